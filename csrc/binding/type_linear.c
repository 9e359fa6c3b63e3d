/* type_linear.c - TernaryLinear: forward, backward, properties. */
#include "layer.h"

#include <string.h>

#include "layer_new.h"

static ob_weights
weights_of(const ob_layer *layer)
{
    return (ob_weights){PyArray_DATA(layer->packed),
                        layer->n,
                        layer->k,
                        PyArray_DATA(layer->scale),
                        ob_layer_scale_len(layer),
                        layer->bias != NULL ? PyArray_DATA(layer->bias) : NULL,
                        layer->packing};
}

/* ------------------------------------------------------------------ forward */
static PyObject *
forward(PyObject *object, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"x", "keep", NULL};
    ob_layer *self = (ob_layer *)object;
    PyObject *x, *keep_flag = Py_True;
    ob_call call = {.function = "TernaryLinear.forward"};
    int keep = 1;
    PyArrayObject *y = NULL, *xq = NULL, *sx = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O|O", keys, &x, &keep_flag) ||
        ob_take_flag(&call, keep_flag, "keep", &keep) < 0) {
        return NULL;
    }
    keep &= self->packing == OB_FORMAT_tile16; /* no other has a backward */
    ob_spec spec = {OB_KIND_FLOAT, OB_LEADING, 1, {(npy_intp)self->k}, NULL};
    ob_view *view = ob_take_array(&call, x, "x", spec);
    if (view == NULL) {
        return NULL;
    }
    const size_t m = ob_view_rows(view);
    if ((y = ob_new_like(view, self->n)) == NULL ||
        (keep && ob_new_kept(m, self->k, &xq, &sx) < 0) || ob_layer_lock(&call, self, keep) < 0) {
        Py_CLEAR(y);
        goto done;
    }
    const ob_weights w = weights_of(self);
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status =
        ob_linear_forward(&w, m, ob_view_dtype(view), view->data, PyArray_DATA(y),
                          keep ? PyArray_DATA(xq) : NULL, keep ? PyArray_DATA(sx) : NULL);
    Py_END_ALLOW_THREADS ob_layer_unlock(self, keep);
    if (ob_fail_status(&call, status) < 0) {
        Py_CLEAR(y);
    }
    else if (keep) {
        Py_XSETREF(self->xq, (PyArrayObject *)Py_NewRef(xq));
        Py_XSETREF(self->sx, (PyArrayObject *)Py_NewRef(sx));
    }
done:
    Py_XDECREF(xq);
    Py_XDECREF(sx);
    ob_release(&call);
    return (PyObject *)y;
}

/* ------------------------------------------------------------------ backward */
/* What a backward may have to undo: a non-finite gradient leaves NaN in ds and db and counts. */
typedef struct undo {
    float *ds, *db; /* in the layer; db NULL: no bias */
    double *control;
    size_t ds_len, db_len;
    char *copy; /* ds, db, control in order */
} undo;

static int
undo_open(undo *u, ob_layer *self, double *control)
{
    *u = (undo){PyArray_DATA(self->scale_grad), NULL, control, ob_layer_scale_len(self), 0, NULL};
    if (self->bias_grad != NULL) {
        u->db = PyArray_DATA(self->bias_grad);
        u->db_len = self->n;
    }
    const size_t floats = (u->ds_len + u->db_len) * sizeof(float);
    u->copy = ob_alloc(floats + OB_CONTROL_LEN * sizeof(double));
    if (u->copy == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(u->copy, u->ds, u->ds_len * sizeof(float));
    if (u->db != NULL) {
        memcpy(u->copy + u->ds_len * sizeof(float), u->db, u->db_len * sizeof(float));
    }
    memcpy(u->copy + floats, control, OB_CONTROL_LEN * sizeof(double));
    return 0;
}

static void
undo_all(const undo *u)
{
    const size_t floats = (u->ds_len + u->db_len) * sizeof(float);
    memcpy(u->ds, u->copy, u->ds_len * sizeof(float));
    if (u->db != NULL) {
        memcpy(u->db, u->copy + u->ds_len * sizeof(float), u->db_len * sizeof(float));
    }
    memcpy(u->control, u->copy + floats, OB_CONTROL_LEN * sizeof(double));
}

/* dX, then the votes; without the GIL.  *nonfinite > 0: everything is as before. */
static ob_status
run_backward(ob_layer *self, const ob_view *dy, const undo *u, void *dx, int votes,
             size_t *nonfinite)
{
    const ob_weights w = weights_of(self);
    const size_t m = ob_view_rows(dy);
    const ob_dtype dt = ob_view_dtype(dy);
    ob_status status = OB_OK;
    if (dx != NULL) {
        status = ob_linear_backward_input(&w, m, dt, dy->data, dx, u->control, nonfinite);
    }
    if (status == OB_OK && *nonfinite == 0) {
        status = ob_vote(&w, m, dt, dy->data, PyArray_DATA(self->xq), PyArray_DATA(self->sx),
                         votes ? &self->view : NULL, u->control, u->ds, u->db, nonfinite);
        if (status == OB_OK && *nonfinite > 0) {
            undo_all(u);
        }
    }
    return status;
}

static ob_view *
take_gradient(ob_call *call, ob_layer *self, PyObject *dy)
{
    ob_spec spec = {OB_KIND_FLOAT, OB_LEADING, 1, {(npy_intp)self->n}, NULL};
    ob_view *view = ob_take_array(call, dy, "dy", spec);
    if (view == NULL) {
        return NULL;
    }
    if (self->packing != OB_FORMAT_tile16) {
        ob_fail(call, PyExc_RuntimeError,
                "a layer packed as '%s' has a forward only: repack('tile16') trains",
                ob_format_name(self->packing));
        return NULL;
    }
    if (self->xq == NULL) {
        ob_fail(call, PyExc_RuntimeError,
                "no activations are kept: one forward(x, keep=True) serves one backward");
        return NULL;
    }
    if (ob_view_rows(view) != (size_t)PyArray_DIM(self->sx, 0)) {
        ob_fail(call, PyExc_ValueError,
                "'dy' must have the %zd tokens of the last forward, got %zu",
                PyArray_DIM(self->sx, 0), ob_view_rows(view));
        return NULL;
    }
    ob_hold_array(call, self->scale_grad, "scale_grad", 1);
    if (self->bias_grad != NULL) {
        ob_hold_array(call, self->bias_grad, "bias_grad", 1);
    }
    if (self->planes != NULL) {
        ob_hold_planes(call, self->planes);
    }
    if (self->planes != NULL && self->view.codes != NULL) {
        ob_hold_array(call, self->packed, "packed", 1);
    }
    return ob_check_overlap(call) < 0 ? NULL : view;
}

static void
finish_backward(ob_layer *self, size_t m)
{
    if (self->planes == NULL) { /* the next backward draws other random numbers */
        double *control = PyArray_DATA(self->control);
        control[OB_CTL_MICRO] += (double)(m / OB_TOKENS_PER_VOTE + (m % OB_TOKENS_PER_VOTE != 0));
    }
    Py_CLEAR(self->xq);
    Py_CLEAR(self->sx);
}

static PyObject *
backward(PyObject *object, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"dy", "input_grad", NULL};
    ob_layer *self = (ob_layer *)object;
    PyObject *dy, *flag = Py_True, *dx = NULL;
    ob_call call = {.function = "TernaryLinear.backward"};
    int wanted = 1;
    undo u = {.copy = NULL};
    size_t nonfinite = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O|O", keys, &dy, &flag) ||
        ob_take_flag(&call, flag, "input_grad", &wanted) < 0 || ob_layer_lock(&call, self, 1) < 0) {
        return NULL;
    }
    ob_view *view = take_gradient(&call, self, dy);
    double *control = self->planes != NULL ? self->view.control : PyArray_DATA(self->control);
    if (view == NULL || undo_open(&u, self, control) < 0) {
        goto done;
    }
    dx = wanted ? (PyObject *)ob_new_like(view, self->k) : Py_NewRef(Py_None);
    if (dx == NULL) {
        goto done;
    }
    void *data = wanted ? PyArray_DATA((PyArrayObject *)dx) : NULL;
    const int votes = self->planes != NULL && !self->paused;
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = run_backward(self, view, &u, data, votes, &nonfinite);
    Py_END_ALLOW_THREADS if (ob_fail_status(&call, status) < 0)
    {
        Py_CLEAR(dx);
    }
    else if (nonfinite > 0)
    {
        PyObject *label = ob_layer_label(self);
        if (label != NULL) {
            ob_fail(&call, PyExc_FloatingPointError,
                    "non-finite gradient in layer %U; nothing was changed", label);
            Py_DECREF(label);
        }
        Py_CLEAR(dx);
    }
    else
    {
        finish_backward(self, ob_view_rows(view));
    }
done:
    ob_layer_unlock(self, 1);
    ob_free(u.copy);
    ob_release(&call);
    return dx;
}

static PyObject *
codes(PyObject *object, PyObject *Py_UNUSED(none))
{
    ob_layer *self = (ob_layer *)object;
    ob_call call = {.function = "TernaryLinear.codes"};
    npy_intp dims[2] = {(npy_intp)self->n, (npy_intp)self->k};
    PyArrayObject *result = ob_new_typed(NPY_INT8, 2, dims, 0);
    if (result == NULL || ob_layer_lock(&call, self, 0) < 0) {
        Py_XDECREF(result);
        return NULL;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = ob_unpack(self->packing, self->n, self->k,
                                              PyArray_DATA(self->packed), PyArray_DATA(result));
    Py_END_ALLOW_THREADS ob_layer_unlock(self, 0);
    if (ob_fail_status(&call, status) < 0) {
        Py_CLEAR(result);
    }
    return (PyObject *)result;
}

/* ------------------------------------------------------------------ life */
static PyObject *
layer_repr(PyObject *object)
{
    ob_layer *self = (ob_layer *)object;
    return PyUnicode_FromFormat("TernaryLinear(in_features=%zu, out_features=%zu, scale='%s', "
                                "bias=%s, packing='%s', name=%R, rule=%s)",
                                self->k, self->n, ob_layer_scale_len(self) == 1 ? "tensor" : "row",
                                self->bias != NULL ? "True" : "False",
                                ob_format_name(self->packing), self->name,
                                self->planes != NULL ? ob_rule_name(self->view.rule) : "None");
}

static int
layer_traverse(PyObject *object, visitproc visit, void *arg)
{
    ob_layer *self = (ob_layer *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->name);
    Py_VISIT(self->planes);
    return 0;
}

static int
layer_clear(PyObject *object)
{
    Py_SETREF(((ob_layer *)object)->name, Py_NewRef(Py_None)); /* the arrays form no cycle */
    return 0;
}

static void
layer_dealloc(PyObject *object)
{
    ob_layer *self = (ob_layer *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Py_XDECREF(self->name);
    Py_XDECREF(self->packed);
    Py_XDECREF(self->scale);
    Py_XDECREF(self->bias);
    Py_XDECREF(self->scale_grad);
    Py_XDECREF(self->bias_grad);
    Py_XDECREF(self->control);
    Py_XDECREF(self->xq);
    Py_XDECREF(self->sx);
    Py_XDECREF(self->planes);
    type->tp_free(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(
    layer_doc,
    "TernaryLinear(in_features, out_features, scale='tensor', bias=False, seed=0, "
    "packing='tile16')\n--\n\n"
    "y = x W^T + bias with W = scale * codes, codes (N, K) in {-1, 0, 1}; no float copy of W "
    "exists.\n\n"
    "scale: 'tensor' for one float32 factor, 'row' for one per output.  Starting codes are -1, 0 "
    "and 1\n"
    "with equal shares (random_codes(N, K, seed)), the scale 1 / sqrt(2/3 K).  Layers of one "
    "model\n"
    "want different seeds.  packing: 'tile16', 2 bits a weight, or 'trits5', 1.6 bits, whose "
    "forward\n"
    "gives the same bits and which has no backward.  packed, scale, bias, scale_grad, bias_grad "
    "and, while an optimizer is\n"
    "attached, planes are views of the layer's own memory.");
PyDoc_STRVAR(
    forward_doc,
    "forward($self, /, x, keep=True)\n--\n\n"
    "x (..., K) float32 or bfloat16 -> y (..., N) of the same dtype.\n\n"
    "Keeps the int8 activations for one backward, in place of those of an earlier forward; with\n"
    "keep=False, or packed as trits5, keeps nothing and leaves those of an earlier forward alone.");
PyDoc_STRVAR(
    backward_doc,
    "backward($self, /, dy, input_grad=True)\n--\n\n"
    "dy (..., N) for the tokens of the last forward -> dx (..., K), or None without input_grad.\n\n"
    "scale_grad and bias_grad grow; with an optimizer attached and `paused` False the codes' votes "
    "are\n"
    "cast.  RuntimeError if no forward kept activations; FloatingPointError, naming the layer, on "
    "a\n"
    "non-finite gradient: then nothing has changed and backward may be called again.");
PyDoc_STRVAR(codes_doc, "codes($self, /)\n--\n\nThe codes as int8 (N, K), a copy.");
PyDoc_STRVAR(
    from_float_doc,
    "from_float($type, /, w, bias=None, packing='tile16')\n--\n\n"
    "w (N, K) float32 or bfloat16, quantised by absmean(); bias (N,) float32 is used in place.");
PyDoc_STRVAR(from_codes_doc,
             "from_codes($type, /, codes, scale, bias=None, packing='tile16')\n--\n\n"
             "codes int8 (N, K) in {-1, 0, 1}; scale a positive number or float32 "
             "(1,) or (N,), used in place.");
PyDoc_STRVAR(from_packed_doc,
             "from_packed($type, /, packed, scale, shape, bias=None, "
             "packing='tile16')\n--\n\n"
             "packed, codes of shape (N, K) in that packing, scale and bias are used in place; "
             "packed must be 64-byte aligned\n"
             "(empty() makes such arrays) and hold no reserved code.");
PyDoc_STRVAR(repack_doc,
             "repack($self, /, packing)\n--\n\n"
             "A layer of the same codes in 'tile16' or 'trits5'; scale and bias are shared.");

static PyMethodDef layer_methods[] = {
    OB_METHOD("forward", forward, forward_doc),
    OB_METHOD("backward", backward, backward_doc),
    {"codes", codes, METH_NOARGS, codes_doc},
    OB_METHOD("repack", ob_layer_repack, repack_doc),
    {"from_float", (PyCFunction)(void (*)(void))ob_layer_from_float,
     METH_VARARGS | METH_KEYWORDS | METH_CLASS, from_float_doc},
    {"from_codes", (PyCFunction)(void (*)(void))ob_layer_from_codes,
     METH_VARARGS | METH_KEYWORDS | METH_CLASS, from_codes_doc},
    {"from_packed", (PyCFunction)(void (*)(void))ob_layer_from_packed,
     METH_VARARGS | METH_KEYWORDS | METH_CLASS, from_packed_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot layer_slots[] = {
    {Py_tp_doc, (void *)layer_doc},
    {Py_tp_new, ob_layer_new},
    {Py_tp_dealloc, layer_dealloc},
    {Py_tp_traverse, layer_traverse},
    {Py_tp_clear, layer_clear},
    {Py_tp_repr, layer_repr},
    {Py_tp_methods, layer_methods},
    {Py_tp_getset, ob_layer_properties},
    {0, NULL},
};

PyType_Spec ob_ternary_linear_spec = {
    .name = "onebit_ext._core.TernaryLinear",
    .basicsize = sizeof(ob_layer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = layer_slots,
};
