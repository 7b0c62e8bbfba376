/* module.cpp: the Python face of door 2. Importing it registers the ops (ops_cpu.cpp), hands the core's loops
 * to torch's threads, and gives the instruction set of this door's copy of the core. torch must be imported first. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/stable/ops.h>

#include "aqlm.h"

namespace {

void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx) {
    torch::stable::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { fn(first, last, ctx); });
}

PyObject *get_isa(PyObject *, PyObject *) { return PyUnicode_FromString(aqlm_get_isa()); }

PyObject *set_isa(PyObject *, PyObject *args) {
    const char *name;
    if (!PyArg_ParseTuple(args, "s:set_isa", &name)) return nullptr;
    if (aqlm_set_isa(name) != AQLM_OK)
        return PyErr_Format(PyExc_ValueError, "isa: got '%s', expected one that this CPU runs", name);
    Py_RETURN_NONE;
}

PyObject *set_exact(PyObject *, PyObject *exact) {
    const int yes = exact == Py_None ? 0 : PyObject_IsTrue(exact);
    if (yes < 0) return nullptr;
    aqlm_set_exact(exact == Py_None ? -1 : yes);
    Py_RETURN_NONE;
}

PyObject *get_exact(PyObject *, PyObject *) {
    const int exact = aqlm_get_exact();
    if (exact < 0) Py_RETURN_NONE;
    return PyBool_FromLong(exact);
}

int exec_module(PyObject *) {
    aqlm_set_parallel(run_on_torch_threads);
    return 0;
}

PyMethodDef methods[] = {
    {"get_isa", get_isa, METH_NOARGS, "get_isa() -> str: the instruction set the ops run on."},
    {"set_isa", set_isa, METH_VARARGS, "set_isa(name): run the ops on another instruction set; ValueError if unknown."},
    {"set_exact", set_exact, METH_O,
     "set_exact(exact): True: matmul without rounded products; None: 16 bits, 23 for float32; False: 16."},
    {"get_exact", get_exact, METH_NOARGS, "get_exact() -> bool | None."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void *>(exec_module)}, {0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_torch", "The torch door of aqlm_c.", 0, methods, slots, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__torch() { return PyModuleDef_Init(&module); }
