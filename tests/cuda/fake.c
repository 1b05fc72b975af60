/* A libcuda.so.1 without a GPU, for tests of what copies to and from one.
 *
 * Device memory is host memory that the program cannot touch: cuMemAlloc gives addresses that are mapped without access,
 * and only the copy engines have another mapping of it. Streams are threads and run in order; events tie them together.
 * One copy engine per direction and device serves whoever is ready first, but goes on with the same stream as long as that
 * has more. It takes its time, and copies the entries of a batch in any order, half of them at its beginning and half at
 * its end; entries that may be read in any order are read, now and then, when they are submitted. What real hardware lets
 * pass, or punishes late, is a mistake at once and counted: host memory that is not pinned for this context, a range that
 * runs out of what was pinned by one call, no context, memory freed while it is copied, a batch without the flag that
 * keeps it on a copy engine, a stream that waits for the default one, a call that spoils a graph being captured. An error
 * while copying is sticky: the context is lost.
 *
 * An engine's work is declared: which memory it reads and writes, and how long it takes on its stream. A copy and a piece
 * of work that touch the same memory, one of them writing, must not both be with the device: nothing orders them. That is
 * a mistake, too ("overlap").
 *
 * The functions that begin with fake_ are for tests. FAKE_CUDA="bytes_per_s=1e9,latency_us=20,delay_us=300,devices=2"
 * sets the same from outside; with refuse=50 one of so many copies is refused, with linger_us=100000 one of 64 takes so
 * long. -DFAKE_VERSION=12080 and 12040 leave out what older drivers lack. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#ifndef FAKE_VERSION
#define FAKE_VERSION 13000
#endif

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    ALREADY_PINNED = 712,
    NOT_PINNED = 713,
    CAPTURE_UNSAFE = 900,
    CAPTURED = 907
};
enum { DEVICES = 4, RANGES = 8192, ON_DEVICE = 1, PINNED = 2 };
enum { COPY, RECORD, WAIT, CALL, WORK };
enum { ORDER_STREAM = 1, ORDER_CALL = 2, ORDER_ANY = 3, OVERLAP_FLAG = 1, NO_TIMING = 2, NON_BLOCKING = 1, RELAXED = 2 };

struct context {
    int device, retained, lost;
};
struct range { /* `alias`: where the copy engines find it */
    uint64_t address, size;
    int kind, device, portable, owned;
    char *alias;
};
struct event {
    struct context *context;
    uint64_t recorded, done;
    int64_t when;
    int references, destroyed, timed;
};
struct piece {
    uint64_t dst, src;
    size_t size;
    char *early;
};
struct touch { /* sorted by address; they do not overlap */
    uint64_t address, size;
    int writes;
};
struct op {
    int type;
    struct piece *pieces;
    size_t count;
    struct touch *touches;
    int64_t ns;
    struct event *event;
    uint64_t number;
    void (*call)(void *);
    void *argument;
    int fills, value;           /* work that writes this value to its first touch, when it ends */
    struct op *next;            /* on its stream */
    struct op *before, *behind; /* of those with the device */
};
struct stream {
    struct context *context;
    struct op *head, **tail, *now;
    int busy, closing, capturing;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct context contexts[DEVICES];
static struct range ranges[RANGES];
static int num_ranges, initialized, pending;
static pid_t process;
static struct stream *legacy[DEVICES];
static int engine_busy[DEVICES][2];
static struct stream *engine_keeps[DEVICES][2]; /* whose next copy comes first: a copy engine goes on with its stream */
static struct op *with_device; /* copies and work that were submitted and have not ended */
static __thread struct context *current;
static __thread int capture_mode;
static struct {
    double bytes_per_s;
    int64_t latency_ns, delay_ns, linger_ns;
    int refuse, devices, hold, capturing, spoiled, quiet, moved, managed, integrated;
    char function[48];
    int nth, code, nth_copy, copy_code;
    uint64_t random;
} set = {.devices = 1, .random = 88172645463325252ull};
static struct {
    int64_t batches, rows, bytes, mistakes, most, work;
    char last[256];
} counted;

static uint64_t dice(void) {
    set.random ^= set.random << 13;
    set.random ^= set.random >> 7;
    return set.random ^= set.random << 17;
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void nap(int64_t ns) {
    if (ns > 0) {
        nanosleep(&(struct timespec){ns / 1000000000, ns % 1000000000}, NULL);
    }
}

static int mistake(const char *text, uint64_t address, size_t size, int code) { /* lock held, as in all that follows */
    counted.mistakes++;
    snprintf(counted.last, sizeof counted.last, "%s: %#lx, %zu bytes", text, (unsigned long)address, size);
    if (!set.quiet) {
        fprintf(stderr, "fake CUDA: %s\n", counted.last);
    }
    return code;
}

static void from_environment(void) {
    const char *text = getenv("FAKE_CUDA");
    char *copy = text ? strdup(text) : NULL, *rest = copy;
    for (char *item; copy && (item = strsep(&rest, ","));) {
        char *value = strchr(item, '=');
        if (value) {
            *value++ = 0;
            if (!strcmp(item, "bytes_per_s")) set.bytes_per_s = atof(value);
            if (!strcmp(item, "latency_us")) set.latency_ns = atoll(value) * 1000;
            if (!strcmp(item, "delay_us")) set.delay_ns = atoll(value) * 1000;
            if (!strcmp(item, "devices")) set.devices = atoi(value);
            if (!strcmp(item, "refuse")) set.refuse = atoi(value);
            if (!strcmp(item, "linger_us")) set.linger_ns = atoll(value) * 1000;
            if (!strcmp(item, "seed")) set.random ^= strtoull(value, NULL, 10) * 0x9E3779B97F4A7C15ull;
        }
    }
    free(copy);
}

/* What every call does first. One that is `unsafe` spoils a graph that another thread captures. */
static int check(const char *function, int wants_context, int unsafe) {
    if (!initialized || getpid() != process) {
        return NOT_INITIALIZED;
    }
    if (set.nth > 0 && !strcmp(function, set.function) && --set.nth == 0) {
        return set.code;
    }
    if (unsafe && set.capturing && capture_mode != RELAXED) {
        set.spoiled = 1;
        return mistake(function, 0, 0, CAPTURE_UNSAFE);
    }
    if (wants_context && !current) {
        return mistake("no context is current", 0, 0, INVALID_CONTEXT);
    }
    return current ? current->lost : OK;
}

#define ENTER(wants_context, unsafe)                         \
    pthread_mutex_lock(&lock);                               \
    int entered = check(__func__, wants_context, unsafe);    \
    if (entered) {                                           \
        pthread_mutex_unlock(&lock);                         \
        return entered;                                      \
    }
#define LEAVE(value)                 \
    do {                             \
        int answer = (value);        \
        pthread_mutex_unlock(&lock); \
        return answer;               \
    } while (0)

/* ---------------------------------------------------------------- memory */

static struct range *find(uint64_t address, size_t size) {
    for (int i = 0; i < num_ranges; i++) {
        if (address >= ranges[i].address && address < ranges[i].address + ranges[i].size) {
            return address + size <= ranges[i].address + ranges[i].size ? &ranges[i] : NULL;
        }
    }
    return NULL;
}

static int insert(struct range range) {
    if (num_ranges == RANGES) {
        return OUT_OF_MEMORY;
    }
    ranges[num_ranges++] = range;
    return OK;
}

static char *bytes_at(uint64_t address) {
    struct range *range = find(address, 1);
    return range ? range->alias + (address - range->address) : NULL;
}

static int usable(struct context *context, uint64_t address, size_t size) {
    struct range *range = find(address, size);
    if (!range) {
        return mistake("neither device memory nor pinned by one call", address, size, INVALID_VALUE);
    }
    if (range->device != context->device && (range->kind == ON_DEVICE || !range->portable)) {
        return mistake("memory of another device, or pinned for another one", address, size, INVALID_VALUE);
    }
    return OK;
}

/* ---------------------------------------------------------------- what overlaps */

static int touches(const struct op *work, uint64_t address, size_t size, int writes) {
    size_t low = 0, high = work->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (work->touches[middle].address + work->touches[middle].size <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (; low < work->count && work->touches[low].address < address + size; low++) {
        if (writes || work->touches[low].writes) {
            return 1;
        }
    }
    return 0;
}

static void compare(const struct op *copy, const struct op *work, const char *text) {
    for (size_t i = 0; i < copy->count; i++) {
        const struct piece *piece = &copy->pieces[i];
        if (touches(work, piece->src, piece->size, 0)) {
            mistake(text, piece->src, piece->size, 0);
            return;
        }
        if (touches(work, piece->dst, piece->size, 1)) {
            mistake(text, piece->dst, piece->size, 0);
            return;
        }
    }
}

static void arrive(struct op *op) {
    for (struct op *other = with_device; other; other = other->behind) {
        if (op->type == COPY && other->type == WORK) {
            compare(op, other, "overlap: a copy was submitted before the engine's work on this memory had ended");
        } else if (op->type == WORK && other->type == COPY) {
            compare(other, op, "overlap: the engine works on this memory before a copy of it has ended");
        }
    }
    op->before = NULL;
    op->behind = with_device;
    if (with_device) {
        with_device->before = op;
    }
    with_device = op;
}

static void depart(struct op *op) {
    *(op->before ? &op->before->behind : &with_device) = op->behind;
    if (op->behind) {
        op->behind->before = op->before;
    }
}

/* ---------------------------------------------------------------- streams */

static void drop_event(struct event *event) {
    if (--event->references == 0 && event->destroyed) {
        free(event);
    }
}

static void lose(struct context *context, int code) {
    context->lost = context->lost ? context->lost : code;
    pthread_cond_broadcast(&changed);
}

static void copy_piece(struct context *context, struct piece *piece) {
    struct range *src = find(piece->src, piece->size), *dst = find(piece->dst, piece->size);
    if (!src || !dst) {
        mistake("freed or unpinned while it was to be copied", src ? piece->dst : piece->src, piece->size, 0);
        lose(context, ILLEGAL_ADDRESS);
        return;
    }
    memcpy(bytes_at(piece->dst), piece->early ? piece->early : bytes_at(piece->src), piece->size);
    counted.rows++;
    counted.bytes += (int64_t)piece->size;
}

/* Whether the stream has another copy in this direction that nothing outside of it has to come before. */
static int goes_on(const struct stream *stream, int down) {
    const struct op *recorded[16];
    int count = 0;
    for (const struct op *op = stream->head; op; op = op->next) {
        if (op->type == COPY) {
            struct range *from = find(op->pieces[0].src, 1);
            return (from && from->kind == ON_DEVICE) == down;
        }
        if (op->type == RECORD && count < 16) {
            recorded[count++] = op;
        } else if (op->type == WAIT) {
            int there = op->event->done >= op->number;
            for (int i = 0; i < count; i++) {
                there |= recorded[i]->event == op->event && recorded[i]->number >= op->number;
            }
            if (!there) {
                return 0;
            }
        } else {
            return 0;
        }
    }
    return 0;
}

static void run_copy(struct stream *stream, struct op *op) { /* gives the lock up in between */
    struct context *context = stream->context;
    struct range *from = find(op->pieces[0].src, 1);
    int down = from && from->kind == ON_DEVICE, *busy = &engine_busy[context->device][down], held = down ? 1 : 2;
    size_t bytes = 0, left = op->count;
    struct stream **keeps = &engine_keeps[context->device][down];
    while ((*busy || (set.hold & held) || (*keeps && *keeps != stream)) && !context->lost) {
        pthread_cond_wait(&changed, &lock);
    }
    *busy = 1;
    for (size_t i = 0; i < op->count; i++) {
        bytes += op->pieces[i].size;
    }
    int64_t ns = set.latency_ns + (set.bytes_per_s > 0 ? (int64_t)((double)bytes / set.bytes_per_s * 1e9) : 0);
    ns += set.delay_ns ? (int64_t)(dice() % (uint64_t)set.delay_ns) : 0;
    ns += set.linger_ns && dice() % 64 == 0 ? set.linger_ns : 0;
    for (int half = 0; half < 2; half++) {
        if (ns > 0) {
            pthread_mutex_unlock(&lock);
            nap(ns / 2);
            pthread_mutex_lock(&lock);
        }
        while ((set.hold & held) && !context->lost) {
            pthread_cond_wait(&changed, &lock);
        }
        if (half && set.nth_copy > 0 && --set.nth_copy == 0) {
            lose(context, set.copy_code);
        }
        for (size_t until = half ? 0 : op->count / 2; left > until && !context->lost; left--) {
            size_t k = dice() % left;
            struct piece piece = op->pieces[k];
            op->pieces[k] = op->pieces[left - 1];
            op->pieces[left - 1] = piece;
            copy_piece(context, &piece);
        }
    }
    *busy = 0;
    *keeps = goes_on(stream, down) ? stream : NULL;
}

static void *serve(void *argument) {
    struct stream *stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->head && !stream->closing) {
            pthread_cond_wait(&changed, &lock);
        }
        struct op *op = stream->head;
        if (!op) {
            break;
        }
        int *lost = &stream->context->lost;
        stream->busy = 1;
        if (!(stream->head = op->next)) {
            stream->tail = &stream->head;
        }
        if (op->type == COPY && !*lost) {
            run_copy(stream, op);
        } else if (op->type == RECORD && !*lost && op->event->done < op->number) {
            op->event->done = op->number;
            op->event->when = now_ns();
        } else if (op->type == WAIT) {
            while (op->event->done < op->number && !*lost) {
                pthread_cond_wait(&changed, &lock);
            }
        } else if ((op->type == CALL || op->type == WORK) && !*lost) {
            stream->now = op;
            while (op->ns < 0 && !*lost) {
                pthread_cond_wait(&changed, &lock);
            }
            stream->now = NULL;
            pthread_mutex_unlock(&lock);
            nap(op->ns);
            if (op->call) {
                op->call(op->argument);
            }
            pthread_mutex_lock(&lock);
            if (op->fills && find(op->touches->address, op->touches->size)) {
                memset(bytes_at(op->touches->address), op->value, op->touches->size);
            }
        }
        if (op->type == COPY || op->type == WORK) {
            depart(op);
        }
        if (op->event) {
            drop_event(op->event);
        }
        for (size_t i = 0; op->pieces && i < op->count; i++) {
            free(op->pieces[i].early);
        }
        free(op->pieces);
        free(op->touches);
        free(op);
        pending--;
        stream->busy = 0;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    free(stream);
    return NULL;
}

static struct op *append(struct stream *stream, struct op op) {
    struct op *kept = malloc(sizeof op);
    *kept = op;
    if (op.event) {
        op.event->references++;
    }
    *stream->tail = kept;
    stream->tail = &kept->next;
    pending++;
    if (op.type == COPY || op.type == WORK) {
        arrive(kept);
    }
    pthread_cond_broadcast(&changed);
    return kept;
}

static struct stream *new_stream(struct context *context) {
    pthread_t thread;
    struct stream *stream = calloc(1, sizeof *stream);
    stream->context = context;
    stream->tail = &stream->head;
    pthread_create(&thread, NULL, serve, stream);
    pthread_detach(thread);
    return stream;
}

/* A handle as a program gives it: 0 to 2 are default streams of the current context. */
static struct stream *resolve(struct stream *handle) {
    if ((uintptr_t)handle > 2) {
        return handle;
    }
    if (!legacy[current->device]) {
        legacy[current->device] = new_stream(current);
    }
    return legacy[current->device];
}

static int enqueue(struct stream *stream, const uint64_t *dsts, const uint64_t *srcs, const size_t *sizes, size_t count,
                   int order) {
    for (size_t i = 0; i < count; i++) {
        int bad = !sizes[i] || !dsts[i] || !srcs[i] ? INVALID_VALUE : OK;
        bad = bad ? bad : usable(stream->context, dsts[i], sizes[i]);
        bad = bad ? bad : usable(stream->context, srcs[i], sizes[i]);
        if (bad) {
            return bad;
        }
    }
    if (set.refuse && dice() % (uint64_t)set.refuse == 0) {
        return OUT_OF_MEMORY;
    }
    struct op op = {.type = COPY, .pieces = malloc(count * sizeof *op.pieces), .count = count};
    for (size_t i = 0; i < count; i++) {
        op.pieces[i] = (struct piece){dsts[i], srcs[i], sizes[i], NULL};
        if (order == ORDER_CALL || (order == ORDER_ANY && dice() % 2)) {
            op.pieces[i].early = malloc(sizes[i]);
            memcpy(op.pieces[i].early, bytes_at(srcs[i]), sizes[i]);
        }
    }
    append(stream, op);
    counted.batches++;
    counted.most = (int64_t)count > counted.most ? (int64_t)count : counted.most;
    return OK;
}

/* ---------------------------------------------------------------- the driver's functions */

API int cuInit(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    if (!initialized) {
        from_environment();
        initialized = 1;
        process = getpid();
        for (int i = 0; i < DEVICES; i++) {
            contexts[i].device = i;
        }
    }
    LEAVE(set.devices ? OK : NO_DEVICE);
}

API int cuDriverGetVersion(int *version) {
    *version = FAKE_VERSION;
    return OK;
}

API int cuDeviceGetCount(int *count) {
    ENTER(0, 0)
    *count = set.devices;
    LEAVE(OK);
}

API int cuDeviceGet(int *device, int ordinal) {
    ENTER(0, 0)
    *device = ordinal;
    LEAVE(ordinal >= 0 && ordinal < set.devices ? OK : INVALID_DEVICE);
}

API int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, (size_t)length, "Fake GPU %d", device);
    return OK;
}

API int cuDeviceGetPCIBusId(char *bus, int length, int device) {
    snprintf(bus, (size_t)length, "0000:%02x:00.0", 10 + device);
    return OK;
}

API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 40 ? 3 : attribute == 75 ? 9 : attribute == 16 ? 132 : attribute == 18 ? set.integrated : 0;
    return OK;
}

API int cuDevicePrimaryCtxRetain(struct context **context, int device) {
    ENTER(0, 0)
    contexts[device].retained++;
    *context = &contexts[device];
    LEAVE(OK);
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER(0, 0)
    contexts[device].retained--;
    LEAVE(OK);
}

API int cuCtxSetCurrent(struct context *context) {
    ENTER(0, 0)
    current = context;
    LEAVE(OK);
}

API int cuCtxGetCurrent(struct context **context) {
    *context = current;
    return OK;
}

API int cuThreadExchangeStreamCaptureMode(int *mode) {
    int old = capture_mode;
    capture_mode = *mode;
    *mode = old;
    return OK;
}

API int cuMemAlloc_v2(uint64_t *address, size_t size) {
    ENTER(1, 1)
    int fd = memfd_create("fake device memory", MFD_CLOEXEC);
    void *closed = MAP_FAILED, *alias = MAP_FAILED;
    if (ftruncate(fd, (off_t)size) == 0) {
        closed = mmap(NULL, size, PROT_NONE, MAP_SHARED, fd, 0);
        alias = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    close(fd);
    if (closed == MAP_FAILED || alias == MAP_FAILED) {
        LEAVE(OUT_OF_MEMORY);
    }
    *address = (uint64_t)(uintptr_t)closed;
    LEAVE(insert((struct range){*address, size, ON_DEVICE, current->device, 1, 1, alias}));
}

API int cuMemFree_v2(uint64_t address) {
    ENTER(1, 1)
    struct range *range = find(address, 1);
    if (!range || range->address != address || range->kind != ON_DEVICE) {
        LEAVE(INVALID_VALUE);
    }
    if (range->owned) {
        munmap((void *)(uintptr_t)address, range->size);
        munmap(range->alias, range->size);
    }
    *range = ranges[--num_ranges];
    LEAVE(OK);
}

API int cuMemHostRegister_v2(void *address, size_t size, unsigned flags) {
    ENTER(1, 1)
    uint64_t begin = (uint64_t)(uintptr_t)address;
    unsigned char present;
    if (!size || !address || mincore((void *)(uintptr_t)(begin & ~4095ull), 1, &present) < 0) {
        LEAVE(INVALID_VALUE);
    }
    if (size >= 512ull << 30) {
        LEAVE(OUT_OF_MEMORY);
    }
    for (int i = 0; i < num_ranges; i++) {
        if (begin < ranges[i].address + ranges[i].size && ranges[i].address < begin + size) {
            LEAVE(ALREADY_PINNED);
        }
    }
    LEAVE(insert((struct range){begin, size, PINNED, current->device, flags & 1, 0, address}));
}

API int cuMemHostUnregister(void *address) {
    ENTER(1, 1)
    struct range *range = find((uint64_t)(uintptr_t)address, 1);
    if (!range || range->kind != PINNED || range->alias != address) {
        LEAVE(NOT_PINNED);
    }
    *range = ranges[--num_ranges];
    LEAVE(OK);
}

API int cuMemHostGetDevicePointer_v2(uint64_t *alias, void *address, unsigned flags) {
    ENTER(1, 0)
    (void)flags;
    *alias = (uint64_t)(uintptr_t)address + (set.moved ? 1ull << 40 : 0);
    LEAVE(find((uint64_t)(uintptr_t)address, 1) ? OK : INVALID_VALUE);
}

API int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    ENTER(1, 1)
    *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*address == MAP_FAILED) {
        LEAVE(OUT_OF_MEMORY);
    }
    LEAVE(insert((struct range){(uint64_t)(uintptr_t)*address, size, PINNED, current->device, flags & 1, 0, *address}));
}

API int cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
    ENTER(0, 0)
    struct range *range = find(address, 1);
    if (!range || (attribute != 2 && attribute != 8 && attribute != 9)) {
        LEAVE(INVALID_VALUE);
    }
    if (attribute == 2) {
        *(unsigned *)value = range->kind == ON_DEVICE ? 2 : 1;
    } else {
        *(int *)value = attribute == 8 ? set.managed : range->device;
    }
    LEAVE(OK);
}

API int cuStreamCreate(struct stream **stream, unsigned flags) {
    ENTER(1, 0)
    if (!(flags & NON_BLOCKING)) {
        mistake("a stream that waits for the default one", 0, 0, 0);
    }
    *stream = new_stream(current);
    LEAVE(OK);
}

API int cuStreamDestroy_v2(struct stream *stream) { /* returns at once; what was submitted goes on */
    ENTER(1, 0)
    stream->closing = 1;
    pthread_cond_broadcast(&changed);
    LEAVE(OK);
}

API int cuStreamQuery(struct stream *stream) {
    ENTER(1, 1)
    stream = resolve(stream);
    LEAVE(stream->context->lost ? stream->context->lost : stream->head || stream->busy ? NOT_READY : OK);
}

API int cuStreamSynchronize(struct stream *stream) {
    ENTER(1, 1)
    stream = resolve(stream);
    while ((stream->head || stream->busy) && !stream->context->lost) {
        pthread_cond_wait(&changed, &lock);
    }
    LEAVE(stream->context->lost);
}

API int cuStreamIsCapturing(struct stream *stream, int *capturing) {
    ENTER(1, 0)
    *capturing = resolve(stream)->capturing;
    LEAVE(OK);
}

API int cuStreamWaitEvent(struct stream *stream, struct event *event, unsigned flags) {
    ENTER(1, 0)
    (void)flags;
    append(resolve(stream), (struct op){.type = WAIT, .event = event, .number = event->recorded});
    LEAVE(OK);
}

API int cuEventCreate(struct event **event, unsigned flags) {
    ENTER(1, 0)
    *event = calloc(1, sizeof **event);
    (*event)->context = current;
    (*event)->timed = !(flags & NO_TIMING);
    LEAVE(OK);
}

API int cuEventDestroy_v2(struct event *event) {
    ENTER(1, 0)
    event->destroyed = 1;
    event->references++;
    drop_event(event);
    LEAVE(OK);
}

API int cuEventRecord(struct event *event, struct stream *stream) {
    ENTER(1, 0)
    stream = resolve(stream);
    if (stream->capturing) {
        mistake("an event recorded into a graph that is captured", 0, 0, 0);
    }
    append(stream, (struct op){.type = RECORD, .event = event, .number = ++event->recorded});
    LEAVE(OK);
}

API int cuEventQuery(struct event *event) {
    ENTER(1, 1)
    LEAVE(event->context->lost ? event->context->lost : event->done >= event->recorded ? OK : NOT_READY);
}

API int cuEventSynchronize(struct event *event) {
    ENTER(1, 1)
    while (event->done < event->recorded && !current->lost) {
        pthread_cond_wait(&changed, &lock);
    }
    LEAVE(current->lost);
}

API int cuEventElapsedTime(float *ms, struct event *from, struct event *to) {
    ENTER(1, 1)
    if (!from->timed || !to->timed || !from->recorded || !to->recorded) {
        LEAVE(INVALID_HANDLE);
    }
    *ms = (float)(to->when - from->when) * 1e-6f;
    LEAVE(from->done >= from->recorded && to->done >= to->recorded ? OK : NOT_READY);
}

API int cuLaunchHostFunc(struct stream *stream, void (*call)(void *), void *argument) {
    ENTER(1, 0)
    append(resolve(stream), (struct op){.type = CALL, .call = call, .argument = argument});
    LEAVE(OK);
}

API int cuMemsetD8Async(uint64_t dst, unsigned char value, size_t size, struct stream *stream) {
    ENTER(1, 0)
    if (usable(current, dst, size)) {
        LEAVE(INVALID_VALUE);
    }
    struct op op = {.type = WORK, .touches = malloc(sizeof *op.touches), .count = 1, .fills = 1, .value = value};
    *op.touches = (struct touch){dst, size, 1};
    append(resolve(stream), op);
    LEAVE(OK);
}

API int cuMemcpyAsync(uint64_t dst, uint64_t src, size_t size, struct stream *stream) {
    ENTER(1, 0)
    LEAVE(enqueue(resolve(stream), &dst, &src, &size, 1, ORDER_STREAM));
}

/* CUDA_MEMCPY2D. */
struct rectangle {
    size_t src_x, src_y;
    unsigned src_type;
    uint64_t src_host, src_device;
    void *src_array;
    size_t src_pitch, dst_x, dst_y;
    unsigned dst_type;
    uint64_t dst_host, dst_device;
    void *dst_array;
    size_t dst_pitch, width, height;
};

API int cuMemcpy2DAsync_v2(const struct rectangle *r, struct stream *stream) {
    ENTER(1, 0)
    uint64_t src = r->src_type == 1 ? r->src_host : r->src_device, dst = r->dst_type == 1 ? r->dst_host : r->dst_device;
    struct range *from = find(src, 1), *to = find(dst, 1);
    if (!r->height || r->src_pitch < r->width || r->dst_pitch < r->width || r->src_x || r->src_y || r->dst_x || r->dst_y ||
        r->src_pitch > 0x7fffffff || r->dst_pitch > 0x7fffffff) {
        LEAVE(INVALID_VALUE);
    }
    if (!from || !to || (from->kind == ON_DEVICE) != (r->src_type == 2) || (to->kind == ON_DEVICE) != (r->dst_type == 2)) {
        LEAVE(mistake("a rectangle of memory of another kind than it says", src, r->width, INVALID_VALUE));
    }
    uint64_t *dsts = malloc(r->height * sizeof *dsts), *srcs = malloc(r->height * sizeof *srcs);
    size_t *sizes = malloc(r->height * sizeof *sizes);
    for (size_t i = 0; i < r->height; i++) {
        dsts[i] = dst + i * r->dst_pitch;
        srcs[i] = src + i * r->src_pitch;
        sizes[i] = r->width;
    }
    int code = enqueue(resolve(stream), dsts, srcs, sizes, r->height, ORDER_STREAM);
    free(dsts);
    free(srcs);
    free(sizes);
    LEAVE(code);
}

#if FAKE_VERSION >= 12080
static int batch(uint64_t *dsts, uint64_t *srcs, size_t *sizes, size_t count, unsigned *attributes, size_t *indices,
                 size_t number, struct stream *stream) {
    unsigned order = attributes[0], flags = attributes[5];
    if (!count || number != 1 || indices[0] || order < ORDER_STREAM || order > ORDER_ANY || (uintptr_t)stream <= 2) {
        return INVALID_VALUE; /* on a default stream, too, as with a real driver */
    }
    if (!(flags & OVERLAP_FLAG)) {
        mistake("a batch that may take multiprocessors", dsts[0], sizes[0], 0);
    }
    return enqueue(stream, dsts, srcs, sizes, count, (int)order);
}

API int cuMemcpyBatchAsync(uint64_t *dsts, uint64_t *srcs, size_t *sizes, size_t count, unsigned *attributes,
                           size_t *indices, size_t number, size_t *failed, struct stream *stream) {
    ENTER(1, 0)
    *failed = (size_t)-1;
    LEAVE(batch(dsts, srcs, sizes, count, attributes, indices, number, stream));
}
#endif

#if FAKE_VERSION >= 13000
API int cuMemcpyBatchAsync_v2(uint64_t *dsts, uint64_t *srcs, size_t *sizes, size_t count, unsigned *attributes,
                              size_t *indices, size_t number, struct stream *stream) {
    ENTER(1, 0)
    LEAVE(batch(dsts, srcs, sizes, count, attributes, indices, number, stream));
}
#endif

API int cuGetErrorName(int code, const char **name) {
    *name = code == INVALID_VALUE     ? "CUDA_ERROR_INVALID_VALUE"
            : code == OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == NO_DEVICE       ? "CUDA_ERROR_NO_DEVICE"
            : code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                                      : "CUDA_ERROR";
    return OK;
}

API int cuGetErrorString(int code, const char **text) {
    (void)code;
    *text = "the fake driver says so";
    return OK;
}

/* ---------------------------------------------------------------- for tests */

#define TEST(name, arguments, body)  \
    API void name arguments {        \
        pthread_mutex_lock(&lock);   \
        body;                        \
        pthread_cond_broadcast(&changed); \
        pthread_mutex_unlock(&lock); \
    }

/* Each copy takes `latency_ns`, its bytes at this rate (0: none), and up to `delay_ns` at random. */
TEST(fake_pace, (double bytes_per_s, int64_t latency_ns, int64_t delay_ns),
     (set.bytes_per_s = bytes_per_s, set.latency_ns = latency_ns, set.delay_ns = delay_ns))
/* The nth call of this function from now on answers `code`. */
TEST(fake_fail, (const char *function, int nth, int code),
     (snprintf(set.function, sizeof set.function, "%s", function), set.nth = nth, set.code = code))
/* The nth copy or batch from now on ends so while it runs, and the context with it. */
TEST(fake_fail_copy, (int nth, int code), (set.nth_copy = nth, set.copy_code = code))
/* No copy from (1), to (2) a device goes on until it is taken back (0). */
TEST(fake_hold, (int directions), (set.hold = directions))
/* Some thread captures a graph, in the mode that forbids most to the others. */
TEST(fake_capture, (int capturing), (set.spoiled &= !capturing, set.capturing = capturing))
TEST(fake_capture_stream, (struct stream * stream, int capturing), (resolve(stream)->capturing = capturing))
/* Whether devices see pinned memory at other addresses. */
TEST(fake_alias, (int moved), (set.moved = moved))
/* Whether device memory is managed. */
TEST(fake_managed, (int managed), (set.managed = managed))
/* Whether devices have no memory of their own. */
TEST(fake_integrated, (int integrated), (set.integrated = integrated))
TEST(fake_devices, (int devices, int quiet), (set.devices = devices, set.quiet = quiet))
TEST(fake_seed, (uint64_t seed), (set.random = seed * 0x9E3779B97F4A7C15ull + 1))

API int fake_spoiled(void) { return set.spoiled; }

/* Device memory that the program may touch while it is open: the engine's, whose forward pass is a CPU's here. */
API int fake_access(uint64_t address, uint64_t size, int open) {
    return mprotect((void *)(uintptr_t)address, size, open ? PROT_READ | PROT_WRITE : PROT_NONE) ? errno : 0;
}

/* Work of the engine on its stream that takes `ns`, or, for -1, until fake_go and then so long: it touches `count` pieces
 * of memory, sorted and apart, and writes to those that say so. */
API int fake_work(struct stream *stream, const uint64_t *addresses, const uint64_t *sizes, const int32_t *writes,
                  uint64_t count, int64_t ns) {
    ENTER(1, 0)
    struct op op = {.type = WORK, .touches = malloc((count ? count : 1) * sizeof *op.touches), .count = count, .ns = ns};
    for (uint64_t i = 0; i < count; i++) {
        op.touches[i] = (struct touch){addresses[i], sizes[i], writes[i]};
        if (i && addresses[i] < addresses[i - 1] + sizes[i - 1]) {
            free(op.touches);
            LEAVE(INVALID_VALUE);
        }
    }
    append(resolve(stream), op);
    counted.work++;
    LEAVE(OK);
}

API int fake_go(struct stream *stream, int64_t ns) {
    ENTER(1, 0)
    stream = resolve(stream);
    if (stream->now && stream->now->ns < 0) {
        stream->now->ns = ns;
    }
    for (struct op *op = stream->head; op; op = op->next) {
        op->ns = op->ns < 0 ? ns : op->ns;
    }
    pthread_cond_broadcast(&changed);
    LEAVE(OK);
}

/* What a debugger would see, and write. */
API int fake_peek(uint64_t address, void *to, uint64_t size) {
    pthread_mutex_lock(&lock);
    char *from = find(address, size) ? bytes_at(address) : NULL;
    if (from) {
        memcpy(to, from, size);
    }
    LEAVE(from ? OK : INVALID_VALUE);
}

API int fake_poke(uint64_t address, const void *from, uint64_t size) {
    pthread_mutex_lock(&lock);
    char *to = find(address, size) ? bytes_at(address) : NULL;
    if (to) {
        memcpy(to, from, size);
    }
    LEAVE(to ? OK : INVALID_VALUE);
}

/* Copy calls, rows, bytes, mistakes, most rows in a call, pieces of work; and the last mistake. */
API void fake_count(int64_t out[6], char last[256]) {
    pthread_mutex_lock(&lock);
    memcpy(out, &counted, 6 * sizeof *out);
    memcpy(last, counted.last, sizeof counted.last);
    pthread_mutex_unlock(&lock);
}

/* Contexts that were lost come back, as in a new process, where nothing is pinned, once what they had been told is
 * forgotten; counters begin anew. */
API void fake_reset(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < DEVICES; i++) {
        while (contexts[i].lost && pending) {
            pthread_cond_wait(&changed, &lock);
        }
    }
    for (int i = 0; i < DEVICES; i++) {
        for (int k = num_ranges - 1; contexts[i].lost && k >= 0; k--) {
            if (ranges[k].kind == PINNED) {
                ranges[k] = ranges[--num_ranges];
            }
        }
        contexts[i].lost = 0;
    }
    memset(&counted, 0, sizeof counted);
    set.nth = set.nth_copy = set.spoiled = set.moved = set.managed = set.integrated = set.hold = set.capturing = 0;
    set.latency_ns = set.delay_ns = set.linger_ns = set.refuse = 0;
    set.bytes_per_s = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
