/* module.cpp: the Python face of the torch binding. Importing it registers the ops (ops_cpu.cpp), hands the core's
 * loops to torch's threads, and gives the settings of this binding's copy of the core. torch must be imported first. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/stable/ops.h>

#include "aqlm.h"
#include "cpu.h"
#include "python/settings.h"
#include "python/signals.h"

namespace {

void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx) {
    torch::stable::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { fn(first, last, ctx); });
}

/* Answers Ctrl-C inside a verb of the quantizer. What the handler raises stays set: torch makes it the cause of the
 * error that the verb then ends with. */
int poll_signals() {
    if (!aqlm_torch::answers_signals || !may_look_for_signals()) return 0;
    const PyGILState_STATE state = PyGILState_Ensure(); /* torch has released it */
    const int stop = PyErr_CheckSignals();
    PyGILState_Release(state);
    return stop;
}

int exec_module(PyObject *) {
    if (!find_main_thread()) return -1;
    aqlm_set_parallel(run_on_torch_threads);
    aqlm_set_poll(poll_signals);
    return 0;
}

PyMethodDef methods[] = {AQLM_SETTINGS, {nullptr, nullptr, 0, nullptr}};

PyModuleDef_Slot execution[] = {{Py_mod_exec, reinterpret_cast<void *>(exec_module)}, {0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_torch", "aqlm_c's torch binding.", 0, methods, execution, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__torch() { return PyModuleDef_Init(&module); }
