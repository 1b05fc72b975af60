/* Copies between device memory and pinned host memory, by NVIDIA's driver.
 *
 * The library is opened at run time: nothing of it is needed to build this, and one wheel serves machines with and without
 * a GPU. A lane is one direction on one device; one thread at a time uses it. A lane cuts a copy into chunks that take
 * about 0.15 ms each, and has at most two of them with the device. The chunks take turns on two streams, each of which
 * waits for the other's last chunk: a copy engine goes on with one stream as long as that has more, so this lets the
 * small copies of the engine in between. A stop ends a copy between two chunks. What the engine's stream has been told
 * before (the mark) is waited for on the host, so that no stream ever waits for a copy, and a stop never for the engine.
 *
 * Nothing in here knows Python: `cuda.c` is the module, and a test in C runs this under sanitizers. A function that
 * returns int answers 0, or the driver's error code, or -1; `cuda_message` then says in this thread what happened.
 * CUDA driver API: docs.nvidia.com/cuda/cuda-driver-api. */

#ifndef KVBM_CUDA_H
#define KVBM_CUDA_H

#include "xxh3.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

/* ---------------------------------------------------------------- the driver's interface */

typedef struct CUctx_st *cuda_context;
typedef struct CUstream_st *cuda_stream;
typedef struct CUevent_st *cuda_event;

enum { CUDA_OK = 0, CUDA_NOT_READY = 600 };
enum { STREAM_NON_BLOCKING = 1, EVENT_NO_TIMING = 2, CAPTURE_RELAXED = 2, PIN_PORTABLE = 1, PIN_DEVICEMAP = 2 };
enum { ORDER_STREAM = 1, ORDER_ANY = 3, PREFER_OVERLAP = 1 };
enum { POINTER_MEMORY_TYPE = 2, POINTER_MANAGED = 8, POINTER_ORDINAL = 9, TYPE_HOST = 1, TYPE_DEVICE = 2 };

/* CUmemcpyAttributes: when the source may be read, hints on where both sides lie (none are given), flags. */
struct cuda_attributes {
    uint32_t order;
    struct {
        uint32_t type;
        int32_t id;
    } source, destination;
    uint32_t flags;
};

/* CUDA_MEMCPY2D: `height` rows of `width` bytes, a pitch apart on each side. */
struct cuda_rectangle {
    size_t src_x, src_y;
    uint32_t src_type;
    const void *src_host;
    uint64_t src_device;
    void *src_array;
    size_t src_pitch, dst_x, dst_y;
    uint32_t dst_type;
    void *dst_host;
    uint64_t dst_device;
    void *dst_array;
    size_t dst_pitch, width, height;
};

/* The functions that are used. Those of batches are missing in older drivers: `batch` came with CUDA 13.0, `batch_12`
 * with 12.8. */
#define CUDA_CALLS(CALL)                                                                                              \
    CALL(init, "cuInit", 0, (unsigned))                                                                               \
    CALL(version, "cuDriverGetVersion", 0, (int *))                                                                   \
    CALL(count, "cuDeviceGetCount", 0, (int *))                                                                       \
    CALL(device, "cuDeviceGet", 0, (int *, int))                                                                      \
    CALL(device_name, "cuDeviceGetName", 0, (char *, int, int))                                                       \
    CALL(device_bus, "cuDeviceGetPCIBusId", 0, (char *, int, int))                                                    \
    CALL(attribute, "cuDeviceGetAttribute", 0, (int *, int, int))                                                     \
    CALL(retain, "cuDevicePrimaryCtxRetain", 0, (cuda_context *, int))                                                \
    CALL(release, "cuDevicePrimaryCtxRelease_v2", 0, (int))                                                           \
    CALL(set_context, "cuCtxSetCurrent", 0, (cuda_context))                                                           \
    CALL(get_context, "cuCtxGetCurrent", 0, (cuda_context *))                                                         \
    CALL(alloc, "cuMemAlloc_v2", 0, (uint64_t *, size_t))                                                             \
    CALL(free, "cuMemFree_v2", 0, (uint64_t))                                                                         \
    CALL(pointer, "cuPointerGetAttribute", 0, (void *, int, uint64_t))                                                \
    CALL(pin, "cuMemHostRegister_v2", 0, (void *, size_t, unsigned))                                                  \
    CALL(unpin, "cuMemHostUnregister", 0, (void *))                                                                   \
    CALL(alias, "cuMemHostGetDevicePointer_v2", 0, (uint64_t *, void *, unsigned))                                    \
    CALL(stream_create, "cuStreamCreate", 0, (cuda_stream *, unsigned))                                               \
    CALL(stream_destroy, "cuStreamDestroy_v2", 0, (cuda_stream))                                                      \
    CALL(stream_query, "cuStreamQuery", 0, (cuda_stream))                                                             \
    CALL(stream_wait, "cuStreamWaitEvent", 0, (cuda_stream, cuda_event, unsigned))                                    \
    CALL(stream_capturing, "cuStreamIsCapturing", 0, (cuda_stream, int *))                                            \
    CALL(event_create, "cuEventCreate", 0, (cuda_event *, unsigned))                                                  \
    CALL(event_destroy, "cuEventDestroy_v2", 0, (cuda_event))                                                         \
    CALL(event_record, "cuEventRecord", 0, (cuda_event, cuda_stream))                                                 \
    CALL(event_query, "cuEventQuery", 0, (cuda_event))                                                                \
    CALL(event_elapsed, "cuEventElapsedTime", 0, (float *, cuda_event, cuda_event))                                   \
    CALL(capture_mode, "cuThreadExchangeStreamCaptureMode", 0, (int *))                                               \
    CALL(copy, "cuMemcpyAsync", 0, (uint64_t, uint64_t, size_t, cuda_stream))                                         \
    CALL(rectangle, "cuMemcpy2DAsync_v2", 0, (const struct cuda_rectangle *, cuda_stream))                            \
    CALL(batch, "cuMemcpyBatchAsync_v2", 1,                                                                           \
         (uint64_t *, uint64_t *, size_t *, size_t, struct cuda_attributes *, size_t *, size_t, cuda_stream))         \
    CALL(batch_12, "cuMemcpyBatchAsync", 1,                                                                           \
         (uint64_t *, uint64_t *, size_t *, size_t, struct cuda_attributes *, size_t *, size_t, size_t *,             \
          cuda_stream))                                                                                               \
    CALL(error_name, "cuGetErrorName", 0, (int, const char **))                                                       \
    CALL(error_text, "cuGetErrorString", 0, (int, const char **))

struct cuda_calls {
#define CUDA_FIELD(field, name, optional, arguments) int(*field) arguments;
    CUDA_CALLS(CUDA_FIELD)
#undef CUDA_FIELD
};

/* ---------------------------------------------------------------- what is kept */

enum { CUDA_DEVICES = 64, CUDA_PINS = 1024 };

struct cuda_mark {
    cuda_event event;
    int device;
    struct cuda_mark *next; /* of those that nobody uses */
};

struct cuda {
    struct cuda_calls call;
    void *library;
    int version;
    pid_t process;
    pthread_mutex_t lock; /* guards what follows */
    cuda_context contexts[CUDA_DEVICES];
    struct cuda_mark *unused;
    struct {
        uint64_t address, bytes;
        int device;
    } pins[CUDA_PINS];
    int num_pins;
};

static __thread char cuda_message[256];

static int cuda_fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(cuda_message, sizeof cuda_message, format, arguments);
    va_end(arguments);
    return code ? code : -1;
}

/* What a call of the driver answered; in words, where it is an error. */
static int cuda_said(struct cuda *cuda, int code, const char *call) {
    const char *name = NULL, *text = NULL;
    if (code == CUDA_OK) {
        return 0;
    }
    cuda->call.error_name(code, &name);
    cuda->call.error_text(code, &text);
    return cuda_fail(code, "%s: %s (%d%s%s)", call, name ? name : "an error", code, text ? ", " : "", text ? text : "");
}

static int64_t cuda_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void cuda_nap(int64_t ns) { nanosleep(&(struct timespec){ns / 1000000000, ns % 1000000000}, NULL); }

/* Opens the driver. Nothing is called that is newer than this version of CUDA. */
static int cuda_open(struct cuda *cuda, const char *library, int newest) {
    static const struct {
        size_t at;
        const char *name;
        int optional;
    } names[] = {
#define CUDA_NAME(field, name, optional, arguments) {offsetof(struct cuda_calls, field), name, optional},
        CUDA_CALLS(CUDA_NAME)
#undef CUDA_NAME
    };
    memset(cuda, 0, sizeof *cuda);
    if (!(cuda->library = dlopen(library, RTLD_NOW | RTLD_LOCAL))) {
        return cuda_fail(-1, "%s", dlerror());
    }
    int result = 0;
    for (size_t i = 0; !result && i < sizeof names / sizeof *names; i++) {
        void *symbol = dlsym(cuda->library, names[i].name);
        if (!symbol && !names[i].optional) {
            result = cuda_fail(-1, "%s has no %s", library, names[i].name);
        }
        memcpy((char *)&cuda->call + names[i].at, &symbol, sizeof symbol);
    }
    if (!result && !(result = cuda_said(cuda, cuda->call.init(0), "cuInit"))) {
        result = cuda_said(cuda, cuda->call.version(&cuda->version), "cuDriverGetVersion");
    }
    if (result) {
        dlclose(cuda->library);
        return result;
    }
    if (newest < 13000) {
        cuda->call.batch = NULL;
    }
    if (newest < 12080) {
        cuda->call.batch_12 = NULL;
    }
    cuda->process = getpid();
    pthread_mutex_init(&cuda->lock, NULL);
    return 0;
}

/* Gives the device's primary context, which the engine's framework uses, too, and which is never made anew here. */
static int cuda_primary(struct cuda *cuda, int device, cuda_context *context) {
    int number, result = 0;
    if (getpid() != cuda->process) {
        return cuda_fail(-1, "CUDA does not survive a fork: this process is a child of the one that opened the driver");
    }
    if (device < 0 || device >= CUDA_DEVICES) {
        return cuda_fail(-1, "there is no device %d", device);
    }
    pthread_mutex_lock(&cuda->lock);
    if (!cuda->contexts[device]) {
        result = cuda_said(cuda, cuda->call.device(&number, device), "cuDeviceGet");
        result = result ? result
                        : cuda_said(cuda, cuda->call.retain(&cuda->contexts[device], number), "cuDevicePrimaryCtxRetain");
    }
    *context = cuda->contexts[device];
    pthread_mutex_unlock(&cuda->lock);
    return result;
}

/* A thread of one's own: it gets the context, and no longer spoils a graph that another thread captures. (By itself a
 * query in any thread ends a capture: pytorch issue 104487.) */
static int cuda_enter(struct cuda *cuda, int device) {
    static __thread struct cuda *relaxed;
    int mode = CAPTURE_RELAXED;
    cuda_context wanted = NULL, current = NULL;
    int result = cuda_primary(cuda, device, &wanted);
    if (!result && (cuda->call.get_context(&current) != CUDA_OK || current != wanted)) {
        result = cuda_said(cuda, cuda->call.set_context(wanted), "cuCtxSetCurrent");
    }
    if (!result && relaxed != cuda) {
        result = cuda_said(cuda, cuda->call.capture_mode(&mode), "cuThreadExchangeStreamCaptureMode");
        relaxed = result ? relaxed : cuda;
    }
    return result;
}

/* ---------------------------------------------------------------- a thread that belongs to somebody else */

/* What `cuda_visit` found, for `cuda_leave` to restore. */
struct cuda_visit {
    cuda_context before;
    int changed;
};

static int cuda_visit(struct cuda *cuda, int device, struct cuda_visit *visit) {
    cuda_context wanted = NULL;
    visit->before = NULL;
    visit->changed = 0;
    int result = cuda_primary(cuda, device, &wanted);
    if (!result && (cuda->call.get_context(&visit->before) != CUDA_OK || visit->before != wanted)) {
        visit->changed = 1;
        result = cuda_said(cuda, cuda->call.set_context(wanted), "cuCtxSetCurrent");
    }
    return result;
}

static void cuda_leave(struct cuda *cuda, struct cuda_visit *visit) {
    if (visit->changed) {
        cuda->call.set_context(visit->before);
    }
}

/* The device whose memory this is; -1: it is no device's, or one that pages move away from (managed). */
static int cuda_device_of(struct cuda *cuda, uint64_t address) {
    uint32_t type = 0, managed = 0;
    int32_t ordinal = -1;
    if (cuda->call.pointer(&type, POINTER_MEMORY_TYPE, address) != CUDA_OK || type != TYPE_DEVICE ||
        cuda->call.pointer(&managed, POINTER_MANAGED, address) != CUDA_OK || managed ||
        cuda->call.pointer(&ordinal, POINTER_ORDINAL, address) != CUDA_OK) {
        return -1;
    }
    return ordinal;
}

/* Marks what `stream` has been told until now. To be called by the thread that tells it. */
static int cuda_mark(struct cuda *cuda, int device, uint64_t stream, struct cuda_mark **made) {
    struct cuda_mark **at, *mark = NULL;
    cuda_stream engine = (cuda_stream)(uintptr_t)stream;
    struct cuda_visit visit;
    int capturing = 0, result = cuda_visit(cuda, device, &visit);
    if (!result && !(result = cuda_said(cuda, cuda->call.stream_capturing(engine, &capturing), "cuStreamIsCapturing")) &&
        capturing) {
        result = cuda_fail(-1, "the engine captures a graph on this stream: a copy would become a part of it");
    }
    if (!result) {
        pthread_mutex_lock(&cuda->lock);
        for (at = &cuda->unused; *at && (*at)->device != device; at = &(*at)->next) {
        }
        if ((mark = *at)) {
            *at = mark->next;
        }
        pthread_mutex_unlock(&cuda->lock);
        if (!mark) {
            if (!(mark = calloc(1, sizeof *mark))) {
                result = cuda_fail(-1, "no memory");
            } else {
                mark->device = device;
                result = cuda_said(cuda, cuda->call.event_create(&mark->event, EVENT_NO_TIMING), "cuEventCreate");
                if (result) {
                    free(mark);
                }
            }
        }
        if (!result && (result = cuda_said(cuda, cuda->call.event_record(mark->event, engine), "cuEventRecord"))) {
            pthread_mutex_lock(&cuda->lock);
            mark->next = cuda->unused;
            cuda->unused = mark;
            pthread_mutex_unlock(&cuda->lock);
        }
    }
    cuda_leave(cuda, &visit);
    *made = result ? NULL : mark;
    return result;
}

/* Nobody will ask for this mark any more. */
static void cuda_unmark(struct cuda *cuda, struct cuda_mark *mark) {
    pthread_mutex_lock(&cuda->lock);
    mark->next = cuda->unused;
    cuda->unused = mark;
    pthread_mutex_unlock(&cuda->lock);
}

/* ---------------------------------------------------------------- pinned memory */

static int cuda_unpin(struct cuda *cuda, uint64_t address) {
    int result = 0;
    for (;;) {
        uint64_t bytes = 0;
        int device = 0;
        pthread_mutex_lock(&cuda->lock);
        for (int i = 0; i < cuda->num_pins && !bytes; i++) {
            if (cuda->pins[i].address == address) {
                bytes = cuda->pins[i].bytes;
                device = cuda->pins[i].device;
                cuda->pins[i] = cuda->pins[--cuda->num_pins];
            }
        }
        pthread_mutex_unlock(&cuda->lock);
        if (!bytes) {
            return result;
        }
        struct cuda_visit visit; /* the engine's thread ends with this */
        int code = cuda_visit(cuda, device, &visit);
        code = code ? code : cuda_said(cuda, cuda->call.unpin((void *)(uintptr_t)address), "cuMemHostUnregister");
        cuda_leave(cuda, &visit);
        result = result ? result : code;
        address += bytes;
    }
}

/* In pieces: a driver refuses one of 512 GiB (vLLM issue 51081), and holds a lock meanwhile that the engine needs. Where one
 * is refused, those before it are given back. */
static int cuda_pin(struct cuda *cuda, int device, uint64_t address, uint64_t bytes, uint64_t piece) {
    int result = cuda_enter(cuda, device);
    for (uint64_t at = 0; !result && at < bytes; at += piece) {
        uint64_t length = bytes - at < piece ? bytes - at : piece, alias = 0;
        void *begin = (void *)(uintptr_t)(address + at);
        if ((result = cuda_said(cuda, cuda->call.pin(begin, length, PIN_PORTABLE | PIN_DEVICEMAP), "cuMemHostRegister"))) {
            cuda_unpin(cuda, address);
            return result;
        }
        result = cuda_said(cuda, cuda->call.alias(&alias, begin, 0), "cuMemHostGetDevicePointer");
        if (!result && alias != address + at) {
            result = cuda_fail(-1, "this device sees pinned host memory at other addresses than the host does");
        }
        pthread_mutex_lock(&cuda->lock);
        if (!result && cuda->num_pins == CUDA_PINS) {
            result = cuda_fail(-1, "more than %d pieces of pinned memory", CUDA_PINS);
        }
        if (!result) {
            cuda->pins[cuda->num_pins].address = address + at;
            cuda->pins[cuda->num_pins].bytes = length;
            cuda->pins[cuda->num_pins++].device = device;
        }
        pthread_mutex_unlock(&cuda->lock);
        if (result) {
            char kept[sizeof cuda_message];
            memcpy(kept, cuda_message, sizeof kept);
            cuda->call.unpin(begin);
            cuda_unpin(cuda, address);
            memcpy(cuda_message, kept, sizeof kept);
        }
    }
    return result;
}

/* ---------------------------------------------------------------- lanes */

/* Chunks with the device, and events: one per chunk with the device, of the chunk before these, and of a begin. */
enum { DEPTH = 2, EVENTS = DEPTH + 1 };
/* A batch begins when all of its descriptors are made, and a long one holds the driver; a stream takes about 1,000 other
 * operations, then the call waits (docs/cuda.md, 0.4 and 2). Where the planes of a block are evenly spaced, the block is one
 * two-dimensional copy: for rows below 64 KiB 1.3 to 9 times as fast as a batch of them (3c). */
enum { DESCRIPTORS = 512, OPERATIONS = 400, RECTANGLES_BELOW = 64 << 10, PITCH_MOST = 0x7fffffff };
enum { CHUNK_NS = 150000, LOOK_NS = 20000, LATE_LOOK_NS = 1000000, LATE_NS = 100000000 };
enum { CHUNK_FIRST = 8 << 20, CHUNK_LEAST = 2 << 20, CHUNK_MOST = 64 << 20 };

struct lane {
    struct cuda *cuda;
    int device, to_device, dead;
    cuda_stream streams[2];
    cuda_event events[EVENTS], begin;
    int64_t sent;       /* chunks, ever: the streams take turns */
    double ns_per_byte; /* of the device, lately; 0: not known */
    uint64_t dst[DESCRIPTORS], src[DESCRIPTORS];
    size_t size[DESCRIPTORS], count;
};

/* One entry per plane, in bytes: row p of slot s lies at address[p] + s * stride[p]. */
struct lane_plan {
    const int64_t *src_address, *src_stride, *dst_address, *dst_stride, *row_bytes;
    int64_t planes;
    const int64_t *src_slots, *dst_slots;
    int64_t blocks;
    int64_t *control; /* next block; stop: 1 once what is with the device has ended, 2 at once */
    const struct cuda_mark *after;
    uint64_t pinned, piece; /* where the host's side begins, and how much of it one registration holds */
    int64_t chunk_bytes;    /* 0: as long as CHUNK_NS takes */
    uint64_t *sums;         /* NULL: none are wanted */
    size_t src_pitch, dst_pitch; /* from plane to plane, where a block is copied as a rectangle; else 0 */
};

struct lane_progress {
    int64_t descriptors, chunks, submit_ns, waited_ns;
};

static void lane_close(struct lane *lane) {
    struct cuda *cuda = lane->cuda;
    char kept[sizeof cuda_message];
    struct cuda_visit visit;
    memcpy(kept, cuda_message, sizeof kept);
    if (cuda_visit(cuda, lane->device, &visit) == 0) {
        for (int i = 0; i < EVENTS + 1; i++) {
            cuda_event event = i < EVENTS ? lane->events[i] : lane->begin;
            if (event) {
                cuda->call.event_destroy(event);
            }
        }
        for (int i = 0; i < 2; i++) {
            if (lane->streams[i]) {
                cuda->call.stream_destroy(lane->streams[i]);
            }
        }
        cuda_leave(cuda, &visit);
    }
    free(lane);
    memcpy(cuda_message, kept, sizeof kept);
}

static int lane_open(struct cuda *cuda, int device, int to_device, struct lane **opened) {
    struct cuda_visit visit;
    struct lane *lane = NULL;
    int result = cuda_visit(cuda, device, &visit);
    if (!result && !(lane = calloc(1, sizeof *lane))) {
        result = cuda_fail(-1, "no memory");
    }
    if (lane) {
        lane->cuda = cuda;
        lane->device = device;
        lane->to_device = to_device;
        for (int i = 0; !result && i < 2; i++) {
            result = cuda_said(cuda, cuda->call.stream_create(&lane->streams[i], STREAM_NON_BLOCKING), "cuStreamCreate");
        }
        for (int i = 0; !result && i < EVENTS + 1; i++) {
            cuda_event *event = i < EVENTS ? &lane->events[i] : &lane->begin;
            result = cuda_said(cuda, cuda->call.event_create(event, 0), "cuEventCreate");
        }
    }
    cuda_leave(cuda, &visit);
    if (result && lane) {
        lane_close(lane);
        lane = NULL;
    }
    *opened = lane;
    return result;
}

static cuda_event lane_event(struct lane *lane, int64_t chunk) { return lane->events[chunk % EVENTS]; }

/* What has gathered goes to the driver. */
static int lane_flush(struct lane *lane, cuda_stream stream, struct lane_progress *progress) {
    struct cuda *cuda = lane->cuda;
    struct cuda_calls *call = &cuda->call;
    int result = 0;
    if (!lane->count) {
        return 0;
    }
    /* What the engine wrote may be read in the stream's turn only. Host memory lies there complete long before. Without
     * PREFER_OVERLAP a driver may take multiprocessors for the copy (rapidsai/cudf 23674). */
    struct cuda_attributes how = {.order = lane->to_device ? ORDER_ANY : ORDER_STREAM, .flags = PREFER_OVERLAP};
    size_t first = 0, failed = 0;
    int64_t begun = cuda_now();
    if (call->batch) {
        result = call->batch(lane->dst, lane->src, lane->size, lane->count, &how, &first, 1, stream);
        result = cuda_said(cuda, result, "cuMemcpyBatchAsync");
    } else if (call->batch_12) {
        result = call->batch_12(lane->dst, lane->src, lane->size, lane->count, &how, &first, 1, &failed, stream);
        result = cuda_said(cuda, result, "cuMemcpyBatchAsync");
    } else {
        for (size_t i = 0; !result && i < lane->count; i++) {
            result = cuda_said(cuda, call->copy(lane->dst[i], lane->src[i], lane->size[i], stream), "cuMemcpyAsync");
        }
    }
    progress->submit_ns += cuda_now() - begun;
    progress->descriptors += (int64_t)lane->count;
    lane->count = 0;
    return result;
}

/* One more row, or a part of one; a part of the last descriptor where it goes on on both sides. No descriptor may run
 * from one registration of pinned memory into the next. */
static int lane_add(struct lane *lane, const struct lane_plan *plan, uint64_t dst, uint64_t src, size_t size,
                    cuda_stream stream, struct lane_progress *progress) {
    size_t n = lane->count;
    uint64_t host = lane->to_device ? src : dst;
    if (n && lane->dst[n - 1] + lane->size[n - 1] == dst && lane->src[n - 1] + lane->size[n - 1] == src &&
        (host - plan->pinned) % plan->piece) {
        lane->size[n - 1] += size;
        return 0;
    }
    lane->dst[n] = dst;
    lane->src[n] = src;
    lane->size[n] = size;
    lane->count = n + 1;
    return lane->count == DESCRIPTORS ? lane_flush(lane, stream, progress) : 0;
}

/* The distance from row to row, if these are evenly spaced, do not overlap and are not further apart than drivers promise
 * to copy (CU_DEVICE_ATTRIBUTE_MAX_PITCH is 2^31 - 1); otherwise 0. */
static size_t lane_pitch(const int64_t *address, const int64_t *stride, const int64_t *row_bytes, int64_t planes) {
    int64_t pitch = planes > 1 ? address[1] - address[0] : 0;
    for (int64_t p = 1; p < planes; p++) {
        if (address[p] - address[p - 1] != pitch || row_bytes[p] != row_bytes[0] || stride[p] != stride[0]) {
            return 0;
        }
    }
    return pitch >= row_bytes[0] && pitch <= PITCH_MOST ? (size_t)pitch : 0;
}

/* Rows of one block, as many as `height` says. */
static int lane_rectangle(struct lane *lane, const struct lane_plan *plan, uint64_t dst, uint64_t src, int64_t height,
                          cuda_stream stream, struct lane_progress *progress) {
    struct cuda_rectangle r = {.src_pitch = plan->src_pitch, .dst_pitch = plan->dst_pitch,
                               .width = (size_t)plan->row_bytes[0], .height = (size_t)height};
    if (lane->to_device) {
        r.src_type = TYPE_HOST;
        r.src_host = (const void *)(uintptr_t)src;
        r.dst_type = TYPE_DEVICE;
        r.dst_device = dst;
    } else {
        r.src_type = TYPE_DEVICE;
        r.src_device = src;
        r.dst_type = TYPE_HOST;
        r.dst_host = (void *)(uintptr_t)dst;
    }
    int64_t begun = cuda_now();
    int code = lane->cuda->call.rectangle(&r, stream);
    progress->submit_ns += cuda_now() - begun;
    progress->descriptors++;
    return cuda_said(lane->cuda, code, "cuMemcpy2DAsync");
}

/* How far a copy has come: the next byte is byte `offset` of row `plane` of block `block`. */
struct lane_cursor {
    int64_t block, plane, offset;
};

/* A chunk that is with the device: `blocks` of the plan are complete once it has ended. */
struct lane_flight {
    int64_t number, blocks, bytes, begun;
    int alone, refused; /* whether the device had nothing else when it was submitted */
};

/* Gives the device the next chunk. Also one that was refused is waited for: some of it may have been taken. */
static int lane_submit(struct lane *lane, const struct lane_plan *plan, int64_t chunk_bytes, struct lane_cursor *cursor,
                       struct lane_flight *flight, struct lane_progress *progress) {
    struct cuda *cuda = lane->cuda;
    cuda_stream stream = lane->streams[lane->sent & 1];
    int64_t left = chunk_bytes, operations = 0;
    int result = 0;
    lane->count = 0;
    if (lane->sent) {
        result = cuda_said(cuda, cuda->call.stream_wait(stream, lane_event(lane, lane->sent - 1), 0), "cuStreamWaitEvent");
    }
    if (!result && flight->alone) {
        result = cuda_said(cuda, cuda->call.event_record(lane->begin, stream), "cuEventRecord");
    }
    while (!result && left > 0 && cursor->block < plan->blocks && operations < OPERATIONS) {
        int64_t p = cursor->plane, rest = plan->row_bytes[p] - cursor->offset, size = rest < left ? rest : left, rows = 0;
        uint64_t src = (uint64_t)(plan->src_address[p] + plan->src_slots[cursor->block] * plan->src_stride[p]);
        uint64_t dst = (uint64_t)(plan->dst_address[p] + plan->dst_slots[cursor->block] * plan->dst_stride[p]);
        if (plan->src_pitch && !cursor->offset && (rows = left / plan->row_bytes[p])) {
            rows = plan->planes - p < rows ? plan->planes - p : rows;
            result = lane_rectangle(lane, plan, dst, src, rows, stream, progress);
            size = rows * plan->row_bytes[p];
            operations++;
        } else {
            result = lane_add(lane, plan, dst + (uint64_t)cursor->offset, src + (uint64_t)cursor->offset, (size_t)size,
                              stream, progress);
            operations += !lane->cuda->call.batch_12; /* where a row is an operation */
            cursor->offset = size == rest ? 0 : cursor->offset + size;
            rows = size == rest;
        }
        left -= size;
        cursor->plane += rows;
        if (cursor->plane == plan->planes) {
            cursor->plane = 0;
            cursor->block++;
        }
    }
    result = result ? result : lane_flush(lane, stream, progress);
    int recorded = cuda->call.event_record(lane_event(lane, lane->sent), stream);
    result = result ? result : cuda_said(cuda, recorded, "cuEventRecord");
    flight->number = lane->sent++;
    flight->blocks = cursor->block;
    flight->bytes = chunk_bytes - left;
    flight->begun = cuda_now();
    flight->refused = result;
    progress->chunks++;
    return result;
}

/* Waits for a chunk: asleep for most of the time that it should take, then with a look every 20 us. */
static int lane_await(struct lane *lane, const struct lane_flight *flight, int64_t since, const int64_t *control) {
    struct cuda *cuda = lane->cuda;
    int64_t expected = (int64_t)(0.8 * lane->ns_per_byte * (double)flight->bytes) - (cuda_now() - since), waited;
    if (expected > LOOK_NS) {
        cuda_nap(expected < 100 * CHUNK_NS ? expected : 100 * CHUNK_NS);
    }
    for (;;) {
        int code = cuda->call.event_query(lane_event(lane, flight->number));
        if (code == CUDA_OK) {
            break;
        }
        if (code != CUDA_NOT_READY) {
            return cuda_said(cuda, code, "cuEventQuery");
        }
        if (__atomic_load_n(&control[1], __ATOMIC_SEQ_CST) == 2) {
            return cuda_fail(-1, "given up while the device was copying");
        }
        waited = cuda_now() - since;
        cuda_nap(waited < LATE_NS ? LOOK_NS : LATE_LOOK_NS); /* after 0.1 s something hangs, or the engine is long at it */
    }
    float ms = 0;
    cuda_event before = flight->alone ? lane->begin : lane_event(lane, flight->number - 1);
    if (flight->bytes && cuda->call.event_elapsed(&ms, before, lane_event(lane, flight->number)) == CUDA_OK && ms > 0) {
        double pace = (double)ms * 1e6 / (double)flight->bytes;
        if (lane->ns_per_byte <= 0) {
            lane->ns_per_byte = pace;
        } else if (!flight->alone) { /* one that came alone was being told while it was timed */
            lane->ns_per_byte = 0.8 * lane->ns_per_byte + 0.2 * pace;
        }
    }
    return 0;
}

/* Waits until the device has nothing of this lane any more; not 0 where that cannot be known. */
static int lane_drain(struct lane *lane, const int64_t *control) {
    for (int i = 0; i < 2; i++) {
        int code;
        while ((code = lane->cuda->call.stream_query(lane->streams[i])) == CUDA_NOT_READY) {
            if (__atomic_load_n(&control[1], __ATOMIC_SEQ_CST) == 2) {
                return -1;
            }
            cuda_nap(5 * LOOK_NS);
        }
        if (code != CUDA_OK) {
            return code;
        }
    }
    return 0;
}

/* Waits until the engine's stream is past the mark, or somebody stops this. */
static int lane_await_mark(struct lane *lane, const struct lane_plan *plan, struct lane_progress *progress) {
    int64_t begun = cuda_now();
    int code;
    while ((code = lane->cuda->call.event_query(plan->after->event)) == CUDA_NOT_READY &&
           !__atomic_load_n(&plan->control[1], __ATOMIC_SEQ_CST)) {
        cuda_nap(cuda_now() - begun < LATE_LOOK_NS ? LOOK_NS : 5 * LOOK_NS);
    }
    progress->waited_ns = cuda_now() - begun;
    return code == CUDA_NOT_READY ? 0 : cuda_said(lane->cuda, code, "cuEventQuery");
}

static int64_t lane_chunk_bytes(const struct lane *lane, const struct lane_plan *plan) {
    if (plan->chunk_bytes > 0) {
        return plan->chunk_bytes;
    }
    if (lane->ns_per_byte <= 0) {
        return CHUNK_FIRST;
    }
    double bytes = CHUNK_NS / lane->ns_per_byte;
    return bytes < CHUNK_LEAST ? CHUNK_LEAST : bytes > CHUNK_MOST ? CHUNK_MOST : (int64_t)bytes;
}

/* The checksums of these blocks, as they lie in host memory. */
static void lane_sums(const struct lane *lane, const struct lane_plan *plan, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        struct xxh3 sum;
        xxh3_begin(&sum);
        for (int64_t p = 0; p < plan->planes; p++) {
            int64_t row = lane->to_device ? plan->src_address[p] + plan->src_slots[i] * plan->src_stride[p]
                                          : plan->dst_address[p] + plan->dst_slots[i] * plan->dst_stride[p];
            xxh3_add(&sum, (const char *)(intptr_t)row, (size_t)plan->row_bytes[p]);
        }
        plan->sums[i] = xxh3_end(&sum);
    }
}

/* Copies the blocks from `control[0]` on, until none is left or somebody stops it; `control[0]` says in the end how far
 * the copy is, after a failure, too: the blocks before it are complete, and nothing of the others is with the device,
 * unless the lane is dead. While the device copies a chunk, the checksums of the one before are made here. */
static int lane_copy(struct lane *lane, struct lane_plan *plan, struct lane_progress *progress) {
    struct lane_flight flying[DEPTH];
    int64_t done = plan->control[0], summed = done, last_end = 0;
    struct lane_cursor cursor = {done, 0, 0};
    int count = 0, over = 0;
    memset(progress, 0, sizeof *progress);
    if (lane->dead) {
        return cuda_fail(-1, "this device copies no more: an earlier copy lost its context, or was given up");
    }
    int result = cuda_enter(lane->cuda, lane->device);
    if (result) {
        return result;
    }
    prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);
    plan->src_pitch = plan->dst_pitch = 0;
    if (plan->row_bytes[0] < RECTANGLES_BELOW) {
        plan->src_pitch = lane_pitch(plan->src_address, plan->src_stride, plan->row_bytes, plan->planes);
        plan->dst_pitch = lane_pitch(plan->dst_address, plan->dst_stride, plan->row_bytes, plan->planes);
        if (!plan->src_pitch || !plan->dst_pitch) {
            plan->src_pitch = plan->dst_pitch = 0;
        }
    }
    result = lane_await_mark(lane, plan, progress);
    while (!result) {
        over = over || cursor.block >= plan->blocks || __atomic_load_n(&plan->control[1], __ATOMIC_SEQ_CST);
        if (!over) {
            flying[count].alone = !count;
            result = lane_submit(lane, plan, lane_chunk_bytes(lane, plan), &cursor, &flying[count], progress);
            count++;
        }
        if (plan->sums && !result) {
            lane_sums(lane, plan, summed, done);
            summed = done;
        }
        if (!count) {
            break;
        }
        if (!result && (over || count == DEPTH)) {
            int64_t since = flying[0].begun > last_end ? flying[0].begun : last_end;
            if ((result = lane_await(lane, &flying[0], since, plan->control)) == 0) {
                done = flying[0].blocks;
                last_end = cuda_now();
                flying[0] = flying[1];
                count--;
            }
        }
    }
    if (result) {
        /* What went out has to end before anybody uses its memory, and may end well. */
        lane->dead = lane_drain(lane, plan->control) != 0;
        for (int i = 0; i < count && !lane->dead && !flying[i].refused; i++) {
            done = flying[i].blocks;
        }
        if (plan->sums) {
            lane_sums(lane, plan, summed, done);
        }
    }
    plan->control[0] = done;
    return result;
}

#endif
