/* The state of every slot of a pool, and which key is in which slot.
 *
 * Python decides what happens (kvbm.blocks.ledger); this does it for a whole run of blocks in one call. Measured on one
 * request of 24 blocks, dicts and numpy took 50 to 70 microseconds, mostly the fixed price of some forty numpy calls.
 *
 * One flat array of slots; one hash table from keys to slots, allocated once for the capacity, so that no insertion
 * ever stops to rehash. Keys are bytes objects of the caller's, referenced, not copied. Neither array is known to the
 * garbage collector: nothing in them can form a cycle, and a million blocks cost it nothing.
 *
 * Every method runs under the GIL from its first to its last step, and no step runs Python code. Runs of slots are
 * `bytes` of int64: immutable, cheap to make, and numpy reads them in place. Every argument is checked before anything
 * changes. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>

/* A registered slot with h holds is REGISTERED + h. An orphan was un-published while it was held, with h holds it is
 * ORPHANED + h; the last to let go frees it. A retired slot is outside the pool's present size. */
enum { RETIRED = -4, FREE = -3, WRITABLE = -2, STAGED = -1, REGISTERED = 0, ORPHANED = 1 << 30 };

typedef struct {
    PyObject *key;    /* while staged or registered, unless cleared meanwhile */
    PyObject *parent; /* the key before it in its prompt, or NULL */
    int32_t state;
    uint32_t hash; /* low half of the key's */
} Slot;

/* Open addressing, linear probing, at most half full; no tombstones: a removal closes the gap. Staged and registered
 * slots are both in it, so that registering moves nothing; the same key may be staged several times. */
typedef struct {
    uint32_t hash;
    int32_t slot; /* -1: empty */
} Entry;

typedef struct {
    PyObject_HEAD
    Slot *slots;
    int32_t *free; /* a stack of `count.free` slots */
    Entry *index;
    uint32_t mask;
    Py_ssize_t capacity;
    struct {
        Py_ssize_t free, writable, staged, registered, active, orphaned, retired;
    } count;
} Table;

static inline int is_registered(int32_t state) { return state >= REGISTERED && state < ORPHANED; }

static inline int is_held(int32_t state) { return state > REGISTERED && state != ORPHANED; }

/* -- arguments and results -- */

typedef struct {
    const int64_t *at;
    Py_ssize_t n;
} Run;

static int run_of(const Table *t, PyObject *object, Run *run) {
    if (!PyBytes_CheckExact(object) || PyBytes_GET_SIZE(object) % sizeof(int64_t)) {
        PyErr_Format(PyExc_TypeError, "slots must be bytes of int64, got %R", (PyObject *)Py_TYPE(object));
        return -1;
    }
    run->at = (const int64_t *)PyBytes_AS_STRING(object);
    run->n = PyBytes_GET_SIZE(object) / (Py_ssize_t)sizeof(int64_t);
    for (Py_ssize_t i = 0; i < run->n; i++) {
        if (run->at[i] < 0 || run->at[i] >= t->capacity) {
            PyErr_Format(PyExc_ValueError, "slot %lld is not in 0..%zd", (long long)run->at[i], t->capacity - 1);
            return -1;
        }
        __builtin_prefetch(&t->slots[run->at[i]]);
    }
    return 0;
}

static PyObject *wrong_state(int64_t slot, int32_t state, const char *wanted) {
    PyErr_Format(PyExc_ValueError, "slot %lld is in state %d, not %s", (long long)slot, (int)state, wanted);
    return NULL;
}

/* Whether every slot of a run is in state `low` to `high`, and none is there twice: a marked one is in no such state. */
static int all_in(Table *t, const Run *run, int32_t low, int32_t high, const char *wanted) {
    enum { MARK = 1 << 30 };
    Py_ssize_t i = 0;
    for (; i < run->n && t->slots[run->at[i]].state >= low && t->slots[run->at[i]].state <= high; i++) {
        t->slots[run->at[i]].state ^= MARK;
    }
    int64_t wrong = i < run->n ? run->at[i] : -1;
    int twice = 0;
    for (Py_ssize_t j = 0; j < i; j++) {
        t->slots[run->at[j]].state ^= MARK;
        twice |= run->at[j] == wrong;
    }
    if (wrong >= 0 && twice) {
        PyErr_Format(PyExc_ValueError, "slot %lld is twice among the slots", (long long)wrong);
    } else if (wrong >= 0) {
        wrong_state(wrong, t->slots[wrong].state, wanted);
    }
    return wrong < 0;
}

static PyObject *new_run(Py_ssize_t n) { return PyBytes_FromStringAndSize(NULL, n * (Py_ssize_t)sizeof(int64_t)); }

static int64_t *slots_in(PyObject *run) { return (int64_t *)PyBytes_AS_STRING(run); }

/* A run shortened to `n` slots; takes the reference. */
static PyObject *shorten(PyObject *run, Py_ssize_t n) {
    Py_ssize_t size = n * (Py_ssize_t)sizeof(int64_t);
    if (PyBytes_GET_SIZE(run) != size && _PyBytes_Resize(&run, size) < 0) {
        return NULL;
    }
    return run;
}

static int key_hash(PyObject *key, uint32_t *hash) {
    if (!PyBytes_CheckExact(key)) {
        PyErr_Format(PyExc_TypeError, "a key must be bytes, got %R", (PyObject *)Py_TYPE(key));
        return -1;
    }
    *hash = (uint32_t)PyObject_Hash(key); /* kept in the object; cannot fail for bytes */
    return 0;
}

static inline int same_key(PyObject *a, PyObject *b) {
    return a == b || (PyBytes_GET_SIZE(a) == PyBytes_GET_SIZE(b) &&
                      memcmp(PyBytes_AS_STRING(a), PyBytes_AS_STRING(b), (size_t)PyBytes_GET_SIZE(a)) == 0);
}

/* -- the hash table -- */

static int32_t find_registered(const Table *t, PyObject *key, uint32_t hash) {
    for (uint32_t i = hash & t->mask; t->index[i].slot >= 0; i = (i + 1) & t->mask) {
        if (t->index[i].hash == hash) {
            const Slot *slot = &t->slots[t->index[i].slot];
            if (is_registered(slot->state) && same_key(slot->key, key)) {
                return t->index[i].slot;
            }
        }
    }
    return -1;
}

/* Registered or staged. */
static int is_known(const Table *t, PyObject *key, uint32_t hash) {
    for (uint32_t i = hash & t->mask; t->index[i].slot >= 0; i = (i + 1) & t->mask) {
        if (t->index[i].hash == hash && same_key(t->slots[t->index[i].slot].key, key)) {
            return 1;
        }
    }
    return 0;
}

static void index_add(Table *t, int32_t slot) {
    uint32_t hash = t->slots[slot].hash, i = hash & t->mask;
    while (t->index[i].slot >= 0) {
        i = (i + 1) & t->mask;
    }
    t->index[i] = (Entry){hash, slot};
}

static void index_remove(Table *t, int32_t slot) {
    uint32_t gap = t->slots[slot].hash & t->mask;
    while (t->index[gap].slot != slot) {
        gap = (gap + 1) & t->mask;
    }
    /* Whatever follows moves up, unless it would pass the place where its search begins. */
    for (uint32_t i = (gap + 1) & t->mask; t->index[i].slot >= 0; i = (i + 1) & t->mask) {
        uint32_t home = t->index[i].hash & t->mask;
        if (((i - home) & t->mask) >= ((i - gap) & t->mask)) {
            t->index[gap] = t->index[i];
            gap = i;
        }
    }
    t->index[gap].slot = -1;
}

/* The prefix of `keys` that is registered, as slots. Keys are looked up in groups whose hash entries, then slots, are
 * requested from memory together: with ten million blocks every step is a cache miss, and this makes them overlap. */
enum { GROUP = 16 };

static Py_ssize_t find_prefix(const Table *t, PyObject *const *keys, Py_ssize_t n, int64_t *out) {
    uint32_t hashes[GROUP];
    for (Py_ssize_t first = 0; first < n; first += GROUP) {
        Py_ssize_t end = n - first < GROUP ? n - first : GROUP;
        for (Py_ssize_t i = 0; i < end; i++) {
            if (key_hash(keys[first + i], &hashes[i]) < 0) {
                return -1;
            }
            __builtin_prefetch(&t->index[hashes[i] & t->mask]);
        }
        for (Py_ssize_t i = 0; i < end; i++) {
            int32_t guess = t->index[hashes[i] & t->mask].slot;
            if (guess >= 0) {
                __builtin_prefetch(&t->slots[guess]);
            }
        }
        for (Py_ssize_t i = 0; i < end; i++) {
            int32_t slot = find_registered(t, keys[first + i], hashes[i]);
            if (slot < 0) {
                return first + i;
            }
            if (out) {
                out[first + i] = slot;
            }
        }
    }
    return n;
}

/* -- transitions of one slot -- */

static void forget_key(Table *t, int32_t slot) {
    Slot *s = &t->slots[slot];
    if (s->key) {
        index_remove(t, slot);
        Py_CLEAR(s->key);
    }
    Py_CLEAR(s->parent);
}

static void push_free(Table *t, int32_t slot) {
    t->slots[slot].state = FREE;
    t->free[t->count.free++] = slot;
}

/* One more hold; whether there was none before. */
static inline int hold_one(Table *t, int64_t slot) {
    int first = t->slots[slot].state++ == REGISTERED;
    t->count.active += first;
    return first;
}

/* Holds all of `run`; returns those that nobody held: `run` itself where that is all of them. */
static PyObject *hold_all(Table *t, PyObject *run, Py_ssize_t n) {
    const int64_t *at = slots_in(run);
    Py_ssize_t idle = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        idle += t->slots[at[i]].state == REGISTERED;
    }
    if (idle == n) {
        Py_ssize_t held_before = 0; /* a slot that is twice in the run */
        for (Py_ssize_t i = 0; i < n; i++) {
            held_before += !hold_one(t, at[i]);
        }
        if (!held_before) {
            return Py_NewRef(run);
        }
        for (Py_ssize_t i = 0; i < n; i++) {
            t->count.active -= --t->slots[at[i]].state == REGISTERED;
        }
    }
    PyObject *first = new_run(idle);
    if (!first) {
        return NULL;
    }
    Py_ssize_t used = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        if (hold_one(t, at[i])) {
            slots_in(first)[used++] = at[i];
        }
    }
    return shorten(first, used);
}

/* -- methods -- */

#define METHOD(name) static PyObject *table_##name(Table *t, PyObject *const *args, Py_ssize_t nargs)

#define NEEDS(count_)                                                                                                  \
    if (nargs != (count_)) {                                                                                           \
        PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", (count_), nargs);                              \
        return NULL;                                                                                                   \
    }

METHOD(match) {
    NEEDS(2)
    Py_ssize_t start = PyNumber_AsSsize_t(args[1], PyExc_OverflowError);
    PyObject *keys, *found = NULL, *idle, *result = NULL;
    if (start < 0) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "start %zd is negative", start);
    }
    if (!(keys = PySequence_Fast(args[0], "keys must be a sequence"))) {
        return NULL;
    }
    Py_ssize_t n = PySequence_Fast_GET_SIZE(keys) - start;
    n = n < 0 ? 0 : n;
    if ((found = new_run(n))) {
        n = find_prefix(t, PySequence_Fast_ITEMS(keys) + (n ? start : 0), n, slots_in(found));
        if (n >= 0 && (found = shorten(found, n)) && (idle = hold_all(t, found, n))) {
            result = PyTuple_Pack(2, found, idle);
            Py_DECREF(idle);
        }
        Py_XDECREF(found);
    }
    Py_DECREF(keys);
    return result;
}

METHOD(peek) {
    NEEDS(2)
    Py_ssize_t start = PyNumber_AsSsize_t(args[1], PyExc_OverflowError);
    PyObject *keys;
    if (start < 0) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "start %zd is negative", start);
    }
    if (!(keys = PySequence_Fast(args[0], "keys must be a sequence"))) {
        return NULL;
    }
    Py_ssize_t n = PySequence_Fast_GET_SIZE(keys) - start;
    n = n > 0 ? find_prefix(t, PySequence_Fast_ITEMS(keys) + start, n, NULL) : 0;
    Py_DECREF(keys);
    return n < 0 ? NULL : PyLong_FromSsize_t(n);
}

METHOD(find) {
    NEEDS(1)
    PyObject *keys = PySequence_Fast(args[0], "keys must be a sequence");
    if (!keys) {
        return NULL;
    }
    Py_ssize_t n = PySequence_Fast_GET_SIZE(keys);
    PyObject *found = new_run(n);
    for (Py_ssize_t i = 0; found && i < n; i++) {
        PyObject *key = PySequence_Fast_GET_ITEM(keys, i);
        uint32_t hash;
        if (key_hash(key, &hash) < 0) {
            Py_CLEAR(found);
        } else {
            slots_in(found)[i] = find_registered(t, key, hash);
        }
    }
    Py_DECREF(keys);
    return found;
}

METHOD(absent) {
    NEEDS(1)
    PyObject *keys = PySequence_Fast(args[0], "keys must be a sequence"), *positions = PyList_New(0);
    for (Py_ssize_t i = 0; keys && positions && i < PySequence_Fast_GET_SIZE(keys); i++) {
        PyObject *key = PySequence_Fast_GET_ITEM(keys, i), *position = NULL;
        uint32_t hash;
        int known = key_hash(key, &hash) < 0 ? -1 : is_known(t, key, hash);
        if (known < 0 ||
            (!known && (!(position = PyLong_FromSsize_t(i)) || PyList_Append(positions, position) < 0))) {
            Py_CLEAR(positions);
        }
        Py_XDECREF(position);
    }
    if (!keys) {
        Py_CLEAR(positions);
    }
    Py_XDECREF(keys);
    return positions;
}

METHOD(take) {
    NEEDS(1)
    Py_ssize_t n = PyNumber_AsSsize_t(args[0], PyExc_OverflowError);
    if (n < 0 || n > t->count.free) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "%zd slots of %zd", n, t->count.free);
    }
    PyObject *taken = new_run(n);
    if (taken) {
        t->count.free -= n;
        t->count.writable += n;
        for (Py_ssize_t i = 0; i < n; i++) {
            int32_t slot = t->free[t->count.free + n - 1 - i];
            t->slots[slot].state = WRITABLE;
            slots_in(taken)[i] = slot;
        }
    }
    return taken;
}

METHOD(claim) {
    NEEDS(1)
    Run run;
    if (run_of(t, args[0], &run) < 0 || !all_in(t, &run, FREE, FREE, "free")) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < run.n; i++) {
        t->slots[run.at[i]].state = WRITABLE;
    }
    Py_ssize_t left = 0;
    for (Py_ssize_t i = 0; i < t->count.free; i++) {
        if (t->slots[t->free[i]].state == FREE) {
            t->free[left++] = t->free[i];
        }
    }
    t->count.free = left;
    t->count.writable += run.n;
    Py_RETURN_NONE;
}

/* Whether the first `i` slots of a run, which are staged, have this key among theirs. */
static int is_twice(const Table *t, const Run *run, Py_ssize_t i, PyObject *key) {
    uint32_t hash = (uint32_t)PyObject_Hash(key);
    for (uint32_t at = hash & t->mask; t->index[at].slot >= 0; at = (at + 1) & t->mask) {
        int32_t slot = t->index[at].slot;
        if (t->index[at].hash == hash && t->slots[slot].state == STAGED && same_key(t->slots[slot].key, key)) {
            for (Py_ssize_t j = 0; j < i; j++) {
                if (run->at[j] == slot) {
                    return 1;
                }
            }
        }
    }
    return 0;
}

METHOD(stage) {
    NEEDS(3)
    Run run;
    PyObject *parent = args[2];
    if (run_of(t, args[0], &run) < 0) {
        return NULL;
    }
    int nameless = args[1] == Py_None, each = PyTuple_CheckExact(parent);
    if (!nameless && (!PyTuple_CheckExact(args[1]) || PyTuple_GET_SIZE(args[1]) != run.n)) {
        return PyErr_Format(PyExc_TypeError, "needs a tuple of %zd keys or None", run.n);
    }
    if (each && PyTuple_GET_SIZE(parent) != run.n) {
        return PyErr_Format(PyExc_TypeError, "needs a tuple of %zd parents", run.n);
    }
    for (Py_ssize_t i = 0; i < (each ? run.n : 1); i++) {
        PyObject *one = each ? PyTuple_GET_ITEM(parent, i) : parent;
        if (one != Py_None && !PyBytes_CheckExact(one)) {
            return PyErr_Format(PyExc_TypeError, "a parent must be bytes or None, got %R", (PyObject *)Py_TYPE(one));
        }
    }
    if (!all_in(t, &run, WRITABLE, WRITABLE, "writable")) {
        return NULL;
    }
    for (Py_ssize_t i = 0; !nameless && i < run.n; i++) {
        uint32_t hash;
        if (key_hash(PyTuple_GET_ITEM(args[1], i), &hash) < 0) {
            return NULL;
        }
        __builtin_prefetch(&t->index[hash & t->mask]);
    }
    for (Py_ssize_t i = 0; i < run.n; i++) {
        Slot *slot = &t->slots[run.at[i]];
        if (!nameless && is_twice(t, &run, i, PyTuple_GET_ITEM(args[1], i))) {
            while (i--) {
                forget_key(t, (int32_t)run.at[i]);
                t->slots[run.at[i]].state = WRITABLE;
            }
            PyErr_SetString(PyExc_ValueError, "a key is twice among the keys");
            return NULL;
        }
        slot->state = STAGED;
        if (nameless) {
            continue;
        }
        slot->key = Py_NewRef(PyTuple_GET_ITEM(args[1], i));
        PyObject *before = each ? PyTuple_GET_ITEM(parent, i) : i ? PyTuple_GET_ITEM(args[1], i - 1) : parent;
        slot->parent = before == Py_None ? NULL : Py_NewRef(before);
        slot->hash = (uint32_t)PyObject_Hash(slot->key);
        index_add(t, (int32_t)run.at[i]);
    }
    t->count.writable -= run.n;
    t->count.staged += run.n;
    Py_RETURN_NONE;
}

/* Whether slot `i` of the run can simply be published: its bytes are there and its key is new. */
static int is_fresh(const Table *t, const Run *run, Py_ssize_t i, const char *done) {
    const Slot *slot = &t->slots[run->at[i]];
    return (!done || done[i]) && find_registered(t, slot->key, slot->hash) < 0;
}

/* Whether the key of slot `i` of the run is that of an earlier one: only where they were staged apart. */
static int is_repeated(const Table *t, const Run *run, Py_ssize_t i) {
    const Slot *slot = &t->slots[run->at[i]];
    for (uint32_t at = slot->hash & t->mask; t->index[at].slot >= 0; at = (at + 1) & t->mask) {
        int32_t other = t->index[at].slot;
        if (other != run->at[i] && t->index[at].hash == slot->hash && same_key(t->slots[other].key, slot->key)) {
            for (Py_ssize_t j = 0; j < i; j++) {
                if (run->at[j] == other) {
                    return 1;
                }
            }
        }
    }
    return 0;
}

METHOD(register) {
    NEEDS(3)
    Run run;
    int keep = PyObject_IsTrue(args[2]);
    if (keep < 0 || run_of(t, args[0], &run) < 0) {
        return NULL;
    }
    if (args[1] != Py_None && (!PyBytes_CheckExact(args[1]) || PyBytes_GET_SIZE(args[1]) != run.n)) {
        return PyErr_Format(PyExc_TypeError, "done must be None or %zd bytes", run.n);
    }
    const char *done = args[1] == Py_None ? NULL : PyBytes_AS_STRING(args[1]);
    if (!all_in(t, &run, STAGED, STAGED, "staged")) {
        return NULL;
    }
    Py_ssize_t fresh = 0;
    for (Py_ssize_t i = 0; i < run.n; i++) {
        if (!t->slots[run.at[i]].key) {
            return wrong_state(run.at[i], STAGED, "staged with a key");
        }
        if (is_repeated(t, &run, i)) {
            PyErr_SetString(PyExc_ValueError, "a key is twice among the keys");
            return NULL;
        }
        fresh += is_fresh(t, &run, i, done);
    }
    PyObject *held = fresh == run.n ? Py_NewRef(args[0]) : new_run(run.n);
    PyObject *positions = fresh == run.n ? Py_NewRef(Py_None) : PyList_New(0), *twins = new_run(run.n - fresh);
    PyObject *idle = new_run(run.n - fresh), *result = NULL;
    if (!held || !positions || !twins || !idle) {
        goto end;
    }
    if (fresh < run.n) { /* everything that can fail comes before the first change */
        for (Py_ssize_t i = 0; i < run.n; i++) {
            PyObject *position = is_fresh(t, &run, i, done) ? PyLong_FromSsize_t(i) : NULL;
            if (position && PyList_Append(positions, position) < 0) {
                PyErr_NoMemory();
            }
            Py_XDECREF(position);
        }
        if (PyErr_Occurred()) {
            goto end;
        }
    }
    Py_ssize_t used = 0, doubled = 0, resting = 0;
    for (Py_ssize_t i = 0; i < run.n; i++) {
        int32_t slot = (int32_t)run.at[i];
        Slot *s = &t->slots[slot];
        int32_t twin = done && !done[i] ? -1 : fresh == run.n ? -1 : find_registered(t, s->key, s->hash);
        if (done && !done[i]) {
            forget_key(t, slot);
            push_free(t, slot);
            continue;
        }
        if (twin < 0) {
            s->state = REGISTERED + 1;
            t->count.registered++;
            t->count.active++;
        } else if (keep) { /* ours until its holder lets go, and nobody else can find it */
            forget_key(t, slot);
            s->state = ORPHANED + 1;
            t->count.orphaned++;
        } else {
            forget_key(t, slot);
            push_free(t, slot);
            slots_in(twins)[doubled++] = twin;
            if (hold_one(t, twin)) {
                slots_in(idle)[resting++] = twin;
            }
            slot = twin;
        }
        if (fresh < run.n) {
            slots_in(held)[used++] = slot;
        }
    }
    t->count.staged -= run.n;
    held = fresh < run.n ? shorten(held, used) : held;
    twins = shorten(twins, doubled);
    idle = shorten(idle, resting);
    if (held && twins && idle) {
        result = PyTuple_Pack(4, held, positions, twins, idle);
    }
end:
    Py_XDECREF(held);
    Py_XDECREF(positions);
    Py_XDECREF(twins);
    Py_XDECREF(idle);
    return result;
}

METHOD(hold) {
    NEEDS(1)
    Run run;
    if (run_of(t, args[0], &run) < 0) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < run.n; i++) {
        if (!is_registered(t->slots[run.at[i]].state)) {
            return wrong_state(run.at[i], t->slots[run.at[i]].state, "registered");
        }
    }
    return hold_all(t, args[0], run.n);
}

METHOD(release) {
    NEEDS(1)
    Run run;
    if (run_of(t, args[0], &run) < 0) {
        return NULL;
    }
    Py_ssize_t single = 0, checked = 0;
    for (; checked < run.n && is_held(t->slots[run.at[checked]].state); checked++) {
        single += t->slots[run.at[checked]].state-- == REGISTERED + 1;
    }
    for (Py_ssize_t i = 0; i < checked; i++) { /* so far only a trial: a slot may be there as often as it is held */
        t->slots[run.at[i]].state++;
    }
    if (checked < run.n) {
        return wrong_state(run.at[checked], t->slots[run.at[checked]].state, "held that often");
    }
    PyObject *idle = single == run.n ? Py_NewRef(args[0]) : new_run(run.n);
    if (!idle) {
        return NULL;
    }
    Py_ssize_t used = 0;
    for (Py_ssize_t i = 0; i < run.n; i++) {
        int32_t slot = (int32_t)run.at[i], left = --t->slots[slot].state;
        if (left == ORPHANED) {
            t->count.orphaned--;
            push_free(t, slot);
        } else if (left == REGISTERED) {
            t->count.active--;
            if (single < run.n) {
                slots_in(idle)[used++] = slot;
            }
        }
    }
    return single == run.n ? idle : shorten(idle, used);
}

METHOD(give_back) {
    NEEDS(1)
    Run run;
    if (run_of(t, args[0], &run) < 0) {
        return NULL;
    }
    if (!all_in(t, &run, WRITABLE, STAGED, "writable or staged")) {
        return NULL;
    }
    for (Py_ssize_t i = run.n; i-- > 0;) { /* so that they are taken in this order again */
        int32_t slot = (int32_t)run.at[i];
        *(t->slots[slot].state == STAGED ? &t->count.staged : &t->count.writable) -= 1;
        forget_key(t, slot);
        push_free(t, slot);
    }
    Py_RETURN_NONE;
}

/* Registered slots lose their keys, which are returned; to writable where `to_writable`, else to free or orphaned. */
static PyObject *withdraw(Table *t, PyObject *slots, int to_writable) {
    Run run;
    if (run_of(t, slots, &run) < 0) {
        return NULL;
    }
    if (!all_in(t, &run, REGISTERED, to_writable ? REGISTERED : ORPHANED - 1,
                to_writable ? "registered and not held" : "registered")) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < run.n; i++) {
        __builtin_prefetch(&t->index[t->slots[run.at[i]].hash & t->mask]);
    }
    PyObject *keys = PyTuple_New(run.n);
    for (Py_ssize_t i = run.n; keys && i-- > 0;) {
        int32_t slot = (int32_t)run.at[i];
        Slot *s = &t->slots[slot];
        PyTuple_SET_ITEM(keys, i, Py_NewRef(s->key));
        forget_key(t, slot);
        t->count.registered--;
        if (to_writable) {
            s->state = WRITABLE;
            t->count.writable++;
        } else if (s->state > REGISTERED) {
            s->state += ORPHANED - REGISTERED;
            t->count.active--;
            t->count.orphaned++;
        } else {
            push_free(t, slot);
        }
    }
    return keys;
}

METHOD(evict) {
    NEEDS(1)
    PyObject *keys = withdraw(t, args[0], 1), *reversed, *result = NULL;
    if (keys && (reversed = new_run(PyTuple_GET_SIZE(keys)))) {
        Py_ssize_t n = PyTuple_GET_SIZE(keys);
        for (Py_ssize_t i = 0; i < n; i++) {
            slots_in(reversed)[i] = slots_in(args[0])[n - 1 - i];
        }
        result = PyTuple_Pack(2, keys, reversed);
        Py_DECREF(reversed);
    }
    Py_XDECREF(keys);
    return result;
}

METHOD(unpublish) {
    NEEDS(1)
    return withdraw(t, args[0], 0);
}

static PyObject *table_clear(Table *t, PyObject *Py_UNUSED(none)) {
    memset(t->index, 0xff, ((size_t)t->mask + 1) * sizeof(Entry));
    for (int32_t slot = (int32_t)t->capacity; slot-- > 0;) {
        Slot *s = &t->slots[slot];
        Py_CLEAR(s->key);
        Py_CLEAR(s->parent);
        if (s->state == REGISTERED) {
            push_free(t, slot);
        } else if (is_registered(s->state)) {
            s->state += ORPHANED - REGISTERED;
            t->count.orphaned++;
        }
    }
    t->count.registered = t->count.active = 0;
    Py_RETURN_NONE;
}

/* -- looking -- */

METHOD(idle) {
    NEEDS(1)
    Run run;
    if (run_of(t, args[0], &run) < 0) {
        return NULL;
    }
    PyObject *idle = new_run(run.n);
    Py_ssize_t used = 0;
    for (Py_ssize_t i = 0; idle && i < run.n; i++) {
        if (t->slots[run.at[i]].state == REGISTERED) {
            slots_in(idle)[used++] = run.at[i];
        }
    }
    return idle ? shorten(idle, used) : NULL;
}

/* A tuple with the bytes object that lies `offset` into each slot, None where there is none. */
static PyObject *objects_at(Table *t, PyObject *slots, size_t offset) {
    Run run;
    if (run_of(t, slots, &run) < 0) {
        return NULL;
    }
    PyObject *found = PyTuple_New(run.n);
    for (Py_ssize_t i = 0; found && i < run.n; i++) {
        PyObject *object = *(PyObject **)((char *)&t->slots[run.at[i]] + offset);
        PyTuple_SET_ITEM(found, i, Py_NewRef(object ? object : Py_None));
    }
    return found;
}

METHOD(keys) {
    NEEDS(1)
    return objects_at(t, args[0], offsetof(Slot, key));
}

METHOD(parents) {
    NEEDS(1)
    return objects_at(t, args[0], offsetof(Slot, parent));
}

METHOD(tags) {
    NEEDS(1)
    Run run;
    if (run_of(t, args[0], &run) < 0) {
        return NULL;
    }
    PyObject *tags = new_run(run.n);
    for (Py_ssize_t i = 0; tags && i < run.n; i++) {
        PyObject *key = t->slots[run.at[i]].key;
        slots_in(tags)[i] = key ? PyObject_Hash(key) : 0;
    }
    return tags;
}

METHOD(parent_slots) {
    NEEDS(1)
    Run run;
    if (run_of(t, args[0], &run) < 0) {
        return NULL;
    }
    PyObject *found = new_run(run.n);
    for (Py_ssize_t i = 0; found && i < run.n; i++) {
        PyObject *parent = t->slots[run.at[i]].parent;
        const Slot *before = i ? &t->slots[run.at[i - 1]] : NULL;
        if (before && parent && parent == before->key && is_registered(before->state)) {
            slots_in(found)[i] = run.at[i - 1];
        } else {
            slots_in(found)[i] = parent ? find_registered(t, parent, (uint32_t)PyObject_Hash(parent)) : -1;
        }
    }
    return found;
}

METHOD(state) {
    NEEDS(1)
    Py_ssize_t slot = PyNumber_AsSsize_t(args[0], PyExc_OverflowError);
    if (slot < 0 || slot >= t->capacity) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "slot %zd is not in 0..%zd", slot, t->capacity - 1);
    }
    return PyLong_FromLong(t->slots[slot].state);
}

static PyObject *table_registered(Table *t, PyObject *Py_UNUSED(none)) {
    PyObject *found = new_run(t->count.registered);
    Py_ssize_t used = 0;
    for (Py_ssize_t slot = 0; found && slot < t->capacity; slot++) {
        if (is_registered(t->slots[slot].state)) {
            slots_in(found)[used++] = slot;
        }
    }
    return found;
}

static PyObject *table_states(Table *t, PyObject *Py_UNUSED(none)) {
    PyObject *states = PyBytes_FromStringAndSize(NULL, t->capacity * (Py_ssize_t)sizeof(int32_t));
    for (Py_ssize_t slot = 0; states && slot < t->capacity; slot++) {
        ((int32_t *)PyBytes_AS_STRING(states))[slot] = t->slots[slot].state;
    }
    return states;
}

static PyObject *table_free_slots(Table *t, PyObject *Py_UNUSED(none)) {
    PyObject *slots = new_run(t->count.free);
    for (Py_ssize_t i = 0; slots && i < t->count.free; i++) {
        slots_in(slots)[i] = t->free[i];
    }
    return slots;
}

/* -- size -- */

enum { LARGEST = 1 << 29 };

/* More slots, free ones; nothing changes where memory is short. */
static int grow(Table *t, Py_ssize_t capacity) {
    size_t entries = 8;
    while (entries < 2 * (size_t)capacity) {
        entries *= 2;
    }
    Slot *slots = PyMem_RawRealloc(t->slots, (size_t)capacity * sizeof(Slot));
    t->slots = slots ? slots : t->slots;
    int32_t *free_ = PyMem_RawRealloc(t->free, (size_t)capacity * sizeof(int32_t));
    t->free = free_ ? free_ : t->free;
    Entry *index = entries == (size_t)t->mask + 1 ? t->index : PyMem_RawMalloc(entries * sizeof(Entry));
    if (!slots || !free_ || !index) {
        if (index != t->index) {
            PyMem_RawFree(index);
        }
        PyErr_NoMemory();
        return -1;
    }
    Py_ssize_t before = t->capacity;
    t->capacity = capacity;
    memset(t->slots + before, 0, (size_t)(capacity - before) * sizeof(Slot));
    /* New ones under the old, the lowest uppermost: what is taken first keeps its neighbours, and the end of an arena or
     * a file stays free for as long as possible. */
    memmove(t->free + (capacity - before), t->free, (size_t)t->count.free * sizeof(int32_t));
    for (Py_ssize_t i = before; i < capacity; i++) {
        t->slots[i].state = FREE;
        t->free[capacity - 1 - i] = (int32_t)i;
    }
    t->count.free += capacity - before;
    if (index != t->index) {
        PyMem_RawFree(t->index);
        t->index = index;
        t->mask = (uint32_t)(entries - 1);
        memset(index, 0xff, entries * sizeof(Entry));
        for (int32_t slot = 0; slot < before; slot++) {
            if (t->slots[slot].key) {
                index_add(t, slot);
            }
        }
    }
    return 0;
}

METHOD(grow) {
    NEEDS(1)
    Py_ssize_t capacity = PyNumber_AsSsize_t(args[0], PyExc_OverflowError);
    if (capacity < t->capacity || capacity > LARGEST) {
        return PyErr_Occurred() ? NULL
                                : PyErr_Format(PyExc_ValueError, "%zd is not in %zd..%d", capacity, t->capacity, LARGEST);
    }
    if (grow(t, capacity) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static int descending(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x < y) - (x > y);
}

METHOD(retire) {
    NEEDS(1)
    Py_ssize_t n = PyNumber_AsSsize_t(args[0], PyExc_OverflowError);
    if (n < 0 || n > t->count.free) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "%zd slots of %zd", n, t->count.free);
    }
    PyObject *gone = new_run(n);
    if (gone && n) {
        /* The highest numbers go, so that an arena can give back its end; the lowest are left on top of the stack. */
        qsort(t->free, (size_t)t->count.free, sizeof(int32_t), descending);
        for (Py_ssize_t i = 0; i < n; i++) {
            t->slots[t->free[i]].state = RETIRED;
            slots_in(gone)[i] = t->free[i];
        }
        t->count.free -= n;
        t->count.retired += n;
        memmove(t->free, t->free + n, (size_t)t->count.free * sizeof(int32_t));
    }
    return gone;
}

METHOD(restore) {
    NEEDS(1)
    Py_ssize_t n = PyNumber_AsSsize_t(args[0], PyExc_OverflowError);
    if (n < 0 || n > t->count.retired) {
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "%zd slots of %zd", n, t->count.retired);
    }
    PyObject *back = new_run(n);
    for (int32_t slot = 0, found = 0; back && found < n; slot++) {
        if (t->slots[slot].state == RETIRED) {
            slots_in(back)[found++] = slot;
        }
    }
    for (Py_ssize_t i = back ? n : 0; i-- > 0;) {
        push_free(t, (int32_t)slots_in(back)[i]);
        t->count.retired--;
    }
    return back;
}

/* -- the type -- */

static PyObject *table_new(PyTypeObject *type, PyObject *Py_UNUSED(args), PyObject *Py_UNUSED(kwargs)) {
    Table *t = (Table *)type->tp_alloc(type, 0);
    /* Whoever forgets __init__ has a table without slots, in which nothing is found. */
    if (t && !(t->index = PyMem_RawMalloc(8 * sizeof(Entry)))) {
        Py_CLEAR(t);
        return PyErr_NoMemory();
    }
    if (t) {
        memset(t->index, 0xff, 8 * sizeof(Entry));
        t->mask = 7;
    }
    return (PyObject *)t;
}

static int table_init(Table *t, PyObject *args, PyObject *kwargs) {
    Py_ssize_t capacity;
    static char *names[] = {"capacity", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n", names, &capacity)) {
        return -1;
    }
    if (t->slots || capacity < 1 || capacity > LARGEST) {
        PyErr_Format(PyExc_ValueError, "capacity must be in 1..%d and be given once, got %zd", LARGEST, capacity);
        return -1;
    }
    return grow(t, capacity);
}

static void table_dealloc(Table *t) {
    for (Py_ssize_t slot = 0; slot < t->capacity; slot++) {
        Py_XDECREF(t->slots[slot].key);
        Py_XDECREF(t->slots[slot].parent);
    }
    PyMem_RawFree(t->slots);
    PyMem_RawFree(t->free);
    PyMem_RawFree(t->index);
    Py_TYPE(t)->tp_free((PyObject *)t);
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))table_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST(match),
    FAST(peek),
    FAST(find),
    FAST(absent),
    FAST(take),
    FAST(claim),
    FAST(stage),
    FAST(register),
    FAST(hold),
    FAST(release),
    FAST(give_back),
    FAST(evict),
    FAST(unpublish),
    FAST(idle),
    FAST(keys),
    FAST(parents),
    FAST(tags),
    FAST(parent_slots),
    FAST(state),
    FAST(grow),
    FAST(retire),
    FAST(restore),
    {"clear", (PyCFunction)table_clear, METH_NOARGS, NULL},
    {"registered_slots", (PyCFunction)table_registered, METH_NOARGS, NULL},
    {"free_slots", (PyCFunction)table_free_slots, METH_NOARGS, NULL},
    {"states", (PyCFunction)table_states, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

#define GAUGE(name) {#name, T_PYSSIZET, offsetof(Table, count.name), READONLY, NULL}

static PyMemberDef members[] = {
    {"capacity", T_PYSSIZET, offsetof(Table, capacity), READONLY, NULL},
    GAUGE(free),
    GAUGE(writable),
    GAUGE(staged),
    GAUGE(registered),
    GAUGE(active),
    GAUGE(orphaned),
    GAUGE(retired),
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject TableType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kvbm.native._slots.Table",
    .tp_basicsize = sizeof(Table),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = table_new,
    .tp_init = (initproc)table_init,
    .tp_dealloc = (destructor)table_dealloc,
    .tp_methods = methods,
    .tp_members = members,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_slots", .m_size = -1};

PyMODINIT_FUNC PyInit__slots(void) {
    PyObject *m = PyModule_Create(&module);
    if (m && PyModule_AddType(m, &TableType) < 0) {
        Py_CLEAR(m);
    }
    return m;
}
