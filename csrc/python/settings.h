/* settings.h: what a Python module says and sets of its copy of the core: instruction set, exactness. C and C++: each
 * module includes it once and puts AQLM_SETTINGS into its table of methods. */
#ifndef AQLM_PYTHON_SETTINGS_H
#define AQLM_PYTHON_SETTINGS_H

#include <Python.h>

#include <stdbool.h>

#include "aqlm.h"

static PyObject *get_isa(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(aqlm_get_isa());
}

static PyObject *available_isas(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *list = PyList_New(0);
    for (const char *const *name = aqlm_available_isas(); list && *name; name++) {
        PyObject *text = PyUnicode_FromString(*name);
        if (!text || PyList_Append(list, text)) Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

static bool choose_isa(PyObject *name, const char *argument) {
    PyObject *bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return false;
    const char *text = PyBytes_AsString(bytes);
    const aqlm_status status = aqlm_set_isa(text);
    Py_DECREF(bytes);
    if (status == AQLM_OK) return true;
    PyObject *names = available_isas(NULL, NULL);
    if (names) PyErr_Format(PyExc_ValueError, "%s: got %R, expected one of %R on this CPU", argument, name, names);
    Py_XDECREF(names);
    return false;
}

static PyObject *set_isa(PyObject *self, PyObject *name) {
    (void)self;
    if (!choose_isa(name, "name")) return NULL;
    Py_RETURN_NONE;
}

static PyObject *set_exact(PyObject *self, PyObject *exact) {
    (void)self;
    const int yes = exact == Py_None ? 0 : PyObject_IsTrue(exact);
    if (yes < 0) return NULL;
    aqlm_set_exact(exact == Py_None ? -1 : yes);
    Py_RETURN_NONE;
}

static PyObject *get_exact(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    const int exact = aqlm_get_exact();
    if (exact < 0) Py_RETURN_NONE;
    return PyBool_FromLong(exact);
}

#define AQLM_SETTINGS                                                                                                  \
    {"set_isa", set_isa, METH_O, "set_isa(name): use the kernels of another instruction set; ValueError if unknown"},  \
        {"get_isa", get_isa, METH_NOARGS, "get_isa() -> str"},                                                         \
        {"available_isas", available_isas, METH_NOARGS, "available_isas() -> list of str, slowest first"},             \
        {"set_exact", set_exact, METH_O,                                                                               \
         "set_exact(exact): True: matmul without rounded products; None: 16 bits, 23 for float32; False: 16"},         \
        {"get_exact", get_exact, METH_NOARGS, "get_exact() -> bool | None"}

#endif
