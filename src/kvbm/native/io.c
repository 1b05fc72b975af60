/* Runs a batch of file reads or writes in one call, without the GIL: over an io_uring of its own, or with preadv and
 * pwritev.
 *
 * An operation is a range of the file and the pieces of memory that belong to it, as the iovecs the kernel reads. The
 * rule above all others: no call returns while the kernel may still touch the caller's memory. Addresses are trusted:
 * the caller (kvbm.transfer.file) has checked slots against regions; the kernel answers EFAULT for what is unmapped. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "int64s.h"

#include <errno.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>) && defined(__NR_io_uring_setup)
#include <linux/io_uring.h>
#define HAVE_RING 1
#endif
#endif

_Static_assert(sizeof(struct iovec) == 2 * sizeof(int64_t), "a segment is an iovec: two int64");

enum { OFFSETS, FIRST, SEGMENTS, RESULTS, CONTROL, BUFFERS };
static const char *const NAMES[BUFFERS] = {"offsets", "first", "segments", "results", "control"};
enum { MAX_SEGMENTS = 1024, MAX_DEPTH = 4096 }; /* of an operation: the kernel's UIO_MAXIOV; of a ring */

typedef struct {
    const int64_t *offsets, *first;
    struct iovec *segments;
    int64_t *results, *control, ops;
    int fd, write;
} Batch;

/* An operation that has been taken: what is left of it. */
typedef struct {
    int64_t op, moved, length;
    struct iovec *iov;
    int count;
} Flight;

static void nap(void) {
    struct timespec time = {0, 100000};
    nanosleep(&time, NULL);
}

static int stopped(const Batch *b) { return __atomic_load_n(&b->control[1], __ATOMIC_SEQ_CST) != 0; }

static void end(const Batch *b, const Flight *f, int64_t result) {
    __atomic_store_n(&b->results[f->op], result, __ATOMIC_RELEASE);
}

/* Takes the next operation, if there is one and nobody has asked to stop. */
static int take(const Batch *b, Flight *f) {
    if (stopped(b)) {
        return 0;
    }
    int64_t op = __atomic_fetch_add(&b->control[0], 1, __ATOMIC_SEQ_CST);
    if (op >= b->ops) {
        return 0;
    }
    *f = (Flight){op, 0, 0, b->segments + b->first[op], (int)(b->first[op + 1] - b->first[op])};
    for (int i = 0; i < f->count; i++) {
        f->length += (int64_t)f->iov[i].iov_len;
    }
    return 1;
}

/* Accounts for what one read or write moved (or -errno). Whether the operation is over; otherwise it goes on with what
 * is left, also after a stop: an operation that was taken is ended, because nobody would take it again. */
static int settle(const Batch *b, Flight *f, int64_t got) {
    if (got == -EINTR) {
        return 0;
    }
    if (got == -EAGAIN && !stopped(b)) {
        nap();
        return 0;
    }
    if (got > 0) {
        f->moved += got;
        if (f->moved < f->length) {
            for (; f->count > 0 && (size_t)got >= f->iov->iov_len; f->iov++, f->count--) {
                got -= (int64_t)f->iov->iov_len;
            }
            f->iov->iov_base = (char *)f->iov->iov_base + got;
            f->iov->iov_len -= (size_t)got;
            return 0;
        }
        end(b, f, f->moved);
    } else if (b->write) {
        end(b, f, got ? got : f->length ? -EIO : 0);
    } else {
        /* The end of the file; a direct read that goes on from an unaligned one gets EINVAL instead. */
        end(b, f, got == 0 || (got == -EINVAL && f->moved > 0) ? f->moved : got);
    }
    return 1;
}

/* The engine without io_uring: one operation at a time on this thread. Returns the operations ended. */
static int64_t run_here(const Batch *b) {
    int64_t ended = 0, got;
    for (Flight f; take(b, &f); ended++) {
        do {
            off_t at = (off_t)(b->offsets[f.op] + f.moved);
            got = b->write ? pwritev(b->fd, f.iov, f.count, at) : preadv(b->fd, f.iov, f.count, at);
        } while (!settle(b, &f, got < 0 ? -errno : got));
    }
    return ended;
}

typedef struct {
    PyObject_HEAD
    int fd, busy, disabled;
    unsigned depth;
    pid_t pid;
    char *rings;
    void *sqes;
    size_t rings_size, sqes_size;
    unsigned *sq_head, *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    void *cqes;
    Flight *flights;
    unsigned *idle; /* a stack of the flights that are not in use */
} Ring;

#ifdef HAVE_RING

#ifdef IORING_SETUP_DEFER_TASKRUN
/* One thread uses the ring, the first to run something on it, and it is woken for what it waits for, not for each
 * completion. Linux 6.1 can do that. */
enum { ONE_THREAD = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_R_DISABLED };
#else
enum { ONE_THREAD = 0 };
#endif

static int ring_open(Ring *r) {
    struct io_uring_params p = {.flags = IORING_SETUP_CLAMP | ONE_THREAD};
    r->fd = (int)syscall(__NR_io_uring_setup, r->depth, &p);
    r->disabled = ONE_THREAD != 0;
    if (r->fd < 0 && errno == EINVAL) {
        p = (struct io_uring_params){.flags = IORING_SETUP_CLAMP};
        r->fd = (int)syscall(__NR_io_uring_setup, r->depth, &p);
        r->disabled = 0;
    }
    if (r->fd < 0) {
        return -1;
    }
    if (!(p.features & IORING_FEAT_SINGLE_MMAP) || !(p.features & IORING_FEAT_RW_CUR_POS) || p.sq_entries < r->depth || p.cq_entries < r->depth) {
        errno = ENOSYS; /* older than Linux 5.6 */
        return -1;
    }
    size_t sq = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    r->rings_size = sq > cq ? sq : cq;
    r->sqes_size = p.sq_entries * sizeof(struct io_uring_sqe);
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    r->rings = mmap(NULL, r->rings_size, protection, flags, r->fd, IORING_OFF_SQ_RING);
    r->sqes = mmap(NULL, r->sqes_size, protection, flags, r->fd, IORING_OFF_SQES);
    if (r->rings == MAP_FAILED || r->sqes == MAP_FAILED) {
        return -1;
    }
    r->sq_head = (unsigned *)(r->rings + p.sq_off.head);
    r->sq_tail = (unsigned *)(r->rings + p.sq_off.tail);
    r->sq_mask = (unsigned *)(r->rings + p.sq_off.ring_mask);
    r->sq_array = (unsigned *)(r->rings + p.sq_off.array);
    r->cq_head = (unsigned *)(r->rings + p.cq_off.head);
    r->cq_tail = (unsigned *)(r->rings + p.cq_off.tail);
    r->cq_mask = (unsigned *)(r->rings + p.cq_off.ring_mask);
    r->cqes = r->rings + p.cq_off.cqes;
    return 0;
}

/* Puts what is left of a flight on the submission queue. There is room: it has at least `depth` entries. */
static void queue(const Ring *r, const Batch *b, unsigned which) {
    const Flight *f = &r->flights[which];
    unsigned tail = *r->sq_tail, at = tail & *r->sq_mask;
    struct io_uring_sqe *sqe = (struct io_uring_sqe *)r->sqes + at;
    memset(sqe, 0, sizeof *sqe);
    sqe->fd = b->fd;
    sqe->off = (uint64_t)(b->offsets[f->op] + f->moved);
    if (f->count == 1 && f->iov->iov_len <= INT_MAX) { /* cheaper for the kernel */
        sqe->opcode = b->write ? IORING_OP_WRITE : IORING_OP_READ;
        sqe->addr = (uint64_t)(uintptr_t)f->iov->iov_base;
        sqe->len = (unsigned)f->iov->iov_len;
    } else {
        sqe->opcode = b->write ? IORING_OP_WRITEV : IORING_OP_READV;
        sqe->addr = (uint64_t)(uintptr_t)f->iov;
        sqe->len = (unsigned)f->count;
    }
    sqe->user_data = which;
    r->sq_array[at] = at;
    __atomic_store_n(r->sq_tail, tail + 1, __ATOMIC_RELEASE);
}

/* Takes back what the kernel has not consumed and ends it with `error`. Returns how many flights that were. */
static unsigned withdraw(const Ring *r, const Batch *b, int error, unsigned idle) {
    unsigned head = __atomic_load_n(r->sq_head, __ATOMIC_ACQUIRE), count = *r->sq_tail - head;
    for (unsigned i = 0; i < count; i++) {
        unsigned which = (unsigned)((struct io_uring_sqe *)r->sqes)[(head + i) & *r->sq_mask].user_data;
        end(b, &r->flights[which], -error);
        r->idle[idle++] = which;
    }
    __atomic_store_n(r->sq_tail, head, __ATOMIC_RELEASE);
    return count;
}

/* Keeps up to `depth` operations in flight until none is left to take and all have ended. Returns how many it ended;
 * into `error` an errno if the ring itself broke: then nothing more is taken, but what flies is still waited for, for
 * ever if need be: memory that may still be written is worse than a thread that hangs. */
static int64_t run_ring(Ring *r, const Batch *b, int *error) {
    int64_t ended = 0;
    unsigned idle = r->depth;
    if (r->disabled) {
        if (syscall(__NR_io_uring_register, r->fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0) {
            *error = errno;
            return 0;
        }
        r->disabled = 0;
    }
    for (;;) {
        while (!*error && idle > 0 && take(b, &r->flights[r->idle[idle - 1]])) {
            queue(r, b, r->idle[--idle]);
        }
        if (idle == r->depth) {
            return ended;
        }
        /* Sleeping until a quarter has ended saves most of the waking up, and leaves three quarters in flight. */
        unsigned waiting = *r->sq_tail - __atomic_load_n(r->sq_head, __ATOMIC_ACQUIRE);
        unsigned wanted = (r->depth - idle + 3) / 4;
        if (syscall(__NR_io_uring_enter, r->fd, waiting, wanted, IORING_ENTER_GETEVENTS, NULL, 0) < 0) {
            if (*error || errno == EAGAIN || errno == EBUSY) {
                nap(); /* the kernel is short of memory for requests, or the ring is broken and all we can do is ask */
            } else if (errno != EINTR) {
                *error = errno;
                unsigned back = withdraw(r, b, *error, idle);
                idle += back;
                ended += back;
            }
        }
        unsigned head = *r->cq_head, tail = __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; head++) {
            const struct io_uring_cqe *cqe = (struct io_uring_cqe *)r->cqes + (head & *r->cq_mask);
            unsigned which = (unsigned)cqe->user_data;
            int over = settle(b, &r->flights[which], cqe->res);
            if (!over && *error) {
                end(b, &r->flights[which], -*error);
                over = 1;
            }
            if (over) {
                r->idle[idle++] = which;
                ended++;
            } else {
                queue(r, b, which);
            }
        }
        __atomic_store_n(r->cq_head, head, __ATOMIC_RELEASE);
    }
}

#else

static int ring_open(Ring *Py_UNUSED(r)) {
    errno = ENOSYS;
    return -1;
}

static int64_t run_ring(Ring *Py_UNUSED(r), const Batch *Py_UNUSED(b), int *error) {
    *error = ENOSYS;
    return 0;
}

#endif

/* Whether the buffers fit together; then into `b`. Otherwise -1 with ValueError set. */
static int check(const Py_buffer *v, Batch *b) {
    Py_ssize_t ops = v[OFFSETS].shape[0], segments = v[SEGMENTS].shape[0];
    if (v[FIRST].shape[0] != ops + 1 || v[RESULTS].shape[0] != ops || segments % 2) {
        PyErr_Format(PyExc_ValueError, "%zd offsets need %zd entries of first and %zd results, and segments are pairs",
                     ops, ops + 1, ops);
        return -1;
    }
    b->offsets = v[OFFSETS].buf;
    b->first = v[FIRST].buf;
    b->segments = v[SEGMENTS].buf;
    b->results = v[RESULTS].buf;
    b->control = v[CONTROL].buf;
    b->ops = ops;
    if (v[CONTROL].shape[0] != 2 || b->control[0] < 0) {
        PyErr_SetString(PyExc_ValueError, "control must be [next operation >= 0, stop]");
        return -1;
    }
    for (Py_ssize_t op = 0; op < ops; op++) {
        int64_t begin = b->first[op], count = b->first[op + 1] - begin, total = b->offsets[op];
        if (total < 0 || begin < 0 || begin > segments / 2 || count < 0 || count > segments / 2 - begin ||
            count > MAX_SEGMENTS) {
            PyErr_Format(PyExc_ValueError, "operation %zd: a negative offset, or not 0 to %d segments of those given",
                         op, MAX_SEGMENTS);
            return -1;
        }
        for (int64_t i = begin; i < begin + count; i++) {
            int64_t length = (int64_t)b->segments[i].iov_len;
            if (length < 0 || __builtin_add_overflow(total, length, &total)) {
                PyErr_Format(PyExc_ValueError, "operation %zd: a negative length, or an end beyond 63 bits", op);
                return -1;
            }
        }
    }
    return 0;
}

/* The call common to both engines; `r` is NULL for preadv and pwritev. */
static PyObject *run(Ring *r, PyObject *const *args, Py_ssize_t count) {
    if (count != 2 + BUFFERS) {
        return PyErr_Format(PyExc_TypeError, "%d arguments are needed, got %zd", 2 + BUFFERS, count);
    }
    long fd = PyLong_AsLong(args[0]);
    int write = PyObject_IsTrue(args[1]), held = 0, error = 0;
    if ((fd == -1 && PyErr_Occurred()) || write < 0) {
        return NULL;
    }
    if (fd < INT_MIN || fd > INT_MAX) {
        return PyErr_Format(PyExc_ValueError, "%ld is no file descriptor", fd);
    }
    Batch b = {.fd = (int)fd, .write = write};
    int64_t ended = -1;
    Py_buffer views[BUFFERS];
    while (held < BUFFERS && get_int64(args[2 + held], NAMES[held], held >= SEGMENTS, &views[held]) == 0) {
        held++;
    }
    if (held == BUFFERS && check(views, &b) == 0) {
        Py_BEGIN_ALLOW_THREADS;
        ended = r ? run_ring(r, &b, &error) : run_here(&b);
        Py_END_ALLOW_THREADS;
    }
    while (held > 0) {
        PyBuffer_Release(&views[--held]);
    }
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return ended < 0 ? NULL : PyLong_FromLongLong(ended);
}

static PyObject *run_io(PyObject *Py_UNUSED(self), PyObject *const *args, Py_ssize_t count) {
    return run(NULL, args, count);
}

static PyObject *ring_run(Ring *r, PyObject *const *args, Py_ssize_t count) {
    if (r->pid != getpid()) {
        PyErr_SetString(PyExc_RuntimeError, "this ring belongs to the process that made it");
        return NULL;
    }
    if (__atomic_exchange_n(&r->busy, 1, __ATOMIC_ACQUIRE)) {
        PyErr_SetString(PyExc_RuntimeError, "this ring is in use by another thread");
        return NULL;
    }
    PyObject *ended = run(r, args, count);
    __atomic_store_n(&r->busy, 0, __ATOMIC_RELEASE);
    return ended;
}

static void ring_dealloc(Ring *r) {
    if (r->rings && r->rings != MAP_FAILED) {
        munmap(r->rings, r->rings_size);
    }
    if (r->sqes && r->sqes != MAP_FAILED) {
        munmap(r->sqes, r->sqes_size);
    }
    if (r->fd >= 0) {
        close(r->fd);
    }
    PyMem_Free(r->flights);
    PyMem_Free(r->idle);
    PyTypeObject *type = Py_TYPE(r);
    type->tp_free(r);
    Py_DECREF(type);
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"depth", NULL};
    int depth;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i:Ring", names, &depth)) {
        return NULL;
    }
    if (depth < 1 || depth > MAX_DEPTH) {
        return PyErr_Format(PyExc_ValueError, "a ring has a depth of 1 to %d, not %d", MAX_DEPTH, depth);
    }
    Ring *r = (Ring *)type->tp_alloc(type, 0);
    if (!r) {
        return NULL;
    }
    r->fd = -1;
    r->depth = (unsigned)depth;
    r->pid = getpid();
    r->flights = PyMem_Calloc(r->depth, sizeof *r->flights);
    r->idle = PyMem_Calloc(r->depth, sizeof *r->idle);
    if (!r->flights || !r->idle) {
        Py_DECREF(r);
        return PyErr_NoMemory();
    }
    for (unsigned i = 0; i < r->depth; i++) {
        r->idle[i] = i;
    }
    if (ring_open(r) < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(r);
        return NULL;
    }
    return (PyObject *)r;
}

static PyMethodDef RING_METHODS[] = {
    {"run", (PyCFunction)(void (*)(void))ring_run, METH_FASTCALL, PyDoc_STR("See _io.pyi.")},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot RING_SLOTS[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, RING_METHODS},
    {Py_tp_doc, PyDoc_STR("See _io.pyi.")},
    {0, NULL},
};

static PyType_Spec RING = {"kvbm.native._io.Ring", sizeof(Ring), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
                           RING_SLOTS};

static int add_types(PyObject *module) {
    PyObject *type = PyType_FromSpec(&RING);
    int failed = !type || PyModule_AddObjectRef(module, "Ring", type) < 0;
    Py_XDECREF(type);
    return failed ? -1 : 0;
}

static PyMethodDef METHODS[] = {
    {"run_io", (PyCFunction)(void (*)(void))run_io, METH_FASTCALL, PyDoc_STR("See _io.pyi.")},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, add_types}, {0, NULL}};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "kvbm.native._io", NULL, 0, METHODS, SLOTS, NULL, NULL,
                                    NULL};

PyMODINIT_FUNC PyInit__io(void) { return PyModuleDef_Init(&MODULE); }
