/* type_optimizer.c - FlipOptimizer: step, zero_grad, learning rates. */
#include "optimizer.h"

#include <math.h>
#include <string.h>

int
ob_optimizer_lock(const ob_call *call, ob_optimizer *self)
{
    if (self->detached) {
        return ob_fail(call, PyExc_RuntimeError, "the optimizer is detached from its layers");
    }
    for (size_t i = 0; i < self->count; i++) {
        if (ob_layer_lock(call, self->slots[i].layer, 1) < 0) {
            while (i-- > 0) {
                ob_layer_unlock(self->slots[i].layer, 1);
            }
            return -1;
        }
    }
    return 0;
}

void
ob_optimizer_unlock(ob_optimizer *self)
{
    for (size_t i = 0; i < self->count; i++) {
        ob_layer_unlock(self->slots[i].layer, 1);
    }
}

/* ------------------------------------------------------------------ step */
/* Adam, elementwise in float32: b -= lr * mh / (sqrt(vh) + 1e-8), powers as running products. */
static void
bias_step(const ob_slot *slot, double lr)
{
    float *bias = PyArray_DATA(slot->layer->bias);
    const float *grad = PyArray_DATA(slot->layer->bias_grad);
    float *average = PyArray_DATA(slot->moments[OB_BIAS_AVG]);
    float *square = PyArray_DATA(slot->moments[OB_BIAS_AVG_SQ]);
    double *powers = PyArray_DATA(slot->moments[OB_BIAS_POWERS]);
    const double *control = slot->layer->view.control;
    const double beta1 = control[OB_CTL_BETA1], beta2 = control[OB_CTL_BETA2];
    const float inverse = (float)(1.0 / control[OB_CTL_GRAD_SCALE]), rate = (float)lr;
    const float b1 = (float)beta1, b2 = (float)beta2, c1 = (float)(1.0 - beta1),
                c2 = (float)(1.0 - beta2);
    powers[0] *= beta1;
    powers[1] *= beta2;
    const float p1 = (float)(1.0 - powers[0]), p2 = (float)(1.0 - powers[1]);
    for (size_t i = 0; i < slot->layer->n; i++) {
        const float g = grad[i] * inverse;
        average[i] = b1 * average[i] + c1 * g;
        square[i] = b2 * square[i] + (c2 * g) * g;
        bias[i] -= (rate * (average[i] / p1)) / (sqrtf(square[i] / p2) + 1e-8f);
    }
}

/* One layer; a layer without votes since its last step is left alone, so that a step that ran out
 * of memory half way can be repeated. */
static ob_status
slot_step(const ob_slot *slot, double scale_lr, double bias_lr, uint64_t *moved)
{
    ob_layer *layer = slot->layer;
    *moved = 0;
    if (layer->view.control[OB_CTL_MICRO] == 0.0) {
        return OB_OK;
    }
    ob_status status =
        ob_flip(layer->n, layer->k, PyArray_DATA(layer->packed), &layer->view, moved);
    if (status != OB_OK) {
        return status;
    }
    status =
        ob_scale_step(ob_layer_scale_len(layer), PyArray_DATA(layer->scale),
                      PyArray_DATA(layer->scale_grad), PyArray_DATA(slot->moments[OB_SCALE_AVG]),
                      PyArray_DATA(slot->moments[OB_SCALE_AVG_SQ]), scale_lr, layer->view.control);
    if (status == OB_OK && layer->bias != NULL) {
        bias_step(slot, bias_lr);
    }
    return status;
}

static PyObject *
step(PyObject *object, PyObject *Py_UNUSED(none))
{
    ob_optimizer *self = (ob_optimizer *)object;
    ob_call call = {.function = "FlipOptimizer.step"};
    ob_status status = OB_OK;
    double total = 0.0, codes = 0.0;
    if (ob_optimizer_lock(&call, self) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS for (size_t i = 0; i < self->count && status == OB_OK; i++)
    {
        uint64_t moved = 0;
        status = slot_step(&self->slots[i], self->scale_lr, self->bias_lr, &moved);
        total += (double)moved;
        codes += (double)self->slots[i].layer->n * (double)self->slots[i].layer->k;
    }
    Py_END_ALLOW_THREADS ob_optimizer_unlock(self);
    if (ob_fail_status(&call, status) < 0) {
        return NULL;
    }
    self->flip_rate = codes > 0.0 ? total / codes : 0.0;
    return Py_NewRef(Py_None);
}

static PyObject *
zero_grad(PyObject *object, PyObject *Py_UNUSED(none))
{
    ob_optimizer *self = (ob_optimizer *)object;
    ob_call call = {.function = "FlipOptimizer.zero_grad"};
    if (ob_optimizer_lock(&call, self) < 0) {
        return NULL;
    }
    for (size_t i = 0; i < self->count; i++) {
        ob_layer *layer = self->slots[i].layer;
        memset(PyArray_DATA(layer->scale_grad), 0, (size_t)PyArray_NBYTES(layer->scale_grad));
        if (layer->bias_grad != NULL) {
            memset(PyArray_DATA(layer->bias_grad), 0, (size_t)PyArray_NBYTES(layer->bias_grad));
        }
    }
    ob_optimizer_unlock(self);
    return Py_NewRef(Py_None);
}

static PyObject *
detach(PyObject *object, PyObject *Py_UNUSED(none))
{
    ob_optimizer *self = (ob_optimizer *)object;
    ob_call call = {.function = "FlipOptimizer.detach"};
    if (!self->detached) {
        if (ob_optimizer_lock(&call, self) < 0) {
            return NULL;
        }
        ob_optimizer_unlock(self);
        ob_optimizer_release(self);
    }
    return Py_NewRef(Py_None);
}

/* ------------------------------------------------------------------ properties */
/* The closure of a rate is its offset in ob_optimizer. */
static PyObject *
get_rate(PyObject *object, void *offset)
{
    return PyFloat_FromDouble(*(double *)((char *)object + (uintptr_t)offset));
}

static const char *
rate_name(uintptr_t offset)
{
    return offset == offsetof(ob_optimizer, lr)         ? "lr"
           : offset == offsetof(ob_optimizer, scale_lr) ? "scale_lr"
                                                        : "bias_lr";
}

static int
set_rate(PyObject *object, PyObject *value, void *offset)
{
    ob_optimizer *self = (ob_optimizer *)object;
    ob_call call = {.function = "FlipOptimizer"};
    double rate = 0.0;
    const char *name = rate_name((uintptr_t)offset);
    if (ob_take_double(&call, value != NULL ? value : Py_None, name, 0, 1e6, &rate) < 0 ||
        ob_optimizer_lock(&call, self) < 0) {
        return -1;
    }
    *(double *)((char *)object + (uintptr_t)offset) = rate;
    for (size_t i = 0; i < self->count; i++) {
        self->slots[i].layer->view.control[OB_CTL_ETA] = self->lr;
    }
    ob_optimizer_unlock(self);
    return 0;
}

static PyObject *
get_layers(PyObject *object, void *Py_UNUSED(closure))
{
    ob_optimizer *self = (ob_optimizer *)object;
    PyObject *layers = PyTuple_New((Py_ssize_t)self->count);
    for (size_t i = 0; layers != NULL && i < self->count; i++) {
        PyTuple_SET_ITEM(layers, (Py_ssize_t)i, Py_NewRef(self->slots[i].layer));
    }
    return layers;
}

static PyObject *
get_rule(PyObject *object, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(ob_rule_name(((ob_optimizer *)object)->rule));
}

static PyObject *
get_vote_plane(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((ob_optimizer *)object)->vote_plane);
}

#define RATE(name, setter, doc) {#name, get_rate, setter, doc, (void *)offsetof(ob_optimizer, name)}

static PyObject *
get_count(PyObject *object, void *offset)
{
    return PyLong_FromSize_t(*(size_t *)((char *)object + (uintptr_t)offset));
}

static PyGetSetDef optimizer_properties[] = {
    RATE(lr, set_rate, "learning rate of the codes, cells per step"),
    RATE(scale_lr, set_rate, "learning rate of the scales, relative to their first value"),
    RATE(bias_lr, set_rate, "learning rate of the biases"),
    RATE(flip_rate, NULL, "share of all codes that the last step moved"),
    {"layers", get_layers, NULL, "the layers, in the order of their ids", NULL},
    {"rule", get_rule, NULL, "name of the flip rule", NULL},
    {"stripes", get_count, NULL, "block-cyclic: every stripes-th row is in training",
     (void *)offsetof(ob_optimizer, stripes)},
    {"stripe", get_count, NULL, "and which: rows n % stripes == stripe",
     (void *)offsetof(ob_optimizer, stripe)},
    {"vote_plane", get_vote_plane, NULL, "whether the votes of a step meet in a plane first", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyObject *
optimizer_repr(PyObject *object)
{
    ob_optimizer *self = (ob_optimizer *)object;
    char rates[96];
    snprintf(rates, sizeof rates, "lr=%g, scale_lr=%g, bias_lr=%g", self->lr, self->scale_lr,
             self->bias_lr);
    return PyUnicode_FromFormat("FlipOptimizer(%zu layers, %s, rule=%s%s)", self->count, rates,
                                ob_rule_name(self->rule), self->detached ? ", detached" : "");
}

/* ------------------------------------------------------------------ life */
static int
optimizer_traverse(PyObject *object, visitproc visit, void *arg)
{
    ob_optimizer *self = (ob_optimizer *)object;
    Py_VISIT(Py_TYPE(object));
    for (size_t i = 0; self->slots != NULL && i < self->count; i++) {
        Py_VISIT(self->slots[i].layer);
        Py_VISIT(self->slots[i].planes);
    }
    return 0;
}

static int
optimizer_clear(PyObject *object)
{
    ob_optimizer_release((ob_optimizer *)object);
    return 0;
}

static void
optimizer_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    ob_optimizer_release((ob_optimizer *)object);
    type->tp_free(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(
    optimizer_doc,
    "FlipOptimizer(layers, lr=0.03, scale_lr=2e-3, betas=None, recipe='finetune',\n"
    "              residual_bits=None, momentum_bits=None, flip_rate_cap=None, seed=0, "
    "bias_lr=1e-3,\n"
    "              rule=None, stripes=1, vote_plane=False)\n"
    "--\n\n"
    "Trains the codes of TernaryLinear layers by votes, their scales and biases by Adam.\n\n"
    "lr: cells per step for a vote of size 1; scale_lr: relative to the scale's first value; "
    "bias_lr:\n"
    "absolute.  betas: decays of the momentum plane and of Adam's first moments, of the factors "
    "and "
    "the second\n"
    "moments; None: (0.9, 0.95), or (0.7, 0.95) with a momentum.  recipe 'finetune': an 8-bit "
    "residual; 'pretrain': also a 4-bit momentum; the bits\n"
    "override it, or one of RULES by its name: 'byte' (code and residual in 8 bits), 'stochastic' "
    "(no\n"
    "memory), ...  stripes G > 1: only every G-th row is in training until rotate(), so planes and "
    "dW\n"
    "shrink to 1/G.  flip_rate_cap: largest share of a layer's codes that should move per step "
    "(None:\n"
    ".025, 0: no cap; with one, an lr beyond .06 counts as .06).  Layers get the ids 0, 1, ... in "
    "order and are detached when the optimizer "
    "dies.\n"
    "The first step of a layer only measures its gradient and moves no code.\n"
    "vote_plane: the votes of a step meet in int16 per weight and count as one vote in step(), so "
    "that\n"
    "micro-batches train as one batch; between steps that plane is zero and in no state_dict().");
PyDoc_STRVAR(
    step_doc,
    "step($self, /)\n--\n\n"
    "Move codes, scales and biases of every layer that had a backward since its last step.");
PyDoc_STRVAR(
    zero_grad_doc,
    "zero_grad($self, /)\n--\n\n"
    "Zero scale_grad and bias_grad of every layer; step() does not.  Votes are never cleared.");
PyDoc_STRVAR(
    rotate_doc,
    "rotate($self, /)\n--\n\n"
    "The next stripe of rows goes into training with fresh planes, and measures first; votes of "
    "the last\n"
    "one that moved no code are dropped.  RuntimeError without stripes.");
PyDoc_STRVAR(detach_doc,
             "detach($self, /)\n--\n\nFree the layers and drop their planes; may be called again.");
PyDoc_STRVAR(
    stats_doc,
    "stats($self, /)\n--\n\n"
    "One dict per layer: name, flip_rate (last step), guard, zero_fraction (share of codes 0),\n"
    "saturated (share of the residual that waits at a bound for votes of the other sign).");
PyDoc_STRVAR(state_dict_doc, "state_dict($self, /)\n--\n\nEverything that resuming needs, as "
                             "copies: rates, planes, moments.");
PyDoc_STRVAR(
    load_state_dict_doc,
    "load_state_dict($self, /, state)\n--\n\n"
    "Take over a state_dict() of the same layers and rule; checked as a whole before anything is\n"
    "written.");

static PyMethodDef optimizer_methods[] = {
    {"step", step, METH_NOARGS, step_doc},
    {"zero_grad", zero_grad, METH_NOARGS, zero_grad_doc},
    {"rotate", ob_optimizer_rotate, METH_NOARGS, rotate_doc},
    {"detach", detach, METH_NOARGS, detach_doc},
    {"stats", ob_optimizer_stats, METH_NOARGS, stats_doc},
    {"state_dict", ob_optimizer_state_dict, METH_NOARGS, state_dict_doc},
    OB_METHOD("load_state_dict", ob_optimizer_load, load_state_dict_doc),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot optimizer_slots[] = {
    {Py_tp_doc, (void *)optimizer_doc},
    {Py_tp_new, ob_optimizer_new},
    {Py_tp_dealloc, optimizer_dealloc},
    {Py_tp_traverse, optimizer_traverse},
    {Py_tp_clear, optimizer_clear},
    {Py_tp_repr, optimizer_repr},
    {Py_tp_methods, optimizer_methods},
    {Py_tp_getset, optimizer_properties},
    {0, NULL},
};

PyType_Spec ob_flip_optimizer_spec = {
    .name = "onebit_ext._core.FlipOptimizer",
    .basicsize = sizeof(ob_optimizer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = optimizer_slots,
};
