/* optimizer_new.c - FlipOptimizer: making one on free layers, and letting them go. */
#include "optimizer.h"

#include <string.h>

/* ------------------------------------------------------------------ arguments */
typedef struct options {
    double lr, scale_lr, bias_lr, betas[2], cap;
    size_t seed, stripes;
    ob_rule rule;
    int vote_plane;
} options;

static const char *
recipe_name(size_t index)
{
    return index == 0 ? "finetune" : "pretrain";
}

/* The rule by its name, or else by its bits, which a recipe sets where they are not given */
static int
take_rule(const ob_call *call, PyObject *recipe, PyObject *name, PyObject *residual,
          PyObject *momentum, ob_rule *rule)
{
    size_t which = 0, residual_bits = 8, momentum_bits, named = 0;
    if (recipe && ob_take_name(call, recipe, "recipe", 2, recipe_name, &which) < 0) {
        return -1;
    }
    momentum_bits = which == 0 ? 0 : 4;
    if ((residual != Py_None &&
         ob_take_size(call, residual, "residual_bits", 0, 32, &residual_bits) < 0) ||
        (momentum != Py_None &&
         ob_take_size(call, momentum, "momentum_bits", 0, 32, &momentum_bits) < 0) ||
        (name != Py_None &&
         ob_take_name(call, name, "rule", OB_RULE_COUNT, ob_rule_text, &named) < 0)) {
        return -1;
    }
    if (name != Py_None && (residual != Py_None || momentum != Py_None)) {
        return ob_fail(call, PyExc_ValueError,
                       "'rule' says the bits too: give it, or 'residual_bits' and "
                       "'momentum_bits'");
    }
    *rule = name != Py_None ? (ob_rule)named : ob_find_rule((int)residual_bits, (int)momentum_bits);
    if (*rule != OB_RULE_COUNT) {
        return 0;
    }
    char known[256] = "";
    for (int i = 0; i < OB_RULE_COUNT; i++) {
        size_t used = strlen(known);
        int r = ob_rule_residual_bits((ob_rule)i), m = ob_rule_momentum_bits((ob_rule)i);
        if (ob_find_rule(r, m) == (ob_rule)i) { /* the first of these bits: byte has a name only */
            snprintf(known + used, sizeof known - used, "%s(%d, %d)", used > 0 ? ", " : "", r, m);
        }
    }
    return ob_fail(call, PyExc_ValueError,
                   "'residual_bits', 'momentum_bits' must be one of %s, got (%zu, %zu)", known,
                   residual_bits, momentum_bits);
}

/* Free, writeable, and each once.  Repeated before attaching: other code may run in between. */
static int
check_layers(const ob_call *call, PyTypeObject *layer_type, PyObject *layers)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(layers); i++) {
        PyObject *item = PyTuple_GET_ITEM(layers, i);
        if (!Py_IS_TYPE(item, layer_type)) {
            return ob_fail(call, PyExc_TypeError, "'layers' must hold TernaryLinear, got %.80s",
                           Py_TYPE(item)->tp_name);
        }
        const ob_layer *layer = (const ob_layer *)item;
        for (Py_ssize_t j = 0; j < i; j++) {
            if (PyTuple_GET_ITEM(layers, j) == item) {
                return ob_fail(call, PyExc_ValueError,
                               "'layers' must hold each layer once, got "
                               "the layer at %zd again at %zd",
                               j, i);
            }
        }
        if (layer->packing != OB_FORMAT_tile16) {
            return ob_fail(call, PyExc_ValueError,
                           "'layers' must be packed as 'tile16', got '%s' at %zd: repack() it",
                           ob_format_name(layer->packing), i);
        }
        if (layer->owner != NULL) {
            return ob_fail(call, PyExc_ValueError,
                           "'layers' must be free, got one that is attached to an optimizer "
                           "already at %zd",
                           i);
        }
        if (layer->writing || layer->reading > 0) {
            return ob_fail(call, PyExc_RuntimeError, "the layer is busy in another thread");
        }
        if (!PyArray_ISWRITEABLE(layer->packed) || !PyArray_ISWRITEABLE(layer->scale) ||
            (layer->bias != NULL && !PyArray_ISWRITEABLE(layer->bias))) {
            return ob_fail(call, PyExc_BufferError,
                           "'layers' must be writeable, got read-only memory in the one at %zd", i);
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ slots */
static double
mean_scale(const ob_layer *layer)
{
    const float *scale = PyArray_DATA(layer->scale);
    const size_t length = ob_layer_scale_len(layer);
    double sum = 0.0;
    for (size_t i = 0; i < length; i++) {
        sum += (double)scale[i];
    }
    return length > 0 ? sum / (double)length : 1.0;
}

static int
open_slot(ob_slot *slot, ob_layer *layer, size_t id, const options *o)
{
    const ob_control_init init = {
        .seed = (double)o->seed,
        .layer = (double)id,
        .eta = o->lr,
        .cap = o->cap,
        .clip = 3.0,
        .beta1 = o->betas[0],
        .beta2 = o->betas[1],
        .scale_init = mean_scale(layer),
        .rule = (double)o->rule,
        .stripes = (double)o->stripes,
    };
    slot->layer = (ob_layer *)Py_NewRef(layer);
    slot->planes = ob_new_planes(layer->n, layer->k, ob_new_control(&init), o->vote_plane,
                                 PyArray_DATA(layer->packed));
    int failed = slot->planes == NULL;
    for (int i = 0; i < OB_MOMENTS && !failed; i++) {
        PyArrayObject *like = i < OB_BIAS_AVG ? layer->scale : layer->bias;
        if (like == NULL) {
            break;
        }
        npy_intp length = i == OB_BIAS_POWERS ? 2 : PyArray_DIM(like, 0);
        int type = i == OB_BIAS_POWERS ? NPY_DOUBLE : NPY_FLOAT;
        slot->moments[i] = ob_new_typed(type, 1, &length, 1);
        failed = slot->moments[i] == NULL;
    }
    if (!failed && slot->moments[OB_BIAS_POWERS] != NULL) {
        double *powers = PyArray_DATA(slot->moments[OB_BIAS_POWERS]);
        powers[0] = powers[1] = 1.0;
    }
    return failed ? -1 : 0;
}

/* Nothing here allocates or runs Python code: all layers are attached or none. */
static int
attach(const ob_call *call, ob_optimizer *self, PyTypeObject *layer_type, PyObject *layers,
       ob_planes *views)
{
    if (check_layers(call, layer_type, layers) < 0) {
        return -1;
    }
    for (size_t i = 0; i < self->count; i++) {
        ob_slot *slot = &self->slots[i];
        ob_layer_attach(slot->layer, (PyObject *)self, slot->planes, &views[i]);
    }
    return 0;
}

static ob_optimizer *
optimizer_on(PyTypeObject *type, const ob_call *call, PyTypeObject *layer_type, PyObject *layers,
             const options *o)
{
    const size_t count = (size_t)PyTuple_GET_SIZE(layers);
    ob_optimizer *self = (ob_optimizer *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->rule = o->rule;
    self->stripes = o->stripes;
    self->vote_plane = o->vote_plane;
    self->lr = o->lr;
    self->scale_lr = o->scale_lr;
    self->bias_lr = o->bias_lr;
    ob_planes *views = PyMem_Calloc(count + 1, sizeof *views);
    self->slots = PyMem_Calloc(count + 1, sizeof *self->slots);
    int failed = views == NULL || self->slots == NULL;
    if (failed) {
        PyErr_NoMemory();
    }
    for (size_t i = 0; i < count && !failed; i++) {
        self->count = i + 1;
        ob_slot *slot = &self->slots[i];
        ob_layer *layer = (ob_layer *)PyTuple_GET_ITEM(layers, (Py_ssize_t)i);
        failed = open_slot(slot, layer, i, o) < 0 ||
                 ob_view_planes(slot->planes, PyArray_DATA(layer->packed), &views[i]) < 0;
    }
    if (failed || attach(call, self, layer_type, layers, views) < 0) {
        Py_CLEAR(self);
    }
    PyMem_Free(views);
    return self;
}

PyObject *
ob_optimizer_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    static char *keys[] = {
        "layers",        "lr",   "scale_lr", "betas", "recipe",  "residual_bits", "momentum_bits",
        "flip_rate_cap", "seed", "bias_lr",  "rule",  "stripes", "vote_plane",    NULL};
    const ob_state *state = PyType_GetModuleState(type);
    PyObject *layers, *lr = NULL, *scale_lr = NULL, *betas = Py_None, *recipe = NULL,
                      *residual = Py_None, *momentum = Py_None, *cap = Py_None, *seed = NULL,
                      *bias_lr = NULL, *rule = Py_None, *stripes = NULL, *vote_plane = NULL;
    ob_call call = {.function = "FlipOptimizer"};
    options o = {0.03, 2e-3, 1e-3, {0.0, 0.95}, 0.025, 0, 1, OB_RULE_residual8, 0};
    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kw, "O|OOOOOOOOOOOO", keys, &layers, &lr, &scale_lr,
                                     &betas, &recipe, &residual, &momentum, &cap, &seed, &bias_lr,
                                     &rule, &stripes, &vote_plane) ||
        (lr && ob_take_double(&call, lr, "lr", 0, 1e6, &o.lr) < 0) ||
        (scale_lr && ob_take_double(&call, scale_lr, "scale_lr", 0, 1e6, &o.scale_lr) < 0) ||
        (bias_lr && ob_take_double(&call, bias_lr, "bias_lr", 0, 1e6, &o.bias_lr) < 0) ||
        (cap != Py_None && ob_take_double(&call, cap, "flip_rate_cap", 0, 1, &o.cap) < 0) ||
        (seed && ob_take_size(&call, seed, "seed", 0, ((size_t)1 << 53) - 1, &o.seed) < 0) ||
        (stripes && ob_take_size(&call, stripes, "stripes", 1, OB_MAX_K, &o.stripes) < 0) ||
        (vote_plane && ob_take_flag(&call, vote_plane, "vote_plane", &o.vote_plane) < 0) ||
        take_rule(&call, recipe, rule, residual, momentum, &o.rule) < 0) {
        return NULL;
    }
    o.betas[0] = ob_rule_beta1(o.rule);
    if (betas != Py_None && ob_take_betas(&call, betas, "betas", o.betas) < 0) {
        return NULL;
    }
    if (!PyTuple_Check(layers) && !PyList_Check(layers)) {
        ob_fail(&call, PyExc_TypeError, "'layers' must be a list of TernaryLinear, got %.80s",
                Py_TYPE(layers)->tp_name);
        return NULL;
    }
    PyObject *fixed = PySequence_Tuple(layers);
    ob_optimizer *self = NULL;
    if (fixed != NULL && check_layers(&call, state->linear_type, fixed) == 0) {
        self = optimizer_on(type, &call, state->linear_type, fixed, &o);
    }
    Py_XDECREF(fixed);
    return (PyObject *)self;
}

void
ob_optimizer_release(ob_optimizer *self)
{
    ob_slot *slots = self->slots;
    const size_t count = self->count;
    self->slots = NULL;
    self->count = 0;
    self->detached = 1;
    for (size_t i = 0; i < count; i++) {
        if (slots[i].layer != NULL && slots[i].layer->owner == (PyObject *)self) {
            ob_layer_detach(slots[i].layer);
        }
        Py_CLEAR(slots[i].layer);
        Py_CLEAR(slots[i].planes);
        for (int j = 0; j < OB_MOMENTS; j++) {
            Py_CLEAR(slots[i].moments[j]);
        }
    }
    PyMem_Free(slots);
}
