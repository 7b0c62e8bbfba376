/* arguments.c: from Python's objects to what the core takes, and from its status to an exception. */
#include "python/arguments.h"

#include <stdio.h>
#include <string.h>

_Thread_local PyThreadState *released;

PyObject *raise_status(aqlm_status status, const char *function) {
    if (PyErr_Occurred()) return NULL; /* the signal handler's own exception */
    if (status == AQLM_CANCELLED) PyErr_SetNone(PyExc_KeyboardInterrupt);
    else if (status == AQLM_NO_MEMORY) PyErr_NoMemory();
    else PyErr_Format(PyExc_ValueError, "%s: %s", function, aqlm_status_text(status));
    return NULL;
}

static const char *type_name(int type) {
    switch (type) {
    case NPY_FLOAT: return "float32";
    case NPY_DOUBLE: return "float64";
    case NPY_UINT16: return "uint16";
    case NPY_UINT8: return "uint8";
    case NPY_INT32: return "int32";
    case NPY_INT16: return "int16";
    default: return "int8";
    }
}

static void shape_text(char *text, size_t size, int ndim, const npy_intp *dims) {
    size_t at = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < ndim && at < size; i++) {
        const char *comma = i + 1 < ndim ? ", " : ndim == 1 ? "," : "";
        if (dims[i] < 0) at += (size_t)snprintf(text + at, size - at, "any%s", comma);
        else at += (size_t)snprintf(text + at, size - at, "%lld%s", (long long)dims[i], comma);
    }
    if (at < size) (void)snprintf(text + at, size - at, ")");
}

PyArrayObject *array_of(PyObject *object, const char *name, int type, int ndim, npy_intp *dims) {
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s: got %R, expected a NumPy array of %s", name, (PyObject *)Py_TYPE(object),
                     type_name(type));
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (PyArray_TYPE(array) != type || PyArray_ISBYTESWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s: got dtype %S, expected %s", name, (PyObject *)PyArray_DESCR(array),
                     type_name(type));
        return NULL;
    }
    bool fits = PyArray_NDIM(array) == ndim;
    for (int i = 0; i < ndim && fits; i++) fits = dims[i] < 0 || PyArray_DIM(array, i) == dims[i];
    if (!fits) {
        char got[128], expected[128];
        shape_text(got, sizeof got, PyArray_NDIM(array), PyArray_DIMS(array));
        shape_text(expected, sizeof expected, ndim, dims);
        PyErr_Format(PyExc_ValueError, "%s: got shape %s, expected %s", name, got, expected);
        return NULL;
    }
    for (int i = 0; i < ndim; i++) dims[i] = PyArray_DIM(array, i);
    return (PyArrayObject *)PyArray_FROM_OF(object, NPY_ARRAY_CARRAY_RO);
}

PyArrayObject *new_array(int type, int ndim, npy_intp *dims) {
    return (PyArrayObject *)PyArray_SimpleNew(ndim, dims, type);
}

int bits_of(npy_intp entries) {
    int bits = 0;
    while ((npy_intp)1 << bits < entries) bits++;
    return (npy_intp)1 << bits == entries ? bits : -1;
}

PyArrayObject *copy_of(PyArrayObject *array) { return (PyArrayObject *)PyArray_NewCopy(array, NPY_CORDER); }

void release_layer(layer *l) {
    PyArrayObject *all[] = {l->weight, l->H, l->codes, l->codebooks, l->scales};
    for (int i = 0; i < 5; i++) Py_XDECREF((PyObject *)all[i]);
}

bool check_shape(const aqlm_shape *shape) {
    const char *problem = aqlm_check_shape(shape);
    if (!problem && shape->out_group_size != 1) problem = "out_group_size must be 1 in the quantizer";
    if (problem)
        PyErr_Format(PyExc_ValueError,
                     "%s; got out_features=%lld, in_features=%lld, num_codebooks=%lld, nbits_per_codebook=%lld, "
                     "in_group_size=%lld, out_group_size=%lld",
                     problem, (long long)shape->out_features, (long long)shape->in_features,
                     (long long)shape->num_codebooks, (long long)shape->nbits_per_codebook,
                     (long long)shape->in_group_size, (long long)shape->out_group_size);
    return !problem;
}

static bool check_codes(PyArrayObject *codes, int64_t bits) {
    const uint16_t *code = data(codes);
    const npy_intp n = PyArray_SIZE(codes);
    for (npy_intp i = 0; i < n; i++)
        if (code[i] >> bits) {
            PyErr_Format(PyExc_ValueError, "codes: got %d at flat index %zd, expected 0..%d", (int)code[i],
                         (Py_ssize_t)i, (1 << bits) - 1);
            return false;
        }
    return true;
}

bool check_not_negative(double x, const char *name) {
    if (x >= 0.0) return true;
    PyObject *value = PyFloat_FromDouble(x);
    if (value) PyErr_Format(PyExc_ValueError, "%s: got %R, expected a number >= 0", name, value);
    Py_XDECREF(value);
    return false;
}

bool fill_layer(layer *l, PyObject *weight, PyObject *H, PyObject *codes, PyObject *codebooks, PyObject *scales) {
    memset(l, 0, sizeof *l);
    npy_intp w[2] = {-1, -1}, c[3] = {-1, -1, -1};
    if (!(l->weight = array_of(weight, "weight", NPY_FLOAT, 2, w))) return false;
    npy_intp h[2] = {w[1], w[1]}, s[1] = {w[0]};
    if (H && !(l->H = array_of(H, "H", NPY_FLOAT, 2, h))) goto fail;
    if (codebooks) {
        if (!(l->codebooks = array_of(codebooks, "codebooks", NPY_FLOAT, 3, c))) goto fail;
        const int bits = bits_of(c[1]);
        if (bits < 1) {
            PyErr_Format(PyExc_ValueError, "codebooks: got %zd entries, expected a power of two in 2..65536",
                         (Py_ssize_t)c[1]);
            goto fail;
        }
        l->shape = (aqlm_shape){w[0], w[1], c[0], bits, c[2], 1};
        if (!check_shape(&l->shape)) goto fail;
    }
    npy_intp n[3] = {w[0], c[2] > 0 ? w[1] / c[2] : -1, c[0]};
    if (codes && !(l->codes = array_of(codes, "codes", NPY_UINT16, 3, n))) goto fail;
    if (codes && !check_codes(l->codes, l->shape.nbits_per_codebook)) goto fail;
    if (scales && !(l->scales = array_of(scales, "scales", NPY_FLOAT, 1, s))) goto fail;
    return true;
fail:
    release_layer(l);
    return false;
}
