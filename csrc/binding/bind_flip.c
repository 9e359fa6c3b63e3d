/* bind_flip.c - planes, the step of the codes, the step of the scale. */
#include "binding.h"

PyObject *
ob_py_flip(const char *name, ob_flip_op op, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"packed", "planes", NULL};
    PyObject *packed, *dict, *result = NULL;
    ob_call call = {.function = name};
    ob_planes planes;
    size_t n = SIZE_MAX, k = SIZE_MAX;
    uint64_t moved = 0;
    uint8_t *codes;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO", keys, &packed, &dict)) {
        return NULL;
    }
    if (ob_take_planes(&call, dict, &n, &k, &planes) < 0 ||
        (codes = ob_take_packed_of(&call, packed, &n, k, &planes, OB_WRITE)) == NULL ||
        ob_check_overlap(&call) < 0) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = op(n, k, codes, &planes, &moved);
    Py_END_ALLOW_THREADS if (ob_fail_status(&call, status) == 0)
    {
        result = PyLong_FromUnsignedLongLong(moved);
    }
done:
    ob_release(&call);
    return result;
}

static PyObject *
flip(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_flip("flip", ob_flip, args, kw);
}

static PyObject *
saturated(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"packed", "planes", NULL};
    PyObject *packed, *dict, *result = NULL;
    ob_call call = {.function = "saturated"};
    ob_planes planes;
    size_t n = SIZE_MAX, k = SIZE_MAX;
    uint64_t count = 0;
    const uint8_t *codes;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO", keys, &packed, &dict)) {
        return NULL;
    }
    if (ob_take_planes(&call, dict, &n, &k, &planes) == 0 &&
        (codes = ob_take_packed_of(&call, packed, &n, k, &planes, 0)) != NULL &&
        ob_check_overlap(&call) == 0) {
        Py_BEGIN_ALLOW_THREADS count = ob_saturated(n, k, codes, &planes);
        Py_END_ALLOW_THREADS result = PyLong_FromUnsignedLongLong(count);
    }
    ob_release(&call);
    return result;
}

static PyObject *
discard(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"planes", NULL};
    PyObject *dict, *result = NULL;
    ob_call call = {.function = "discard"};
    ob_planes planes;
    size_t n = SIZE_MAX, k = SIZE_MAX;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &dict)) {
        return NULL;
    }
    if (ob_take_planes(&call, dict, &n, &k, &planes) == 0 && ob_check_overlap(&call) == 0) {
        ob_discard(n, k, &planes);
        result = Py_NewRef(Py_None);
    }
    ob_release(&call);
    return result;
}

static PyObject *
scale_step(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"scale", "grad", "exp_avg", "exp_avg_sq", "control", "lr", NULL};
    static const char *const names[] = {"scale", "grad", "exp_avg", "exp_avg_sq"};
    PyObject *objects[4], *control, *rate, *result = NULL;
    ob_call call = {.function = "scale_step"};
    ob_view *views[4];
    double lr = 0.0, *state;
    npy_intp length = OB_FREE;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOOOO", keys, &objects[0], &objects[1],
                                     &objects[2], &objects[3], &control, &rate) ||
        ob_take_double(&call, rate, "lr", 0.0, 1e6, &lr) < 0) {
        return NULL;
    }
    for (int i = 0; i < 4; i++) {
        ob_spec spec = {OB_KIND_F32, i == 1 ? 0 : OB_WRITE, 1, {length}, "N"};
        if ((views[i] = ob_take_array(&call, objects[i], names[i], spec)) == NULL) {
            goto done;
        }
        length = PyArray_DIM(views[0]->array, 0);
    }
    if ((state = ob_take_control(&call, control, "control", OB_WRITE)) == NULL ||
        ob_check_overlap(&call) < 0) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = ob_scale_step((size_t)length, views[0]->data, views[1]->data,
                                                  views[2]->data, views[3]->data, lr, state);
    Py_END_ALLOW_THREADS if (ob_fail_status(&call, status) == 0)
    {
        result = Py_NewRef(Py_None);
    }
done:
    ob_release(&call);
    return result;
}

/* ------------------------------------------------------------------ new state */
typedef struct control_arguments {
    PyObject *seed, *layer, *eta, *cap, *clip, *betas, *scale_init; /* NULL: not given */
} control_arguments;

static const ob_control_init DEFAULTS = {.eta = 0.03, .cap = 0.025, .clip = 3.0, .scale_init = 1.0};

/* init: the defaults, and the rule if it is known */
static int
take_control_init(const ob_call *call, const control_arguments *given, ob_control_init *init)
{
    const size_t exact = ((size_t)1 << 53) - 1;
    size_t seed = 0, layer = 0;
    double betas[2] = {ob_rule_beta1((ob_rule)init->rule), 0.95};
    if ((given->seed && ob_take_size(call, given->seed, "seed", 0, exact, &seed) < 0) ||
        (given->layer && ob_take_size(call, given->layer, "layer", 0, exact, &layer) < 0) ||
        (given->eta && ob_take_double(call, given->eta, "eta", 0, 1e6, &init->eta) < 0) ||
        (given->cap && ob_take_double(call, given->cap, "cap", 0, 1, &init->cap) < 0) ||
        (given->clip && ob_take_double(call, given->clip, "clip", 1e-6, 1e6, &init->clip) < 0) ||
        (given->betas && given->betas != Py_None &&
         ob_take_betas(call, given->betas, "betas", betas) < 0) ||
        (given->scale_init &&
         ob_take_double(call, given->scale_init, "scale_init", 0, 1e18, &init->scale_init) < 0)) {
        return -1;
    }
    init->seed = (double)seed;
    init->layer = (double)layer;
    init->beta1 = betas[0];
    init->beta2 = betas[1];
    return 0;
}

static PyObject *
new_control(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"seed", "layer", "eta", "cap", "clip", "betas", "scale_init", NULL};
    control_arguments given = {0};
    ob_control_init init = DEFAULTS;
    ob_call call = {.function = "new_control"};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "|$OOOOOOO", keys, &given.seed, &given.layer,
                                     &given.eta, &given.cap, &given.clip, &given.betas,
                                     &given.scale_init) ||
        take_control_init(&call, &given, &init) < 0) {
        return NULL;
    }
    return (PyObject *)ob_new_control(&init);
}

/* What planes are for: (N, K), a rule, a stripe */
typedef struct planes_arguments {
    PyObject *rows, *columns, *rule, *stripes, *stripe, *vote_plane;
} planes_arguments;

static int
take_planes_init(const ob_call *call, const planes_arguments *given, size_t *n, size_t *k,
                 ob_control_init *init, int *votes)
{
    size_t rule = OB_RULE_residual8, stripes = 1, stripe = 0;
    if (ob_take_size(call, given->rows, "out_features", 0, OB_MAX_K, n) < 0 ||
        ob_take_size(call, given->columns, "in_features", 0, OB_MAX_K, k) < 0 ||
        (given->rule &&
         ob_take_name(call, given->rule, "rule", OB_RULE_COUNT, ob_rule_text, &rule) < 0) ||
        (given->stripes &&
         ob_take_size(call, given->stripes, "stripes", 1, OB_MAX_K, &stripes) < 0) ||
        (given->stripe &&
         ob_take_size(call, given->stripe, "stripe", 0, stripes - 1, &stripe) < 0) ||
        (given->vote_plane && ob_take_flag(call, given->vote_plane, "vote_plane", votes) < 0)) {
        return -1;
    }
    init->rule = (double)rule;
    init->stripes = (double)stripes;
    init->stripe = (double)stripe;
    return 0;
}

static PyObject *
new_planes(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"out_features", "in_features", "rule",       "packed",     "stripes",
                           "stripe",       "seed",        "layer",      "eta",        "cap",
                           "clip",         "betas",       "scale_init", "vote_plane", NULL};
    control_arguments given = {0};
    planes_arguments shape = {0};
    ob_control_init init = DEFAULTS;
    PyObject *packed = Py_None, *planes = NULL;
    const uint8_t *codes = NULL;
    size_t n = 0, k = 0;
    int votes = 0;
    ob_call call = {.function = "new_planes"};
    if (!PyArg_ParseTupleAndKeywords(
            args, kw, "OO|O$OOOOOOOOOOO", keys, &shape.rows, &shape.columns, &shape.rule, &packed,
            &shape.stripes, &shape.stripe, &given.seed, &given.layer, &given.eta, &given.cap,
            &given.clip, &given.betas, &given.scale_init, &shape.vote_plane) ||
        take_planes_init(&call, &shape, &n, &k, &init, &votes) < 0 ||
        take_control_init(&call, &given, &init) < 0) {
        return NULL;
    }
    if (packed == Py_None && init.rule == OB_RULE_byte) {
        ob_fail(&call, PyExc_ValueError, "'packed' must be given: rule byte holds the codes too");
    }
    else if (packed == Py_None || (codes = ob_take_packed(&call, packed, n, k, 0)) != NULL) {
        planes = ob_new_planes(n, k, ob_new_control(&init), votes, codes);
    }
    ob_release(&call);
    return planes;
}

static PyObject *
rule_spec(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"rule", NULL};
    PyObject *name;
    size_t index;
    ob_call call = {.function = "rule_spec"};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &name) ||
        ob_take_name(&call, name, "rule", OB_RULE_COUNT, ob_rule_text, &index) < 0) {
        return NULL;
    }
    ob_rule rule = (ob_rule)index;
    return Py_BuildValue("{s:i,s:i,s:i,s:d,s:(dd)}", "residual_bits", ob_rule_residual_bits(rule),
                         "momentum_bits", ob_rule_momentum_bits(rule), "units", ob_rule_units(rule),
                         "dead_zone", (double)ob_rule_dead_zone(rule), "betas", ob_rule_beta1(rule),
                         0.95);
}

static PyObject *
plane_specs(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"out_features", "in_features", "rule", "stripes",
                           "stripe",       "vote_plane",  NULL};
    planes_arguments shape = {0};
    ob_control_init init = {.seed = 0};
    size_t n = 0, k = 0;
    int votes = 0;
    ob_call call = {.function = "plane_specs"};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|O$OOO", keys, &shape.rows, &shape.columns,
                                     &shape.rule, &shape.stripes, &shape.stripe,
                                     &shape.vote_plane) ||
        take_planes_init(&call, &shape, &n, &k, &init, &votes) < 0) {
        return NULL;
    }
    PyArrayObject *control = ob_new_control(&init);
    PyObject *specs = control != NULL ? ob_plane_specs(n, k, PyArray_DATA(control), votes) : NULL;
    Py_XDECREF(control);
    return specs;
}

/* ------------------------------------------------------------------ method table */
PyDoc_STRVAR(flip_doc,
             "flip($module, /, packed, planes)\n--\n\n"
             "One optimizer step of a layer's codes, in place; returns how many codes moved.\n\n"
             "packed uint8 tile16 of (N, K), planes as made by new_planes for (N, K).  A layer "
             "without a vote\n"
             "since its last step stays as it is.  Raises as linear_forward.");

PyDoc_STRVAR(discard_doc,
             "discard($module, /, planes)\n--\n\n"
             "Forget the sums of this step without moving a code; votes stay in the residual, but "
             "not in a vote\n"
             "plane.");

PyDoc_STRVAR(scale_step_doc,
             "scale_step($module, /, scale, grad, exp_avg, exp_avg_sq, control, lr)\n--\n\n"
             "Adam on a scale, in place: all float32 of one length, control float64.\n\n"
             "lr is relative to control['scale_init'].  The scale stays >= 1e-8 and equal to the "
             "inverse of its\n"
             "float32 inverse.  Raises as linear_forward.");

PyDoc_STRVAR(
    new_planes_doc,
    "new_planes($module, /, out_features, in_features, rule='residual8', *, packed=None, "
    "stripes=1,\n"
    "           stripe=0, seed=0, layer=0, eta=0.03, cap=0.025, clip=3.0, betas=None,\n"
    "           scale_init=1.0, vote_plane=False)\n--\n\n"
    "A dict of the training planes of one layer, 64-byte aligned, as the rule starts them.\n\n"
    "residual: int8 (N, K) for 8 bits and byte, int16 (N, K), uint8 (N, ceil(K/64), 32) for 4 bits "
    "and\n"
    "(N, ceil(K/64), 16) for 2, none for stochastic; with a momentum, momentum uint8 (N, "
    "ceil(K/64), 32)\n"
    "or int8 (N, ceil(K/64), 64) and momentum_scale uint16 (N, ceil(K/64)); row_factor, row_sum, "
    "sketch\n"
    "float32 (N,); col_factor, col_sum float32 (K,); control float64, which names rule and "
    "stripe.\n"
    "stripes > 1: only the rows n % stripes == stripe are in training, and N is their number "
    "here.\n"
    "packed: the layer's codes, needed by rule byte, whose residual holds them too.  Below 8 bits "
    "a\n"
    "residual starts uniform within .3 cell, otherwise at zero.  eta: cells per step.  cap: "
    "largest\n"
    "share of codes moved per step, 0 for none.  Layers of one run want different `layer` ids.\n"
    "vote_plane: also votes int16 (N, K), zero between steps, which holds a step's votes until "
    "flip().");

PyDoc_STRVAR(plane_specs_doc,
             "plane_specs($module, /, out_features, in_features, rule='residual8', *, stripes=1, "
             "stripe=0,\n"
             "            vote_plane=False)\n--\n\n"
             "What new_planes makes, without making it: name -> (shape, dtype).");

PyDoc_STRVAR(rule_spec_doc,
             "rule_spec($module, /, rule)\n--\n\n"
             "What a flip rule is, as a dict: residual_bits, momentum_bits, units (of the residual "
             "in a cell),\n"
             "dead_zone (of votes, in units of u), betas (decays by default: of the momentum and "
             "the scale's\n"
             "first moment, of the factors and the second moment).");

PyDoc_STRVAR(saturated_doc,
             "saturated($module, /, packed, planes)\n--\n\n"
             "How many weights have a residual at its bound (16 and 8 bits: at or beyond half a "
             "cell), where it\n"
             "waits for votes of the other sign.");

PyDoc_STRVAR(new_control_doc,
             "new_control($module, /, *, seed=0, layer=0, eta=0.03, cap=0.025, clip=3.0, "
             "betas=None,\n"
             "            scale_init=1.0)\n--\n\n"
             "The control array of a layer, float64 (len(CONTROL),); CONTROL names its entries.");

PyMethodDef ob_flip_methods[] = {
    OB_METHOD("flip", flip, flip_doc),
    OB_METHOD("discard", discard, discard_doc),
    OB_METHOD("scale_step", scale_step, scale_step_doc),
    OB_METHOD("new_planes", new_planes, new_planes_doc),
    OB_METHOD("plane_specs", plane_specs, plane_specs_doc),
    OB_METHOD("rule_spec", rule_spec, rule_spec_doc),
    OB_METHOD("saturated", saturated, saturated_doc),
    OB_METHOD("new_control", new_control, new_control_doc),
    {NULL, NULL, 0, NULL},
};
