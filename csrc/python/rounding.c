/* rounding.c: steps of other methods on NumPy arrays: aqlm/rounding.h. */
#include "python/arguments.h"

#include <stdlib.h>

static PyObject *factor_columns(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("H", "sorted", "relative_damp");
    PyObject *matrix;
    int sorted;
    double damp;
    if (!PARSE("Opd", &matrix, &sorted, &damp) || !check_not_negative(damp, "relative_damp")) return NULL;
    npy_intp dims[2] = {-1, -1};
    PyArrayObject *H = array_of(matrix, "H", NPY_FLOAT, 2, dims);
    if (!H) return NULL;
    if (dims[0] != dims[1]) {
        Py_DECREF((PyObject *)H);
        return PyErr_Format(PyExc_ValueError, "H: got shape (%zd, %zd), expected a square matrix", (Py_ssize_t)dims[0],
                            (Py_ssize_t)dims[1]);
    }
    PyArrayObject *order = new_array(NPY_INT32, 1, dims), *feedback = new_array(NPY_FLOAT, 2, dims);
    aqlm_status status = AQLM_NO_MEMORY;
    if (order && feedback)
        UNLOCKED(aqlm_factor_columns(data(order), data(feedback), data(H), dims[0], sorted != 0, damp));
    Py_DECREF((PyObject *)H);
    if (!status) return Py_BuildValue("NN", order, feedback);
    Py_XDECREF((PyObject *)order);
    Py_XDECREF((PyObject *)feedback);
    return raise_status(status, "factor_columns");
}

static bool is_permutation(PyArrayObject *order) {
    const npy_intp n = PyArray_SIZE(order);
    const int32_t *at = data(order);
    char *seen = calloc((size_t)n, 1);
    bool permutation = seen != NULL;
    for (npy_intp i = 0; i < n && permutation; i++) permutation = at[i] >= 0 && at[i] < n && !seen[at[i]]++;
    free(seen);
    if (!permutation) PyErr_Format(PyExc_ValueError, "order: expected a permutation of 0..%zd", (Py_ssize_t)n - 1);
    return permutation;
}

/* What both ways of rounding take. */
typedef struct rounded {
    PyArrayObject *weight, *order, *feedback;
    npy_intp dims[2];
} rounded;

static void release_rounded(rounded *r) {
    PyArrayObject *all[] = {r->weight, r->order, r->feedback};
    for (int i = 0; i < 3; i++) Py_XDECREF((PyObject *)all[i]);
}

static bool fill_rounded(rounded *r, PyObject *weight, PyObject *order, PyObject *feedback, npy_intp width) {
    *r = (rounded){NULL, NULL, NULL, {-1, -1}};
    if (!(r->weight = array_of(weight, "weight", NPY_FLOAT, 2, r->dims))) return false;
    npy_intp groups[1] = {r->dims[1] / width}, square[2] = {r->dims[1], r->dims[1]};
    if (r->dims[0] < 1 || r->dims[1] < 1 || r->dims[1] % width)
        PyErr_Format(PyExc_ValueError, "weight: got shape (%zd, %zd), expected columns in groups of %zd",
                     (Py_ssize_t)r->dims[0], (Py_ssize_t)r->dims[1], (Py_ssize_t)width);
    else if ((r->order = array_of(order, "order", NPY_INT32, 1, groups)) && is_permutation(r->order) &&
             (feedback == Py_None || (r->feedback = array_of(feedback, "feedback", NPY_FLOAT, 2, square))))
        return true;
    release_rounded(r);
    return false;
}

static PyObject *round_columns(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("weight", "order", "feedback", "bits", "group_size", "symmetric", "at_start", "scales", "zeros");
    PyObject *weight, *order, *feedback, *given = Py_None, *given_zeros = Py_None;
    long long bits, group;
    int symmetric = 0, at_start = 0;
    if (!PARSE("OOOLL|ppOO", &weight, &order, &feedback, &bits, &group, &symmetric, &at_start, &given, &given_zeros))
        return NULL;
    if (bits < 1 || bits > 8) return PyErr_Format(PyExc_ValueError, "bits: got %lld, expected 1..8", bits);
    rounded r;
    if (!fill_rounded(&r, weight, order, feedback, 1)) return NULL;
    if (group < 1 || r.dims[1] % group) {
        PyErr_Format(PyExc_ValueError, "group_size: got %lld, expected a divisor of in_features=%zd", group,
                     (Py_ssize_t)r.dims[1]);
        release_rounded(&r);
        return NULL;
    }
    npy_intp groups[2] = {r.dims[0], r.dims[1] / (npy_intp)group};
    PyArrayObject *scales = NULL, *zeros = NULL, *codes = NULL, *own = NULL, *own_zeros = NULL;
    const bool found = given == Py_None;
    if (found) {
        scales = new_array(NPY_FLOAT, 2, groups);
        zeros = new_array(NPY_FLOAT, 2, groups);
    } else {
        own = array_of(given, "scales", NPY_FLOAT, 2, groups);
        own_zeros = own ? array_of(given_zeros, "zeros", NPY_FLOAT, 2, groups) : NULL;
        scales = own_zeros ? copy_of(own) : NULL;
        zeros = scales ? copy_of(own_zeros) : NULL;
    }
    if (zeros) codes = new_array(NPY_UINT8, 2, r.dims);
    const aqlm_columns columns = {data(r.weight),
                                  data(r.order),
                                  data(r.feedback),
                                  r.dims[0],
                                  r.dims[1],
                                  group,
                                  bits,
                                  !found      ? AQLM_GRID_GIVEN
                                  : symmetric ? AQLM_GRID_SYMMETRIC
                                              : AQLM_GRID_AFFINE,
                                  at_start != 0};
    aqlm_status status = AQLM_NO_MEMORY;
    if (codes) UNLOCKED(aqlm_round_columns(data(codes), data(scales), data(zeros), &columns));
    Py_XDECREF((PyObject *)own);
    Py_XDECREF((PyObject *)own_zeros);
    release_rounded(&r);
    if (!status) return Py_BuildValue("NNN", codes, scales, zeros);
    PyArrayObject *all[] = {codes, scales, zeros};
    for (int i = 0; i < 3; i++) Py_XDECREF((PyObject *)all[i]);
    return raise_status(status, "round_columns");
}

static PyObject *round_lattice(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("weight", "order", "feedback", "scale", "second", "residual_scale", "fitted");
    PyObject *weight, *order, *feedback;
    double scale, residual = 1.0;
    long long second = 0;
    int fitted = 0;
    if (!PARSE("OOOd|Ldp", &weight, &order, &feedback, &scale, &second, &residual, &fitted)) return NULL;
    if (!(scale > 0.0) || !(residual > 0.0))
        return PyErr_Format(PyExc_ValueError, "scale, residual_scale: expected numbers > 0");
    if (second < 0 || second > 2) return PyErr_Format(PyExc_ValueError, "second: got %lld, expected 0..2 bits", second);
    rounded r;
    if (!fill_rounded(&r, weight, order, feedback, 8)) return NULL;
    npy_intp groups[3] = {r.dims[0], r.dims[1] / 8, second ? 2 : 1};
    PyArrayObject *decoded = new_array(NPY_FLOAT, 2, r.dims), *codes = new_array(NPY_UINT16, 3, groups);
    const aqlm_lattice lattice = {data(r.weight), data(r.order), data(r.feedback), r.dims[0],  r.dims[1],
                                  second,         (float)scale,  (float)residual,  fitted != 0};
    aqlm_status status = AQLM_NO_MEMORY;
    if (decoded && codes) UNLOCKED(aqlm_round_lattice(data(decoded), data(codes), &lattice));
    release_rounded(&r);
    if (!status) return Py_BuildValue("NN", decoded, codes);
    Py_XDECREF((PyObject *)decoded);
    Py_XDECREF((PyObject *)codes);
    return raise_status(status, "round_lattice");
}

static PyObject *e8p_decode(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("codes", "fitted");
    PyObject *object;
    int fitted = 0;
    if (!PARSE("O|p", &object, &fitted)) return NULL;
    npy_intp dims[2] = {-1, 8};
    PyArrayObject *codes = array_of(object, "codes", NPY_UINT16, 1, dims);
    PyArrayObject *vectors = codes ? new_array(NPY_FLOAT, 2, dims) : NULL;
    if (vectors) aqlm_e8p_decode(data(vectors), data(codes), dims[0], fitted != 0);
    Py_XDECREF((PyObject *)codes);
    return (PyObject *)vectors;
}

static PyObject *e8p_nearest(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("x", "fitted");
    PyObject *object;
    int fitted = 0;
    if (!PARSE("O|p", &object, &fitted)) return NULL;
    npy_intp dims[2] = {-1, 8};
    PyArrayObject *x = array_of(object, "x", NPY_FLOAT, 2, dims);
    PyArrayObject *codes = x ? new_array(NPY_UINT16, 1, dims) : NULL;
    aqlm_status status = AQLM_NO_MEMORY;
    if (codes) UNLOCKED(aqlm_e8p_nearest(data(codes), data(x), dims[0], fitted != 0));
    Py_XDECREF((PyObject *)x);
    if (!status) return (PyObject *)codes;
    Py_XDECREF((PyObject *)codes);
    return PyErr_Occurred() ? NULL : raise_status(status, "e8p_nearest");
}

static PyObject *e8_short(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    npy_intp dims[2] = {256, 8};
    PyArrayObject *vectors = new_array(NPY_FLOAT, 2, dims);
    if (vectors) aqlm_e8_short(data(vectors));
    return (PyObject *)vectors;
}

static PyObject *hadamard_order(PyObject *self, PyObject *n) {
    (void)self;
    const long long size = PyLong_AsLongLong(n);
    if (size == -1 && PyErr_Occurred()) return NULL;
    if (size < 1) return PyErr_Format(PyExc_ValueError, "n: got %lld, expected at least 1", size);
    return PyLong_FromLongLong(aqlm_hadamard_order(size));
}

static PyObject *hadamard(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("x", "inverse");
    PyObject *object;
    int inverse = 0;
    if (!PARSE("O|p", &object, &inverse)) return NULL;
    npy_intp dims[2] = {-1, -1};
    PyArrayObject *x = array_of(object, "x", NPY_FLOAT, 2, dims);
    PyArrayObject *y = x ? new_array(NPY_FLOAT, 2, dims) : NULL;
    aqlm_status status = AQLM_NO_MEMORY;
    if (y) UNLOCKED(aqlm_hadamard(data(y), data(x), dims[0], dims[1], inverse != 0));
    Py_XDECREF((PyObject *)x);
    if (!status) return (PyObject *)y;
    Py_XDECREF((PyObject *)y);
    return PyErr_Occurred() ? NULL : raise_status(status, "hadamard");
}

static PyObject *random_orthogonal(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("n", "seed");
    long long n;
    unsigned long long seed;
    if (!PARSE("LK", &n, &seed)) return NULL;
    if (n < 1 || n > 4096) return PyErr_Format(PyExc_ValueError, "n: got %lld, expected 1..4096", n);
    npy_intp dims[2] = {(npy_intp)n, (npy_intp)n};
    PyArrayObject *q = new_array(NPY_FLOAT, 2, dims);
    aqlm_status status = AQLM_NO_MEMORY;
    if (q) UNLOCKED(aqlm_random_orthogonal(data(q), n, seed));
    if (!status) return (PyObject *)q;
    Py_XDECREF((PyObject *)q);
    return raise_status(status, "random_orthogonal");
}

static PyObject *rotate(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("x", "left", "right");
    PyObject *object, *left_object, *right_object;
    if (!PARSE("OOO", &object, &left_object, &right_object)) return NULL;
    npy_intp p[2] = {-1, -1}, q[2] = {-1, -1};
    PyArrayObject *left = array_of(left_object, "left", NPY_FLOAT, 2, p), *right = NULL, *x = NULL, *y = NULL;
    if (left) right = array_of(right_object, "right", NPY_FLOAT, 2, q);
    npy_intp dims[2] = {-1, p[0] * q[0]};
    if (right && (p[0] != p[1] || q[0] != q[1]))
        PyErr_SetString(PyExc_ValueError, "left, right: expected square matrices");
    else if (right) x = array_of(object, "x", NPY_FLOAT, 2, dims);
    if (x) y = new_array(NPY_FLOAT, 2, dims);
    aqlm_status status = AQLM_NO_MEMORY;
    if (y) UNLOCKED(aqlm_rotate(data(y), data(x), data(left), data(right), dims[0], p[0], q[0]));
    PyArrayObject *all[] = {left, right, x};
    for (int i = 0; i < 3; i++) Py_XDECREF((PyObject *)all[i]);
    if (!status) return (PyObject *)y;
    Py_XDECREF((PyObject *)y);
    return PyErr_Occurred() ? NULL : raise_status(status, "rotate");
}

PyMethodDef rounding_methods[] = {
    VERB(factor_columns, "factor_columns(H, sorted, relative_damp) -> (order, feedback)"),
    VERB(round_columns, "round_columns(weight, order, feedback, bits, group_size, symmetric=False, at_start=False, "
                        "scales=None, zeros=None) -> (codes, scales, zeros)"),
    VERB(round_lattice, "round_lattice(weight, order, feedback, scale, second=0, residual_scale=1.0, fitted=False) -> "
                        "(decoded, codes)"),
    VERB(e8p_decode, "e8p_decode(codes, fitted=False) -> vectors"),
    VERB(e8p_nearest, "e8p_nearest(x, fitted=False) -> codes"),
    {"e8_short", e8_short, METH_NOARGS, "e8_short() -> vectors"},
    {"hadamard_order", hadamard_order, METH_O, "hadamard_order(n) -> order"},
    VERB(hadamard, "hadamard(x, inverse=False) -> y"),
    VERB(random_orthogonal, "random_orthogonal(n, seed) -> q"),
    VERB(rotate, "rotate(x, left, right) -> y"),
    {NULL, NULL, 0, NULL},
};
