/* What is remembered of blocks that may be long gone, by tag: how often each was asked for, and which left lately.
 *
 * Both are lossy and of a fixed size. A tag's counters, or its entry, lie in one cache line. Everything runs under the
 * GIL and calls no Python code in between. */

#include "run.h"
#include <stdlib.h>

enum { ROWS = 4, MOST = 15, LINE = 8, SAMPLES = 10, SPARE = 4 };

static const uint64_t LOW_BITS = 0x7777777777777777u; /* what may be left of sixteen counters shifted right by one */

/* Tags may be poor hashes (small integers in tests): the finaliser of splitmix64 spreads them. */
static inline uint64_t mix(int64_t tag) {
    uint64_t h = (uint64_t)tag + 0x9E3779B97F4A7C15u;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    return h ^ (h >> 31);
}

/* The upper half of `h` as a number below `n`. */
static inline uint64_t below(uint64_t h, uint64_t n) { return ((h >> 32) * n) >> 32; }

static Py_ssize_t capacity_of(PyObject *args, const char *format) {
    Py_ssize_t capacity;
    if (!PyArg_ParseTuple(args, format, &capacity)) {
        return -1;
    }
    if (capacity < 1 || capacity > INT32_MAX / SPARE) {
        PyErr_Format(PyExc_ValueError, "capacity must be in 1..%d", INT32_MAX / SPARE);
        return -1;
    }
    return capacity;
}

/* -- Sketch: a count-min sketch of four rows of 4-bit counters -- */

typedef struct {
    PyObject_HEAD
    uint64_t *words; /* lines of LINE words; each row has two words, 32 counters, in every line */
    uint64_t lines;
    Py_ssize_t capacity, additions;
} Sketch;

typedef struct {
    uint64_t *word[ROWS];
    int shift[ROWS];
} Counters;

static int lowest(const Sketch *s, int64_t tag, Counters *c) {
    uint64_t h = mix(tag), *line = s->words + below(h, s->lines) * LINE;
    int count = MOST;
    for (int row = 0; row < ROWS; row++, h >>= 5) {
        c->word[row] = line + 2 * row + (h & 1);
        c->shift[row] = (int)(h >> 1 & 15) * 4;
        int mine = (int)(*c->word[row] >> c->shift[row] & MOST);
        count = mine < count ? mine : count;
    }
    return count;
}

/* The lines of a run are far apart: asked for at once, they come at once. */
static int sketch_open(const Sketch *s, PyObject *tags, Run *run) {
    if (run_open(tags, "tags", run) < 0) {
        return -1;
    }
    for (Py_ssize_t k = 0; k < run->n; k++) {
        __builtin_prefetch(s->words + below(mix(run->at[k]), s->lines) * LINE);
    }
    return 0;
}

static PyObject *sketch_add(Sketch *s, PyObject *tags) {
    Run run;
    if (sketch_open(s, tags, &run) < 0) {
        return NULL;
    }
    for (Py_ssize_t k = 0; k < run.n; k++) {
        Counters c;
        int count = lowest(s, run.at[k], &c);
        /* Only the lowest counters grow: the others are too high already, through tags that share them. */
        for (int row = 0; row < ROWS && count < MOST; row++) {
            if ((int)(*c.word[row] >> c.shift[row] & MOST) == count) {
                *c.word[row] += (uint64_t)1 << c.shift[row];
            }
        }
        if (++s->additions >= SAMPLES * s->capacity) {
            uint64_t *word = s->words, *end = word + s->lines * LINE;
            for (; word < end; word++) {
                *word = *word >> 1 & LOW_BITS;
            }
            s->additions /= 2;
        }
    }
    run_close(&run);
    Py_RETURN_NONE;
}

static PyObject *sketch_estimate(Sketch *s, PyObject *tags) {
    Run run;
    if (sketch_open(s, tags, &run) < 0) {
        return NULL;
    }
    PyObject *result = PyBytes_FromStringAndSize(NULL, run.n);
    for (Py_ssize_t k = 0; result && k < run.n; k++) {
        Counters c;
        PyBytes_AS_STRING(result)[k] = (char)lowest(s, run.at[k], &c);
    }
    run_close(&run);
    return result;
}

static PyObject *sketch_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    Py_ssize_t capacity = capacity_of(args, "n:Sketch");
    Sketch *s = capacity < 0 ? NULL : (Sketch *)type->tp_alloc(type, 0);
    if (!s) {
        return NULL;
    }
    /* Sixteen counters for each of `capacity` tags, four times what the paper takes: a tag seen once must not look as
     * if it had been seen twice. */
    s->capacity = capacity;
    s->lines = (uint64_t)(capacity + LINE - 1) / LINE;
    s->words = calloc(s->lines * LINE, sizeof(uint64_t));
    if (!s->words) {
        Py_DECREF(s);
        return PyErr_NoMemory();
    }
    return (PyObject *)s;
}

static void sketch_dealloc(Sketch *s) {
    PyTypeObject *type = Py_TYPE(s);
    free(s->words);
    type->tp_free(s);
    Py_DECREF(type);
}

/* -- Ghosts: which tags left lately -- */

/* A table without chains: two tags with the same place displace each other. */
typedef struct {
    uint32_t mark;  /* 31 bits of the tag's hash, and its kind */
    uint32_t stamp; /* the number of the addition */
} Ghost;

typedef struct {
    PyObject_HEAD
    Ghost *ghosts;
    uint32_t capacity, places, now;
} Ghosts;

static int ghosts_open(const Ghosts *g, PyObject *tags, Run *run) {
    if (run_open(tags, "tags", run) < 0) {
        return -1;
    }
    for (Py_ssize_t k = 0; k < run->n; k++) {
        __builtin_prefetch(&g->ghosts[below(mix(run->at[k]), g->places)]);
    }
    return 0;
}

static PyObject *ghosts_add(Ghosts *g, PyObject *const *args, Py_ssize_t count) {
    Run run;
    if (!count_is(count, 2, 2, "add") || ghosts_open(g, args[0], &run) < 0) {
        return NULL;
    }
    const uint8_t *kinds = byte_each(args[1], "kinds", run.n);
    if (!kinds) {
        run_close(&run);
        return NULL;
    }
    for (Py_ssize_t k = 0; k < run.n; k++) {
        if (kinds[k] < 2) {
            uint64_t h = mix(run.at[k]);
            g->ghosts[below(h, g->places)] = (Ghost){(uint32_t)h << 1 | kinds[k], g->now++};
        }
    }
    run_close(&run);
    Py_RETURN_NONE;
}

static PyObject *ghosts_take(Ghosts *g, PyObject *tags) {
    Run run;
    if (ghosts_open(g, tags, &run) < 0) {
        return NULL;
    }
    PyObject *result = PyBytes_FromStringAndSize(NULL, run.n);
    for (Py_ssize_t k = 0; result && k < run.n; k++) {
        uint64_t h = mix(run.at[k]);
        Ghost *ghost = &g->ghosts[below(h, g->places)];
        int is_there = ghost->mark >> 1 == ((uint32_t)h << 1) >> 1 && g->now - ghost->stamp <= g->capacity;
        PyBytes_AS_STRING(result)[k] = (char)(is_there ? 1 + (ghost->mark & 1) : 0);
        if (is_there) {
            ghost->stamp = g->now - g->capacity - 1;
        }
    }
    run_close(&run);
    return result;
}

static PyObject *ghosts_new(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    Py_ssize_t capacity = capacity_of(args, "n:Ghosts");
    Ghosts *g = capacity < 0 ? NULL : (Ghosts *)type->tp_alloc(type, 0);
    if (!g) {
        return NULL;
    }
    g->capacity = (uint32_t)capacity;
    g->places = g->capacity * SPARE;
    g->now = g->capacity + 1; /* a zeroed entry is too old to count */
    g->ghosts = calloc(g->places, sizeof(Ghost));
    if (!g->ghosts) {
        Py_DECREF(g);
        return PyErr_NoMemory();
    }
    return (PyObject *)g;
}

static void ghosts_dealloc(Ghosts *g) {
    PyTypeObject *type = Py_TYPE(g);
    free(g->ghosts);
    type->tp_free(g);
    Py_DECREF(type);
}

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL
#define ONE(function) (PyCFunction)(void (*)(void))function, METH_O

static PyMethodDef SKETCH_METHODS[] = {
    {"add", ONE(sketch_add), NULL}, {"estimate", ONE(sketch_estimate), NULL}, {NULL, NULL, 0, NULL}};

static PyMethodDef GHOSTS_METHODS[] = {
    {"add", FAST(ghosts_add), NULL}, {"take", ONE(ghosts_take), NULL}, {NULL, NULL, 0, NULL}};

static PyType_Slot SKETCH_SLOTS[] = {
    {Py_tp_new, sketch_new}, {Py_tp_dealloc, sketch_dealloc}, {Py_tp_methods, SKETCH_METHODS}, {0, NULL}};

static PyType_Slot GHOSTS_SLOTS[] = {
    {Py_tp_new, ghosts_new}, {Py_tp_dealloc, ghosts_dealloc}, {Py_tp_methods, GHOSTS_METHODS}, {0, NULL}};

static PyType_Spec SPECS[] = {
    {"kvbm.native._sketch.Sketch", sizeof(Sketch), 0, Py_TPFLAGS_DEFAULT, SKETCH_SLOTS},
    {"kvbm.native._sketch.Ghosts", sizeof(Ghosts), 0, Py_TPFLAGS_DEFAULT, GHOSTS_SLOTS},
};

static int add_types(PyObject *module) {
    for (int k = 0; k < 2; k++) {
        PyObject *type = PyType_FromModuleAndSpec(module, &SPECS[k], NULL);
        int failed = !type || PyModule_AddType(module, (PyTypeObject *)type) < 0;
        Py_XDECREF(type);
        if (failed) {
            return -1;
        }
    }
    return 0;
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, add_types}, {0, NULL}};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "kvbm.native._sketch", NULL, 0, NULL, SLOTS, NULL, NULL,
                                    NULL};

PyMODINIT_FUNC PyInit__sketch(void) { return PyModuleDef_Init(&MODULE); }
