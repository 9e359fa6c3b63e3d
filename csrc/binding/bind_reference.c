/* bind_reference.c - the naive twins, under the signatures of the real functions. */
#include "binding.h"

static PyObject *
linear_forward(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_linear_forward("reference.linear_forward", ob_reference_linear_forward, args, kw);
}

static PyObject *
linear_backward_input(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_linear_backward_input("reference.linear_backward_input",
                                       ob_reference_linear_backward_input, args, kw);
}

static PyObject *
vote(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_vote("reference.vote", ob_reference_vote, args, kw);
}

static PyObject *
flip(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_flip("reference.flip", ob_reference_flip, args, kw);
}

static PyObject *
absmean(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_absmean("reference.absmean", ob_reference_absmean, args, kw);
}

static PyObject *
weight_gradient(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"dy", "xq", "sx", "packed", "scale", "in_features", "control", NULL};
    PyObject *dy, *xq, *sx, *packed, *scale, *width, *control;
    ob_call call = {.function = "reference.weight_gradient"};
    ob_weights w;
    size_t k = 0;
    PyArrayObject *dw = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOOOO", keys, &dy, &xq, &sx, &packed, &scale,
                                     &width, &control) ||
        ob_take_size(&call, width, "in_features", 0, OB_MAX_K, &k) < 0) {
        return NULL;
    }
    ob_view *vxq, *vsx,
        *vdy =
            ob_take_array(&call, dy, "dy", (ob_spec){OB_KIND_FLOAT, OB_LEADING, 1, {OB_FREE}, "N"});
    double *state;
    if (vdy == NULL) {
        goto done;
    }
    const size_t n = ob_view_dim(vdy, -1), m = ob_view_rows(vdy);
    if (n > OB_MAX_K || m > OB_TOKENS_PER_VOTE) {
        ob_fail(&call, PyExc_ValueError, "'dy' must have at most %u tokens of %u columns",
                OB_TOKENS_PER_VOTE, OB_MAX_K);
        goto done;
    }
    ob_spec codes = {OB_KIND_I8, 0, 2, {(npy_intp)m, (npy_intp)ob_padded_k(k)}, NULL};
    ob_spec steps = {OB_KIND_F32, 0, 1, {(npy_intp)m}, NULL};
    if ((vxq = ob_take_array(&call, xq, "xq", codes)) == NULL ||
        (vsx = ob_take_array(&call, sx, "sx", steps)) == NULL ||
        ob_take_weights(&call, packed, OB_FORMAT_tile16, scale, NULL, n, k, 0, &w) < 0 ||
        (state = ob_take_control(&call, control, "control", OB_WRITE)) == NULL ||
        ob_check_overlap(&call) < 0) {
        goto done;
    }
    dw = ob_new_typed(NPY_DOUBLE, 2, (npy_intp[]){(npy_intp)n, (npy_intp)k}, 1);
    if (dw == NULL) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = ob_reference_weight_gradient(
        &w, m, ob_view_dtype(vdy), vdy->data, vxq->data, vsx->data, state, PyArray_DATA(dw));
    Py_END_ALLOW_THREADS if (ob_fail_status(&call, status) < 0)
    {
        Py_CLEAR(dw);
    }
done:
    ob_release(&call);
    return (PyObject *)dw;
}

PyDoc_STRVAR(linear_forward_doc,
             "linear_forward($module, /, x, packed, scale, out_features, bias=None, *,\n"
             "               out=None, xq=None, sx=None, packing='tile16')\n--\n\n"
             "The naive twin of onebit_ext.linear_forward.");
PyDoc_STRVAR(linear_backward_input_doc, "linear_backward_input($module, /, dy, packed, scale, "
                                        "in_features, control, *, out=None)\n--\n\n"
                                        "The naive twin of onebit_ext.linear_backward_input.");
PyDoc_STRVAR(vote_doc, "vote($module, /, dy, xq, sx, packed, scale, in_features, planes=None, *,\n"
                       "     control=None, ds=None, db=None)\n--\n\n"
                       "The naive twin of onebit_ext.vote.");
PyDoc_STRVAR(flip_doc, "flip($module, /, packed, planes)\n--\n\n"
                       "The naive twin of onebit_ext.flip.");
PyDoc_STRVAR(absmean_doc, "absmean($module, /, w)\n--\n\nThe naive twin of onebit_ext.absmean.");
PyDoc_STRVAR(weight_gradient_doc,
             "weight_gradient($module, /, dy, xq, sx, packed, scale, in_features, control)\n--\n\n"
             "The dense dW (N, K) float64 that the votes of one micro-batch see, for tests.\n\n"
             "dy (..., N) of at most 65,536 tokens; xq, sx as kept by linear_forward.");

PyMethodDef ob_reference_methods[] = {
    OB_METHOD("linear_forward", linear_forward, linear_forward_doc),
    OB_METHOD("linear_backward_input", linear_backward_input, linear_backward_input_doc),
    OB_METHOD("vote", vote, vote_doc),
    OB_METHOD("flip", flip, flip_doc),
    OB_METHOD("absmean", absmean, absmean_doc),
    OB_METHOD("weight_gradient", weight_gradient, weight_gradient_doc),
    {NULL, NULL, 0, NULL},
};
