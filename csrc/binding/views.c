/* views.c - groups of arrays that several functions share: weights and control (planes.c: planes). */
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
/* the packings that kernels read */
static const ob_format_id packings[] = {OB_FORMAT_tile16, OB_FORMAT_trits5};

static const char *
packing_text(size_t index)
{
    return ob_format_name(packings[index]);
}

int
ob_take_packing(const ob_call *call, PyObject *object, ob_format_id *packing)
{
    size_t index = 0;
    if (object != NULL && ob_take_name(call, object, "packing", 2, packing_text, &index) < 0) {
        return -1;
    }
    *packing = packings[index];
    return 0;
}

ob_spec
ob_packed_spec(ob_format_id packing, size_t n, size_t k, unsigned flags)
{
    const size_t step = packing == OB_FORMAT_trits5 ? 20 : 16;
    npy_intp strips = (npy_intp)(n / 64 + (n % 64 != 0));
    npy_intp steps = (npy_intp)(k / step + (k % step != 0));
    return (ob_spec){OB_KIND_U8, flags, 5, {strips, steps, 4, 16, 4}, NULL};
}

uint8_t *
ob_take_packed_as(ob_call *call, PyObject *packed, ob_format_id packing, size_t n, size_t k,
                  unsigned flags)
{
    ob_spec spec = ob_packed_spec(packing, n, k, flags | OB_ALIGN64);
    ob_view *view = ob_take_array(call, packed, "packed", spec);
    return view != NULL ? view->data : NULL;
}

uint8_t *
ob_take_packed(ob_call *call, PyObject *packed, size_t n, size_t k, unsigned flags)
{
    return ob_take_packed_as(call, packed, OB_FORMAT_tile16, n, k, flags);
}

PyArrayObject *
ob_new_packed_as(ob_format_id packing, size_t n, size_t k)
{
    ob_spec spec = ob_packed_spec(packing, n, k, 0);
    return ob_new_typed(NPY_UINT8, 5, spec.dims, 0);
}

PyArrayObject *
ob_new_packed(size_t n, size_t k)
{
    return ob_new_packed_as(OB_FORMAT_tile16, n, k);
}

int
ob_take_weights(ob_call *call, PyObject *packed, ob_format_id packing, PyObject *scale,
                PyObject *bias, size_t n, size_t k, unsigned flags, ob_weights *out)
{
    const npy_intp rows = (npy_intp)n;
    const uint8_t *codes = ob_take_packed_as(call, packed, packing, n, k, flags);
    if (codes == NULL) {
        return -1;
    }
    ob_view *factors =
        ob_take_array(call, scale, "scale", (ob_spec){OB_KIND_F32, OB_OR_ONE, 1, {rows}, NULL});
    if (factors == NULL) {
        return -1;
    }
    *out = (ob_weights){codes, n, k, factors->data, ob_view_dim(factors, 0), NULL, packing};
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
    [OB_CTL_ETA] = {"eta", 0, 1e6, 0}, /* bounds keep eta * clip * units finite in float32 */
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
    [OB_CTL_STRIPES] = {"stripes", 0, OB_MAX_K, 1},
    [OB_CTL_STRIPE] = {"stripe", 0, OB_MAX_K, 1},
    [OB_CTL_VOTE_MOVED] = {"vote_moved", 0, exact, 1},
    [OB_CTL_RULE] = {"rule", 0, OB_RULE_COUNT - 1, 1},
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
    if (values[OB_CTL_STRIPE] > 0 && values[OB_CTL_STRIPE] >= values[OB_CTL_STRIPES]) {
        ob_fail(call, PyExc_ValueError, "'%s' must hold 'stripe' below 'stripes'", name);
        return NULL;
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
        values[OB_CTL_RULE] = init->rule;
        values[OB_CTL_STRIPES] = init->stripes;
        values[OB_CTL_STRIPE] = init->stripe;
    }
    return control;
}
