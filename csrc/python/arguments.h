/* arguments.h: what every function of `_core` does with its arguments and its status. Each array is checked for dtype
 * and shape before the core sees it; the core is called with the GIL released. */
#ifndef AQLM_PYTHON_ARGUMENTS_H
#define AQLM_PYTHON_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL aqlm_numpy
#ifndef AQLM_IMPORTS_NUMPY /* one file does */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include <stdbool.h>
#include <stdint.h>

#include "aqlm.h"

#define KEYWORDS(...) static char *names[] = {__VA_ARGS__, NULL}
#define PARSE(format, ...) PyArg_ParseTupleAndKeywords(args, kwargs, format, names, __VA_ARGS__)
#define VERB(name, text) {#name, (PyCFunction)(void (*)(void))name, METH_VARARGS | METH_KEYWORDS, text}

extern _Thread_local PyThreadState *released; /* NULL: this thread is not inside the core */

/* status = call, while other threads run Python. */
#define UNLOCKED(call)                                                                                                 \
    do {                                                                                                               \
        released = PyEval_SaveThread();                                                                                \
        status = (call);                                                                                               \
        PyEval_RestoreThread(released);                                                                                \
        released = NULL;                                                                                               \
    } while (0)

PyObject *raise_status(aqlm_status status, const char *function); /* NULL */

/* A C-contiguous array of exactly this dtype and shape (dims < 0: any, and filled in). New reference or NULL. */
PyArrayObject *array_of(PyObject *object, const char *name, int type, int ndim, npy_intp *dims);
PyArrayObject *new_array(int type, int ndim, npy_intp *dims);
PyArrayObject *copy_of(PyArrayObject *array);

static inline void *data(PyArrayObject *array) { return array ? PyArray_DATA(array) : NULL; }

int bits_of(npy_intp entries); /* -1 unless it is a power of two */

/* These say what is wrong and return false. */
bool check_shape(const aqlm_shape *shape);
bool check_not_negative(double x, const char *name); /* nor NaN */

/* Everything the quantizer's verbs take; release_layer() drops what was filled. */
typedef struct layer {
    PyArrayObject *weight, *H, *codes, *codebooks, *scales;
    aqlm_shape shape;
} layer;

/* Any argument may be NULL where the verb does not take it. */
bool fill_layer(layer *l, PyObject *weight, PyObject *H, PyObject *codes, PyObject *codebooks, PyObject *scales);
void release_layer(layer *l);

/* The functions of quantizer.c, product.c and rounding.c. */
extern PyMethodDef quantizer_methods[], product_methods[], rounding_methods[];

#endif
