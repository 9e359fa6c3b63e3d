/* bind_linear.c - the stateless forward and backward.  The bodies serve the naive twins too. */
#include "binding.h"

/* `out` given: a view of the shape and dtype of x with `columns` last.  NULL with an exception. */
static ob_view *
take_out(ob_call *call, PyObject *out, const ob_view *x, size_t columns)
{
    ob_spec spec = {OB_KIND_F32, OB_WRITE, PyArray_NDIM(x->array), {0}, NULL};
    if (ob_view_dtype(x) == OB_BF16) {
        spec.kinds = OB_KIND_RAW_BF16;
    }
    if (spec.ndim > OB_MAX_DIMS) {
        ob_fail(call, PyExc_ValueError, "'out' may be given for at most %d dimensions, got %d",
                OB_MAX_DIMS, spec.ndim);
        return NULL;
    }
    for (int i = 0; i + 1 < spec.ndim; i++) {
        spec.dims[i] = PyArray_DIM(x->array, i);
    }
    spec.dims[spec.ndim - 1] = (npy_intp)columns;
    return ob_take_array(call, out, "out", spec);
}

/* The array the result goes to, new reference: `out` or a new one.  Sets *data. */
static PyArrayObject *
result_array(const ob_view *out, const ob_view *x, size_t columns, void **data)
{
    PyArrayObject *result = out != NULL ? out->array : ob_new_like(x, columns);
    if (out != NULL) {
        Py_INCREF(result);
    }
    *data = result != NULL ? PyArray_DATA(result) : NULL;
    return result;
}

PyObject *
ob_py_linear_forward(const char *name, ob_forward_op op, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"x",   "packed", "scale", "out_features", "bias",
                           "out", "xq",     "sx",    "packing",      NULL};
    PyObject *x, *packed, *scale, *width, *bias = Py_None, *out = Py_None, *xq = Py_None,
                                          *sx = Py_None, *packing_name = NULL;
    ob_call call = {.function = name};
    ob_weights w;
    ob_format_id packing;
    size_t n = 0;
    ob_view *vx, *vout = NULL, *vxq = NULL, *vsx = NULL;
    PyArrayObject *y = NULL;
    void *data = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOO|O$OOOO", keys, &x, &packed, &scale, &width,
                                     &bias, &out, &xq, &sx, &packing_name) ||
        ob_take_packing(&call, packing_name, &packing) < 0 ||
        ob_take_size(&call, width, "out_features", 0, OB_MAX_K, &n) < 0) {
        return NULL;
    }
    vx = ob_take_array(&call, x, "x", (ob_spec){OB_KIND_FLOAT, OB_LEADING, 1, {OB_FREE}, "K"});
    if (vx == NULL) {
        goto done;
    }
    const size_t k = ob_view_dim(vx, -1), m = ob_view_rows(vx);
    if (k > OB_MAX_K) {
        ob_fail(&call, PyExc_ValueError, "'x' must have at most %u columns, got %zu", OB_MAX_K, k);
        goto done;
    }
    if (ob_take_weights(&call, packed, packing, scale, bias, n, k, 0, &w) < 0 ||
        (out != Py_None && (vout = take_out(&call, out, vx, n)) == NULL)) {
        goto done;
    }
    if ((xq == Py_None) != (sx == Py_None)) {
        ob_fail(&call, PyExc_ValueError, "'xq' and 'sx' must be given together");
        goto done;
    }
    if (xq != Py_None) {
        npy_intp rows = (npy_intp)m, padded = (npy_intp)ob_padded_k(k);
        ob_spec codes = {OB_KIND_I8, OB_WRITE, 2, {rows, padded}, NULL};
        ob_spec steps = {OB_KIND_F32, OB_WRITE, 1, {rows}, NULL};
        if ((vxq = ob_take_array(&call, xq, "xq", codes)) == NULL ||
            (vsx = ob_take_array(&call, sx, "sx", steps)) == NULL) {
            goto done;
        }
    }
    if (ob_check_overlap(&call) < 0 || (y = result_array(vout, vx, n, &data)) == NULL) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = op(&w, m, ob_view_dtype(vx), vx->data, data,
                                       vxq ? vxq->data : NULL, vsx ? vsx->data : NULL);
    Py_END_ALLOW_THREADS if (ob_fail_status(&call, status) < 0)
    {
        Py_CLEAR(y);
    }
done:
    ob_release(&call);
    return (PyObject *)y;
}

PyObject *
ob_py_linear_backward_input(const char *name, ob_input_op op, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"dy", "packed", "scale", "in_features", "control", "out", NULL};
    PyObject *dy, *packed, *scale, *width, *control, *out = Py_None;
    ob_call call = {.function = name};
    ob_weights w;
    size_t k = 0, nonfinite = 0;
    ob_view *vdy, *vout = NULL;
    double *state;
    PyArrayObject *dx = NULL;
    void *data = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOO|$O", keys, &dy, &packed, &scale, &width,
                                     &control, &out) ||
        ob_take_size(&call, width, "in_features", 0, OB_MAX_K, &k) < 0) {
        return NULL;
    }
    vdy = ob_take_array(&call, dy, "dy", (ob_spec){OB_KIND_FLOAT, OB_LEADING, 1, {OB_FREE}, "N"});
    if (vdy == NULL) {
        goto done;
    }
    const size_t n = ob_view_dim(vdy, -1), m = ob_view_rows(vdy);
    if (n > OB_MAX_K) {
        ob_fail(&call, PyExc_ValueError, "'dy' must have at most %u columns, got %zu", OB_MAX_K, n);
        goto done;
    }
    if (ob_take_weights(&call, packed, OB_FORMAT_tile16, scale, NULL, n, k, 0, &w) < 0 ||
        (state = ob_take_control(&call, control, "control", OB_WRITE)) == NULL ||
        (out != Py_None && (vout = take_out(&call, out, vdy, k)) == NULL) ||
        ob_check_overlap(&call) < 0 || (dx = result_array(vout, vdy, k, &data)) == NULL) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status =
        op(&w, m, ob_view_dtype(vdy), vdy->data, data, state, &nonfinite);
    Py_END_ALLOW_THREADS if (ob_fail_status(&call, status) < 0)
    {
        Py_CLEAR(dx);
    }
    else if (nonfinite > 0)
    {
        state[OB_CTL_NONFINITE] += 1.0;
    }
done:
    ob_release(&call);
    return (PyObject *)dx;
}

/* What one vote reads and writes, as ob_vote takes it. */
typedef struct vote_arguments {
    ob_weights w;
    ob_view *dy, *xq, *sx;
    ob_planes planes;
    double *control;
    float *ds, *db;
} vote_arguments;

/* xq (M, padded K) int8, sx (M,): what the forward of the same tokens kept */
static int
take_kept(ob_call *call, PyObject *xq, PyObject *sx, size_t m, size_t k, vote_arguments *v)
{
    npy_intp rows = (npy_intp)m, padded = (npy_intp)ob_padded_k(k);
    ob_spec codes = {OB_KIND_I8, 0, 2, {rows, padded}, NULL};
    ob_spec steps = {OB_KIND_F32, 0, 1, {rows}, NULL};
    return (v->xq = ob_take_array(call, xq, "xq", codes)) == NULL ||
                   (v->sx = ob_take_array(call, sx, "sx", steps)) == NULL
               ? -1
               : 0;
}

/* A float32 accumulator of `length` entries, or NULL in *out if not wanted */
static int
take_sum(ob_call *call, PyObject *object, const char *name, size_t length, float **out)
{
    *out = NULL;
    if (object == Py_None) {
        return 0;
    }
    ob_spec spec = {OB_KIND_F32, OB_WRITE, 1, {(npy_intp)length}, NULL};
    ob_view *view = ob_take_array(call, object, name, spec);
    if (view == NULL) {
        return -1;
    }
    *out = view->data;
    return 0;
}

static int
take_random_state(ob_call *call, PyObject *planes, PyObject *control, size_t n, size_t k,
                  vote_arguments *v)
{
    if ((planes == Py_None) == (control == Py_None)) {
        return ob_fail(call, PyExc_ValueError,
                       "one of 'planes' and 'control' must be given (planes hold a control)");
    }
    if (planes != Py_None) {
        int status = ob_take_planes(call, planes, &n, &k, &v->planes);
        v->control = v->planes.control;
        return status;
    }
    v->control = ob_take_control(call, control, "control", OB_WRITE);
    return v->control != NULL ? 0 : -1;
}

/* Weights; where the rule moves codes in votes, `packed` is an output. */
static int
take_codes(ob_call *call, PyObject *packed, PyObject *scale, size_t n, size_t k, vote_arguments *v)
{
    const int moves = v->planes.control != NULL && v->planes.votes == NULL &&
                      ob_rule_moves_in_vote(v->planes.rule);
    if (ob_take_weights(call, packed, OB_FORMAT_tile16, scale, NULL, n, k, moves ? OB_WRITE : 0,
                        &v->w) < 0) {
        return -1;
    }
    v->planes.codes = moves ? PyArray_DATA((PyArrayObject *)packed) : NULL;
    return 0;
}

PyObject *
ob_py_vote(const char *name, ob_vote_op op, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"dy",     "xq",      "sx", "packed", "scale", "in_features",
                           "planes", "control", "ds", "db",     NULL};
    PyObject *dy, *xq, *sx, *packed, *scale, *width, *planes = Py_None, *control = Py_None,
                                                     *ds = Py_None, *db = Py_None, *result = NULL;
    ob_call call = {.function = name};
    vote_arguments v = {.control = NULL};
    size_t k = 0, nonfinite = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOOO|O$OOO", keys, &dy, &xq, &sx, &packed, &scale,
                                     &width, &planes, &control, &ds, &db) ||
        ob_take_size(&call, width, "in_features", 0, OB_MAX_K, &k) < 0) {
        return NULL;
    }
    v.dy = ob_take_array(&call, dy, "dy", (ob_spec){OB_KIND_FLOAT, OB_LEADING, 1, {OB_FREE}, "N"});
    if (v.dy == NULL) {
        goto done;
    }
    const size_t n = ob_view_dim(v.dy, -1), m = ob_view_rows(v.dy);
    if (n > OB_MAX_K) {
        ob_fail(&call, PyExc_ValueError, "'dy' must have at most %u columns, got %zu", OB_MAX_K, n);
        goto done;
    }
    if (take_kept(&call, xq, sx, m, k, &v) < 0 ||
        take_random_state(&call, planes, control, n, k, &v) < 0 ||
        take_codes(&call, packed, scale, n, k, &v) < 0 ||
        take_sum(&call, ds, "ds", v.w.scale_len, &v.ds) < 0 ||
        take_sum(&call, db, "db", n, &v.db) < 0 || ob_check_overlap(&call) < 0) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status =
        op(&v.w, m, ob_view_dtype(v.dy), v.dy->data, v.xq->data, v.sx->data,
           planes != Py_None ? &v.planes : NULL, v.control, v.ds, v.db, &nonfinite);
    Py_END_ALLOW_THREADS if (ob_fail_status(&call, status) == 0)
    {
        if (nonfinite > 0 && planes == Py_None) { /* with planes the operation counts it itself */
            v.control[OB_CTL_NONFINITE] += 1.0;
        }
        result = Py_NewRef(Py_None);
    }
done:
    ob_release(&call);
    return result;
}

/* ------------------------------------------------------------------ method table */
static PyObject *
linear_forward(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_linear_forward("linear_forward", ob_linear_forward, args, kw);
}

static PyObject *
linear_backward_input(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_linear_backward_input("linear_backward_input", ob_linear_backward_input, args, kw);
}

static PyObject *
vote(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_vote("vote", ob_vote, args, kw);
}

PyDoc_STRVAR(
    linear_forward_doc,
    "linear_forward($module, /, x, packed, scale, out_features, bias=None, *,\n"
    "               out=None, xq=None, sx=None, packing='tile16')\n--\n\n"
    "y = (xq . T^T) * (sx * scale) + bias, exactly, with int8 activations per token.\n\n"
    "x (..., K) float32 or bfloat16; packed uint8 of (out_features, K) in `packing`, 'tile16' or\n"
    "'trits5', which give the same bits; scale (1,) or (N,) float32; bias (N,) float32.  Returns y "
    "(..., N) of the dtype of x, in `out` if given.\n"
    "xq (M, padded K) int8 and sx (M,) float32, given together, receive what vote() needs; M is "
    "the\n"
    "product of the leading dimensions, padded K = 16 * ceil(K / 16).  A token with a non-finite\n"
    "entry gives NaN.  Quantisation: BitNet b1.58, arXiv 2402.17764.\n"
    "Raises TypeError (dtype), ValueError (shape, layout), BufferError (read-only, overlap).");

PyDoc_STRVAR(
    linear_backward_input_doc,
    "linear_backward_input($module, /, dy, packed, scale, in_features, control, *, "
    "out=None)\n--\n\n"
    "dx (..., K) of dy (..., N): dy * scale rounded stochastically to int8 per token, times T.\n\n"
    "control float64 (len(CONTROL),) keys the rounding by seed, layer, step and micro.  A token "
    "with\n"
    "a non-finite gradient gives NaN and control['nonfinite'] grows by one per call.  Raises as\n"
    "linear_forward.");

PyDoc_STRVAR(
    vote_doc,
    "vote($module, /, dy, xq, sx, packed, scale, in_features, planes=None, *,\n"
    "     control=None, ds=None, db=None)\n--\n\n"
    "The weight side of the backward: dW in registers, its votes into the planes.\n\n"
    "dy (..., N) float32 or bfloat16; xq, sx as kept by linear_forward; planes as made by "
    "new_planes,\n"
    "or None with a control instead (no votes).  ds (1,) or (N,) and db (N,) float32 grow by the\n"
    "gradients of scale and bias.  Rules that move codes in votes (residual4, residual2, "
    "stochastic)\n"
    "write packed.  Each 65,536 tokens count as one micro-batch.  A non-finite\n"
    "gradient anywhere: ds and db become NaN, control['nonfinite'] grows, no vote is cast.  "
    "Raises\n"
    "as linear_forward.");

PyMethodDef ob_linear_methods[] = {
    OB_METHOD("linear_forward", linear_forward, linear_forward_doc),
    OB_METHOD("linear_backward_input", linear_backward_input, linear_backward_input_doc),
    OB_METHOD("vote", vote, vote_doc),
    {NULL, NULL, 0, NULL},
};
