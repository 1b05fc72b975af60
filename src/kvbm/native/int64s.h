/* What the C helpers that take arrays of int64 share. */

#ifndef KVBM_INT64S_H
#define KVBM_INT64S_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* A contiguous one-dimensional view of int64, or -1 with ValueError set. */
static int get_int64(PyObject *object, const char *name, int writable, Py_buffer *view) {
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) == 0) {
        const char *format = view->format ? view->format : "B";
        format += *format == '@' || *format == '=' || (*format == '<' && PY_LITTLE_ENDIAN);
        if (view->ndim == 1 && view->itemsize == 8 && (strcmp(format, "q") == 0 || strcmp(format, "l") == 0)) {
            return 0;
        }
        PyBuffer_Release(view);
    }
    PyErr_Format(PyExc_ValueError, "%s must be a %scontiguous one-dimensional buffer of int64", name,
                 writable ? "writable, " : "");
    return -1;
}

#endif
