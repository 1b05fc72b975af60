/* Copies many rows in one call, without the GIL, and makes checksums of what it copies; makes the memory there that it
 * copies to.
 *
 * A Python loop over rows costs microseconds a row, and each of its steps waits for the GIL beside a busy thread; this
 * is one call per batch. Addresses are trusted: the caller (kvbm.transfer.plan) has checked slots against regions. */

#include "int64s.h"
#include "xxh3.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_STREAMING 1
#include <immintrin.h>
#else
#define HAVE_STREAMING 0
#endif

enum { SRC_ADDRESS, SRC_STRIDE, DST_ADDRESS, DST_STRIDE, ROW_BYTES, SRC_SLOTS, DST_SLOTS, CONTROL, SUMS, BUFFERS };
static const char *const NAMES[BUFFERS] = {"src_address", "src_stride", "dst_address", "dst_stride", "row_bytes",
                                           "src_slots",   "dst_slots",  "control",     "sums"};

/* Bytes of a row. From STREAM_FROM on streaming beats memcpy; up to PREFETCH_TO fetching the next row ahead helps. What
 * gets a checksum is read for it while it is in the first cache: PIECE bytes at a time. */
enum { STREAM_FROM = 512, PREFETCH_TO = 4096, PIECE = 16 << 10 };

enum { PAGE = 4096 };

/* The ways to copy a long row; which one is faster depends on the processor. Each has SAMPLES turns on copies of at least
 * SAMPLE_BYTES, then the one with the better median stays. */
enum { LINEAR, ABREAST, WAYS, SAMPLES = 9, SAMPLE_BYTES = 1 << 20 };
static struct {
    int way; /* -1: not known yet */
    int begun[WAYS], ended;
    double ns_per_byte[WAYS][SAMPLES];
} measured = {.way = -1};

#if HAVE_STREAMING
__attribute__((target("avx2"), always_inline)) static inline void stream_line(char *dst, const char *src) {
    __m256i a = _mm256_loadu_si256((const __m256i *)src);
    __m256i b = _mm256_loadu_si256((const __m256i *)(src + 32));
    _mm256_stream_si256((__m256i *)dst, a);
    _mm256_stream_si256((__m256i *)(dst + 32), b);
}

/* Copies up to four `pages` at once while so many are left of a row, as glibc's memcpy does: the hardware prefetcher
 * follows each of them. One page after the other, a core of a recent Xeon waits for the first lines of every page, and
 * reaches three quarters of what it does so. All lines are read before one is written: otherwise a core of an EPYC (Zen 3)
 * falls to a quarter. Returns how far it came. */
__attribute__((target("avx2"), always_inline)) static inline size_t stream_abreast(char *dst, const char *src, size_t i,
                                                                                 size_t n, size_t pages) {
    for (; i + pages * PAGE <= n; i += pages * PAGE) {
        for (size_t line = i; line < i + PAGE; line += 64) {
            __m256i held[2 * 4];
            for (size_t page = 0; page < pages; page++) {
                held[2 * page] = _mm256_loadu_si256((const __m256i *)(src + line + page * PAGE));
                held[2 * page + 1] = _mm256_loadu_si256((const __m256i *)(src + line + page * PAGE + 32));
            }
            for (size_t page = 0; page < pages; page++) {
                _mm256_stream_si256((__m256i *)(dst + line + page * PAGE), held[2 * page]);
                _mm256_stream_si256((__m256i *)(dst + line + page * PAGE + 32), held[2 * page + 1]);
            }
        }
    }
    return i;
}

/* Stores go round the cache: a block is not read again soon by this core, and not fetching the destination first saves
 * a third of the memory traffic. (It also avoids memcpy's `rep movsb`, which is five times slower on some AMD cores
 * for some alignments.) `ahead`, if given, is the row that comes next: its lines are requested while this one's are
 * written, because the hardware prefetcher starts anew at each short row. */
__attribute__((target("avx2"))) static void stream_row(char *dst, const char *src, size_t n, const char *ahead, int way) {
    size_t head = (size_t)(-(uintptr_t)dst) & 63;
    if (head > n) {
        head = n;
    }
    memcpy(dst, src, head);
    size_t i = head;
    if (way == ABREAST) {
        i = stream_abreast(dst, src, i, n, 4);
        i = stream_abreast(dst, src, i, n, 2);
    }
    for (; i + 64 <= n; i += 64) {
        if (ahead) {
            _mm_prefetch(ahead + i, _MM_HINT_T0);
        }
        stream_line(dst + i, src + i);
    }
    memcpy(dst + i, src + i, n - i);
}
#endif

static void copy_row(char *dst, const char *src, size_t n, const char *ahead, int way) {
#if HAVE_STREAMING
    if (n >= STREAM_FROM && __builtin_cpu_supports("avx2")) {
        stream_row(dst, src, n, n <= PREFETCH_TO ? ahead : NULL, way);
        return;
    }
#endif
    (void)ahead;
    (void)way;
    memcpy(dst, src, n);
}

static void copy_blocks_so(const Py_buffer *b, Py_ssize_t begin, Py_ssize_t end, uint64_t *sums, int way) {
    const int64_t *src_address = b[SRC_ADDRESS].buf, *src_stride = b[SRC_STRIDE].buf;
    const int64_t *dst_address = b[DST_ADDRESS].buf, *dst_stride = b[DST_STRIDE].buf;
    const int64_t *row_bytes = b[ROW_BYTES].buf, *src_slots = b[SRC_SLOTS].buf, *dst_slots = b[DST_SLOTS].buf;
    Py_ssize_t planes = b[ROW_BYTES].shape[0];
    for (Py_ssize_t i = begin; i < end; i++) {
        struct xxh3 sum;
        xxh3_begin(&sum);
        for (Py_ssize_t p = 0; p < planes; p++) {
            const char *src = (const char *)(intptr_t)(src_address[p] + src_slots[i] * src_stride[p]);
            char *dst = (char *)(intptr_t)(dst_address[p] + dst_slots[i] * dst_stride[p]);
            Py_ssize_t q = p + 1 < planes ? p + 1 : 0, j = q || i + 1 == end ? i : i + 1;
            const char *next = (const char *)(intptr_t)(src_address[q] + src_slots[j] * src_stride[q]);
            size_t n = (size_t)row_bytes[p], step = sums ? PIECE : n;
            for (size_t at = 0; at < n; at += step) {
                size_t some = n - at < step ? n - at : step;
                copy_row(dst + at, src + at, some, next, way);
                if (sums) {
                    xxh3_add(&sum, src + at, some);
                }
            }
        }
        if (sums) {
            sums[i] = xxh3_end(&sum);
        }
    }
#if HAVE_STREAMING
    _mm_sfence(); /* streaming stores are weakly ordered; whoever is told of this copy must see its bytes */
#endif
}

static int by_size(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

/* Whose turn it is, and its number, where a copy of this size can be a sample; otherwise -1. */
static int turn(const int64_t *row_bytes, double bytes, int *way) {
    int begun[WAYS];
    for (int each = 0; each < WAYS; each++) {
        begun[each] = __atomic_load_n(&measured.begun[each], __ATOMIC_RELAXED);
    }
    *way = begun[ABREAST] < begun[LINEAR] ? ABREAST : LINEAR;
    if (bytes < SAMPLE_BYTES || row_bytes[0] < 2 * PAGE || begun[*way] >= SAMPLES) {
        return -1;
    }
    int number = __atomic_fetch_add(&measured.begun[*way], 1, __ATOMIC_RELAXED);
    return number < SAMPLES ? number : -1;
}

static void copy_blocks(const Py_buffer *b, Py_ssize_t begin, Py_ssize_t end, uint64_t *sums, int64_t slot_bytes) {
    int way = __atomic_load_n(&measured.way, __ATOMIC_ACQUIRE), number = -1;
    double bytes = (double)(end - begin) * (double)slot_bytes;
    struct timespec from, to;
    if (way < 0 && b[ROW_BYTES].shape[0]) {
        number = turn(b[ROW_BYTES].buf, bytes, &way);
    }
    clock_gettime(CLOCK_MONOTONIC, &from);
    copy_blocks_so(b, begin, end, sums, way);
    if (number < 0) {
        return;
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    measured.ns_per_byte[way][number] = ((double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec)) / bytes;
    if (__atomic_add_fetch(&measured.ended, 1, __ATOMIC_ACQ_REL) == WAYS * SAMPLES) {
        for (int each = 0; each < WAYS; each++) {
            qsort(measured.ns_per_byte[each], SAMPLES, sizeof(double), by_size);
        }
        int better = measured.ns_per_byte[ABREAST][SAMPLES / 2] < measured.ns_per_byte[LINEAR][SAMPLES / 2];
        __atomic_store_n(&measured.way, better ? ABREAST : LINEAR, __ATOMIC_RELEASE);
    }
}

/* Takes chunks off `control` until none is left or somebody asks to stop; returns the blocks copied by this call. */
static int64_t copy_shared(const Py_buffer *b, int64_t *control, int64_t chunk, uint64_t *sums, int64_t slot_bytes) {
    int64_t blocks = b[SRC_SLOTS].shape[0], copied = 0;
    while (!__atomic_load_n(&control[1], __ATOMIC_SEQ_CST)) {
        int64_t begin = __atomic_fetch_add(&control[0], chunk, __ATOMIC_SEQ_CST);
        if (begin >= blocks) {
            break;
        }
        int64_t end = blocks - begin < chunk ? blocks : begin + chunk;
        copy_blocks(b, begin, end, sums, slot_bytes);
        copied += end - begin;
    }
    return copied;
}

/* Whether the buffers fit together; bytes of one slot into `slot_bytes`. Otherwise -1 with ValueError set. */
static int check(const Py_buffer *b, int wanted, int64_t chunk, int64_t *slot_bytes) {
    for (int k = SRC_ADDRESS; k < ROW_BYTES; k++) {
        if (b[k].shape[0] != b[ROW_BYTES].shape[0]) {
            PyErr_Format(PyExc_ValueError, "%s has %zd entries, row_bytes has %zd", NAMES[k], b[k].shape[0],
                         b[ROW_BYTES].shape[0]);
            return -1;
        }
    }
    if (b[SRC_SLOTS].shape[0] != b[DST_SLOTS].shape[0]) {
        PyErr_Format(PyExc_ValueError, "src_slots has %zd entries, dst_slots has %zd", b[SRC_SLOTS].shape[0],
                     b[DST_SLOTS].shape[0]);
        return -1;
    }
    const int64_t *row_bytes = b[ROW_BYTES].buf;
    *slot_bytes = 0;
    for (Py_ssize_t p = 0; p < b[ROW_BYTES].shape[0]; p++) {
        if (row_bytes[p] < 0) {
            PyErr_Format(PyExc_ValueError, "row_bytes[%zd] is negative", p);
            return -1;
        }
        *slot_bytes += row_bytes[p];
    }
    if (wanted > CONTROL && (b[CONTROL].shape[0] != 2 || ((int64_t *)b[CONTROL].buf)[0] < 0 || chunk < 1)) {
        PyErr_SetString(PyExc_ValueError, "control must be [next block >= 0, stop] and chunk at least 1");
        return -1;
    }
    if (wanted > SUMS && (b[SUMS].shape[0] != b[SRC_SLOTS].shape[0] || *slot_bytes < XXH3_FROM)) {
        PyErr_Format(PyExc_ValueError, "sums must be one per block, of blocks of at least %d bytes", XXH3_FROM);
        return -1;
    }
    return 0;
}

static PyObject *copy_rows(PyObject *Py_UNUSED(self), PyObject *const *args, Py_ssize_t count) {
    if (count != CONTROL && count != CONTROL + 2 && count != CONTROL + 3) {
        return PyErr_Format(PyExc_TypeError, "copy_rows takes 7, 9 or 10 arguments, got %zd", count);
    }
    /* What comes after the chunk, which is a number, are buffers again. */
    int wanted = count == CONTROL ? CONTROL : (int)count - 1, held = 0;
    int64_t chunk = wanted > CONTROL ? PyLong_AsLongLong(args[CONTROL + 1]) : 0, copied = -1, slot_bytes;
    if (chunk == -1 && PyErr_Occurred()) {
        return NULL;
    }
    Py_buffer views[BUFFERS];
    while (held < wanted && get_int64(args[held + (held > CONTROL)], NAMES[held], held >= CONTROL, &views[held]) == 0) {
        held++;
    }
    if (held == wanted && check(views, wanted, chunk, &slot_bytes) == 0) {
        Py_BEGIN_ALLOW_THREADS;
        if (wanted > CONTROL) {
            copied = copy_shared(views, views[CONTROL].buf, chunk, wanted > SUMS ? views[SUMS].buf : NULL, slot_bytes);
        } else {
            copied = views[SRC_SLOTS].shape[0];
            copy_blocks(views, 0, copied, NULL, slot_bytes);
        }
        Py_END_ALLOW_THREADS;
    }
    while (held > 0) {
        PyBuffer_Release(&views[--held]);
    }
    return copied < 0 ? NULL : PyLong_FromLongLong(copied * slot_bytes);
}

static PyObject *prefer(PyObject *Py_UNUSED(self), PyObject *args) {
    int way = WAYS;
    if (!PyArg_ParseTuple(args, "|i:prefer", &way)) {
        return NULL;
    }
    if (way < -1 || way > WAYS) {
        return PyErr_Format(PyExc_ValueError, "there is no way %d: 0 to %d, or -1 to measure", way, WAYS - 1);
    }
    if (way != WAYS) {
        memset(measured.begun, 0, sizeof measured.begun);
        measured.ended = 0;
        __atomic_store_n(&measured.way, way, __ATOMIC_RELEASE);
    }
    return PyLong_FromLong(__atomic_load_n(&measured.way, __ATOMIC_ACQUIRE));
}

static PyObject *checksums(PyObject *Py_UNUSED(self), PyObject *args) {
    unsigned long long address;
    long long stride;
    Py_ssize_t nbytes;
    PyObject *objects[2];
    Py_buffer slots, sums;
    if (!PyArg_ParseTuple(args, "KLnOO:checksums", &address, &stride, &nbytes, &objects[0], &objects[1]) ||
        get_int64(objects[0], "slots", 0, &slots) < 0) {
        return NULL;
    }
    if (get_int64(objects[1], "sums", 1, &sums) < 0) {
        PyBuffer_Release(&slots);
        return NULL;
    }
    int good = nbytes >= XXH3_FROM && sums.shape[0] == slots.shape[0];
    if (good) {
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t i = 0; i < slots.shape[0]; i++) {
            struct xxh3 sum;
            xxh3_begin(&sum);
            xxh3_add(&sum, (const char *)(uintptr_t)address + ((int64_t *)slots.buf)[i] * stride, (size_t)nbytes);
            ((uint64_t *)sums.buf)[i] = xxh3_end(&sum);
        }
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_Format(PyExc_ValueError, "sums must be one per slot, of slots of at least %d bytes", XXH3_FROM);
    }
    PyBuffer_Release(&slots);
    PyBuffer_Release(&sums);
    return good ? Py_NewRef(Py_None) : NULL;
}

/* -- making memory there -- */

/* A part at a time: the kernel drains lists of every processor for each MADV_COLLAPSE. */
enum { HUGE_PAGE = 2 << 20, PART = 8 * HUGE_PAGE, LOOK_NS = 1000000 };
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1: make huge pages now, whatever transparent_hugepage says about shared memory */
#endif

static int reserve(int fd, off_t at, off_t length) {
    int error;
    do {
        error = posix_fallocate(fd, at, length);
    } while (error == EINTR);
    return error;
}

/* Scratch of PART bytes, in huge pages where it can be; NULL if there is none. */
static char *scratch(void **mapping) {
    *mapping = mmap(NULL, PART + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*mapping == MAP_FAILED) {
        return NULL;
    }
    char *aligned = (char *)(((uintptr_t)*mapping + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    madvise(aligned, PART, MADV_HUGEPAGE);
    return aligned;
}

/* MADV_COLLAPSE clears a huge page in one go, and a kernel that preempts nothing lets no thread in before it ends. That
 * is 0.2 ms, but 7 ms in a virtual machine whose host has yet to find that memory. A huge page of one's own is cleared
 * with a look at who waits after every 4 KiB; given back, it is the next that the kernel hands out, and the host has
 * found it. */
static void find(char *huge_pages, off_t length) {
    for (off_t i = 0; i < length; i += HUGE_PAGE) {
        ((volatile char *)huge_pages)[i] = 1;
    }
    madvise(huge_pages, (size_t)length, MADV_DONTNEED);
}

/* Reserved first: a page that is refused there is an error, one that is refused to a write is SIGBUS. */
static int fill_part(int fd, char *memory, off_t at, off_t length) {
    int error;
    off_t first = (at + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, end = (at + length) / HUGE_PAGE * HUGE_PAGE;
    for (off_t huge = first; huge < end; huge += HUGE_PAGE) {
        if ((error = reserve(fd, huge, PAGE))) { /* it collapses what has at least a page */
            return error;
        }
    }
    if (first < end) { /* what is refused stays in small pages; EAGAIN says that somebody had one of them just then */
        for (int tries = 3; tries && madvise(memory + first, (size_t)(end - first), MADV_COLLAPSE) && errno == EAGAIN;) {
            tries--;
        }
    }
    if ((error = reserve(fd, at, length))) {
        return error;
    }
    volatile char *page = memory + at;
    for (off_t i = 0; i < length; i += PAGE) {
        page[i] = page[i];
    }
    page[length - 1] = page[length - 1]; /* an unaligned range ends in a page the stride can miss */
    return 0;
}

static PyObject *fill(PyObject *Py_UNUSED(self), PyObject *args) {
    int fd, wait, error = 0;
    unsigned long long address;
    Py_buffer shared;
    if (!PyArg_ParseTuple(args, "iKw*p:fill", &fd, &address, &shared, &wait)) {
        return NULL;
    }
    if (shared.len != 3 * (Py_ssize_t)sizeof(int64_t) || (uintptr_t)shared.buf % sizeof(int64_t)) {
        PyBuffer_Release(&shared);
        return PyErr_Format(PyExc_ValueError, "granted, done and over are three int64");
    }
    int64_t *granted = shared.buf, *done = granted + 1, *over = granted + 2;
    Py_BEGIN_ALLOW_THREADS;
    void *mapping = MAP_FAILED;
    char *found = wait ? scratch(&mapping) : NULL;
    int64_t at = __atomic_load_n(done, __ATOMIC_ACQUIRE);
    while (!error && !__atomic_load_n(over, __ATOMIC_ACQUIRE)) {
        int64_t left = __atomic_load_n(granted, __ATOMIC_ACQUIRE) - at;
        int64_t part = PART - at % PART;
        if (left > 0) {
            part = left < part ? left : part;
            if (found != NULL) {
                find(found, part);
            }
            if (!(error = fill_part(fd, (char *)(uintptr_t)address, at, part))) {
                __atomic_store_n(done, at += part, __ATOMIC_RELEASE);
            }
        } else if (wait) {
            nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
        } else {
            break;
        }
    }
    if (mapping != MAP_FAILED) {
        munmap(mapping, PART + HUGE_PAGE);
    }
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&shared);
    return PyLong_FromLong(error);
}

static PyMethodDef METHODS[] = {
    {"copy_rows", (PyCFunction)(void (*)(void))copy_rows, METH_FASTCALL, PyDoc_STR("See _copy.pyi.")},
    {"prefer", prefer, METH_VARARGS, PyDoc_STR("See _copy.pyi.")},
    {"checksums", checksums, METH_VARARGS, PyDoc_STR("See _copy.pyi.")},
    {"fill", fill, METH_VARARGS, PyDoc_STR("See _copy.pyi.")},
    {NULL, NULL, 0, NULL},
};

static int add_constants(PyObject *module) { return PyModule_AddIntMacro(module, XXH3_FROM); }

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, add_constants}, {0, NULL}};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "kvbm.native._copy", NULL, 0, METHODS, SLOTS, NULL, NULL,
                                    NULL};

PyMODINIT_FUNC PyInit__copy(void) { return PyModuleDef_Init(&MODULE); }
