/* signals.h: Ctrl-C inside the core, for Python modules in C and in C++. Each module includes it once. */
#ifndef AQLM_PYTHON_SIGNALS_H
#define AQLM_PYTHON_SIGNALS_H

#include <Python.h>

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* Python's main thread, the only one that runs handlers of signals. Others must not ask for the GIL from inside the
 * core: once the interpreter ends, a daemon thread that does is ended there, and its stack is gone while the threads of
 * its loop still write to it. */
static unsigned long main_thread;

static void become_main_thread(void) { main_thread = PyThread_get_thread_ident(); } /* in a fork's child */

/* With the GIL held; false with an exception set. */
static bool find_main_thread(void) {
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL;
    PyObject *ident = thread ? PyObject_GetAttrString(thread, "ident") : NULL;
    if (ident) main_thread = PyLong_AsUnsignedLong(ident);
    Py_XDECREF(ident);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    if (PyErr_Occurred()) return false;
    if (pthread_atfork(NULL, NULL, become_main_thread)) PyErr_NoMemory();
    return !PyErr_Occurred();
}

/* Whether it is time for the main thread to look for signals: some 20 times a second. */
static bool may_look_for_signals(void) {
    static struct timespec last; /* the main thread's alone */
    struct timespec now;
    if (PyThread_get_thread_ident() != main_thread || clock_gettime(CLOCK_MONOTONIC, &now)) return false;
    const int64_t elapsed = (int64_t)(now.tv_sec - last.tv_sec) * 1000000000 + (now.tv_nsec - last.tv_nsec);
    if (elapsed < 50000000) return false;
    last = now;
    return true;
}

#endif
