/* quantizer.c: the quantizer's verbs on NumPy arrays: aqlm/quantizer.h. */
#include "python/arguments.h"

#include <stdlib.h>

/* Drops the arguments; hands out the result or the error. */
static PyObject *finish(layer *l, PyArrayObject *result, aqlm_status status, const char *function) {
    release_layer(l);
    if (!status) return (PyObject *)result;
    Py_XDECREF((PyObject *)result);
    return raise_status(status, function);
}

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
    if (!fill_layer(&l, weight, NULL, NULL, NULL, scales)) return NULL;
    l.shape = (aqlm_shape){PyArray_DIM(l.weight, 0), PyArray_DIM(l.weight, 1), K, B, g, 1};
    npy_intp in[1] = {l.shape.in_features};
    PyArrayObject *columns = NULL;
    if (!check_shape(&l.shape) ||
        (column != Py_None && !(columns = array_of(column, "column_weight", NPY_FLOAT, 1, in)))) {
        release_layer(&l);
        return NULL;
    }
    if (iterations < 1) {
        Py_XDECREF((PyObject *)columns);
        release_layer(&l);
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
    release_layer(&l);
    if (!status) return Py_BuildValue("NN", codes, codebooks);
    Py_XDECREF((PyObject *)codes);
    Py_XDECREF((PyObject *)codebooks);
    return raise_status(status, "residual_kmeans");
}

/* An array that is written into as it lies. New reference or NULL. */
static PyArrayObject *target_of(PyObject *object, const char *name, int type, int ndim, npy_intp *dims) {
    PyArrayObject *array = array_of(object, name, type, ndim, dims);
    if (!array || ((PyObject *)array == object && PyArray_ISWRITEABLE(array))) return array;
    PyErr_Format(PyExc_ValueError, "%s: got a read-only or strided array, expected one to write into", name);
    Py_DECREF((PyObject *)array);
    return NULL;
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
    PyArrayObject *total = target_of(sum, "sum", NPY_DOUBLE, 2, square);
    aqlm_status status = AQLM_OK;
    if (total) UNLOCKED(aqlm_accumulate_hessian(data(total), data(rows), dims[0], dims[1]));
    Py_DECREF((PyObject *)rows);
    if (!total) return NULL;
    Py_DECREF((PyObject *)total);
    if (status) return raise_status(status, "accumulate_hessian");
    Py_RETURN_NONE;
}

static PyObject *accumulate_product(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("sum", "x", "y");
    PyObject *sum, *left, *right;
    if (!PARSE("OOO", &sum, &left, &right)) return NULL;
    npy_intp x_dims[2] = {-1, -1};
    PyArrayObject *x = array_of(left, "x", NPY_FLOAT, 2, x_dims);
    if (!x) return NULL;
    npy_intp y_dims[2] = {x_dims[0], -1};
    PyArrayObject *y = array_of(right, "y", NPY_FLOAT, 2, y_dims), *total = NULL;
    npy_intp dims[2] = {x_dims[1], y_dims[1]};
    if (y) total = target_of(sum, "sum", NPY_DOUBLE, 2, dims);
    aqlm_status status = AQLM_OK;
    if (total) UNLOCKED(aqlm_accumulate_product(data(total), data(x), data(y), x_dims[0], dims[0], dims[1]));
    Py_DECREF((PyObject *)x);
    Py_XDECREF((PyObject *)y);
    if (!total) return NULL;
    Py_DECREF((PyObject *)total);
    if (status) return raise_status(status, "accumulate_product");
    Py_RETURN_NONE;
}

static PyObject *correct_weight(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("weight", "cross", "H", "alpha", "relative_damp");
    PyObject *matrix, *product, *square;
    double alpha, damp;
    if (!PARSE("OOOdd", &matrix, &product, &square, &alpha, &damp) || !check_not_negative(damp, "relative_damp"))
        return NULL;
    npy_intp dims[2] = {-1, -1};
    PyArrayObject *weight = array_of(matrix, "weight", NPY_FLOAT, 2, dims), *cross = NULL, *H = NULL, *found = NULL;
    npy_intp of_inputs[2] = {dims[1], dims[1]};
    if (weight) cross = array_of(product, "cross", NPY_FLOAT, 2, of_inputs);
    if (cross) H = array_of(square, "H", NPY_FLOAT, 2, of_inputs);
    aqlm_status status = AQLM_NO_MEMORY;
    if (H && (found = new_array(NPY_FLOAT, 2, dims)))
        UNLOCKED(aqlm_correct_weight(data(found), data(weight), data(cross), data(H), dims[0], dims[1], alpha, damp));
    const bool valid = H;
    Py_XDECREF((PyObject *)weight);
    Py_XDECREF((PyObject *)cross);
    Py_XDECREF((PyObject *)H);
    if (valid && !status) return (PyObject *)found;
    Py_XDECREF((PyObject *)found);
    return valid ? raise_status(status, "correct_weight") : NULL;
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
    if (!fill_layer(&l, weight, H, codes, codebooks, scales)) return NULL;
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
    if (!fill_layer(&l, weight, NULL, NULL, codebooks, scales)) return NULL;
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
    if (!fill_layer(&l, weight, H, codes, codebooks, scales)) return NULL;
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
    if (!fill_layer(&l, weight, H, codes, codebooks, scales)) return NULL;
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
    if (!fill_layer(&l, weight, H, codes, codebooks, scales)) return NULL;
    npy_intp dims[2] = {2, PyArray_SIZE(l.codebooks) + PyArray_SIZE(l.scales)};
    PyArrayObject *given = array_of(moments, "moments", NPY_DOUBLE, 2, dims);
    PyArrayObject *c = copy_of(l.codebooks), *s = copy_of(l.scales), *m = given ? copy_of(given) : NULL;
    aqlm_status status = AQLM_NO_MEMORY;
    if (c && s && m)
        UNLOCKED(aqlm_update_adam(data(c), data(s), data(m), data(l.weight), data(l.H), data(l.codes), &l.shape, steps,
                                  rate, before));
    Py_XDECREF((PyObject *)given);
    release_layer(&l);
    if (!status) return Py_BuildValue("NNN", c, s, m);
    PyArrayObject *all[] = {c, s, m};
    for (int i = 0; i < 3; i++) Py_XDECREF((PyObject *)all[i]);
    return raise_status(status, "update_adam");
}

static bool check_buffer_options(const aqlm_buffer_options *o, bool keeps_first) {
    const double shares[] = {o->beta1, o->beta2}, others[] = {o->divisor, o->learning_rate};
    const char *names[] = {"beta1", "beta2", "divisor", "learning_rate"};
    for (int i = 0; i < 2; i++) {
        if (!check_not_negative(shares[i], names[i]) || !check_not_negative(others[i], names[2 + i])) return false;
        if (shares[i] >= 1.0) {
            PyErr_Format(PyExc_ValueError, "%s: got a number >= 1, expected one in [0, 1)", names[i]);
            return false;
        }
    }
    if (o->divisor == 0.0) PyErr_SetString(PyExc_ValueError, "divisor: got 0, expected a number > 0");
    else if (o->step < 1) PyErr_Format(PyExc_ValueError, "step: got %lld, expected at least 1", (long long)o->step);
    else if (o->beta1 > 0.0 && !keeps_first)
        PyErr_SetString(PyExc_ValueError, "first: got None, expected an array for a beta1 above 0");
    return !PyErr_Occurred();
}

static PyObject *buffer_step(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    KEYWORDS("buffer", "gradient", "first", "second", "scales", "divisor", "learning_rate", "beta1", "beta2", "step");
    PyObject *buffer, *gradient, *first, *second, *scales;
    double divisor, rate, beta1, beta2;
    long long step;
    if (!PARSE("OOOOOddddL", &buffer, &gradient, &first, &second, &scales, &divisor, &rate, &beta1, &beta2, &step))
        return NULL;
    const aqlm_buffer_options options = {divisor, rate, beta1, beta2, step};
    const bool keeps_first = first != Py_None, bytes = scales != Py_None;
    if (!check_buffer_options(&options, keeps_first)) return NULL;
    npy_intp dims[2] = {-1, -1};
    PyArrayObject *b = target_of(buffer, "buffer", NPY_FLOAT, 2, dims), *g = NULL, *m = NULL, *v = NULL, *s = NULL;
    const npy_intp n = b ? PyArray_SIZE(b) : 0;
    npy_intp scale_dims[2] = {2, (n + AQLM_MOMENTS_BLOCK - 1) / AQLM_MOMENTS_BLOCK};
    bool valid = b && (g = array_of(gradient, "gradient", NPY_FLOAT, 2, dims));
    if (valid && keeps_first) valid = (m = target_of(first, "first", bytes ? NPY_INT8 : NPY_FLOAT, 2, dims));
    valid = valid && (v = target_of(second, "second", bytes ? NPY_UINT8 : NPY_FLOAT, 2, dims));
    if (valid && bytes) valid = (s = target_of(scales, "scales", NPY_FLOAT, 2, scale_dims));
    const aqlm_buffer_moments moments = {data(m), data(v), data(s)};
    aqlm_status status = AQLM_OK;
    if (valid) UNLOCKED(aqlm_buffer_step(data(b), &moments, data(g), AQLM_F32, n, &options));
    PyArrayObject *all[] = {b, g, m, v, s};
    for (int i = 0; i < 5; i++) Py_XDECREF((PyObject *)all[i]);
    if (!valid) return NULL;
    if (status) return raise_status(status, "buffer_step");
    Py_RETURN_NONE;
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
    if (!fill_layer(&l, weight, H, none ? NULL : codes, none ? NULL : codebooks, none ? NULL : scales)) return NULL;
    if (none) l.shape = (aqlm_shape){PyArray_DIM(l.weight, 0), PyArray_DIM(l.weight, 1), 1, 1, 4, 1};
    double error = 0.0;
    aqlm_status status = AQLM_OK;
    if (!none || check_shape(&l.shape))
        UNLOCKED(aqlm_quantization_error(&error, data(l.weight), data(l.H), data(l.codes), data(l.codebooks),
                                         data(l.scales), &l.shape));
    release_layer(&l);
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

PyMethodDef quantizer_methods[] = {
    VERB(residual_kmeans, "residual_kmeans(weight, scales, num_codebooks, nbits_per_codebook, in_group_size, "
                          "init_max_iter=100, tolerance=1e-3, seed=0, column_weight=None) -> (codes, codebooks)"),
    VERB(accumulate_hessian, "accumulate_hessian(sum, x): sum += x.T @ x, in place"),
    VERB(accumulate_product, "accumulate_product(sum, x, y): sum += x.T @ y, in place"),
    VERB(correct_weight, "correct_weight(weight, cross, H, alpha, relative_damp) -> weight"),
    VERB(factor_hessian, "factor_hessian(H, in_group_size, relative_damp) -> (order, feedback, metric)"),
    VERB(search_sweep, "search_sweep(codes, weight, H, codebooks, scales, beam_size=0, seed=0, pairs=False) -> codes"),
    VERB(search_ldl,
         "search_ldl(weight, order, feedback, metric, codebooks, scales, beam_size=0, pairs=False) -> codes"),
    VERB(update_codebooks, "update_codebooks(codebooks, weight, H, codes, scales, cg_steps) -> codebooks"),
    VERB(update_scales, "update_scales(scales, weight, H, codes, codebooks) -> scales"),
    VERB(update_adam, "update_adam(codebooks, scales, moments, weight, H, codes, steps, learning_rate, steps_before=0) "
                      "-> (codebooks, scales, moments)"),
    VERB(buffer_step,
         "buffer_step(buffer, gradient, first, second, scales, divisor, learning_rate, beta1, beta2, step): "
         "a step of Adam, in place"),
    VERB(quantization_error, "quantization_error(weight, H, codes=None, codebooks=None, scales=None) -> tr(D H D^T)"),
    VERB(gaussian_reference, "gaussian_reference(eigenvalues, rate) -> relative error"),
    {NULL, NULL, 0, NULL},
};
