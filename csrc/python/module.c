/* module.c: door 1, `aqlm_c._core`: NumPy arrays in, aqlm.h called with the GIL released, NumPy arrays out.
 * Limited API (abi3, Python 3.10 on). Every array is checked for dtype and shape before the core sees it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <numpy/arrayobject.h>

#include "aqlm.h"
#include "python/settings.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- Ctrl-C: the core polls from the calling thread; here that means taking the GIL back for a moment ---- */

static _Thread_local PyThreadState *released;

static int poll_signals(void) {
    static _Thread_local struct timespec last;
    struct timespec now;
    if (!released || clock_gettime(CLOCK_MONOTONIC, &now)) return 0;
    const int64_t elapsed = (int64_t)(now.tv_sec - last.tv_sec) * 1000000000 + (now.tv_nsec - last.tv_nsec);
    if (elapsed < 50000000) return 0;
    last = now;
    PyEval_RestoreThread(released);
    const int stop = PyErr_CheckSignals();
    released = PyEval_SaveThread();
    return stop;
}

#define UNLOCKED(call)                                                                                                 \
    do {                                                                                                               \
        released = PyEval_SaveThread();                                                                                \
        status = (call);                                                                                               \
        PyEval_RestoreThread(released);                                                                                \
        released = NULL;                                                                                               \
    } while (0)

static PyObject *raise_status(aqlm_status status, const char *function) {
    if (PyErr_Occurred()) return NULL; /* the signal handler's own exception */
    if (status == AQLM_CANCELLED) PyErr_SetNone(PyExc_KeyboardInterrupt);
    else if (status == AQLM_NO_MEMORY) PyErr_NoMemory();
    else PyErr_Format(PyExc_ValueError, "%s: %s", function, aqlm_status_text(status));
    return NULL;
}

/* ---- arguments ------------------------------------------------------------------------------------------ */

static const char *type_name(int type) {
    switch (type) {
    case NPY_FLOAT: return "float32";
    case NPY_DOUBLE: return "float64";
    case NPY_UINT16: return "uint16";
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
    if (at < size) snprintf(text + at, size - at, ")");
}

/* A C-contiguous array of exactly this dtype and shape (dims < 0: any, and filled in). New reference or NULL. */
static PyArrayObject *array_of(PyObject *object, const char *name, int type, int ndim, npy_intp *dims) {
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

static void *data(PyArrayObject *array) { return array ? PyArray_DATA(array) : NULL; }

static PyArrayObject *new_array(int type, int ndim, npy_intp *dims) {
    return (PyArrayObject *)PyArray_SimpleNew(ndim, dims, type);
}

static int bits_of(npy_intp entries) {
    int bits = 0;
    while ((npy_intp)1 << bits < entries) bits++;
    return (npy_intp)1 << bits == entries ? bits : -1;
}

/* Everything the quantizer's verbs take; release() drops what was filled. */
typedef struct layer {
    PyArrayObject *weight, *H, *codes, *codebooks, *scales;
    aqlm_shape shape;
} layer;

static void release(layer *l) {
    PyArrayObject *all[] = {l->weight, l->H, l->codes, l->codebooks, l->scales};
    for (int i = 0; i < 5; i++) Py_XDECREF((PyObject *)all[i]);
}

static bool check_shape(const aqlm_shape *shape) {
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

/* "name: got x, expected ..." unless x is a number >= 0 (NaN is not). */
static bool check_not_negative(double x, const char *name) {
    if (x >= 0.0) return true;
    PyObject *value = PyFloat_FromDouble(x);
    if (value) PyErr_Format(PyExc_ValueError, "%s: got %R, expected a number >= 0", name, value);
    Py_XDECREF(value);
    return false;
}

/* Any argument may be NULL where the verb does not take it. */
static bool fill(layer *l, PyObject *weight, PyObject *H, PyObject *codes, PyObject *codebooks, PyObject *scales) {
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
    release(l);
    return false;
}

static PyArrayObject *copy_of(PyArrayObject *array) { return (PyArrayObject *)PyArray_NewCopy(array, NPY_CORDER); }

/* Drops the arguments; hands out the result or the error. */
static PyObject *finish(layer *l, PyArrayObject *result, aqlm_status status, const char *function) {
    release(l);
    if (!status) return (PyObject *)result;
    Py_XDECREF((PyObject *)result);
    return raise_status(status, function);
}

#define KEYWORDS(...) static char *names[] = {__VA_ARGS__, NULL}
#define PARSE(format, ...) PyArg_ParseTupleAndKeywords(args, kwargs, format, names, __VA_ARGS__)

/* ---- the quantizer's verbs --------------------------------------------------------------------------------- */

static PyObject *residual_kmeans(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("weight", "scales", "num_codebooks", "nbits_per_codebook", "in_group_size", "init_max_iter", "tolerance",
             "seed", "column_weight");
    PyObject *weight, *scales, *column = Py_None;
    long long K, B, g, iterations = 100;
    unsigned long long seed = 0;
    double tolerance = 1e-3;
    if (!PARSE("OOLLL|LdKO", &weight, &scales, &K, &B, &g, &iterations, &tolerance, &seed, &column) ||
        !check_not_negative(tolerance, "tolerance"))
        return NULL;
    layer l;
    if (!fill(&l, weight, NULL, NULL, NULL, scales)) return NULL;
    l.shape = (aqlm_shape){PyArray_DIM(l.weight, 0), PyArray_DIM(l.weight, 1), K, B, g, 1};
    npy_intp in[1] = {l.shape.in_features};
    PyArrayObject *columns = NULL;
    if (!check_shape(&l.shape) ||
        (column != Py_None && !(columns = array_of(column, "column_weight", NPY_FLOAT, 1, in)))) {
        release(&l);
        return NULL;
    }
    if (iterations < 1) {
        Py_XDECREF((PyObject *)columns);
        release(&l);
        return PyErr_Format(PyExc_ValueError, "init_max_iter: got %lld, expected at least 1", iterations);
    }
    npy_intp codes_dims[3] = {l.shape.out_features, l.shape.in_features / g, K},
             codebook_dims[3] = {K, (npy_intp)1 << B, g};
    PyArrayObject *codes = new_array(NPY_UINT16, 3, codes_dims), *codebooks = new_array(NPY_FLOAT, 3, codebook_dims);
    aqlm_status status = AQLM_NO_MEMORY;
    if (codes && codebooks)
        UNLOCKED(aqlm_residual_kmeans(data(codes), data(codebooks), data(l.weight), data(l.scales), data(columns),
                                      &l.shape, iterations, tolerance, seed));
    Py_XDECREF((PyObject *)columns);
    release(&l);
    if (!status) return Py_BuildValue("NN", codes, codebooks);
    Py_XDECREF((PyObject *)codes);
    Py_XDECREF((PyObject *)codebooks);
    return raise_status(status, "residual_kmeans");
}

static PyObject *accumulate_hessian(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("sum", "x");
    PyObject *sum, *x;
    if (!PARSE("OO", &sum, &x)) return NULL;
    npy_intp dims[2] = {-1, -1};
    PyArrayObject *rows = array_of(x, "x", NPY_FLOAT, 2, dims);
    if (!rows) return NULL;
    npy_intp square[2] = {dims[1], dims[1]};
    PyArrayObject *total = array_of(sum, "sum", NPY_DOUBLE, 2, square);
    if (total && ((PyObject *)total != sum || !PyArray_ISWRITEABLE(total))) {
        PyErr_SetString(PyExc_ValueError, "sum: got a read-only or strided array, expected one to write into");
        Py_DECREF((PyObject *)total);
        total = NULL;
    }
    aqlm_status status = AQLM_OK;
    if (total) UNLOCKED(aqlm_accumulate_hessian(data(total), data(rows), dims[0], dims[1]));
    Py_DECREF((PyObject *)rows);
    if (!total) return NULL;
    Py_DECREF((PyObject *)total);
    if (status) return raise_status(status, "accumulate_hessian");
    Py_RETURN_NONE;
}

static PyObject *factor_hessian(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("H", "in_group_size", "relative_damp");
    PyObject *matrix;
    long long g;
    double damp;
    if (!PARSE("OLd", &matrix, &g, &damp) || !check_not_negative(damp, "relative_damp")) return NULL;
    npy_intp dims[2] = {-1, -1};
    PyArrayObject *H = array_of(matrix, "H", NPY_FLOAT, 2, dims);
    if (!H) return NULL;
    const aqlm_shape shape = {1, dims[1], 1, 1, g, 1};
    PyArrayObject *order = NULL, *feedback = NULL, *metric = NULL;
    aqlm_status status = AQLM_NO_MEMORY;
    bool valid = dims[0] == dims[1];
    if (!valid)
        PyErr_Format(PyExc_ValueError, "H: got shape (%zd, %zd), expected a square matrix", (Py_ssize_t)dims[0],
                     (Py_ssize_t)dims[1]);
    if (valid && (valid = check_shape(&shape))) {
        npy_intp groups[3] = {dims[1] / g, g, g};
        order = new_array(NPY_INT32, 1, groups);
        feedback = new_array(NPY_FLOAT, 2, dims);
        metric = new_array(NPY_FLOAT, 3, groups);
        if (order && feedback && metric)
            UNLOCKED(aqlm_factor_hessian(data(order), data(feedback), data(metric), data(H), dims[1], g, damp));
    }
    Py_DECREF((PyObject *)H);
    if (valid && !status) return Py_BuildValue("NNN", order, feedback, metric);
    Py_XDECREF((PyObject *)order);
    Py_XDECREF((PyObject *)feedback);
    Py_XDECREF((PyObject *)metric);
    return valid ? raise_status(status, "factor_hessian") : NULL;
}

static bool search_of(aqlm_search *s, const layer *l, long long beam_size, int pairs, unsigned long long seed) {
    if (beam_size < 0 || beam_size > 64)
        PyErr_Format(PyExc_ValueError, "beam_size: got %lld, expected 0 (exact pairs) or 1..64", beam_size);
    else if ((pairs || beam_size == 0) && (l->shape.num_codebooks < 2 || l->shape.nbits_per_codebook > 8))
        PyErr_Format(PyExc_ValueError,
                     "%s (exact pairs) with %lldx%lld, expected at least 2 codebooks of at most 8 bits",
                     pairs ? "pairs: got True" : "beam_size: got 0", (long long)l->shape.num_codebooks,
                     (long long)l->shape.nbits_per_codebook);
    *s = (aqlm_search){data(l->weight), data(l->codebooks), data(l->scales), l->shape, beam_size, pairs, seed};
    return !PyErr_Occurred();
}

static PyObject *search_sweep(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("codes", "weight", "H", "codebooks", "scales", "beam_size", "seed", "pairs");
    PyObject *codes, *weight, *H, *codebooks, *scales;
    long long beam_size = 0;
    unsigned long long seed = 0;
    int pairs = 0;
    if (!PARSE("OOOOO|LKp", &codes, &weight, &H, &codebooks, &scales, &beam_size, &seed, &pairs)) return NULL;
    layer l;
    aqlm_search s;
    if (!fill(&l, weight, H, codes, codebooks, scales)) return NULL;
    PyArrayObject *result = search_of(&s, &l, beam_size, pairs, seed) ? copy_of(l.codes) : NULL;
    aqlm_status status = AQLM_NO_MEMORY;
    if (result) UNLOCKED(aqlm_search_sweep(data(result), &s, data(l.H)));
    return finish(&l, result, status, "search_sweep");
}

static PyObject *search_ldl(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("weight", "order", "feedback", "metric", "codebooks", "scales", "beam_size", "pairs");
    PyObject *weight, *order, *feedback, *metric, *codebooks, *scales;
    long long beam_size = 0;
    int pairs = 0;
    if (!PARSE("OOOOOO|Lp", &weight, &order, &feedback, &metric, &codebooks, &scales, &beam_size, &pairs)) return NULL;
    layer l;
    aqlm_search s;
    if (!fill(&l, weight, NULL, NULL, codebooks, scales)) return NULL;
    const npy_intp g = l.shape.in_group_size, in = l.shape.in_features;
    npy_intp groups[3] = {in / g, g, g}, square[2] = {in, in},
             codes_dims[3] = {l.shape.out_features, in / g, l.shape.num_codebooks};
    PyArrayObject *o = array_of(order, "order", NPY_INT32, 1, groups),
                  *f = o ? array_of(feedback, "feedback", NPY_FLOAT, 2, square) : NULL;
    PyArrayObject *m = f ? array_of(metric, "metric", NPY_FLOAT, 3, groups) : NULL, *result = NULL;
    if (m) {
        char *seen = calloc((size_t)groups[0], 1);
        const int32_t *at = data(o);
        bool permutation = seen != NULL;
        for (npy_intp i = 0; i < groups[0] && permutation; i++)
            permutation = at[i] >= 0 && at[i] < groups[0] && !seen[at[i]]++;
        free(seen);
        if (!permutation)
            PyErr_Format(PyExc_ValueError, "order: expected a permutation of 0..%zd", (Py_ssize_t)groups[0] - 1);
        else if (search_of(&s, &l, beam_size, pairs, 0)) result = new_array(NPY_UINT16, 3, codes_dims);
    }
    aqlm_status status = AQLM_NO_MEMORY;
    if (result) UNLOCKED(aqlm_search_ldl(data(result), &s, data(o), data(f), data(m)));
    PyArrayObject *all[] = {o, f, m};
    for (int i = 0; i < 3; i++) Py_XDECREF((PyObject *)all[i]);
    return finish(&l, result, status, "search_ldl");
}

static PyObject *update_codebooks(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("codebooks", "weight", "H", "codes", "scales", "cg_steps");
    PyObject *codes, *weight, *H, *codebooks, *scales;
    long long cg_steps;
    if (!PARSE("OOOOOL", &codebooks, &weight, &H, &codes, &scales, &cg_steps)) return NULL;
    if (cg_steps < 0) return PyErr_Format(PyExc_ValueError, "cg_steps: got %lld, expected at least 0", cg_steps);
    layer l;
    if (!fill(&l, weight, H, codes, codebooks, scales)) return NULL;
    PyArrayObject *result = copy_of(l.codebooks);
    aqlm_status status = AQLM_NO_MEMORY;
    if (result)
        UNLOCKED(aqlm_update_codebooks(data(result), data(l.weight), data(l.H), data(l.codes), data(l.scales), &l.shape,
                                       cg_steps));
    return finish(&l, result, status, "update_codebooks");
}

static PyObject *update_scales(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("scales", "weight", "H", "codes", "codebooks");
    PyObject *codes, *weight, *H, *codebooks, *scales;
    if (!PARSE("OOOOO", &scales, &weight, &H, &codes, &codebooks)) return NULL;
    layer l;
    if (!fill(&l, weight, H, codes, codebooks, scales)) return NULL;
    PyArrayObject *result = copy_of(l.scales);
    aqlm_status status = AQLM_NO_MEMORY;
    if (result)
        UNLOCKED(
            aqlm_update_scales(data(result), data(l.weight), data(l.H), data(l.codes), data(l.codebooks), &l.shape));
    return finish(&l, result, status, "update_scales");
}

static PyObject *update_adam(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("codebooks", "scales", "moments", "weight", "H", "codes", "steps", "learning_rate", "steps_before");
    PyObject *codes, *weight, *H, *codebooks, *scales, *moments;
    long long steps, before = 0;
    double rate;
    if (!PARSE("OOOOOOLd|L", &codebooks, &scales, &moments, &weight, &H, &codes, &steps, &rate, &before) ||
        !check_not_negative((double)steps, "steps") || !check_not_negative(rate, "learning_rate") ||
        !check_not_negative((double)before, "steps_before"))
        return NULL;
    layer l;
    if (!fill(&l, weight, H, codes, codebooks, scales)) return NULL;
    npy_intp dims[2] = {2, PyArray_SIZE(l.codebooks) + PyArray_SIZE(l.scales)};
    PyArrayObject *given = array_of(moments, "moments", NPY_DOUBLE, 2, dims);
    PyArrayObject *c = copy_of(l.codebooks), *s = copy_of(l.scales), *m = given ? copy_of(given) : NULL;
    aqlm_status status = AQLM_NO_MEMORY;
    if (c && s && m)
        UNLOCKED(aqlm_update_adam(data(c), data(s), data(m), data(l.weight), data(l.H), data(l.codes), &l.shape, steps,
                                  rate, before));
    Py_XDECREF((PyObject *)given);
    release(&l);
    if (!status) return Py_BuildValue("NNN", c, s, m);
    PyArrayObject *all[] = {c, s, m};
    for (int i = 0; i < 3; i++) Py_XDECREF((PyObject *)all[i]);
    return raise_status(status, "update_adam");
}

static PyObject *quantization_error(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("weight", "H", "codes", "codebooks", "scales");
    PyObject *weight, *H, *codes = Py_None, *codebooks = Py_None, *scales = Py_None;
    if (!PARSE("OO|OOO", &weight, &H, &codes, &codebooks, &scales)) return NULL;
    layer l;
    const bool none = codes == Py_None;
    if (!none && (codebooks == Py_None || scales == Py_None))
        return PyErr_Format(PyExc_ValueError, "%s: got None, expected an array beside codes",
                            codebooks == Py_None ? "codebooks" : "scales");
    if (!fill(&l, weight, H, none ? NULL : codes, none ? NULL : codebooks, none ? NULL : scales)) return NULL;
    if (none) l.shape = (aqlm_shape){PyArray_DIM(l.weight, 0), PyArray_DIM(l.weight, 1), 1, 1, 4, 1};
    double error = 0.0;
    aqlm_status status = AQLM_OK;
    if (!none || check_shape(&l.shape))
        UNLOCKED(aqlm_quantization_error(&error, data(l.weight), data(l.H), data(l.codes), data(l.codebooks),
                                         data(l.scales), &l.shape));
    release(&l);
    if (PyErr_Occurred()) return NULL;
    return status ? raise_status(status, "quantization_error") : PyFloat_FromDouble(error);
}

static PyObject *gaussian_reference(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("eigenvalues", "rate");
    PyObject *values;
    double rate, error = 0.0;
    if (!PARSE("Od", &values, &rate) || !check_not_negative(rate, "rate")) return NULL;
    npy_intp n[1] = {-1};
    PyArrayObject *eigenvalues = array_of(values, "eigenvalues", NPY_DOUBLE, 1, n);
    if (!eigenvalues) return NULL;
    if (n[0] == 0) {
        Py_DECREF((PyObject *)eigenvalues);
        return PyErr_Format(PyExc_ValueError, "eigenvalues: got none, expected at least one");
    }
    aqlm_status status;
    UNLOCKED(aqlm_gaussian_reference(&error, data(eigenvalues), n[0], rate));
    Py_DECREF((PyObject *)eigenvalues);
    return status ? raise_status(status, "gaussian_reference") : PyFloat_FromDouble(error);
}

/* ---- the stored weight ---------------------------------------------------------------------------------------- */

typedef struct stored {
    PyArrayObject *codes, *codebooks, *scales;
    aqlm_weight w;
} stored;

static void release_stored(stored *s) {
    Py_XDECREF((PyObject *)s->codes);
    Py_XDECREF((PyObject *)s->codebooks);
    Py_XDECREF((PyObject *)s->scales);
}

static bool fill_stored(stored *s, PyObject *codes, PyObject *codebooks, PyObject *scales) {
    memset(s, 0, sizeof *s);
    npy_intp c[4] = {-1, -1, -1, -1};
    if (!(s->codebooks = array_of(codebooks, "codebooks", NPY_FLOAT, 4, c))) return false;
    const int bits = bits_of(c[1]);
    npy_intp n[3] = {-1, -1, c[0]};
    if (bits < 1 || bits > 16)
        PyErr_Format(PyExc_ValueError, "codebooks: got %zd entries, expected a power of two in 2..65536",
                     (Py_ssize_t)c[1]);
    else if ((s->codes = array_of(codes, "codes", bits <= 8 ? NPY_INT8 : NPY_INT16, 3, n))) {
        npy_intp flat[1] = {n[0]}, full[4] = {n[0], 1, 1, 1};
        const bool is_flat = PyArray_Check(scales) && PyArray_NDIM((PyArrayObject *)scales) == 1;
        if ((s->scales = array_of(scales, "scales", NPY_FLOAT, is_flat ? 1 : 4, is_flat ? flat : full))) {
            s->w = (aqlm_weight){{n[0] * c[2], n[1] * c[3], c[0], bits, c[3], c[2]},
                                 data(s->codes),
                                 data(s->codebooks),
                                 data(s->scales),
                                 AQLM_F32,
                                 false};
            const char *problem = aqlm_check_shape(&s->w.shape);
            if (!problem) return true;
            PyErr_SetString(PyExc_ValueError, problem);
        }
    }
    release_stored(s);
    return false;
}

static PyObject *decode_rows(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("codes", "codebooks", "scales");
    PyObject *codes, *codebooks, *scales;
    if (!PARSE("OOO", &codes, &codebooks, &scales)) return NULL;
    stored s;
    if (!fill_stored(&s, codes, codebooks, scales)) return NULL;
    npy_intp dims[2] = {s.w.shape.out_features, s.w.shape.in_features};
    PyArrayObject *rows = new_array(NPY_FLOAT, 2, dims);
    aqlm_status status = AQLM_NO_MEMORY;
    if (rows) UNLOCKED(aqlm_decode_rows(data(rows), AQLM_F32, &s.w, 0, dims[0]));
    release_stored(&s);
    if (!status) return (PyObject *)rows;
    Py_XDECREF((PyObject *)rows);
    return raise_status(status, "decode_rows");
}

static PyObject *matmul(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("x", "codes", "codebooks", "scales", "bias");
    PyObject *x, *codes, *codebooks, *scales, *b = Py_None;
    if (!PARSE("OOOO|O", &x, &codes, &codebooks, &scales, &b)) return NULL;
    stored s;
    if (!fill_stored(&s, codes, codebooks, scales)) return NULL;
    npy_intp in[2] = {-1, s.w.shape.in_features}, out[1] = {s.w.shape.out_features};
    PyArrayObject *rows = array_of(x, "x", NPY_FLOAT, 2, in), *bias = NULL, *y = NULL;
    aqlm_status status = AQLM_NO_MEMORY;
    if (rows && (b == Py_None || (bias = array_of(b, "bias", NPY_FLOAT, 1, out)))) {
        npy_intp dims[2] = {in[0], out[0]};
        const aqlm_plan plan = aqlm_matmul_plan(&s.w, AQLM_F32, in[0], false);
        void *workspace = aligned_alloc(64, (plan.workspace / 64 + 1) * 64);
        y = new_array(NPY_FLOAT, 2, dims);
        if (workspace && y)
            UNLOCKED(aqlm_matmul(data(y), data(rows), AQLM_F32, &s.w, data(bias), in[0], &plan, workspace));
        free(workspace);
    }
    Py_XDECREF((PyObject *)rows);
    Py_XDECREF((PyObject *)bias);
    release_stored(&s);
    if (!status) return (PyObject *)y;
    Py_XDECREF((PyObject *)y);
    return raise_status(status, "matmul");
}

static PyObject *convert_codes(PyObject *args, PyObject *kwargs, bool pack) {
    KEYWORDS("codes", "nbits_per_codebook");
    PyObject *object;
    long long bits;
    if (!PARSE("OL", &object, &bits)) return NULL;
    if (bits < 1 || bits > 16)
        return PyErr_Format(PyExc_ValueError, "nbits_per_codebook: got %lld, expected 1..16", bits);
    const int stored_type = bits <= 8 ? NPY_INT8 : NPY_INT16;
    npy_intp dims[3] = {-1, -1, -1};
    PyArrayObject *codes = array_of(object, "codes", pack ? NPY_UINT16 : stored_type, 3, dims);
    if (!codes) return NULL;
    const aqlm_shape shape = {dims[0], dims[1] * 4, dims[2], bits, 4, 1}; /* g and og do not matter here */
    PyArrayObject *result = check_shape(&shape) ? new_array(pack ? stored_type : NPY_UINT16, 3, dims) : NULL;
    aqlm_status status = AQLM_NO_MEMORY;
    int64_t where = -1;
    if (result) {
        if (pack) UNLOCKED(aqlm_pack_codes(data(result), data(codes), &shape, &where));
        else UNLOCKED(aqlm_unpack_codes(data(result), data(codes), &shape, &where));
    }
    if (where >= 0) {
        const long long value = pack        ? ((uint16_t *)data(codes))[where]
                                : bits <= 8 ? ((int8_t *)data(codes))[where]
                                            : ((int16_t *)data(codes))[where];
        const long long half = 1ll << (bits - 1);
        PyErr_Format(PyExc_ValueError,
                     "codes: got %lld at flat index %lld, expected %lld..%lld for nbits_per_codebook=%lld", value,
                     (long long)where, pack ? 0 : -half, pack ? 2 * half - 1 : half - 1, bits);
    }
    Py_DECREF((PyObject *)codes);
    if (!status) return (PyObject *)result;
    Py_XDECREF((PyObject *)result);
    return raise_status(status, pack ? "pack_codes" : "unpack_codes");
}

static PyObject *pack_codes(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    return convert_codes(args, kwargs, true);
}

static PyObject *unpack_codes(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    return convert_codes(args, kwargs, false);
}

/* ---- threads --------------------------------------------------------------------------------------------- */

static PyObject *set_num_threads(PyObject *self, PyObject *n) {
    (void)self;
    const long count = PyLong_AsLong(n);
    if (count == -1 && PyErr_Occurred()) return NULL;
    if (count < 1 || count > 1024) return PyErr_Format(PyExc_ValueError, "n: got %ld threads, expected 1..1024", count);
    aqlm_set_num_threads((int)count);
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(aqlm_get_num_threads());
}

#define VERB(name, text) {#name, (PyCFunction)(void (*)(void))name, METH_VARARGS | METH_KEYWORDS, text}
static PyMethodDef methods[] = {
    VERB(residual_kmeans, "residual_kmeans(weight, scales, num_codebooks, nbits_per_codebook, in_group_size, "
                          "init_max_iter=100, tolerance=1e-3, seed=0, column_weight=None) -> (codes, codebooks)"),
    VERB(accumulate_hessian, "accumulate_hessian(sum, x): sum += x.T @ x, in place"),
    VERB(factor_hessian, "factor_hessian(H, in_group_size, relative_damp) -> (order, feedback, metric)"),
    VERB(search_sweep, "search_sweep(codes, weight, H, codebooks, scales, beam_size=0, seed=0, pairs=False) -> codes"),
    VERB(search_ldl,
         "search_ldl(weight, order, feedback, metric, codebooks, scales, beam_size=0, pairs=False) -> codes"),
    VERB(update_codebooks, "update_codebooks(codebooks, weight, H, codes, scales, cg_steps) -> codebooks"),
    VERB(update_scales, "update_scales(scales, weight, H, codes, codebooks) -> scales"),
    VERB(update_adam, "update_adam(codebooks, scales, moments, weight, H, codes, steps, learning_rate, steps_before=0) "
                      "-> (codebooks, scales, moments)"),
    VERB(quantization_error, "quantization_error(weight, H, codes=None, codebooks=None, scales=None) -> tr(D H D^T)"),
    VERB(gaussian_reference, "gaussian_reference(eigenvalues, rate) -> relative error"),
    VERB(decode_rows, "decode_rows(codes, codebooks, scales) -> W [out, in]"),
    VERB(matmul, "matmul(x, codes, codebooks, scales, bias=None) -> x W^T + bias"),
    VERB(pack_codes, "pack_codes(codes, nbits_per_codebook) -> int8 or int16 codes of the disk layout"),
    VERB(unpack_codes, "unpack_codes(codes, nbits_per_codebook) -> uint16 codes"),
    {"set_num_threads", set_num_threads, METH_O, "set_num_threads(n)"},
    {"get_num_threads", get_num_threads, METH_NOARGS, "get_num_threads() -> int"},
    AQLM_SETTINGS,
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module) {
    (void)module;
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    aqlm_set_poll(poll_signals);
    const char *wish = getenv("AQLM_C_ISA");
    if (!wish || !*wish) return 0;
    PyObject *name = PyUnicode_DecodeFSDefault(wish);
    const bool ok = name && choose_isa(name, "AQLM_C_ISA");
    Py_XDECREF(name);
    return ok ? 0 : -1;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_core", "The AQLM quantizer in C, on NumPy arrays.", 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
