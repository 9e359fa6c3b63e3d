/* bind_limits.c - the machine's own limits, for the benchmark. */
#include "binding.h"

static PyObject *
limit_multiply(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"rounds", NULL};
    PyObject *number;
    ob_call call = {.function = "limit_multiply"};
    size_t rounds = 0;
    uint64_t done;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &number) ||
        ob_take_size(&call, number, "rounds", 1, 1000000000, &rounds) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS done = ob_limit_multiply(rounds);
    Py_END_ALLOW_THREADS return PyLong_FromUnsignedLongLong(done);
}

/* An array of bytes; read, or read and written back. */
static PyObject *
stream(const char *name, unsigned flags, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"data", NULL};
    PyObject *object, *result = NULL;
    ob_call call = {.function = name};
    const ob_spec spec = {.kinds = OB_KIND_I8 | OB_KIND_U8,
                          .flags = flags | OB_ALIGN64,
                          .ndim = 1,
                          .dims = {OB_FREE},
                          .letters = "B"};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &object)) {
        return NULL;
    }
    const ob_view *view = ob_take_array(&call, object, "data", spec);
    if (view != NULL) {
        Py_BEGIN_ALLOW_THREADS if (flags & OB_WRITE)
        {
            ob_limit_update(view->data, view->bytes);
        }
        else
        {
            ob_limit_read(view->data, view->bytes);
        }
        Py_END_ALLOW_THREADS result = Py_NewRef(Py_None);
    }
    ob_release(&call);
    return result;
}

static PyObject *
limit_read(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return stream("limit_read", 0, args, kw);
}

static PyObject *
limit_update(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return stream("limit_update", OB_WRITE, args, kw);
}

PyDoc_STRVAR(limit_multiply_doc, "limit_multiply($module, /, rounds)\n--\n\n"
                                 "Issue the int8 multiply-add of the instruction set in use from "
                                 "registers, `rounds` times 12, on every\n"
                                 "thread.  Returns the multiply-adds done in all, 0 if this "
                                 "instruction set has no such instruction.");
PyDoc_STRVAR(limit_read_doc, "limit_read($module, /, data)\n--\n\n"
                             "Read a one-dimensional, 64-byte aligned uint8 or int8 array once on "
                             "all threads (whole cache lines).");
PyDoc_STRVAR(
    limit_update_doc,
    "limit_update($module, /, data)\n--\n\nThe same, and write every byte back unchanged.");

PyMethodDef ob_limits_methods[] = {
    OB_METHOD("limit_multiply", limit_multiply, limit_multiply_doc),
    OB_METHOD("limit_read", limit_read, limit_read_doc),
    OB_METHOD("limit_update", limit_update, limit_update_doc),
    {NULL, NULL, 0, NULL},
};
