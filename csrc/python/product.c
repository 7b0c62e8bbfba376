/* product.c: the stored weight on NumPy arrays: aqlm/product.h. */
#include "python/arguments.h"

#include <stdlib.h>
#include <string.h>

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

PyMethodDef product_methods[] = {
    VERB(decode_rows, "decode_rows(codes, codebooks, scales) -> W [out, in]"),
    VERB(matmul, "matmul(x, codes, codebooks, scales, bias=None) -> x W^T + bias"),
    VERB(pack_codes, "pack_codes(codes, nbits_per_codebook) -> int8 or int16 codes of the disk layout"),
    VERB(unpack_codes, "unpack_codes(codes, nbits_per_codebook) -> uint16 codes"),
    {NULL, NULL, 0, NULL},
};
