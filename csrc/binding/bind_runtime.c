/* bind_runtime.c - instruction sets, threads, memory. */
#include "binding.h"

static PyObject *
isa(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(none))
{
    return PyUnicode_FromString(ob_isa_name(ob_isa_active()));
}

static PyObject *
isas(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(none))
{
    const size_t active = ob_isa_active();
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < ob_isa_count(); i++) {
        size_t forward = 0, input = 0, weight = 0;
        ob_isa_tiles(i, &forward, &input, &weight);
        PyObject *entry = Py_BuildValue("{s:s, s:O, s:O, s:(nnn)}", "name", ob_isa_name(i),
                                        "supported", ob_isa_supported(i) ? Py_True : Py_False,
                                        "active", i == active ? Py_True : Py_False, "tiles",
                                        (Py_ssize_t)forward, (Py_ssize_t)input, (Py_ssize_t)weight);
        if (entry == NULL || PyList_Append(list, entry) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    return list;
}

static PyObject *
force_isa(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"name", NULL};
    PyObject *name;
    ob_call call = {.function = "force_isa"};
    size_t index = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &name) ||
        ob_take_name(&call, name, "name", ob_isa_count(), ob_isa_name, &index) < 0) {
        return NULL;
    }
    ob_status status = ob_isa_force(index);
    if (status == OB_UNSUPPORTED) {
        PyErr_Format(PyExc_RuntimeError, "force_isa(): this machine cannot run '%s'",
                     ob_isa_name(index));
        return NULL;
    }
    return ob_fail_status(&call, status) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *
num_threads(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(none))
{
    return PyLong_FromSize_t(ob_num_threads());
}

static PyObject *
set_num_threads(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"threads", NULL};
    PyObject *number;
    ob_call call = {.function = "set_num_threads"};
    size_t threads = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &number) ||
        ob_take_size(&call, number, "threads", 1, 256, &threads) < 0) {
        return NULL;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS /* waits for a running operation */
        status = ob_set_num_threads(threads);
    Py_END_ALLOW_THREADS return ob_fail_status(&call, status) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *
share_threads(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"openmp", NULL};
    const char *path;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "z", keys, &path)) {
        return NULL;
    }
    if (ob_share_threads(path) != OB_OK) {
        PyErr_Format(PyExc_RuntimeError,
                     "share_threads(): 'openmp' must be the path of a loaded OpenMP runtime, got "
                     "'%.200s'",
                     path);
        return NULL;
    }
    return Py_NewRef(Py_None);
}

static PyObject *
memory(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(none))
{
    return Py_BuildValue("{s:n, s:n, s:n}", "live", (Py_ssize_t)ob_alloc_live_bytes(), "peak",
                         (Py_ssize_t)ob_alloc_peak_bytes(), "largest",
                         (Py_ssize_t)ob_alloc_largest());
}

static PyObject *
reset_peak_memory(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(none))
{
    ob_alloc_reset_peak();
    return Py_NewRef(Py_None);
}

static PyObject *
fail_allocation(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"after", NULL};
    PyObject *number;
    ob_call call = {.function = "fail_allocation"};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &number)) {
        return NULL;
    }
    if (!PyLong_CheckExact(number)) {
        ob_fail(&call, PyExc_TypeError, "'after' must be an integer, got %.80s",
                Py_TYPE(number)->tp_name);
        return NULL;
    }
    int overflow = 0;
    long long after = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow != 0 || after < -1 || after == 0) {
        ob_fail(&call, PyExc_ValueError, "'after' must be -1 or at least 1");
        return NULL;
    }
    ob_alloc_fail_after(after);
    return Py_NewRef(Py_None);
}

PyDoc_STRVAR(isa_doc, "isa($module, /)\n--\n\nName of the instruction set in use.");
PyDoc_STRVAR(
    isas_doc,
    "isas($module, /)\n--\n\n"
    "Every instruction set of this build, worst first: dicts of name, supported, active and tiles\n"
    "(rows of a register tile in forward, dX and dW).");
PyDoc_STRVAR(force_isa_doc, "force_isa($module, /, name)\n--\n\nUse another instruction set from "
                            "the next call on, for tests.");
PyDoc_STRVAR(num_threads_doc,
             "num_threads($module, /)\n--\n\nHow many threads one operation may use.");
PyDoc_STRVAR(set_num_threads_doc, "set_num_threads($module, /, threads)\n--\n\nThreads from the "
                                  "next operation on, 1 to 256, whatever torch uses.");
PyDoc_STRVAR(
    share_threads_doc,
    "share_threads($module, /, openmp)\n--\n\n"
    "Run on the threads of the loaded OpenMP runtime at the path `openmp`, and as many as it\n"
    "would use unless set_num_threads or ONEBIT_NUM_THREADS says otherwise; None: on own threads.\n"
    "RuntimeError if no such runtime is loaded.");
PyDoc_STRVAR(
    memory_doc,
    "memory($module, /)\n--\n\nBytes of the C allocator: live, peak and the largest single block.");
PyDoc_STRVAR(reset_peak_memory_doc,
             "reset_peak_memory($module, /)\n--\n\nStart measuring peak and largest anew.");
PyDoc_STRVAR(fail_allocation_doc,
             "fail_allocation($module, /, after)\n--\n\n"
             "For tests: the `after`-th allocation of the C core from now fails; -1: never.");

PyMethodDef ob_runtime_methods[] = {
    {"isa", isa, METH_NOARGS, isa_doc},
    {"isas", isas, METH_NOARGS, isas_doc},
    OB_METHOD("force_isa", force_isa, force_isa_doc),
    {"num_threads", num_threads, METH_NOARGS, num_threads_doc},
    OB_METHOD("set_num_threads", set_num_threads, set_num_threads_doc),
    OB_METHOD("share_threads", share_threads, share_threads_doc),
    {"memory", memory, METH_NOARGS, memory_doc},
    {"reset_peak_memory", reset_peak_memory, METH_NOARGS, reset_peak_memory_doc},
    OB_METHOD("fail_allocation", fail_allocation, fail_allocation_doc),
    {NULL, NULL, 0, NULL},
};
