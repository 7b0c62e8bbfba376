/* module.c: the NumPy binding, `aqlm_c._core`: arrays in, aqlm.h called with the GIL released, arrays out.
 * Limited API (abi3, Python 3.10 on). Functions: quantizer.c, product.c, rounding.c; here: settings, and what an import
 * does. */
#define AQLM_IMPORTS_NUMPY
#include "python/arguments.h"
#include "python/settings.h"
#include "python/signals.h"

#include <stdlib.h>

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

static PyMethodDef methods[] = {
    {"set_num_threads", set_num_threads, METH_O, "set_num_threads(n)"},
    {"get_num_threads", get_num_threads, METH_NOARGS, "get_num_threads() -> int"},
    AQLM_SETTINGS,
    {NULL, NULL, 0, NULL},
};

/* Answers Ctrl-C: the core polls from the calling thread, which here takes the GIL back for a moment. */
static int poll_signals(void) {
    if (!released || !may_look_for_signals()) return 0;
    PyEval_RestoreThread(released);
    const int stop = PyErr_CheckSignals();
    released = PyEval_SaveThread();
    return stop;
}

static int module_exec(PyObject *module) {
    if (PyArray_ImportNumPyAPI() < 0 || !find_main_thread() || PyModule_AddFunctions(module, quantizer_methods) ||
        PyModule_AddFunctions(module, product_methods) || PyModule_AddFunctions(module, rounding_methods))
        return -1;
    aqlm_set_poll(poll_signals);
    const char *wish = getenv("AQLM_C_ISA");
    if (!wish || !*wish) return 0;
    PyObject *name = PyUnicode_DecodeFSDefault(wish);
    const bool ok = name && choose_isa(name, "AQLM_C_ISA");
    Py_XDECREF(name);
    return ok ? 0 : -1;
}

static PyModuleDef_Slot execution[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                        "_core",
                                        "The AQLM quantizer in C, on NumPy arrays.",
                                        0,
                                        methods,
                                        execution,
                                        NULL,
                                        NULL,
                                        NULL};

/* NOLINTNEXTLINE(misc-use-internal-linkage): Python looks it up */
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
