/* `cuda.h` as a module: a driver, marks on the engine's streams, and lanes that copy without the GIL. */

#include "int64s.h"

#include <limits.h>

#include "cuda.h"

static PyObject *Error; /* CudaError */
static PyTypeObject *MarkType, *LaneType;

typedef struct {
    PyObject_HEAD
    struct cuda cuda;
} Driver;

typedef struct {
    PyObject_HEAD
    Driver *driver;
    struct cuda_mark *mark;
} Mark;

typedef struct {
    PyObject_HEAD
    Driver *driver;
    struct lane *lane; /* NULL once it is closed */
    int busy;
} Lane;

/* NULL, with CudaError set: its arguments are the sentence and the driver's code, or -1. */
static PyObject *raise(int code) {
    PyObject *arguments = Py_BuildValue("si", cuda_message, code);
    if (arguments) {
        PyErr_SetObject(Error, arguments);
        Py_DECREF(arguments);
    }
    return NULL;
}

static void release(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---------------------------------------------------------------- marks */

static void mark_dealloc(Mark *self) {
    if (self->mark) {
        cuda_unmark(&self->driver->cuda, self->mark);
    }
    Py_XDECREF(self->driver);
    release((PyObject *)self);
}

static PyType_Slot MARK_SLOTS[] = {
    {Py_tp_dealloc, mark_dealloc},
    {Py_tp_doc, PyDoc_STR("See _cuda.pyi.")},
    {0, NULL},
};

static PyType_Spec MARK = {"kvbm.native._cuda.Mark", sizeof(Mark), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, MARK_SLOTS};

/* ---------------------------------------------------------------- lanes */

enum { SRC_ADDRESS, SRC_STRIDE, DST_ADDRESS, DST_STRIDE, ROW_BYTES, SRC_SLOTS, DST_SLOTS, CONTROL, SUMS, BUFFERS };
static const char *const NAMES[BUFFERS] = {"src_address", "src_stride", "dst_address", "dst_stride", "row_bytes",
                                           "src_slots",   "dst_slots",  "control",     "sums"};

/* Whether the buffers fit together; then into `plan`. Otherwise -1 with ValueError set. */
static int check(const Py_buffer *b, int wanted, struct lane_plan *plan) {
    const int64_t *row_bytes = b[ROW_BYTES].buf;
    int64_t slot_bytes = 0, *control = b[CONTROL].buf;
    for (int k = SRC_ADDRESS; k < ROW_BYTES; k++) {
        if (b[k].shape[0] != b[ROW_BYTES].shape[0]) {
            PyErr_Format(PyExc_ValueError, "%s has %zd entries, row_bytes has %zd", NAMES[k], b[k].shape[0],
                         b[ROW_BYTES].shape[0]);
            return -1;
        }
    }
    for (Py_ssize_t p = 0; p < b[ROW_BYTES].shape[0]; p++) {
        if (row_bytes[p] < 1) {
            PyErr_Format(PyExc_ValueError, "row_bytes[%zd] is not at least 1", p);
            return -1;
        }
        slot_bytes += row_bytes[p];
    }
    if (!slot_bytes || b[SRC_SLOTS].shape[0] != b[DST_SLOTS].shape[0]) {
        PyErr_Format(PyExc_ValueError, "no rows, or %zd source slots for %zd destination slots", b[SRC_SLOTS].shape[0],
                     b[DST_SLOTS].shape[0]);
        return -1;
    }
    if (b[CONTROL].shape[0] != 2 || control[0] < 0 || control[0] > b[SRC_SLOTS].shape[0]) {
        PyErr_SetString(PyExc_ValueError, "control must be [next block, one of 0 to all, and stop]");
        return -1;
    }
    if (wanted > SUMS && (b[SUMS].shape[0] != b[SRC_SLOTS].shape[0] || slot_bytes < XXH3_FROM)) {
        PyErr_Format(PyExc_ValueError, "sums must be one per block, of blocks of at least %d bytes", XXH3_FROM);
        return -1;
    }
    plan->src_address = b[SRC_ADDRESS].buf;
    plan->src_stride = b[SRC_STRIDE].buf;
    plan->dst_address = b[DST_ADDRESS].buf;
    plan->dst_stride = b[DST_STRIDE].buf;
    plan->row_bytes = row_bytes;
    plan->planes = b[ROW_BYTES].shape[0];
    plan->src_slots = b[SRC_SLOTS].buf;
    plan->dst_slots = b[DST_SLOTS].buf;
    plan->blocks = b[SRC_SLOTS].shape[0];
    plan->control = control;
    plan->sums = wanted > SUMS ? b[SUMS].buf : NULL;
    return 0;
}

static PyObject *lane_run(Lane *self, PyObject *args) {
    PyObject *objects[BUFFERS], *mark;
    struct lane_plan plan = {0};
    struct lane_progress progress;
    unsigned long long pinned, piece;
    long long chunk_bytes;
    int held = 0, result = 0, ran = 0;
    if (!PyArg_ParseTuple(args, "OOOOOOOOO!KKLO:copy", &objects[0], &objects[1], &objects[2], &objects[3], &objects[4],
                          &objects[5], &objects[6], &objects[7], MarkType, &mark, &pinned, &piece, &chunk_bytes,
                          &objects[SUMS])) {
        return NULL;
    }
    if (!piece || chunk_bytes < 0) {
        return PyErr_Format(PyExc_ValueError, "piece must be at least 1, chunk_bytes at least 0");
    }
    if (!self->lane || __atomic_exchange_n(&self->busy, 1, __ATOMIC_ACQUIRE)) {
        PyErr_SetString(PyExc_RuntimeError, self->lane ? "another thread copies on this lane" : "this lane is closed");
        return NULL;
    }
    plan.after = ((Mark *)mark)->mark;
    plan.pinned = pinned;
    plan.piece = piece;
    plan.chunk_bytes = chunk_bytes;
    int wanted = objects[SUMS] == Py_None ? SUMS : BUFFERS;
    Py_buffer views[BUFFERS];
    while (held < wanted && get_int64(objects[held], NAMES[held], held >= CONTROL, &views[held]) == 0) {
        held++;
    }
    if (held == wanted && check(views, wanted, &plan) == 0) {
        ran = 1;
        Py_BEGIN_ALLOW_THREADS;
        result = lane_copy(self->lane, &plan, &progress);
        Py_END_ALLOW_THREADS;
    }
    while (held > 0) {
        PyBuffer_Release(&views[--held]);
    }
    __atomic_store_n(&self->busy, 0, __ATOMIC_RELEASE);
    if (!ran || result) {
        return ran ? raise(result) : NULL;
    }
    return Py_BuildValue("LLLL", (long long)progress.descriptors, (long long)progress.chunks,
                         (long long)progress.submit_ns, (long long)progress.waited_ns);
}

static PyObject *lane_end(Lane *self, PyObject *Py_UNUSED(nothing)) {
    if (__atomic_exchange_n(&self->busy, 1, __ATOMIC_ACQUIRE)) {
        PyErr_SetString(PyExc_RuntimeError, "another thread copies on this lane");
        return NULL;
    }
    struct lane *lane = self->lane;
    self->lane = NULL;
    if (lane) {
        Py_BEGIN_ALLOW_THREADS;
        lane_close(lane);
        Py_END_ALLOW_THREADS;
    }
    __atomic_store_n(&self->busy, 0, __ATOMIC_RELEASE);
    return Py_NewRef(Py_None);
}

static PyObject *lane_dead(Lane *self, void *Py_UNUSED(closure)) {
    return PyBool_FromLong(!self->lane || self->lane->dead);
}

static void lane_dealloc(Lane *self) {
    if (self->lane) {
        lane_close(self->lane);
    }
    Py_XDECREF(self->driver);
    release((PyObject *)self);
}

static PyMethodDef LANE_METHODS[] = {
    {"copy", (PyCFunction)lane_run, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"close", (PyCFunction)lane_end, METH_NOARGS, PyDoc_STR("See _cuda.pyi.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef LANE_GETTERS[] = {
    {"dead", (getter)lane_dead, NULL, PyDoc_STR("See _cuda.pyi."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot LANE_SLOTS[] = {
    {Py_tp_dealloc, lane_dealloc},
    {Py_tp_methods, LANE_METHODS},
    {Py_tp_getset, LANE_GETTERS},
    {Py_tp_doc, PyDoc_STR("See _cuda.pyi.")},
    {0, NULL},
};

static PyType_Spec LANE = {"kvbm.native._cuda.Lane", sizeof(Lane), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, LANE_SLOTS};

/* ---------------------------------------------------------------- the driver */

/* Nothing of it is given back: a process that has opened CUDA keeps the library and the device's context. */
static void driver_dealloc(Driver *self) { release((PyObject *)self); }

static PyObject *driver_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"library", "newest", NULL};
    const char *library;
    int newest = INT_MAX;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s|i:Driver", names, &library, &newest)) {
        return NULL;
    }
    Driver *self = (Driver *)type->tp_alloc(type, 0);
    if (!self) {
        return NULL;
    }
    int result;
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_open(&self->cuda, library, newest);
    Py_END_ALLOW_THREADS;
    if (result) {
        Py_DECREF(self);
        return raise(result);
    }
    return (PyObject *)self;
}

static PyObject *driver_count(Driver *self, PyObject *Py_UNUSED(nothing)) {
    int count = 0, result;
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_said(&self->cuda, self->cuda.call.count(&count), "cuDeviceGetCount");
    Py_END_ALLOW_THREADS;
    return result ? raise(result) : PyLong_FromLong(count);
}

static PyObject *driver_describe(Driver *self, PyObject *args) {
    char name[256] = "", bus[32] = "";
    int ordinal, device, result;
    if (!PyArg_ParseTuple(args, "i:describe", &ordinal)) {
        return NULL;
    }
    struct cuda *cuda = &self->cuda;
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_said(cuda, cuda->call.device(&device, ordinal), "cuDeviceGet");
    result = result ? result : cuda_said(cuda, cuda->call.device_name(name, sizeof name, device), "cuDeviceGetName");
    result = result ? result : cuda_said(cuda, cuda->call.device_bus(bus, sizeof bus, device), "cuDeviceGetPCIBusId");
    Py_END_ALLOW_THREADS;
    return result ? raise(result) : Py_BuildValue("ss", name, bus);
}

static PyObject *driver_attribute(Driver *self, PyObject *args) {
    int ordinal, number, device, value = 0, result;
    if (!PyArg_ParseTuple(args, "ii:attribute", &ordinal, &number)) {
        return NULL;
    }
    struct cuda *cuda = &self->cuda;
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_said(cuda, cuda->call.device(&device, ordinal), "cuDeviceGet");
    result = result ? result : cuda_said(cuda, cuda->call.attribute(&value, number, device), "cuDeviceGetAttribute");
    Py_END_ALLOW_THREADS;
    return result ? raise(result) : PyLong_FromLong(value);
}

static PyObject *driver_device_of(Driver *self, PyObject *args) {
    unsigned long long address;
    int device;
    if (!PyArg_ParseTuple(args, "K:device_of", &address)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    device = cuda_device_of(&self->cuda, address);
    Py_END_ALLOW_THREADS;
    return device < 0 ? Py_NewRef(Py_None) : PyLong_FromLong(device);
}

static PyObject *driver_pin(Driver *self, PyObject *args) {
    unsigned long long address, bytes, piece;
    int device, result;
    if (!PyArg_ParseTuple(args, "iKKK:pin", &device, &address, &bytes, &piece)) {
        return NULL;
    }
    if (!bytes || !piece) {
        return PyErr_Format(PyExc_ValueError, "bytes and piece must be at least 1");
    }
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_pin(&self->cuda, device, address, bytes, piece);
    Py_END_ALLOW_THREADS;
    return result ? raise(result) : Py_NewRef(Py_None);
}

static PyObject *driver_unpin(Driver *self, PyObject *args) {
    unsigned long long address;
    int result;
    if (!PyArg_ParseTuple(args, "K:unpin", &address)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_unpin(&self->cuda, address);
    Py_END_ALLOW_THREADS;
    return result ? raise(result) : Py_NewRef(Py_None);
}

static PyObject *driver_alloc(Driver *self, PyObject *args) {
    unsigned long long bytes;
    uint64_t address = 0;
    int device, result;
    if (!PyArg_ParseTuple(args, "iK:alloc", &device, &bytes)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_enter(&self->cuda, device);
    result = result ? result : cuda_said(&self->cuda, self->cuda.call.alloc(&address, bytes), "cuMemAlloc");
    Py_END_ALLOW_THREADS;
    return result ? raise(result) : PyLong_FromUnsignedLongLong(address);
}

static PyObject *driver_free(Driver *self, PyObject *args) {
    unsigned long long address;
    int device, result;
    if (!PyArg_ParseTuple(args, "iK:free", &device, &address)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_enter(&self->cuda, device);
    result = result ? result : cuda_said(&self->cuda, self->cuda.call.free(address), "cuMemFree");
    Py_END_ALLOW_THREADS;
    return result ? raise(result) : Py_NewRef(Py_None);
}

static PyObject *driver_mark(Driver *self, PyObject *args) {
    unsigned long long stream;
    int device, result;
    if (!PyArg_ParseTuple(args, "iK:mark", &device, &stream)) {
        return NULL;
    }
    Mark *mark = (Mark *)MarkType->tp_alloc(MarkType, 0);
    if (!mark) {
        return NULL;
    }
    mark->driver = (Driver *)Py_NewRef(self);
    Py_BEGIN_ALLOW_THREADS;
    result = cuda_mark(&self->cuda, device, stream, &mark->mark);
    Py_END_ALLOW_THREADS;
    if (result) {
        Py_DECREF(mark);
        return raise(result);
    }
    return (PyObject *)mark;
}

static PyObject *driver_lane(Driver *self, PyObject *args) {
    int device, to_device, result;
    if (!PyArg_ParseTuple(args, "ip:lane", &device, &to_device)) {
        return NULL;
    }
    Lane *lane = (Lane *)LaneType->tp_alloc(LaneType, 0);
    if (!lane) {
        return NULL;
    }
    lane->driver = (Driver *)Py_NewRef(self);
    Py_BEGIN_ALLOW_THREADS;
    result = lane_open(&self->cuda, device, to_device, &lane->lane);
    Py_END_ALLOW_THREADS;
    if (result) {
        Py_DECREF(lane);
        return raise(result);
    }
    return (PyObject *)lane;
}

static PyObject *driver_version(Driver *self, void *Py_UNUSED(closure)) { return PyLong_FromLong(self->cuda.version); }

static PyObject *driver_call(Driver *self, void *Py_UNUSED(closure)) {
    const struct cuda_calls *call = &self->cuda.call;
    return PyUnicode_FromString(call->batch      ? "cuMemcpyBatchAsync_v2"
                                : call->batch_12 ? "cuMemcpyBatchAsync"
                                                 : "cuMemcpyAsync");
}

static PyMethodDef DRIVER_METHODS[] = {
    {"devices", (PyCFunction)driver_count, METH_NOARGS, PyDoc_STR("See _cuda.pyi.")},
    {"describe", (PyCFunction)driver_describe, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"attribute", (PyCFunction)driver_attribute, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"device_of", (PyCFunction)driver_device_of, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"alloc", (PyCFunction)driver_alloc, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"free", (PyCFunction)driver_free, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"pin", (PyCFunction)driver_pin, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"unpin", (PyCFunction)driver_unpin, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"mark", (PyCFunction)driver_mark, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {"lane", (PyCFunction)driver_lane, METH_VARARGS, PyDoc_STR("See _cuda.pyi.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef DRIVER_GETTERS[] = {
    {"version", (getter)driver_version, NULL, PyDoc_STR("See _cuda.pyi."), NULL},
    {"call", (getter)driver_call, NULL, PyDoc_STR("See _cuda.pyi."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot DRIVER_SLOTS[] = {
    {Py_tp_new, driver_new},
    {Py_tp_dealloc, driver_dealloc},
    {Py_tp_methods, DRIVER_METHODS},
    {Py_tp_getset, DRIVER_GETTERS},
    {Py_tp_doc, PyDoc_STR("See _cuda.pyi.")},
    {0, NULL},
};

static PyType_Spec DRIVER = {"kvbm.native._cuda.Driver", sizeof(Driver), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, DRIVER_SLOTS};

/* ---------------------------------------------------------------- the module */

static int add_types(PyObject *module) {
    Error = PyErr_NewException("kvbm.native._cuda.CudaError", PyExc_RuntimeError, NULL);
    MarkType = (PyTypeObject *)PyType_FromSpec(&MARK);
    LaneType = (PyTypeObject *)PyType_FromSpec(&LANE);
    PyObject *driver = PyType_FromSpec(&DRIVER);
    int failed = !Error || !MarkType || !LaneType || !driver || PyModule_AddObjectRef(module, "CudaError", Error) < 0 ||
                 PyModule_AddObjectRef(module, "Mark", (PyObject *)MarkType) < 0 ||
                 PyModule_AddObjectRef(module, "Lane", (PyObject *)LaneType) < 0 ||
                 PyModule_AddObjectRef(module, "Driver", driver) < 0;
    Py_XDECREF(driver);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, add_types}, {0, NULL}};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "kvbm.native._cuda", NULL, 0, NULL, SLOTS, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cuda(void) { return PyModuleDef_Init(&MODULE); }
