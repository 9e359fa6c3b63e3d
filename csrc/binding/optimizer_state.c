/* optimizer_state.c - FlipOptimizer: statistics, saving and restoring. */
#include "optimizer.h"

#include <string.h>

#define STATE_VERSION 1
#define VOTES "votes"

static const char *const moment_names[OB_MOMENTS] = {
    "scale_exp_avg", "scale_exp_avg_sq", "bias_exp_avg", "bias_exp_avg_sq", "bias_powers"};

/* Borrowed; NULL if there is none, or with an exception */
static PyObject *
item_of(PyObject *dict, const char *name)
{
    PyObject *key = PyUnicode_FromString(name);
    PyObject *value = key != NULL ? PyDict_GetItemWithError(dict, key) : NULL;
    Py_XDECREF(key);
    return value;
}

size_t
ob_slot_arrays(const ob_slot *slot, const char *names[OB_SLOT_ARRAYS],
               PyArrayObject *arrays[OB_SLOT_ARRAYS])
{
    size_t count = 0;
    PyObject *key = NULL, *array = NULL;
    Py_ssize_t position = 0;
    while (PyDict_Next(slot->planes, &position, &key, &array)) {
        if (PyUnicode_CompareWithASCIIString(key, VOTES) != 0) {
            names[count] = PyUnicode_AsUTF8(key);
            arrays[count++] = (PyArrayObject *)array;
        }
    }
    for (int i = 0; i < OB_MOMENTS; i++) {
        if (slot->moments[i] != NULL) {
            names[count] = moment_names[i];
            arrays[count++] = slot->moments[i];
        }
    }
    return count;
}

/* ------------------------------------------------------------------ statistics */
/* Bit pairs equal to 1, which is code zero.  The padding counts too. */
static size_t
count_zero_codes(const uint8_t *packed, size_t bytes)
{
    size_t count = 0;
    for (size_t i = 0; i < bytes; i++) {
        count += (size_t)__builtin_popcount(packed[i] & ~(packed[i] >> 1) & 0x55u);
    }
    return count;
}

static PyObject *
slot_stats(const ob_slot *slot)
{
    const ob_layer *layer = slot->layer;
    const double *control = layer->view.control;
    const size_t codes = layer->n * layer->k, bytes = (size_t)PyArray_NBYTES(layer->packed);
    const ob_planes *view = &layer->view;
    const size_t trained = ob_active_rows(layer->n, view->stripes, view->stripe) * layer->k;
    const double total = codes > 0 ? (double)codes : 1.0;
    size_t zeros;
    uint64_t saturated;
    Py_BEGIN_ALLOW_THREADS zeros =
        count_zero_codes(PyArray_DATA(layer->packed), bytes) - (4 * bytes - codes);
    saturated = ob_saturated(layer->n, layer->k, PyArray_DATA(layer->packed), view);
    Py_END_ALLOW_THREADS return Py_BuildValue(
        "{s:O, s:d, s:d, s:d, s:d}", "name", layer->name, "flip_rate",
        control[OB_CTL_MOVED] / total, "guard", control[OB_CTL_GUARD], "zero_fraction",
        (double)zeros / total, "saturated",
        (double)saturated / (trained > 0 ? (double)trained : 1.0));
}

PyObject *
ob_optimizer_stats(PyObject *object, PyObject *Py_UNUSED(none))
{
    ob_optimizer *self = (ob_optimizer *)object;
    ob_call call = {.function = "FlipOptimizer.stats"};
    PyObject *list = PyList_New(0);
    if (list == NULL || ob_optimizer_lock(&call, self) < 0) {
        Py_XDECREF(list);
        return NULL;
    }
    for (size_t i = 0; list != NULL && i < self->count; i++) {
        PyObject *entry = slot_stats(&self->slots[i]);
        if (entry == NULL || PyList_Append(list, entry) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    ob_optimizer_unlock(self);
    return list;
}

/* ------------------------------------------------------------------ saving */
static PyObject *
slot_state(const ob_slot *slot)
{
    const char *names[OB_SLOT_ARRAYS];
    PyArrayObject *arrays[OB_SLOT_ARRAYS];
    const size_t count = ob_slot_arrays(slot, names, arrays);
    const ob_planes *view = &slot->layer->view;
    PyObject *state = PyDict_New();
    for (size_t i = 0; state != NULL && i < count; i++) {
        PyObject *copy = PyArray_NewCopy(arrays[i], NPY_CORDER);
        if (copy == NULL || PyDict_SetItemString(state, names[i], copy) < 0) {
            Py_CLEAR(state);
        }
        Py_XDECREF(copy);
    }
    if (state != NULL && view->votes != NULL && view->control[OB_CTL_MICRO] > 0) {
        PyObject *votes = item_of(slot->planes, VOTES);
        PyObject *copy = votes != NULL ? PyArray_NewCopy((PyArrayObject *)votes, NPY_CORDER) : NULL;
        if (copy == NULL || PyDict_SetItemString(state, VOTES, copy) < 0) {
            Py_CLEAR(state);
        }
        Py_XDECREF(copy);
    }
    return state;
}

PyObject *
ob_optimizer_state_dict(PyObject *object, PyObject *Py_UNUSED(none))
{
    ob_optimizer *self = (ob_optimizer *)object;
    ob_call call = {.function = "FlipOptimizer.state_dict"};
    if (ob_optimizer_lock(&call, self) < 0) {
        return NULL;
    }
    PyObject *layers = PyList_New(0), *state = NULL;
    for (size_t i = 0; layers != NULL && i < self->count; i++) {
        PyObject *entry = slot_state(&self->slots[i]);
        if (entry == NULL || PyList_Append(layers, entry) < 0) {
            Py_CLEAR(layers);
        }
        Py_XDECREF(entry);
    }
    ob_optimizer_unlock(self);
    if (layers != NULL) {
        state =
            Py_BuildValue("{s:i, s:s, s:d, s:d, s:d, s:d, s:O}", "version", STATE_VERSION, "rule",
                          ob_rule_name(self->rule), "lr", self->lr, "scale_lr", self->scale_lr,
                          "bias_lr", self->bias_lr, "flip_rate", self->flip_rate, "layers", layers);
        Py_DECREF(layers);
    }
    return state;
}

/* ------------------------------------------------------------------ restoring */
static PyObject *
field(const ob_call *call, PyObject *state, const char *name)
{
    PyObject *value = item_of(state, name);
    if (value == NULL && !PyErr_Occurred()) {
        ob_fail(call, PyExc_ValueError, "'state' lacks the key '%s'", name);
    }
    return value;
}

static int
field_rate(const ob_call *call, PyObject *state, const char *name, double high, double *out)
{
    PyObject *value = field(call, state, name);
    return value != NULL ? ob_take_double(call, value, name, 0, high, out) : -1;
}

/* Planes for the stripe that the state was in, if that is not the slot's; -1 with an exception */
static int
take_stripe(const ob_slot *slot, PyObject *state, ob_call *call, ob_spare *spare)
{
    PyObject *item = field(call, state, "control");
    const double *control = item != NULL ? ob_take_control(call, item, "control", 0) : NULL;
    const ob_planes *view = &slot->layer->view;
    if (control == NULL) {
        return -1;
    }
    if (control[OB_CTL_RULE] != (double)view->rule ||
        control[OB_CTL_STRIPES] != (double)view->stripes) {
        return ob_fail(call, PyExc_ValueError,
                       "'control' must hold rule %d and stripes %zu as this optimizer, got %d "
                       "and %zu",
                       (int)view->rule, view->stripes, (int)control[OB_CTL_RULE],
                       (size_t)control[OB_CTL_STRIPES]);
    }
    return control[OB_CTL_STRIPE] == (double)view->stripe ? 0 : ob_spare_make(spare, slot, control);
}

/* Votes held between micro-batches: 1 if the state has them, 0 if it needs none, -1 with an exception */
static int
take_votes(const ob_slot *slot, PyObject *state, ob_call *call, double micro,
           PyArrayObject **source)
{
    PyObject *mine = item_of(slot->planes, VOTES), *item = item_of(state, VOTES);
    if (PyErr_Occurred()) {
        return -1;
    }
    if ((mine == NULL && item != NULL) || (mine != NULL && item == NULL && micro > 0)) {
        return ob_fail(call, PyExc_ValueError,
                       "'state' was saved between micro-batches of an optimizer %s a vote plane, "
                       "and this one has %s",
                       mine == NULL ? "with" : "without", mine == NULL ? "none" : "one");
    }
    if (item == NULL) {
        return 0;
    }
    if (ob_take_array(call, item, VOTES, ob_spec_like((PyArrayObject *)mine)) == NULL) {
        return -1;
    }
    *source = (PyArrayObject *)Py_NewRef(item);
    return 1;
}

/* The source of every array of a slot, strong references in `sources`, that of the votes last. */
static int
take_slot(const ob_slot *slot, PyObject *state, ob_call *call, PyArrayObject **sources)
{
    const char *names[OB_SLOT_ARRAYS];
    PyArrayObject *arrays[OB_SLOT_ARRAYS];
    const size_t count = ob_slot_arrays(slot, names, arrays);
    double micro = 0.0;
    for (size_t i = 0; i < count; i++) {
        PyObject *item = field(call, state, names[i]);
        if (item != NULL && strcmp(names[i], "control") == 0) {
            const double *control = ob_take_control(call, item, names[i], 0);
            if (control == NULL) {
                return -1;
            }
            micro = control[OB_CTL_MICRO];
        }
        else if (item == NULL ||
                 ob_take_array(call, item, names[i], ob_spec_like(arrays[i])) == NULL) {
            return -1;
        }
        sources[i] = (PyArrayObject *)Py_NewRef(item);
    }
    int votes = take_votes(slot, state, call, micro, &sources[OB_SLOT_ARRAYS - 1]);
    if (votes >= 0 && (size_t)PyDict_GET_SIZE(state) != count + (size_t)votes) {
        return ob_fail(call, PyExc_ValueError, "'state' must hold %zu arrays per layer, got %zd",
                       count, PyDict_GET_SIZE(state));
    }
    return votes < 0 ? -1 : 0;
}

/* Every layer's sources, and planes where another stripe was in training than now. */
static int
take_slots(ob_optimizer *self, const ob_call *outer, PyObject *state, ob_spare *spares,
           PyArrayObject **sources)
{
    PyObject *layers = field(outer, state, "layers");
    if (layers == NULL) {
        return -1;
    }
    if (!PyList_Check(layers) || (size_t)PyList_GET_SIZE(layers) != self->count) {
        return ob_fail(outer, PyExc_ValueError, "'state' must hold a list of %zu layers",
                       self->count);
    }
    for (size_t i = 0; i < self->count; i++) {
        ob_call call = {.function = outer->function};
        PyObject *entry = PyList_GET_ITEM(layers, (Py_ssize_t)i);
        if (!PyDict_Check(entry)) {
            return ob_fail(&call, PyExc_TypeError, "'state' must hold a dict per layer, got %.80s",
                           Py_TYPE(entry)->tp_name);
        }
        int status = take_stripe(&self->slots[i], entry, &call, &spares[i]);
        ob_slot slot = self->slots[i]; /* as it will be */
        slot.planes = spares[i].planes != NULL ? spares[i].planes : slot.planes;
        if (status == 0) {
            status = take_slot(&slot, entry, &call, &sources[i * OB_SLOT_ARRAYS]);
        }
        ob_release(&call);
        if (status < 0) {
            return -1;
        }
    }
    return 0;
}

/* Everything but the arrays; `taken` receives the rates. */
static int
take_header(const ob_optimizer *self, const ob_call *call, PyObject *state, ob_optimizer *taken)
{
    size_t version = 0, rule = 0;
    PyObject *value = field(call, state, "version");
    if (value == NULL ||
        ob_take_size(call, value, "version", STATE_VERSION, STATE_VERSION, &version) < 0 ||
        (value = field(call, state, "rule")) == NULL ||
        ob_take_name(call, value, "rule", OB_RULE_COUNT, ob_rule_text, &rule) < 0 ||
        field_rate(call, state, "lr", 1e6, &taken->lr) < 0 ||
        field_rate(call, state, "scale_lr", 1e6, &taken->scale_lr) < 0 ||
        field_rate(call, state, "bias_lr", 1e6, &taken->bias_lr) < 0 ||
        field_rate(call, state, "flip_rate", 1, &taken->flip_rate) < 0) {
        return -1;
    }
    if (rule != (size_t)self->rule) {
        return ob_fail(call, PyExc_ValueError, "'rule' must be '%s', got '%s'",
                       ob_rule_text((size_t)self->rule), ob_rule_text(rule));
    }
    return 0;
}

static void
copy_votes(const ob_layer *layer, const PyArrayObject *source)
{
    const ob_planes *view = &layer->view;
    size_t rows = ob_active_rows(layer->n, view->stripes, view->stripe);
    if (view->votes != NULL && source != NULL) {
        memmove(view->votes, PyArray_DATA(source), (size_t)PyArray_NBYTES(source));
    }
    else if (view->votes != NULL) {
        memset(view->votes, 0, rows * layer->k * sizeof *view->votes);
    }
}

static void
copy_slots(ob_optimizer *self, ob_spare *spares, PyArrayObject *const *sources)
{
    const char *names[OB_SLOT_ARRAYS];
    PyArrayObject *arrays[OB_SLOT_ARRAYS];
    for (size_t i = 0; i < self->count; i++) {
        if (spares[i].planes != NULL) {
            ob_spare_use(&spares[i], &self->slots[i]);
        }
        self->stripe = self->slots[i].layer->view.stripe;
        const size_t count = ob_slot_arrays(&self->slots[i], names, arrays);
        for (size_t j = 0; j < count; j++) {
            memmove(PyArray_DATA(arrays[j]), PyArray_DATA(sources[i * OB_SLOT_ARRAYS + j]),
                    (size_t)PyArray_NBYTES(arrays[j]));
        }
        copy_votes(self->slots[i].layer, sources[i * OB_SLOT_ARRAYS + OB_SLOT_ARRAYS - 1]);
    }
}

PyObject *
ob_optimizer_load(PyObject *object, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"state", NULL};
    ob_optimizer *self = (ob_optimizer *)object, taken;
    PyObject *state, *result = NULL;
    ob_call call = {.function = "FlipOptimizer.load_state_dict"};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &state)) {
        return NULL;
    }
    if (!PyDict_Check(state)) {
        ob_fail(&call, PyExc_TypeError, "'state' must be a dict, got %.80s",
                Py_TYPE(state)->tp_name);
        return NULL;
    }
    if (ob_optimizer_lock(&call, self) < 0) {
        return NULL;
    }
    const size_t room = self->count * OB_SLOT_ARRAYS;
    PyArrayObject **sources = PyMem_Calloc(room + 1, sizeof *sources);
    ob_spare *spares = PyMem_Calloc(self->count + 1, sizeof *spares);
    if (sources == NULL || spares == NULL) {
        PyErr_NoMemory();
    }
    else if (take_header(self, &call, state, &taken) == 0 &&
             take_slots(self, &call, state, spares, sources) == 0) {
        copy_slots(self, spares, sources);
        self->lr = taken.lr;
        self->scale_lr = taken.scale_lr;
        self->bias_lr = taken.bias_lr;
        self->flip_rate = taken.flip_rate;
        result = Py_NewRef(Py_None);
    }
    for (size_t i = 0; sources != NULL && i < room; i++) {
        Py_XDECREF(sources[i]);
    }
    for (size_t i = 0; spares != NULL && i < self->count; i++) {
        Py_XDECREF(spares[i].planes);
    }
    PyMem_Free(sources);
    PyMem_Free(spares);
    ob_optimizer_unlock(self);
    return result;
}
