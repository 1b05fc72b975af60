/* Doubly linked lists over slot numbers, for the eviction orders in kvbm.policy.
 *
 * An order moves a run of some 24 blocks at a time. Python and numpy cost a microsecond and more for each step on a run;
 * one call here costs a fraction of that for all of them, and each order is a few lines over these calls. What differs
 * between orders is data: which list a slot belongs to (level), how often it was used, and whether it may go (blocked).
 *
 * Nodes are numbers: 0 is none, then a sentinel per list, then a node per slot. A list is a ring through its sentinel,
 * so that taking a slot out, or joining two lists, never asks where a list begins. Zeroed memory is a valid start for
 * slots, so that making lists for ten million slots touches nothing.
 *
 * Everything runs under the GIL and calls no Python code in between. Slots are checked against the bounds before
 * anything changes. */

#include "run.h"
#include <stddef.h>
#include <stdlib.h>
#include <structmember.h>

enum { MAX_LISTS = 64, NEVER = 255, KEPT = 255 };

/* Second chances that one `pop` gives, beyond one per slot it was asked for: a bound on its time. */
enum { CHANCES = 4096 };

/* One node is touched as a whole: kept together it costs one cache miss. */
typedef struct {
    int32_t prev, next; /* nodes; 0 while in no list */
    int32_t parent;     /* node, 0: none; valid only while that node's life is `parent_life` */
    int32_t blocked;    /* reasons why it must not go: it is held, or has children */
    uint32_t life;      /* how many blocks this slot has had: a child must not unblock the successor of its parent */
    uint32_t parent_life;
    uint8_t uses;
    uint8_t passed; /* it was in its list's order and blocked when its turn came: it waits outside the list */
    uint8_t given;  /* it was popped, and neither forgotten nor put back yet */
} Node;

typedef struct {
    PyObject_HEAD
    Node *nodes;
    uint8_t *level; /* by slot: the list it is in or, while in none, belongs to. Apart, so that halving is one sweep */
    Py_ssize_t num_slots, num_lists, linked, size[MAX_LISTS];
} Lists;

/* -- nodes -- */

static inline int32_t node_of(const Lists *l, int64_t slot) { return (int32_t)(slot + l->num_lists + 1); }

static inline int64_t slot_of(const Lists *l, int32_t i) { return i - l->num_lists - 1; }

static inline int32_t sentinel(Py_ssize_t list) { return (int32_t)list + 1; }

static void link_before(Lists *l, int32_t at, int32_t i) {
    Node *nodes = l->nodes;
    nodes[i].prev = nodes[at].prev;
    nodes[i].next = at;
    nodes[nodes[at].prev].next = i;
    nodes[at].prev = i;
    l->size[l->level[slot_of(l, i)]]++;
    l->linked++;
}

static void to_tail(Lists *l, int32_t i) { link_before(l, sentinel(l->level[slot_of(l, i)]), i); }

static void to_front(Lists *l, int32_t i) { link_before(l, l->nodes[sentinel(l->level[slot_of(l, i)])].next, i); }

static void unlink_node(Lists *l, int32_t i) {
    Node *node = &l->nodes[i];
    l->nodes[node->prev].next = node->next;
    l->nodes[node->next].prev = node->prev;
    node->prev = node->next = 0;
    l->size[l->level[slot_of(l, i)]]--;
    l->linked--;
}

/* The node of its parent, if that is still the same block; else 0. */
static int32_t parent_of(const Lists *l, int32_t i) {
    int32_t parent = l->nodes[i].parent;
    return parent && l->nodes[parent].life == l->nodes[i].parent_life ? parent : 0;
}

/* A slot that was passed over is older than all that is in its list: unblocked, it is the first. */
static void unblock(Lists *l, int32_t i) {
    Node *node = &l->nodes[i];
    if (--node->blocked == 0 && node->passed) {
        node->passed = 0;
        to_front(l, i);
    }
}

static void give(Lists *l, int32_t i) {
    l->nodes[i].given = 1;
    int32_t parent = parent_of(l, i);
    if (parent) {
        unblock(l, parent);
    }
}

/* Undo `give`. */
static void take_back(Lists *l, int32_t i) {
    l->nodes[i].given = 0;
    int32_t parent = parent_of(l, i);
    if (parent) {
        l->nodes[parent].blocked++;
    }
}

/* -- what a method does to one slot; 0 where it must not be done -- */

static int append_one(Lists *l, int32_t i, Py_ssize_t Py_UNUSED(unused)) {
    if (l->nodes[i].next || l->nodes[i].passed) {
        return 0;
    }
    if (l->nodes[i].given) {
        take_back(l, i);
    }
    to_tail(l, i);
    return 1;
}

static int remove_one(Lists *l, int32_t i, Py_ssize_t Py_UNUSED(unused)) {
    if (l->nodes[i].next) {
        unlink_node(l, i);
        return 1;
    }
    int waited = l->nodes[i].passed;
    l->nodes[i].passed = 0;
    return waited;
}

static int hold_one(Lists *l, int32_t i, Py_ssize_t Py_UNUSED(unused)) {
    l->nodes[i].blocked++;
    return 1;
}

static int release_one(Lists *l, int32_t i, Py_ssize_t Py_UNUSED(unused)) {
    Node *node = &l->nodes[i];
    if (node->given) {
        take_back(l, i);
    } else if (node->blocked) {
        node->blocked--;
    } else {
        return 0;
    }
    if (!node->blocked && !node->next) {
        node->passed = 0;
        to_front(l, i);
    }
    return 1;
}

static int place_one(Lists *l, int32_t i, Py_ssize_t level) {
    if (level >= l->num_lists || l->nodes[i].next) {
        return 0;
    }
    l->level[slot_of(l, i)] = (uint8_t)level;
    return 1;
}

static int climb_one(Lists *l, int32_t i, Py_ssize_t Py_UNUSED(unused)) {
    int64_t slot = slot_of(l, i);
    return place_one(l, i, l->level[slot] + (l->level[slot] + 1 < l->num_lists));
}

static int use_one(Lists *l, int32_t i, Py_ssize_t most) {
    l->nodes[i].uses += l->nodes[i].uses < most;
    return 1;
}

static int forget_one(Lists *l, int32_t i, Py_ssize_t Py_UNUSED(unused)) {
    Node *node = &l->nodes[i];
    int32_t parent = parent_of(l, i);
    if (node->next) {
        unlink_node(l, i);
    }
    if (parent && !node->given) {
        unblock(l, parent);
    }
    *node = (Node){.life = node->life + 1};
    l->level[slot_of(l, i)] = 0;
    return 1;
}

static int adopt_one(Lists *l, int32_t i, Py_ssize_t parent) {
    Node *node = &l->nodes[i];
    if (parent >= 0) {
        if (node->parent || node_of(l, parent) == i) {
            return 0;
        }
        node->parent = node_of(l, parent);
        node->parent_life = l->nodes[node->parent].life;
        l->nodes[node->parent].blocked++;
    }
    return 1;
}

/* -- methods; _lists.pyi says what they do -- */

/* An integer in low..high, or -1 with ValueError (or what the conversion raised) set. */
static Py_ssize_t number_of(PyObject *object, const char *name, Py_ssize_t low, Py_ssize_t high) {
    Py_ssize_t number = PyNumber_AsSsize_t(object, NULL);
    if (number == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (number < low || number > high) {
        PyErr_Format(PyExc_ValueError, "%s must be in %zd..%zd", name, low, high);
        return -1;
    }
    return number;
}

/* Slots, or with `lowest` -1 parents of slots. */
static int slots_open(const Lists *l, PyObject *object, int64_t lowest, Run *run) {
    if (run_open(object, "slots", run) < 0) {
        return -1;
    }
    for (Py_ssize_t k = 0; k < run->n; k++) {
        if (run->at[k] < lowest || run->at[k] >= l->num_slots) {
            PyErr_Format(PyExc_ValueError, "slot %lld is not in 0..%zd", (long long)run->at[k], l->num_slots - 1);
            run_close(run);
            return -1;
        }
        __builtin_prefetch(&l->nodes[node_of(l, run->at[k])]);
    }
    return 0;
}

/* `step` on every slot, the last one first where `leaf_first`; each with its entry of `bytes` or `numbers`, or all with
 * `argument`. */
static inline PyObject *each(Lists *l, const Run *run, int (*step)(Lists *, int32_t, Py_ssize_t), int leaf_first,
                             const uint8_t *bytes, const int64_t *numbers, Py_ssize_t argument) {
    for (Py_ssize_t k = 0; k < run->n; k++) {
        Py_ssize_t at = leaf_first ? run->n - 1 - k : k;
        int64_t slot = run->at[at];
        if (!step(l, node_of(l, slot), bytes ? bytes[at] : numbers ? (Py_ssize_t)numbers[at] : argument)) {
            return PyErr_Format(PyExc_ValueError, "slot %lld is in a state that does not allow it", (long long)slot);
        }
    }
    Py_RETURN_NONE;
}

#define METHOD(name, leaf_first)                                                                                       \
    static PyObject *do_##name(Lists *l, PyObject *slots) {                                                            \
        Run run;                                                                                                       \
        if (slots_open(l, slots, 0, &run) < 0) {                                                                       \
            return NULL;                                                                                               \
        }                                                                                                              \
        PyObject *result = each(l, &run, name##_one, leaf_first, NULL, NULL, 0);                                       \
        run_close(&run);                                                                                               \
        return result;                                                                                                 \
    }

METHOD(append, 1)
METHOD(remove, 0)
METHOD(hold, 0)
METHOD(release, 0)
METHOD(climb, 0)

static PyObject *use(Lists *l, PyObject *const *args, Py_ssize_t count) {
    Run run;
    Py_ssize_t most;
    if (!count_is(count, 2, 2, "use") || (most = number_of(args[1], "most", 0, NEVER - 1)) < 0 ||
        slots_open(l, args[0], 0, &run) < 0) {
        return NULL;
    }
    PyObject *result = each(l, &run, use_one, 0, NULL, NULL, most);
    run_close(&run);
    return result;
}

static PyObject *place(Lists *l, PyObject *const *args, Py_ssize_t count) {
    Run run;
    if (!count_is(count, 2, 2, "place") || slots_open(l, args[0], 0, &run) < 0) {
        return NULL;
    }
    const uint8_t *levels = byte_each(args[1], "levels", run.n);
    PyObject *result = levels ? each(l, &run, place_one, 0, levels, NULL, 0) : NULL;
    run_close(&run);
    return result;
}

static PyObject *forget(Lists *l, PyObject *slots) {
    Run run;
    if (slots_open(l, slots, 0, &run) < 0) {
        return NULL;
    }
    PyObject *result = PyBytes_FromStringAndSize(NULL, run.n);
    for (Py_ssize_t k = 0; result && k < run.n; k++) {
        int32_t i = node_of(l, run.at[k]);
        PyBytes_AS_STRING(result)[k] = (char)(l->nodes[i].given ? l->level[run.at[k]] : KEPT);
        forget_one(l, i, 0);
    }
    run_close(&run);
    return result;
}

static PyObject *adopt(Lists *l, PyObject *const *args, Py_ssize_t count) {
    Run run, parents;
    if (!count_is(count, 2, 2, "adopt") || slots_open(l, args[0], 0, &run) < 0) {
        return NULL;
    }
    PyObject *result = NULL;
    if (slots_open(l, args[1], -1, &parents) == 0) {
        if (run.n != parents.n) {
            PyErr_Format(PyExc_ValueError, "%zd slots with %zd parents", run.n, parents.n);
        } else {
            /* All the new lives begin before the first of them is somebody's parent. */
            Py_XDECREF(each(l, &run, forget_one, 0, NULL, NULL, 0));
            result = each(l, &run, adopt_one, 0, NULL, parents.at, 0);
        }
        run_close(&parents);
    }
    run_close(&run);
    return result;
}

static PyObject *pop(Lists *l, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t list, n, above = NEVER, to = 0, got = 0;
    if (!count_is(count, 2, 4, "pop") || (list = number_of(args[0], "list", 0, l->num_lists - 1)) < 0 ||
        (n = number_of(args[1], "n", 0, PY_SSIZE_T_MAX)) < 0 ||
        (count > 2 && (above = number_of(args[2], "above", 0, NEVER)) < 0) ||
        (count > 3 && (to = number_of(args[3], "to", 0, l->num_lists - 1)) < 0)) {
        return NULL;
    }
    /* Those that have waited outside come back one by one, so more may come than are in the list now. */
    n = n < l->num_slots ? n : l->num_slots;
    PyObject *result = PyBytes_FromStringAndSize(NULL, n * (Py_ssize_t)sizeof(int64_t));
    if (!result) {
        return NULL;
    }
    int64_t *out = (int64_t *)PyBytes_AS_STRING(result);
    const Node *head = &l->nodes[sentinel(list)];
    for (Py_ssize_t chances = CHANCES + n; got < n && head->next != sentinel(list);) {
        int32_t i = head->next;
        Node *node = &l->nodes[i];
        __builtin_prefetch(&l->nodes[node->next]);
        if (!node->blocked && node->uses > above && chances-- == 0) {
            break;
        }
        unlink_node(l, i);
        if (node->blocked) {
            node->passed = 1;
        } else if (node->uses > above) {
            node->uses = (uint8_t)(to == list ? node->uses - 1 : 0);
            l->level[slot_of(l, i)] = (uint8_t)to;
            to_tail(l, i);
        } else {
            out[got++] = slot_of(l, i);
            give(l, i);
        }
    }
    if (got < n) {
        _PyBytes_Resize(&result, got * (Py_ssize_t)sizeof(int64_t)); /* NULL with the error set where it fails */
    }
    return result;
}

static PyObject *halve(Lists *l, PyObject *Py_UNUSED(ignored)) {
    for (Py_ssize_t list = 1; list < l->num_lists; list++) {
        int32_t from = sentinel(list), to = sentinel(list >> 1);
        Node *nodes = l->nodes;
        if (nodes[from].next == from) {
            continue;
        }
        nodes[nodes[from].next].prev = nodes[to].prev;
        nodes[nodes[to].prev].next = nodes[from].next;
        nodes[nodes[from].prev].next = to;
        nodes[to].prev = nodes[from].prev;
        nodes[from].prev = nodes[from].next = from;
        l->size[list >> 1] += l->size[list];
        l->size[list] = 0;
    }
    uint8_t *level = l->level, *end = level + l->num_slots;
    while (level < end) {
        *level++ >>= 1;
    }
    Py_RETURN_NONE;
}

static PyObject *size_of(Lists *l, PyObject *list) {
    Py_ssize_t which = number_of(list, "list", 0, l->num_lists - 1);
    return which < 0 ? NULL : PyLong_FromSsize_t(l->size[which]);
}

static Py_ssize_t length(Lists *l) { return l->linked; }

/* -- life of the object -- */

static int grow(Lists *l, Py_ssize_t num_slots) {
    size_t before = (size_t)(l->num_slots + l->num_lists + 1), after = (size_t)(num_slots + l->num_lists + 1);
    Node *nodes = realloc(l->nodes, after * sizeof(Node)); /* large ones move by their page tables, not by copying */
    if (nodes) {
        l->nodes = nodes;
        uint8_t *level = realloc(l->level, (size_t)num_slots + 1);
        if (level) {
            l->level = level;
            memset(nodes + before, 0, (after - before) * sizeof(Node));
            memset(level + l->num_slots, 0, (size_t)(num_slots - l->num_slots));
            l->num_slots = num_slots;
            return 0;
        }
    }
    PyErr_NoMemory();
    return -1;
}

static PyObject *resize(Lists *l, PyObject *argument) {
    Py_ssize_t num_slots = number_of(argument, "num_slots", l->num_slots, INT32_MAX - MAX_LISTS - 1);
    if (num_slots < 0 || grow(l, num_slots) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *new_lists(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    Py_ssize_t num_slots, num_lists = 1;
    if (!PyArg_ParseTuple(args, "n|n:Lists", &num_slots, &num_lists)) {
        return NULL;
    }
    if (num_slots < 0 || num_slots > INT32_MAX - MAX_LISTS - 1 || num_lists < 1 || num_lists > MAX_LISTS) {
        return PyErr_Format(PyExc_ValueError, "%zd slots in %zd lists: there are up to %d slots and 1..%d lists",
                            num_slots, num_lists, INT32_MAX - MAX_LISTS - 1, MAX_LISTS);
    }
    Lists *l = (Lists *)type->tp_alloc(type, 0);
    if (!l) {
        return NULL;
    }
    l->num_lists = num_lists;
    l->num_slots = num_slots;
    l->nodes = calloc((size_t)(num_slots + num_lists + 1), sizeof(Node));
    l->level = calloc((size_t)num_slots + 1, 1);
    if (!l->nodes || !l->level) {
        Py_DECREF(l);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t list = 0; list < num_lists; list++) {
        l->nodes[sentinel(list)].prev = l->nodes[sentinel(list)].next = sentinel(list);
    }
    return (PyObject *)l;
}

static void dealloc(Lists *l) {
    PyTypeObject *type = Py_TYPE(l);
    free(l->nodes);
    free(l->level);
    type->tp_free(l);
    Py_DECREF(type);
}

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL
#define ONE(function) (PyCFunction)(void (*)(void))function, METH_O

static PyMethodDef METHODS[] = {
    {"append", ONE(do_append), NULL},   {"remove", ONE(do_remove), NULL}, {"hold", ONE(do_hold), NULL},
    {"release", ONE(do_release), NULL}, {"place", FAST(place), NULL},        {"climb", ONE(do_climb), NULL},
    {"use", FAST(use), NULL},        {"adopt", FAST(adopt), NULL},        {"forget", ONE(forget), NULL},
    {"pop", FAST(pop), NULL},        {"size", ONE(size_of), NULL},        {"resize", ONE(resize), NULL},
    {"halve", (PyCFunction)(void (*)(void))halve, METH_NOARGS, NULL},     {NULL, NULL, 0, NULL},
};

static PyMemberDef MEMBERS[] = {
    {"num_slots", T_PYSSIZET, offsetof(Lists, num_slots), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot TYPE_SLOTS[] = {
    {Py_tp_new, new_lists}, {Py_tp_dealloc, dealloc}, {Py_tp_methods, METHODS}, {Py_tp_members, MEMBERS},
    {Py_sq_length, length}, {0, NULL},
};

static PyType_Spec SPEC = {"kvbm.native._lists.Lists", sizeof(Lists), 0, Py_TPFLAGS_DEFAULT, TYPE_SLOTS};

static int add_types(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &SPEC, NULL);
    int failed = !type || PyModule_AddType(module, (PyTypeObject *)type) < 0;
    Py_XDECREF(type);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, add_types}, {0, NULL}};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "kvbm.native._lists", NULL, 0, NULL, SLOTS, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__lists(void) { return PyModuleDef_Init(&MODULE); }
