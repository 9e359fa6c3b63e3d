/* views.c - groups of arrays that several functions share: weights, control, planes. */
#include "binding.h"

#include <math.h>
#include <string.h>

const char *
ob_rule_text(size_t rule)
{
    return ob_rule_name((ob_rule)rule);
}

const char *
ob_format_text(size_t format)
{
    return ob_format_name((ob_format_id)format);
}

/* ------------------------------------------------------------------ weights */
static ob_spec
packed_spec(size_t n, size_t k, unsigned flags)
{
    npy_intp strips = (npy_intp)(n / 64 + (n % 64 != 0));
    npy_intp steps = (npy_intp)(k / 16 + (k % 16 != 0));
    return (ob_spec){OB_KIND_U8, flags | OB_ALIGN64, 5, {strips, steps, 4, 16, 4}, NULL};
}

uint8_t *
ob_take_packed(ob_call *call, PyObject *packed, size_t n, size_t k, unsigned flags)
{
    ob_view *view = ob_take_array(call, packed, "packed", packed_spec(n, k, flags));
    return view != NULL ? view->data : NULL;
}

PyArrayObject *
ob_new_packed(size_t n, size_t k)
{
    ob_spec spec = packed_spec(n, k, 0);
    return ob_new_typed(NPY_UINT8, 5, spec.dims, 0);
}

int
ob_take_weights(ob_call *call, PyObject *packed, PyObject *scale, PyObject *bias, size_t n,
                size_t k, ob_weights *out)
{
    const npy_intp rows = (npy_intp)n;
    const uint8_t *codes = ob_take_packed(call, packed, n, k, 0);
    if (codes == NULL) {
        return -1;
    }
    ob_view *factors =
        ob_take_array(call, scale, "scale", (ob_spec){OB_KIND_F32, OB_OR_ONE, 1, {rows}, NULL});
    if (factors == NULL) {
        return -1;
    }
    *out = (ob_weights){codes, n, k, factors->data, ob_view_dim(factors, 0), NULL};
    if (bias != NULL && bias != Py_None) {
        ob_view *offsets =
            ob_take_array(call, bias, "bias", (ob_spec){OB_KIND_F32, 0, 1, {rows}, NULL});
        if (offsets == NULL) {
            return -1;
        }
        out->bias = offsets->data;
    }
    return 0;
}

/* ------------------------------------------------------------------ control */
static const double exact = 9007199254740991.0; /* 2^53 - 1 */
static const double below_one = 1.0 - 0x1p-53;

static const struct control_field {
    const char *name;
    double low, high;
    int integer;
} control_fields[OB_CONTROL_LEN] = {
    [OB_CTL_SEED] = {"seed", 0, exact, 1},
    [OB_CTL_LAYER] = {"layer", 0, exact, 1},
    [OB_CTL_STEP] = {"step", 0, exact, 1},
    [OB_CTL_MICRO] = {"micro", 0, exact, 1},
    [OB_CTL_NONFINITE] = {"nonfinite", 0, exact, 1},
    [OB_CTL_ETA] = {"eta", 0, 1e6, 0}, /* bounds keep eta * clip * 128 finite in float32 */
    [OB_CTL_ETA_PEAK] = {"eta_peak", 0, 1e6, 0},
    [OB_CTL_GUARD] = {"guard", 1e-3, 1, 0},
    [OB_CTL_CAP] = {"cap", 0, 1, 0},
    [OB_CTL_CLIP] = {"clip", 1e-6, 1e6, 0},
    [OB_CTL_BETA1] = {"beta1", 0, below_one, 0},
    [OB_CTL_BETA2] = {"beta2", 0, below_one, 0},
    [OB_CTL_GRAD_SCALE] = {"grad_scale", 1e-30, 1e30, 0},
    [OB_CTL_SKETCH_ENERGY] = {"sketch_energy", 0, INFINITY, 0},
    [OB_CTL_MOVED] = {"moved", 0, exact, 1},
    [OB_CTL_SCALE_INIT] = {"scale_init", 0, 1e18, 0},
    [OB_CTL_BETA1_POWER] = {"beta1_power", 0, 1, 0},
    [OB_CTL_BETA2_POWER] = {"beta2_power", 0, 1, 0},
    [OB_CTL_RESERVED0] = {"reserved0", 0, 0, 0},
    [OB_CTL_RESERVED1] = {"reserved1", 0, 0, 0},
};

const char *
ob_control_field(size_t index)
{
    return control_fields[index].name;
}

double *
ob_take_control(ob_call *call, PyObject *control, const char *name, unsigned flags)
{
    ob_spec spec = {OB_KIND_F64, flags, 1, {OB_CONTROL_LEN}, NULL};
    ob_view *view = ob_take_array(call, control, name, spec);
    if (view == NULL) {
        return NULL;
    }
    const double *values = view->data;
    for (size_t i = 0; i < OB_CONTROL_LEN; i++) {
        const struct control_field *field = &control_fields[i];
        int inside = values[i] >= field->low && values[i] <= field->high;
        if (!inside || (field->integer && values[i] != floor(values[i]))) {
            char text[96];
            snprintf(text, sizeof text, "%s in [%g, %g], got %g",
                     field->integer ? "an integer" : "", field->low, field->high, values[i]);
            ob_fail(call, PyExc_ValueError, "'%s' must hold '%s' %s", name, field->name, text);
            return NULL;
        }
    }
    return view->data;
}

PyArrayObject *
ob_new_control(const ob_control_init *init)
{
    PyArrayObject *control = ob_new_typed(NPY_DOUBLE, 1, (npy_intp[]){OB_CONTROL_LEN}, 1);
    if (control != NULL) {
        double *values = PyArray_DATA(control);
        values[OB_CTL_SEED] = init->seed;
        values[OB_CTL_LAYER] = init->layer;
        values[OB_CTL_ETA] = values[OB_CTL_ETA_PEAK] = init->eta;
        values[OB_CTL_GUARD] = values[OB_CTL_GRAD_SCALE] = 1.0;
        values[OB_CTL_CAP] = init->cap;
        values[OB_CTL_CLIP] = init->clip;
        values[OB_CTL_BETA1] = init->beta1;
        values[OB_CTL_BETA2] = init->beta2;
        values[OB_CTL_SCALE_INIT] = init->scale_init;
        values[OB_CTL_BETA1_POWER] = values[OB_CTL_BETA2_POWER] = 1.0;
    }
    return control;
}

/* ------------------------------------------------------------------ planes */
enum {
    ROW_FACTOR,
    COL_FACTOR,
    RESIDUAL,
    ROW_SUM,
    COL_SUM,
    SKETCH,
    MOMENTUM,
    MOMENTUM_SCALE,
    CONTROL,
    PLANES
};
static const char *const plane_names[PLANES] = {
    [ROW_FACTOR] = "row_factor", [COL_FACTOR] = "col_factor",
    [RESIDUAL] = "residual",     [ROW_SUM] = "row_sum",
    [COL_SUM] = "col_sum",       [SKETCH] = "sketch",
    [MOMENTUM] = "momentum",     [MOMENTUM_SCALE] = "momentum_scale",
    [CONTROL] = "control",
};

/* Shape and type of one plane of an (n, k) layer; `type` is what ob_new_planes makes. */
static ob_spec
plane_spec(int plane, npy_intp n, npy_intp k, int *type)
{
    const npy_intp blocks = k / 64 + (k % 64 != 0);
    *type = NPY_FLOAT;
    switch (plane) {
    case RESIDUAL:
        *type = NPY_INT8;
        return (ob_spec){OB_KIND_I8, OB_WRITE, 2, {n, k}, NULL};
    case MOMENTUM:
        *type = NPY_UINT8;
        return (ob_spec){OB_KIND_U8, OB_WRITE, 3, {n, blocks, 32}, NULL};
    case MOMENTUM_SCALE:
        *type = NPY_UINT16;
        return (ob_spec){OB_KIND_RAW_BF16, OB_WRITE, 2, {n, blocks}, NULL};
    case ROW_FACTOR:
    case ROW_SUM:
    case SKETCH:
        return (ob_spec){OB_KIND_F32, OB_WRITE, 1, {n}, "N"};
    default:
        return (ob_spec){OB_KIND_F32, OB_WRITE, 1, {k}, "K"};
    }
}

ob_rule
ob_find_rule(int residual_bits, int momentum_bits)
{
    for (int rule = 0; rule < OB_RULE_COUNT; rule++) {
        if (ob_rule_residual_bits((ob_rule)rule) == residual_bits &&
            ob_rule_momentum_bits((ob_rule)rule) == momentum_bits) {
            return (ob_rule)rule;
        }
    }
    return OB_RULE_COUNT;
}

/* Exactly the documented keys; afterwards look-ups run no foreign code. */
static int
check_keys(const ob_call *call, PyObject *planes, int *has_momentum)
{
    PyObject *key = NULL, *value = NULL;
    Py_ssize_t position = 0;
    unsigned seen = 0;
    while (PyDict_Next(planes, &position, &key, &value)) {
        int plane = PLANES;
        for (int i = 0; PyUnicode_CheckExact(key) && i < PLANES; i++) {
            if (PyUnicode_CompareWithASCIIString(key, plane_names[i]) == 0) {
                plane = i;
            }
        }
        if (plane == PLANES) {
            return ob_fail(call, PyExc_ValueError, "'planes' has an unknown key %.60R", key);
        }
        seen |= 1u << plane;
    }
    const unsigned momentum = 1u << MOMENTUM | 1u << MOMENTUM_SCALE;
    *has_momentum = (seen & momentum) != 0;
    for (int i = 0; i < PLANES; i++) {
        int wanted = !(momentum >> i & 1u) || *has_momentum;
        if (wanted && !(seen >> i & 1u)) {
            return ob_fail(call, PyExc_ValueError, "'planes' lacks the key '%s'", plane_names[i]);
        }
    }
    return 0;
}

static ob_planes
planes_of(void *const data[PLANES], ob_rule rule)
{
    return (ob_planes){rule,
                       data[RESIDUAL],
                       data[MOMENTUM],
                       data[MOMENTUM_SCALE],
                       data[ROW_FACTOR],
                       data[COL_FACTOR],
                       data[ROW_SUM],
                       data[COL_SUM],
                       data[SKETCH],
                       data[CONTROL]};
}

int
ob_view_planes(PyObject *planes, ob_rule rule, ob_planes *out)
{
    void *data[PLANES] = {NULL};
    for (int i = 0; i < PLANES; i++) {
        PyObject *key = PyUnicode_FromString(plane_names[i]);
        PyObject *array = key != NULL ? PyDict_GetItemWithError(planes, key) : NULL;
        Py_XDECREF(key);
        data[i] = array != NULL ? PyArray_DATA((PyArrayObject *)array) : NULL;
        if (array == NULL && PyErr_Occurred()) {
            return -1;
        }
    }
    *out = planes_of(data, rule);
    return 0;
}

void
ob_hold_planes(ob_call *call, PyObject *planes)
{
    PyObject *key = NULL, *array = NULL;
    Py_ssize_t position = 0;
    while (PyDict_Next(planes, &position, &key, &array)) {
        ob_hold_array(call, (PyArrayObject *)array, PyUnicode_AsUTF8(key), 1);
    }
}

int
ob_take_planes(ob_call *call, PyObject *planes, size_t *n, size_t *k, ob_planes *out)
{
    int has_momentum = 0;
    if (!PyDict_Check(planes)) {
        return ob_fail(call, PyExc_TypeError, "'planes' must be a dict of arrays, got %.80s",
                       Py_TYPE(planes)->tp_name);
    }
    if (check_keys(call, planes, &has_momentum) < 0) {
        return -1;
    }
    void *data[PLANES] = {NULL};
    npy_intp rows = *n == SIZE_MAX ? OB_FREE : (npy_intp)*n;
    npy_intp columns = *k == SIZE_MAX ? OB_FREE : (npy_intp)*k;
    for (int i = 0; i < PLANES; i++) {
        if (!has_momentum && (i == MOMENTUM || i == MOMENTUM_SCALE)) {
            continue;
        }
        PyObject *item = PyDict_GetItemString(planes, plane_names[i]);
        if (item == NULL) {
            return ob_fail(call, PyExc_MemoryError, "'%s' could not be read", plane_names[i]);
        }
        if (i == CONTROL) {
            data[i] = ob_take_control(call, item, plane_names[i], OB_WRITE);
        }
        else {
            int type = 0;
            ob_view *view =
                ob_take_array(call, item, plane_names[i], plane_spec(i, rows, columns, &type));
            data[i] = view != NULL ? view->data : NULL;
            if (view != NULL && i == ROW_FACTOR) {
                rows = PyArray_DIM(view->array, 0);
            }
            if (view != NULL && i == COL_FACTOR) {
                columns = PyArray_DIM(view->array, 0);
            }
        }
        if (data[i] == NULL) {
            return -1;
        }
    }
    if (rows > OB_MAX_K || columns > OB_MAX_K) {
        return ob_fail(call, PyExc_ValueError, "'planes' must be of at most %u rows and columns",
                       OB_MAX_K);
    }
    *n = (size_t)rows;
    *k = (size_t)columns;
    *out = planes_of(data, ob_find_rule(8, has_momentum ? 4 : 0));
    return 0;
}

PyObject *
ob_new_planes(size_t n, size_t k, ob_rule rule, const ob_control_init *init)
{
    PyObject *planes = PyDict_New();
    for (int i = 0; planes != NULL && i < PLANES; i++) {
        if (ob_rule_momentum_bits(rule) == 0 && (i == MOMENTUM || i == MOMENTUM_SCALE)) {
            continue;
        }
        PyArrayObject *array = NULL;
        if (i == CONTROL) {
            array = ob_new_control(init);
        }
        else {
            int type = 0;
            ob_spec spec = plane_spec(i, (npy_intp)n, (npy_intp)k, &type);
            array = ob_new_typed(type, spec.ndim, spec.dims, 1);
        }
        if (array == NULL || PyDict_SetItemString(planes, plane_names[i], (PyObject *)array) < 0) {
            Py_CLEAR(planes);
        }
        Py_XDECREF(array);
    }
    return planes;
}
