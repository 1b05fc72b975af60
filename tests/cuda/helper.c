/* `cuda.h` over the fake driver: ./helper path/of/libcuda.so.1 seconds-of-stress. Built with sanitizers, too. */

#define _GNU_SOURCE
#include <limits.h>

#include "cuda.h"

#include <sys/mman.h>
#include <sys/wait.h>

static _Atomic int checks, failed;
static struct cuda cuda;
#define CHECK(condition)                                                                      \
    do {                                                                                      \
        checks++;                                                                             \
        if (!(condition)) {                                                                   \
            failed++;                                                                         \
            printf("%s, line %d: %s [%s]\n", __func__, __LINE__, #condition, cuda_message);   \
        }                                                                                     \
    } while (0)

/* ---------------------------------------------------------------- the driver as a test sees it */

#define FAKE_CALLS(CALL)                                                                            \
    CALL(int, cuMemAlloc_v2, (uint64_t *, size_t))                                                  \
    CALL(int, cuMemFree_v2, (uint64_t))                                                             \
    CALL(int, cuStreamCreate, (void **, unsigned))                                                  \
    CALL(int, cuStreamSynchronize, (void *))                                                        \
    CALL(int, cuLaunchHostFunc, (void *, void (*)(void *), void *))                                 \
    CALL(int, cuThreadExchangeStreamCaptureMode, (int *))                                           \
    CALL(int, cuEventQuery, (void *))                                                               \
    CALL(void, fake_pace, (double, int64_t, int64_t))                                               \
    CALL(void, fake_fail, (const char *, int, int))                                                 \
    CALL(void, fake_fail_copy, (int, int))                                                          \
    CALL(void, fake_hold, (int))                                                                    \
    CALL(void, fake_capture, (int))                                                                 \
    CALL(void, fake_capture_stream, (void *, int))                                                  \
    CALL(void, fake_alias, (int))                                                                   \
    CALL(void, fake_devices, (int, int))                                                            \
    CALL(int, fake_spoiled, (void))                                                                 \
    CALL(int, fake_work, (void *, const uint64_t *, const uint64_t *, const int32_t *, uint64_t, int64_t)) \
    CALL(int, fake_peek, (uint64_t, void *, uint64_t))                                              \
    CALL(int, fake_poke, (uint64_t, const void *, uint64_t))                                        \
    CALL(void, fake_count, (int64_t *, char *))                                                     \
    CALL(void, fake_reset, (void))

#define POINTER(answer, name, arguments) static answer(*name) arguments;
FAKE_CALLS(POINTER)

static void bind_fake(const char *path) {
    void *library = dlopen(path, RTLD_NOW), *symbol;
#define FIND(answer, name, arguments)                              \
    if (!library || !(symbol = dlsym(library, #name))) {           \
        printf("no %s in %s: %s\n", #name, path, dlerror());       \
        exit(2);                                                   \
    }                                                              \
    memcpy(&name, &symbol, sizeof symbol);
    FAKE_CALLS(FIND)
}

struct counts {
    int64_t batches, rows, bytes, mistakes, most, work;
    char last[256];
};

static struct counts counts(void) {
    struct counts counted;
    fake_count(&counted.batches, counted.last);
    return counted;
}

static void no_mistakes(const char *where) {
    struct counts c = counts();
    checks++;
    if (c.mistakes) {
        failed++;
        printf("%s: %ld mistakes, the last one: %s\n", where, (long)c.mistakes, c.last);
    }
}

static void use(int device) {
    cuda_context context;
    CHECK(cuda.call.retain(&context, device) == 0 && cuda.call.set_context(context) == 0);
}

static double seconds(void) { return (double)cuda_now() * 1e-9; }

/* ---------------------------------------------------------------- two memories */

enum { PLANES = 5, GAP = 64, MOST_ROW = 1 << 17 };

struct memory { /* on a device a plane per layer, with gaps; on the host one extent per slot */
    int64_t address[PLANES], stride[PLANES], rows[PLANES], planes, slots, slot_bytes;
    uint64_t base, bytes, piece;
    int device, on_device;
};

static int even; /* whether all planes have rows of one size: such a block is one two-dimensional copy */

static struct memory make(int device, int on_device, int64_t slots, int64_t planes, int64_t row, int64_t piece_slots) {
    struct memory m = {.planes = planes, .slots = slots, .device = device, .on_device = on_device};
    int64_t gap = on_device && planes > 1 ? GAP : 0;
    for (int64_t p = 0; p < planes; p++) {
        m.rows[p] = row + (even ? 0 : 8 * p);
        m.slot_bytes += m.rows[p];
    }
    for (int64_t p = 0; p < planes; p++) {
        m.stride[p] = on_device ? m.rows[p] + gap : m.slot_bytes;
        m.address[p] = on_device ? (int64_t)m.bytes + gap : (p ? m.address[p - 1] + m.rows[p - 1] : 0);
        m.bytes += on_device ? (uint64_t)(slots * m.stride[p] + gap) : 0;
    }
    m.bytes = ((on_device ? m.bytes : (uint64_t)(slots * m.slot_bytes)) + 4095) & ~4095ull;
    m.piece = piece_slots ? (uint64_t)(piece_slots * m.slot_bytes) : m.bytes;
    if (on_device) {
        use(device);
        CHECK(cuMemAlloc_v2(&m.base, m.bytes) == 0);
    } else {
        m.base = (uint64_t)(uintptr_t)mmap(NULL, m.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (piece_slots >= 0) {
            CHECK(cuda_pin(&cuda, device, m.base, m.bytes, m.piece) == 0);
        }
    }
    for (int64_t p = 0; p < planes; p++) {
        m.address[p] += (int64_t)m.base;
    }
    return m;
}

static void destroy(struct memory *m) {
    if (m->on_device) {
        use(m->device);
        CHECK(cuMemFree_v2(m->base) == 0);
    } else {
        CHECK(cuda_unpin(&cuda, m->base) == 0);
        munmap((void *)(uintptr_t)m->base, m->bytes);
    }
}

static void row_access(struct memory *m, int64_t slot, int64_t p, char *bytes, int write) {
    uint64_t at = (uint64_t)(m->address[p] + slot * m->stride[p]), size = (uint64_t)m->rows[p];
    if (m->on_device) {
        CHECK((write ? fake_poke(at, bytes, size) : fake_peek(at, bytes, size)) == 0);
    } else {
        memcpy(write ? (void *)(uintptr_t)at : bytes, write ? bytes : (void *)(uintptr_t)at, size);
    }
}

/* What a slot with this value has at byte i of row p. */
static char byte_of(int value, int64_t p, int64_t i) { return (char)(value * 31 + p * 7 + (i >> 3) * 5 + i); }

static void put(struct memory *m, int64_t slot, int value) {
    char row[MOST_ROW];
    for (int64_t p = 0; p < m->planes; p++) {
        for (int64_t i = 0; i < m->rows[p]; i++) {
            row[i] = byte_of(value, p, i);
        }
        row_access(m, slot, p, row, 1);
    }
}

static int holds(struct memory *m, int64_t slot, int value) {
    char row[MOST_ROW];
    for (int64_t p = 0; p < m->planes; p++) {
        row_access(m, slot, p, row, 0);
        for (int64_t i = 0; i < m->rows[p]; i++) {
            if (row[i] != byte_of(value, p, i)) {
                return 0;
            }
        }
    }
    return 1;
}

static struct cuda_mark *nothing_told; /* a mark of a stream that has nothing to do */

static struct lane_plan plan_of(struct memory *from, struct memory *to, const int64_t *src, const int64_t *dst,
                                int64_t blocks, int64_t *control, int64_t chunk_bytes) {
    struct memory *host = from->on_device ? to : from;
    control[0] = control[1] = 0;
    return (struct lane_plan){from->address, from->stride, to->address, to->stride, from->rows, from->planes, src, dst,
                              blocks, control, nothing_told, host->base, host->piece, chunk_bytes, NULL, 0, 0};
}

static struct lane *open_lane(int device, int to_device) {
    struct lane *lane;
    CHECK(lane_open(&cuda, device, to_device, &lane) == 0);
    return lane;
}

struct running { /* a copy on another thread */
    struct lane *lane;
    struct lane_plan *plan;
    struct lane_progress progress;
    int result;
    char message[256]; /* that thread's */
    pthread_t thread;
};

static void *run_copy(void *argument) {
    struct running *r = argument;
    r->result = lane_copy(r->lane, r->plan, &r->progress);
    memcpy(r->message, cuda_message, sizeof r->message);
    return NULL;
}

static void start(struct running *r) { pthread_create(&r->thread, NULL, run_copy, r); }
static int finish(struct running *r) {
    pthread_join(r->thread, NULL);
    return r->result;
}

static int64_t load(const int64_t *at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
static void store(int64_t *at, int64_t value) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); }

static void shuffle(int64_t *list, int64_t n, unsigned *seed) {
    for (int64_t i = 0; i < n; i++) {
        int64_t j = rand_r(seed) % (i + 1);
        list[i] = list[j];
        list[j] = i;
    }
}

/* ---------------------------------------------------------------- tests */

static void scattered_rows_land_where_they_belong(int64_t planes, int64_t row, int64_t chunk) {
    enum { N = 64 };
    unsigned seed = 1;
    struct memory g1 = make(0, 1, N, planes, row, 0), g2 = make(0, 0, N, planes, row, 7);
    struct lane *down = open_lane(0, 0), *up = open_lane(0, 1);
    struct lane_progress progress;
    int64_t control[2], src[N], dst[N];
    CHECK(cuda_device_of(&cuda, g1.base) == 0 && cuda_device_of(&cuda, g2.base) == -1 && cuda_device_of(&cuda, 1) == -1);
    for (int i = 0; i < N; i++) {
        put(&g1, i, i);
        put(&g2, i, 99);
    }
    shuffle(src, N, &seed);
    shuffle(dst, N, &seed);
    struct lane_plan plan = plan_of(&g1, &g2, src, dst, 40, control, chunk);
    CHECK(lane_copy(down, &plan, &progress) == 0 && control[0] == 40);
    for (int i = 0; i < N; i++) {
        CHECK(holds(&g2, dst[i], i < 40 ? (int)src[i] : 99));
        put(&g1, i, 77);
    }
    plan = plan_of(&g2, &g1, dst, src, 40, control, chunk);
    CHECK(lane_copy(up, &plan, &progress) == 0 && control[0] == 40);
    for (int i = 0; i < N; i++) {
        CHECK(holds(&g1, src[i], i < 40 ? (int)src[i] : 77));
    }
    plan = plan_of(&g2, &g1, dst, src, 0, control, chunk);
    CHECK(lane_copy(up, &plan, &progress) == 0 && control[0] == 0 && progress.chunks == 0);
    lane_close(down);
    lane_close(up);
    destroy(&g1);
    destroy(&g2);
}

static void chunks_have_the_bytes_asked_for_whatever_a_block_has(void) {
    enum { N = 6 };
    struct memory g1 = make(0, 1, N, 2, 10000, 0), g2 = make(0, 0, N, 2, 10000, 0);
    struct lane *down = open_lane(0, 0);
    struct lane_progress progress;
    int64_t control[2], list[N] = {5, 4, 3, 2, 1, 0}, sizes[] = {1000, 4096, 20008, 50000, 1 << 20};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, sizes[k]);
        for (int i = 0; i < N; i++) {
            put(&g1, i, (int)k + i);
        }
        CHECK(lane_copy(down, &plan, &progress) == 0);
        CHECK(progress.chunks == (N * g1.slot_bytes + sizes[k] - 1) / sizes[k]);
        for (int i = 0; i < N; i++) {
            CHECK(holds(&g2, i, (int)k + i));
        }
    }
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
}

static void more_rows_than_one_call_takes(void) {
    enum { N = 4000 };
    struct memory g1 = make(0, 1, N, PLANES, 8, 0), g2 = make(0, 0, N, PLANES, 8, 0);
    struct lane *down = open_lane(0, 0);
    struct lane_progress progress;
    int64_t control[2], *list = malloc(N * sizeof *list);
    for (int i = 0; i < N; i++) {
        list[i] = i;
        put(&g1, i, i);
    }
    struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, 1 << 30);
    CHECK(lane_copy(down, &plan, &progress) == 0 && control[0] == N);
    CHECK(progress.descriptors == PLANES * N && counts().most <= DESCRIPTORS);
    CHECK(progress.chunks == (cuda.call.batch_12 ? 1 : PLANES * N / OPERATIONS));
    for (int i = 0; i < N; i++) {
        CHECK(holds(&g2, i, i));
    }
    free(list);
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
}

static void a_block_of_even_planes_is_one_copy(void) {
    enum { N = 1000 };
    even = 1;
    struct memory g1 = make(0, 1, N, PLANES, 64, 0), g2 = make(0, 0, N, PLANES, 64, 0);
    struct memory wide = make(0, 1, 2, 2, RECTANGLES_BELOW, 0), there = make(0, 0, 2, 2, RECTANGLES_BELOW, 0);
    struct lane *down = open_lane(0, 0);
    struct lane_progress progress;
    int64_t control[2], *list = malloc(N * sizeof *list);
    for (int i = 0; i < N; i++) {
        list[i] = i;
        put(&g1, i, i);
    }
    struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, 1 << 30);
    CHECK(lane_copy(down, &plan, &progress) == 0 && control[0] == N);
    CHECK(progress.descriptors == N && progress.chunks == (N + OPERATIONS - 1) / OPERATIONS);
    for (int i = 0; i < N; i++) {
        CHECK(holds(&g2, i, i));
    }
    plan = plan_of(&g1, &g2, list, list, 3, control, 3 * 64 + 20); /* chunks that end inside blocks, and inside rows */
    CHECK(lane_copy(down, &plan, &progress) == 0 && progress.chunks == (3 * PLANES * 64 + 211) / 212);
    plan = plan_of(&wide, &there, list, list, 2, control, 1 << 30); /* long rows are as fast in a batch */
    CHECK(lane_copy(down, &plan, &progress) == 0 && progress.descriptors == 2 * 2 - (wide.stride[0] == wide.rows[0] ? 2 : 0));
    even = 0;
    free(list);
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
    destroy(&wide);
    destroy(&there);
}

static void neighbours_are_one_row_but_never_across_registrations(void) {
    enum { N = 64 };
    struct memory g1 = make(0, 1, N, 1, 4096, 0), g2 = make(0, 0, N, 1, 4096, 16);
    struct lane *down = open_lane(0, 0), *up = open_lane(0, 1);
    struct lane_progress progress;
    int64_t control[2], list[N];
    for (int i = 0; i < N; i++) {
        list[i] = i;
        put(&g1, i, i);
    }
    struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, 1 << 30);
    CHECK(lane_copy(down, &plan, &progress) == 0 && progress.descriptors == 4);
    plan = plan_of(&g2, &g1, list, list, N, control, 1 << 30);
    CHECK(lane_copy(up, &plan, &progress) == 0 && progress.descriptors == 4);
    for (int i = 0; i < N; i++) {
        CHECK(holds(&g2, i, i));
    }
    lane_close(down);
    lane_close(up);
    destroy(&g1);
    destroy(&g2);
}

static void checksums_are_those_of_the_blocks(void) {
    enum { N = 9 };
    struct memory g1 = make(0, 1, N, 3, 30000, 0), g2 = make(0, 0, N, 3, 30000, 0);
    struct lane *down = open_lane(0, 0), *up = open_lane(0, 1);
    struct lane_progress progress;
    int64_t control[2], src[N], dst[N];
    uint64_t sums[N], again[N];
    unsigned seed = 5;
    shuffle(src, N, &seed);
    shuffle(dst, N, &seed);
    memset(sums, 0, sizeof sums);
    for (int i = 0; i < N; i++) {
        put(&g1, i, i);
    }
    struct lane_plan plan = plan_of(&g1, &g2, src, dst, N, control, 40000);
    plan.sums = sums;
    CHECK(lane_copy(down, &plan, &progress) == 0);
    plan = plan_of(&g2, &g1, dst, src, N, control, 1 << 20);
    plan.sums = again;
    CHECK(lane_copy(up, &plan, &progress) == 0);
    for (int i = 0; i < N; i++) {
        struct xxh3 sum;
        xxh3_begin(&sum);
        xxh3_add(&sum, (char *)(uintptr_t)(g2.base + (uint64_t)(dst[i] * g2.slot_bytes)), (size_t)g2.slot_bytes);
        CHECK(sums[i] == xxh3_end(&sum) && again[i] == sums[i]);
    }
    lane_close(down);
    lane_close(up);
    destroy(&g1);
    destroy(&g2);
}

static void at_most_two_chunks_are_with_the_device(void) {
    enum { N = 32 };
    struct memory g1 = make(0, 1, N, 2, 4096, 0), g2 = make(0, 0, N, 2, 4096, 0);
    struct lane *down = open_lane(0, 0);
    int64_t control[2], list[N], before = counts().batches, two = cuda.call.batch_12 ? 2 : 8;
    for (int i = 0; i < N; i++) {
        list[i] = i;
    }
    struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, 2 * g1.slot_bytes);
    struct running r = {.lane = down, .plan = &plan};
    fake_hold(1);
    start(&r);
    while (counts().batches < before + two) {
        usleep(500);
    }
    usleep(20000);
    CHECK(counts().batches == before + two && load(&control[0]) == 0);
    fake_hold(0);
    CHECK(finish(&r) == 0 && control[0] == N && r.progress.chunks == N / 2);
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
}

static void chunks_become_as_long_as_the_device_is_fast(void) {
    enum { N = 512 };
    struct memory g1 = make(0, 1, N, 1, 1 << 17, 0), g2 = make(0, 0, N, 1, 1 << 17, 0); /* 64 MiB */
    struct lane *down = open_lane(0, 0);
    struct lane_progress progress;
    int64_t control[2], list[N];
    unsigned seed = 2;
    shuffle(list, N, &seed);
    struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, 0);
    CHECK(lane_copy(down, &plan, &progress) == 0 && progress.chunks <= 8 << 20 && progress.chunks >= 2);
    fake_pace(1e9, 0, 0); /* 0.15 ms of it would be 150 kB: the least is 2 MiB */
    for (int i = 0; i < 2; i++) {
        plan = plan_of(&g1, &g2, list, list, N, control, 0);
        CHECK(lane_copy(down, &plan, &progress) == 0);
    }
    CHECK(progress.chunks == 32);
    fake_pace(0, 0, 0);
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
}

/* The engine's own copies: a copy engine goes on with one stream as long as that has more. */
static void small_copies_of_the_engine_get_in_between(void) {
    enum { N = 64 };
    struct memory g1 = make(0, 1, N, 1, 4096, 0), g2 = make(0, 0, N, 1, 4096, 0), small = make(0, 0, 1, 1, 4096, 0);
    struct lane *down = open_lane(0, 0);
    cuda_stream engine;
    int64_t control[2], list[N], before = counts().batches;
    for (int i = 0; i < N; i++) {
        list[i] = (i * 7) % N;
    }
    use(0);
    CHECK(cuda.call.stream_create(&engine, STREAM_NON_BLOCKING) == 0);
    fake_pace(0, 2000000, 0);
    struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, g1.slot_bytes);
    struct running r = {.lane = down, .plan = &plan};
    start(&r);
    while (counts().batches < before + 4) {
        usleep(200);
    }
    double begun = seconds();
    CHECK(cuda.call.copy(small.base, g1.base, 4096, engine) == 0 && cuStreamSynchronize(engine) == 0);
    CHECK(seconds() - begun < 0.04); /* of 0.12 that are left of the other copy */
    CHECK(finish(&r) == 0 && control[0] == N);
    fake_pace(0, 0, 0);
    cuda.call.stream_destroy(engine);
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
    destroy(&small);
}

static void wrong_memory_is_refused_and_the_lane_goes_on(void) {
    enum { N = 8 };
    struct memory g1 = make(0, 1, N, 3, 512, 0), pinned = make(0, 0, N, 3, 512, 0), loose = make(0, 0, N, 3, 512, -1);
    struct lane *down = open_lane(0, 0);
    struct lane_progress progress;
    int64_t control[2], list[N] = {0, 1, 2, 3, 4, 5, 6, 7}, far[N] = {0, 1, 2, 3, 4, 5, 6, 700000};
    loose.piece = loose.bytes;
    for (int i = 0; i < N; i++) {
        put(&pinned, i, 50);
        put(&g1, i, i);
    }
    struct lane_plan plan = plan_of(&g1, &loose, list, list, N, control, 1 << 20);
    CHECK(lane_copy(down, &plan, &progress) == 1 && control[0] == 0 && strstr(cuda_message, "INVALID_VALUE"));
    plan = plan_of(&g1, &pinned, far, list, N, control, 2 * g1.slot_bytes); /* the last chunk is wrong */
    CHECK(lane_copy(down, &plan, &progress) == 1 && control[0] == 6 && !down->dead);
    for (int i = 0; i < 6; i++) {
        CHECK(holds(&pinned, i, i));
    }
    CHECK(cuda.call.batch_12 ? holds(&pinned, 6, 50) : 1); /* a batch is refused as a whole */
    plan = plan_of(&g1, &pinned, list, list, N, control, 1 << 20);
    CHECK(lane_copy(down, &plan, &progress) == 0 && holds(&pinned, 7, 7));
    lane_close(down);
    destroy(&g1);
    destroy(&pinned);
    munmap((void *)(uintptr_t)loose.base, loose.bytes);
}

struct late { /* a kernel of the model: takes its time, then writes */
    struct memory *memory;
    int64_t slot;
    int value, ms;
};

static void write_late(void *argument) {
    struct late *late = argument;
    usleep((useconds_t)late->ms * 1000);
    put(late->memory, late->slot, late->value);
}

/* Stores wait for what writes their blocks, loads for what still uses theirs; with a mark of another stream it goes wrong. */
static void copies_wait_for_what_the_engine_was_told_before(void) {
    struct memory g1 = make(0, 1, 4, 3, 512, 0), g2 = make(0, 0, 4, 3, 512, 0);
    struct lane *down = open_lane(0, 0), *up = open_lane(0, 1);
    struct lane_progress progress;
    void *engine;
    int64_t control[2], one[1] = {1};
    use(0);
    CHECK(cuStreamCreate(&engine, 1) == 0);
    for (int round = 0; round < 9; round++) {
        int marked = round > 0;
        struct cuda_mark *mark = NULL;
        put(&g1, 1, 5);
        put(&g2, 1, 60);
        struct late kv = {&g1, 1, 6, marked ? 5 : 40};
        CHECK(cuLaunchHostFunc(engine, write_late, &kv) == 0);
        struct lane_plan plan = plan_of(&g1, &g2, one, one, 1, control, 1 << 20);
        CHECK(cuda_mark(&cuda, 0, (uint64_t)(uintptr_t)engine, &mark) == 0);
        plan.after = marked ? mark : nothing_told;
        CHECK(lane_copy(down, &plan, &progress) == 0);
        CHECK(holds(&g2, 1, marked ? 6 : 5) && (!marked || progress.waited_ns > 1000000));
        cuda_unmark(&cuda, mark);
        cuStreamSynchronize(engine);

        struct late zero = {&g1, 1, 0, marked ? 5 : 40};
        put(&g2, 1, 61);
        CHECK(cuLaunchHostFunc(engine, write_late, &zero) == 0);
        plan = plan_of(&g2, &g1, one, one, 1, control, 1 << 20);
        CHECK(cuda_mark(&cuda, 0, (uint64_t)(uintptr_t)engine, &mark) == 0);
        plan.after = marked ? mark : nothing_told;
        CHECK(lane_copy(up, &plan, &progress) == 0);
        cuStreamSynchronize(engine);
        CHECK(holds(&g1, 1, marked ? 61 : 0));
        cuda_unmark(&cuda, mark);
    }
    lane_close(down);
    lane_close(up);
    cuda.call.stream_destroy(engine);
    destroy(&g1);
    destroy(&g2);
}

/* The fake sees it, too, where the engine's work is declared and its data are early. */
static void work_that_is_not_waited_for_is_a_mistake(void) {
    struct memory g1 = make(0, 1, 4, 1, 512, 0), g2 = make(0, 0, 4, 1, 512, 0);
    struct lane *lanes[] = {open_lane(0, 0), open_lane(0, 1)};
    struct lane_progress progress;
    void *engine;
    int64_t control[2], one[1] = {1};
    use(0);
    CHECK(cuStreamCreate(&engine, 1) == 0);
    uint64_t at = (uint64_t)(g1.address[0] + g1.stride[0]), size = 512, other = (uint64_t)(g1.address[0] + 2 * g1.stride[0]);
    for (int up = 0; up < 2; up++) {
        for (int writes = 0; writes < 2; writes++) {
            for (int marked = 0; marked < 3; marked++) { /* 2: work on another block */
                struct cuda_mark *mark;
                int64_t before = counts().mistakes;
                int32_t flag = writes;
                CHECK(fake_work(engine, marked == 2 ? &other : &at, &size, &flag, 1, 20000000) == 0);
                struct lane_plan plan = up ? plan_of(&g2, &g1, one, one, 1, control, 1 << 20)
                                           : plan_of(&g1, &g2, one, one, 1, control, 1 << 20);
                CHECK(cuda_mark(&cuda, 0, (uint64_t)(uintptr_t)engine, &mark) == 0);
                plan.after = marked == 1 ? mark : nothing_told;
                CHECK(lane_copy(lanes[up], &plan, &progress) == 0);
                CHECK((counts().mistakes > before) == (marked == 0 && (up || writes)));
                cuda_unmark(&cuda, mark);
                cuStreamSynchronize(engine);
            }
        }
    }
    fake_hold(1); /* and work that begins before the copy has ended, as without a fence */
    struct lane_plan plan = plan_of(&g1, &g2, one, one, 1, control, 1 << 20);
    struct running r = {.lane = lanes[0], .plan = &plan};
    struct counts before = counts();
    int32_t writes = 1;
    start(&r);
    while (counts().batches == before.batches) {
        usleep(500);
    }
    CHECK(fake_work(engine, &at, &size, &writes, 1, 0) == 0 && counts().mistakes == before.mistakes + 1);
    fake_hold(0);
    CHECK(finish(&r) == 0);
    lane_close(lanes[0]);
    lane_close(lanes[1]);
    cuda.call.stream_destroy(engine);
    destroy(&g1);
    destroy(&g2);
}

static void a_stopped_copy_has_copied_a_prefix_and_can_go_on(int64_t chunk) {
    enum { N = 60 };
    struct memory g1 = make(0, 1, N, 2, 4096, 0), g2 = make(0, 0, N, 2, 4096, 0);
    struct lane *down = open_lane(0, 0);
    int64_t control[2], list[N];
    for (int i = 0; i < N; i++) {
        list[i] = N - 1 - i;
        put(&g1, i, i);
        put(&g2, i, 99);
    }
    fake_pace(0, 1000000, 0);
    struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, chunk);
    struct running r = {.lane = down, .plan = &plan};
    int64_t before = counts().batches;
    start(&r);
    while (counts().batches < before + 8) {
        usleep(200);
    }
    store(&control[1], 1);
    CHECK(finish(&r) == 0 && control[0] > 0 && control[0] < N);
    for (int i = 0; i < control[0]; i++) {
        CHECK(holds(&g2, list[i], (int)list[i]));
    }
    for (int64_t i = control[0] + 1; i < N; i++) {
        CHECK(holds(&g2, list[i], 99) || i < control[0] + chunk / g1.slot_bytes);
    }
    fake_pace(0, 0, 0);
    control[1] = 0;
    CHECK(run_copy(&r) == NULL && r.result == 0 && control[0] == N);
    for (int i = 0; i < N; i++) {
        CHECK(holds(&g2, i, i));
    }
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
}

static void a_stop_does_not_wait_for_the_engine(void) {
    struct memory g1 = make(0, 1, 2, 1, 512, 0), g2 = make(0, 0, 2, 1, 512, 0);
    struct lane *down = open_lane(0, 0);
    struct cuda_mark *mark;
    void *engine;
    int64_t control[2], one[1] = {1}, before = counts().batches;
    use(0);
    CHECK(cuStreamCreate(&engine, 1) == 0);
    CHECK(fake_work(engine, NULL, NULL, NULL, 0, 300000000) == 0 && cuda_mark(&cuda, 0, (uint64_t)(uintptr_t)engine, &mark) == 0);
    struct lane_plan plan = plan_of(&g1, &g2, one, one, 1, control, 1 << 20);
    plan.after = mark;
    struct running r = {.lane = down, .plan = &plan};
    double begun = seconds();
    start(&r);
    usleep(20000);
    store(&control[1], 1);
    CHECK(finish(&r) == 0 && control[0] == 0 && seconds() - begun < 0.2 && counts().batches == before);
    cuStreamSynchronize(engine);
    cuda_unmark(&cuda, mark);
    cuda.call.stream_destroy(engine);
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
}

/* Nothing that the driver answers is taken for success, and memory is left alone once the copy has returned. */
static void every_call_may_fail(void) {
    enum { N = 8 };
    static const char *const calls[] = {"cuStreamWaitEvent", "cuEventRecord", "cuEventQuery", "cuMemcpyBatchAsync_v2",
                                        "cuMemcpyBatchAsync", "cuMemcpyAsync", "cuMemcpy2DAsync_v2", "cuStreamQuery"};
    struct memory g1 = make(0, 1, N, 2, 512, 0), g2 = make(0, 0, N, 2, 512, 0);
    struct lane *down = open_lane(0, 0);
    struct lane_progress progress;
    int64_t control[2], list[N] = {0, 1, 2, 3, 4, 5, 6, 7};
    fake_pace(0, 300000, 0);
    for (size_t k = 0; k < sizeof calls / sizeof *calls; k++) {
        for (int nth = 1; nth < 12; nth++) {
            for (int i = 0; i < N; i++) {
                put(&g1, i, i + nth);
                put(&g2, i, 99);
            }
            struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, 2 * g1.slot_bytes);
            fake_fail(calls[k], nth, 999);
            int result = lane_copy(down, &plan, &progress);
            fake_fail("nothing", 0, 0);
            CHECK(result == 0 ? control[0] == N : result == 999 && strstr(cuda_message, "999"));
            int64_t copied = control[0];
            for (int i = 0; i < N; i++) {
                CHECK(i >= copied || holds(&g2, i, i + nth));
                put(&g2, i, 98);
            }
            usleep(1000);
            for (int i = 0; i < N; i++) {
                CHECK(holds(&g2, i, 98)); /* nothing lands late */
            }
            if (down->dead) {
                lane_close(down);
                down = open_lane(0, 0);
            }
        }
    }
    fake_pace(0, 0, 0);
    static const char *const opening[] = {"cuStreamCreate", "cuEventCreate", "cuDeviceGet"};
    for (size_t k = 0; k < 2; k++) {
        struct lane *none = (void *)1;
        fake_fail(opening[k], 2, 2);
        CHECK(lane_open(&cuda, 0, 0, &none) == 2 && !none);
    }
    struct cuda_mark *mark = (void *)1;
    fake_fail("cuEventRecord", 1, 2);
    CHECK(cuda_mark(&cuda, 0, 0, &mark) == 2 && !mark);
    fake_fail("cuStreamIsCapturing", 1, 2);
    CHECK(cuda_mark(&cuda, 0, 0, &mark) == 2 && !mark);
    fake_fail("nothing", 0, 0);
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
}

static void a_device_that_hangs_is_given_up_when_told_to(void) {
    struct memory g1 = make(0, 1, 8, 2, 512, 0), g2 = make(0, 0, 8, 2, 512, 0);
    struct lane *down = open_lane(0, 0);
    int64_t control[2], list[] = {0, 1, 2, 3, 4, 5, 6, 7}, before = counts().batches;
    struct lane_plan plan = plan_of(&g1, &g2, list, list, 8, control, 2 * g1.slot_bytes);
    struct running r = {.lane = down, .plan = &plan};
    fake_hold(1);
    start(&r);
    while (counts().batches < before + 2) {
        usleep(500);
    }
    store(&control[1], 1); /* a stop waits for the device */
    usleep(20000);
    store(&control[1], 2);
    CHECK(finish(&r) == -1 && control[0] == 0 && down->dead && strstr(r.message, "given up"));
    CHECK(run_copy(&r) == NULL && r.result == -1);
    lane_close(down); /* what it has goes on, so the memory has to stay */
    fake_hold(0);
    usleep(20000);
    destroy(&g1);
    destroy(&g2);
}

static void a_lost_context_ends_everything_and_says_so(void) {
    enum { N = 8 };
    struct memory g1 = make(0, 1, N, 2, 512, 0), g2 = make(0, 0, N, 2, 512, 0);
    struct lane *down = open_lane(0, 0), *none;
    struct lane_progress progress;
    struct cuda_mark *mark;
    int64_t control[2], list[N] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct lane_plan plan = plan_of(&g1, &g2, list, list, N, control, 2 * g1.slot_bytes);
    for (int i = 0; i < N; i++) {
        put(&g1, i, i);
        put(&g2, i, 99);
    }
    fake_pace(0, 2000000, 0); /* so that the end of each chunk is seen */
    fake_fail_copy(3, 700);
    CHECK(lane_copy(down, &plan, &progress) == 700 && strstr(cuda_message, "ILLEGAL_ADDRESS"));
    int64_t whole = cuda.call.batch_12 ? 4 : 0; /* where a row is a copy, the third is one of the first chunk */
    CHECK(control[0] == whole && down->dead && (!whole || holds(&g2, 3, 3)));
    fake_pace(0, 0, 0);
    CHECK(lane_copy(down, &plan, &progress) == -1);
    CHECK(cuda_mark(&cuda, 0, 0, &mark) == 700 && lane_open(&cuda, 0, 1, &none) == 700);
    fake_reset(); /* nothing is pinned any more */
    cuda_unpin(&cuda, g2.base);
    CHECK(cuda_pin(&cuda, 0, g2.base, g2.bytes, g2.piece) == 0);
    lane_close(down);
    down = open_lane(0, 0); /* and where it is lost while a copy waits for the engine */
    plan = plan_of(&g1, &g2, list, list, N, control, 1 << 20);
    fake_fail("cuEventQuery", 1, 700);
    CHECK(lane_copy(down, &plan, &progress) == 700 && control[0] == 0);
    fake_reset();
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
}

static void a_graph_that_is_captured_meanwhile_is_not_spoiled(void) {
    struct memory g1 = make(0, 1, 4, 2, 512, 0), g2 = make(0, 0, 4, 2, 512, 0), more = make(0, 0, 4, 2, 512, -1);
    struct lane *down = open_lane(0, 0);
    struct cuda_mark *mark;
    void *engine;
    int64_t control[2], list[] = {0, 1, 2, 3};
    struct lane_plan plan = plan_of(&g1, &g2, list, list, 4, control, g1.slot_bytes);
    struct running r = {.lane = down, .plan = &plan};
    fake_capture(1);
    start(&r); /* on a thread that has never copied before */
    CHECK(finish(&r) == 0 && control[0] == 4);
    CHECK(cuda_pin(&cuda, 0, more.base, more.bytes, more.bytes) == 0 && cuda_unpin(&cuda, more.base) == 0 && !fake_spoiled());
    fake_capture(0);
    use(0);
    CHECK(cuStreamCreate(&engine, 1) == 0);
    fake_capture_stream(engine, 1);
    CHECK(cuda_mark(&cuda, 0, (uint64_t)(uintptr_t)engine, &mark) == -1 && strstr(cuda_message, "graph"));
    fake_capture_stream(engine, 0);
    CHECK(cuda_mark(&cuda, 0, (uint64_t)(uintptr_t)engine, &mark) == 0);
    cuda_unmark(&cuda, mark);
    cuda.call.stream_destroy(engine);
    lane_close(down);
    destroy(&g1);
    destroy(&g2);
    munmap((void *)(uintptr_t)more.base, more.bytes);
}

static void *mark_from_here(void *argument) {
    cuda_context before = NULL, after = argument;
    struct cuda_mark *mark;
    CHECK(cuda.call.get_context(&before) == 0 && !before);
    CHECK(cuda_mark(&cuda, 0, 0, &mark) == 0 && cuda.call.get_context(&after) == 0 && !after);
    cuda_unmark(&cuda, mark);
    return NULL;
}

static void a_thread_of_somebody_else_keeps_its_context(void) {
    pthread_t thread;
    cuda_context context;
    use(1);
    cuda_context mine = NULL;
    cuda.call.get_context(&mine);
    struct cuda_mark *mark;
    CHECK(cuda_mark(&cuda, 0, 0, &mark) == 0 && cuda.call.get_context(&context) == 0 && context == mine);
    cuda_unmark(&cuda, mark);
    pthread_create(&thread, NULL, mark_from_here, &context);
    pthread_join(thread, NULL);
    use(0);
}

static void a_child_after_fork_is_told(void) {
    pid_t child = fork();
    if (child == 0) {
        struct cuda_mark *mark;
        _exit(cuda_mark(&cuda, 0, 0, &mark) && strstr(cuda_message, "fork") ? 7 : 8);
    }
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
}

static void memory_is_pinned_in_pieces_or_not_at_all(void) {
    uint64_t bytes = 513ull << 30, piece = 60ull << 30;
    void *room = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint64_t address = (uint64_t)(uintptr_t)room;
    if (room == MAP_FAILED) {
        printf("pinning in pieces: not tried, there is no room for %lu GiB of addresses\n", (unsigned long)(bytes >> 30));
        return;
    }
    CHECK(cuda_pin(&cuda, 0, address, bytes, bytes) == 2 && strstr(cuda_message, "OUT_OF_MEMORY"));
    CHECK(cuda_pin(&cuda, 0, address, bytes, piece) == 0 && cuda_unpin(&cuda, address) == 0);
    for (int nth = 1; nth < 10; nth += 4) { /* what was pinned before is given back, or the next one would fail */
        fake_fail("cuMemHostRegister_v2", nth, 2);
        CHECK(cuda_pin(&cuda, 0, address, bytes, piece) == 2);
        fake_fail("cuMemHostGetDevicePointer_v2", nth, 2);
        CHECK(cuda_pin(&cuda, 0, address, bytes, piece) == 2);
    }
    fake_fail("nothing", 0, 0);
    fake_alias(1);
    CHECK(cuda_pin(&cuda, 0, address, bytes, piece) == -1 && strstr(cuda_message, "other addresses"));
    fake_alias(0);
    CHECK(cuda_pin(&cuda, 0, address, bytes, piece) == 0 && cuda_unpin(&cuda, address) == 0 && cuda.num_pins == 0);
    munmap(room, bytes);
}

/* Threads, devices and directions at once, with stops and what follows them; each thread has slots of its own. */
struct stress {
    int device, to_device, id;
    double until;
    long plans, stops;
    struct memory *g1, *g2;
    void *engine;
    pthread_t thread;
};
struct stopper {
    int64_t *control;
    int us;
};

static void *stop_later(void *argument) {
    struct stopper *s = argument;
    usleep((useconds_t)s->us);
    store(&s->control[1], 1);
    return NULL;
}

static void *stress(void *argument) {
    enum { N = 24 };
    struct stress *s = argument;
    unsigned seed = (unsigned)s->id * 7 + 3;
    struct lane *lane = open_lane(s->device, s->to_device);
    struct memory *from = s->to_device ? s->g2 : s->g1, *to = s->to_device ? s->g1 : s->g2;
    int64_t control[2], src[N], dst[N], base = s->id % 2 * N;
    uint64_t sums[N];
    while (seconds() < s->until) {
        int n = 1 + rand_r(&seed) % N, value = rand_r(&seed) % 100, stops = rand_r(&seed) % 2;
        shuffle(src, N, &seed);
        shuffle(dst, N, &seed);
        for (int i = 0; i < N; i++) {
            src[i] += base;
            dst[i] += base;
            put(from, src[i], value + (int)src[i]);
            put(to, dst[i], 101);
        }
        struct cuda_mark *mark;
        struct lane_plan plan = plan_of(from, to, src, dst, n, control, 1 + rand_r(&seed) % (5 * (int)from->slot_bytes));
        plan.sums = sums;
        CHECK(cuda_mark(&cuda, s->device, (uint64_t)(uintptr_t)s->engine, &mark) == 0);
        plan.after = mark;
        struct stopper stopper = {control, rand_r(&seed) % 3000};
        struct running r = {.lane = lane, .plan = &plan};
        pthread_t thread;
        if (stops) {
            pthread_create(&thread, NULL, stop_later, &stopper);
        }
        CHECK(run_copy(&r) == NULL && r.result == 0);
        for (int i = 0; i < control[0]; i++) {
            CHECK(holds(to, dst[i], value + (int)src[i]));
        }
        if (stops) {
            pthread_join(thread, NULL);
            s->stops += control[0] < n;
            control[1] = 0;
            CHECK(run_copy(&r) == NULL && r.result == 0);
        }
        CHECK(control[0] == n);
        for (int i = 0; i < N; i++) {
            CHECK(holds(to, dst[i], i < n ? value + (int)src[i] : 101));
        }
        cuda_unmark(&cuda, mark);
        s->plans++;
    }
    lane_close(lane);
    return NULL;
}

static void many_lanes_at_once(double duration) {
    enum { T = 4 };
    struct stress all[T];
    struct memory g1[2], g2[2];
    void *engines[2];
    fake_pace(2e9, 20000, 100000);
    for (int d = 0; d < 2; d++) {
        g1[d] = make(d, 1, 48, 3, 2048, 0);
        g2[d] = make(0, 0, 48, 3, 2048, 5); /* pinned once, for all devices */
        use(d);
        CHECK(cuStreamCreate(&engines[d], 1) == 0);
    }
    for (int t = 0; t < T; t++) {
        all[t] = (struct stress){.device = t / 2, .to_device = t % 2, .id = t, .until = seconds() + duration,
                                 .g1 = &g1[t / 2], .g2 = &g2[t / 2], .engine = engines[t / 2]};
        pthread_create(&all[t].thread, NULL, stress, &all[t]);
    }
    long plans = 0, stops = 0;
    for (int t = 0; t < T; t++) {
        pthread_join(all[t].thread, NULL);
        plans += all[t].plans;
        stops += all[t].stops;
    }
    printf("%ld copies at once in four lanes, %ld stopped in the middle\n", plans, stops);
    CHECK(plans > 0 && (stops > 0 || duration < 1));
    fake_pace(0, 0, 0);
    for (int d = 0; d < 2; d++) {
        use(d);
        cuda.call.stream_destroy(engines[d]);
        destroy(&g1[d]);
        destroy(&g2[d]);
    }
}

int main(int argc, char **argv) {
    CHECK(argc == 3 && cuda_open(&cuda, "/nowhere/libcuda.so.1", INT_MAX) == -1 && strstr(cuda_message, "nowhere"));
    CHECK(cuda_open(&cuda, "libc.so.6", INT_MAX) == -1 && strstr(cuda_message, "cuInit"));
    bind_fake(argv[1]);
    fake_devices(0, 1);
    CHECK(cuda_open(&cuda, argv[1], INT_MAX) == 100 && strstr(cuda_message, "NO_DEVICE"));
    fake_devices(2, 1);
    CHECK(cuda_open(&cuda, argv[1], INT_MAX) == 0);
    CHECK(cuda_mark(&cuda, 0, 0, &nothing_told) == 0 && cuda_mark(&cuda, 9, 0, &(struct cuda_mark *){NULL}) == 101);
    printf("CUDA %d\n", cuda.version);
    scattered_rows_land_where_they_belong(PLANES, 1000, 3000);
    scattered_rows_land_where_they_belong(PLANES, 1000, 1 << 20);
    scattered_rows_land_where_they_belong(1, 1 << 16, 0);
    scattered_rows_land_where_they_belong(2, 1, 1);
    even = 1;
    scattered_rows_land_where_they_belong(PLANES, 1000, 3000);
    scattered_rows_land_where_they_belong(PLANES, 1000, 12345);
    scattered_rows_land_where_they_belong(2, 300, 1 << 20);
    checksums_are_those_of_the_blocks();
    a_stopped_copy_has_copied_a_prefix_and_can_go_on(3 * 4096);
    even = 0;
    a_block_of_even_planes_is_one_copy();
    chunks_have_the_bytes_asked_for_whatever_a_block_has();
    more_rows_than_one_call_takes();
    neighbours_are_one_row_but_never_across_registrations();
    checksums_are_those_of_the_blocks();
    at_most_two_chunks_are_with_the_device();
    chunks_become_as_long_as_the_device_is_fast();
    small_copies_of_the_engine_get_in_between();
    copies_wait_for_what_the_engine_was_told_before();
    a_stopped_copy_has_copied_a_prefix_and_can_go_on(2 * (2 * 4096 + 8));
    a_stopped_copy_has_copied_a_prefix_and_can_go_on(5000);
    a_stop_does_not_wait_for_the_engine();
    a_graph_that_is_captured_meanwhile_is_not_spoiled();
    a_thread_of_somebody_else_keeps_its_context();
    a_child_after_fork_is_told();
    memory_is_pinned_in_pieces_or_not_at_all();
    many_lanes_at_once(atof(argv[2]));
    even = 1;
    many_lanes_at_once(atof(argv[2]));
    even = 0;
    no_mistakes("what is right");
    work_that_is_not_waited_for_is_a_mistake();
    wrong_memory_is_refused_and_the_lane_goes_on();
    every_call_may_fail();
    even = 1;
    every_call_may_fail();
    even = 0;
    a_device_that_hangs_is_given_up_when_told_to();
    a_lost_context_ends_everything_and_says_so();
    printf("%d checks, %d failed\n", checks, failed);
    return failed != 0;
}
