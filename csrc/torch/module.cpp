/* module.cpp: the Python face of the torch binding. Importing it registers the ops (ops_cpu.cpp), hands the core's
 * loops to torch's threads, and gives the settings of this binding's copy of the core. torch must be imported first. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/stable/ops.h>

#include "aqlm.h"
#include "python/settings.h"

namespace {

void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx) {
    torch::stable::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { fn(first, last, ctx); });
}

int exec_module(PyObject *) {
    aqlm_set_parallel(run_on_torch_threads);
    return 0;
}

PyMethodDef methods[] = {AQLM_SETTINGS, {nullptr, nullptr, 0, nullptr}};

PyModuleDef_Slot execution[] = {{Py_mod_exec, reinterpret_cast<void *>(exec_module)}, {0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_torch", "aqlm_c's torch binding.", 0, methods, execution, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__torch() { return PyModuleDef_Init(&module); }
