/* Arguments of the helpers that work on a run of blocks at once. */

#ifndef KVBM_RUN_H
#define KVBM_RUN_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* Contiguous int64s of the caller's: the contents of `bytes`, or any one-dimensional buffer of that format. */
typedef struct {
    const int64_t *at;
    Py_ssize_t n;
    Py_buffer view; /* obj is NULL where there is nothing to release */
} Run;

static int run_open(PyObject *object, const char *name, Run *run) {
    run->view.obj = NULL;
    if (PyBytes_CheckExact(object) && PyBytes_GET_SIZE(object) % (Py_ssize_t)sizeof(int64_t) == 0) {
        run->at = (const int64_t *)PyBytes_AS_STRING(object);
        run->n = PyBytes_GET_SIZE(object) / (Py_ssize_t)sizeof(int64_t);
        return 0;
    }
    if (PyObject_GetBuffer(object, &run->view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) == 0) {
        const char *format = run->view.format ? run->view.format : "B";
        format += *format == '@' || *format == '=' || (*format == '<' && PY_LITTLE_ENDIAN);
        if (run->view.ndim == 1 && run->view.itemsize == 8 && (strcmp(format, "q") == 0 || strcmp(format, "l") == 0)) {
            run->at = run->view.buf;
            run->n = run->view.shape[0];
            return 0;
        }
        PyBuffer_Release(&run->view);
    }
    PyErr_Format(PyExc_ValueError, "%s must be bytes of int64 or a contiguous one-dimensional buffer of int64", name);
    return -1;
}

static void run_close(Run *run) {
    if (run->view.obj) {
        PyBuffer_Release(&run->view);
    }
}

/* `bytes` with one byte for each of `n`, or NULL with ValueError set. */
static const uint8_t *byte_each(PyObject *object, const char *name, Py_ssize_t n) {
    if (PyBytes_CheckExact(object) && PyBytes_GET_SIZE(object) == n) {
        return (const uint8_t *)PyBytes_AS_STRING(object);
    }
    PyErr_Format(PyExc_ValueError, "%s must be bytes, %zd of them", name, n);
    return NULL;
}

static int count_is(Py_ssize_t count, Py_ssize_t low, Py_ssize_t high, const char *name) {
    if (count < low || count > high) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd to %zd arguments, got %zd", name, low, high, count);
        return 0;
    }
    return 1;
}

#endif
