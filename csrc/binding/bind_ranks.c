/* bind_ranks.c - what a distributed run needs of C. */
#include "binding.h"

static PyObject *
average_residuals(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"parts", "first", "columns", "control", "out", NULL};
    PyObject *parts_object, *first_object, *columns_object, *control_object, *out_object;
    PyObject *result = NULL;
    ob_call call = {.function = "average_residuals"};
    size_t first = 0, columns = 0;
    ob_view *parts, *out;
    double *control;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOO$O", keys, &parts_object, &first_object,
                                     &columns_object, &control_object, &out_object) ||
        ob_take_size(&call, first_object, "first", 0, (size_t)1 << 53, &first) < 0 ||
        ob_take_size(&call, columns_object, "columns", 1, OB_MAX_K, &columns) < 0) {
        return NULL;
    }
    ob_spec whole = {OB_KIND_I8 | OB_KIND_I16, 0, 2, {OB_FREE, OB_FREE}, "WS"};
    if ((parts = ob_take_array(&call, parts_object, "parts", whole)) == NULL) {
        goto done;
    }
    size_t ranks = ob_view_dim(parts, 0), share = ob_view_dim(parts, 1);
    int bytes = (int)PyArray_ITEMSIZE(parts->array);
    if (ranks < 1 || ranks > OB_MAX_RANKS) {
        ob_fail(&call, PyExc_ValueError, "'parts' must have 1 to %d rows, one a rank, got %zu",
                OB_MAX_RANKS, ranks);
        goto done;
    }
    ob_spec one = {bytes == 1 ? OB_KIND_I8 : OB_KIND_I16, OB_WRITE, 1, {(npy_intp)share}, "S"};
    if ((control = ob_take_control(&call, control_object, "control", 0)) == NULL ||
        (out = ob_take_array(&call, out_object, "out", one)) == NULL ||
        ob_check_overlap(&call) < 0) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status =
        ob_average_residuals(ranks, share, bytes, parts->data, first, columns, control, out->data);
    Py_END_ALLOW_THREADS if (ob_fail_status(&call, status) == 0)
    {
        result = Py_NewRef(Py_None);
    }
done:
    ob_release(&call);
    return result;
}

PyDoc_STRVAR(
    average_residuals_doc,
    "average_residuals($module, /, parts, first, columns, control, *, out)\n--\n\n"
    "The mean of W ranks' residuals, rounded once: out = floor((sum + j) / W), j uniform in "
    "0..W-1 under\n"
    "the stream COMBINE at control's position, the same on every rank.\n\n"
    "parts: int8 or int16 (W, S), the weights first .. first + S - 1 of a plane with rows of "
    "`columns`.\n"
    "out: like one row of parts.  Raises as linear_forward.");

PyMethodDef ob_ranks_methods[] = {
    OB_METHOD("average_residuals", average_residuals, average_residuals_doc),
    {NULL, NULL, 0, NULL},
};
