/* planes.c - the training planes of a layer as a dict of arrays; their control says which rule and rows they are of. */
#include "binding.h"

#include <string.h>

enum {
    ROW_FACTOR,
    COL_FACTOR,
    RESIDUAL,
    ROW_SUM,
    COL_SUM,
    SKETCH,
    MOMENTUM,
    MOMENTUM_SCALE,
    VOTES,
    CONTROL,
    PLANES
};
static const char *const plane_names[PLANES] = {
    [ROW_FACTOR] = "row_factor", [COL_FACTOR] = "col_factor",
    [RESIDUAL] = "residual",     [ROW_SUM] = "row_sum",
    [COL_SUM] = "col_sum",       [SKETCH] = "sketch",
    [MOMENTUM] = "momentum",     [MOMENTUM_SCALE] = "momentum_scale",
    [VOTES] = "votes",           [CONTROL] = "control",
};

static ob_rule
rule_of(const double *control)
{
    return (ob_rule)control[OB_CTL_RULE];
}

static size_t
rows_of(size_t n, const double *control)
{
    return ob_active_rows(n, (size_t)control[OB_CTL_STRIPES], (size_t)control[OB_CTL_STRIPE]);
}

/* Whether a rule has the plane; that of the votes is optional for each */
static int
has_plane(ob_rule rule, int plane, int votes)
{
    return plane == VOTES                                 ? votes
           : plane == RESIDUAL                            ? ob_rule_residual_bits(rule) > 0
           : plane == MOMENTUM || plane == MOMENTUM_SCALE ? ob_rule_momentum_bits(rule) > 0
                                                          : 1;
}

/* Shape and type of one plane of `rows` rows and k columns; `type` is what ob_new_planes makes. */
static ob_spec
plane_spec(int plane, ob_rule rule, npy_intp rows, npy_intp k, int *type)
{
    const npy_intp blocks = k / 64 + (k % 64 != 0);
    const int bits = plane == RESIDUAL ? ob_rule_residual_bits(rule) : ob_rule_momentum_bits(rule);
    *type = NPY_FLOAT;
    switch (plane) {
    case RESIDUAL:
        if (bits >= 8) {
            *type = bits == 16 ? NPY_INT16 : NPY_INT8;
            return (ob_spec){bits == 16 ? OB_KIND_I16 : OB_KIND_I8, OB_WRITE, 2, {rows, k}, NULL};
        }
        *type = NPY_UINT8;
        return (ob_spec){OB_KIND_U8, OB_WRITE, 3, {rows, blocks, 8 * bits}, NULL};
    case MOMENTUM:
        *type = bits == 8 ? NPY_INT8 : NPY_UINT8;
        return (ob_spec){
            bits == 8 ? OB_KIND_I8 : OB_KIND_U8, OB_WRITE, 3, {rows, blocks, 8 * bits}, NULL};
    case VOTES:
        *type = NPY_INT16;
        return (ob_spec){OB_KIND_I16, OB_WRITE, 2, {rows, k}, NULL};
    case MOMENTUM_SCALE:
        *type = NPY_UINT16;
        return (ob_spec){OB_KIND_RAW_BF16, OB_WRITE, 2, {rows, blocks}, NULL};
    case ROW_FACTOR:
    case ROW_SUM:
    case SKETCH:
        return (ob_spec){OB_KIND_F32, OB_WRITE, 1, {rows}, "N"};
    case CONTROL:
        *type = NPY_DOUBLE;
        return (ob_spec){OB_KIND_F64, OB_WRITE, 1, {OB_CONTROL_LEN}, NULL};
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

/* Documented keys only, as a set in *seen; afterwards look-ups run no foreign code. */
static int
check_keys(const ob_call *call, PyObject *planes, unsigned *seen)
{
    PyObject *key = NULL, *value = NULL;
    Py_ssize_t position = 0;
    *seen = 0;
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
        *seen |= 1u << plane;
    }
    return 0;
}

/* The planes of the rule that control names, no more and no less */
static int
check_rule(const ob_call *call, ob_rule rule, unsigned seen)
{
    for (int i = 0; i < PLANES; i++) {
        int given = seen >> i & 1u;
        if (given != has_plane(rule, i, seen >> VOTES & 1u)) {
            return ob_fail(call, PyExc_ValueError, "'planes' %s the key '%s' (rule %s)",
                           given ? "must not have" : "lacks", plane_names[i], ob_rule_name(rule));
        }
    }
    return 0;
}

static ob_planes
planes_of(void *const data[PLANES], uint8_t *codes)
{
    const double *control = data[CONTROL];
    const ob_rule rule = rule_of(control);
    return (ob_planes){rule,
                       (size_t)control[OB_CTL_STRIPES],
                       (size_t)control[OB_CTL_STRIPE],
                       ob_rule_moves_in_vote(rule) && data[VOTES] == NULL ? codes : NULL,
                       data[RESIDUAL],
                       data[MOMENTUM],
                       data[MOMENTUM_SCALE],
                       data[ROW_FACTOR],
                       data[COL_FACTOR],
                       data[ROW_SUM],
                       data[COL_SUM],
                       data[SKETCH],
                       data[CONTROL],
                       data[VOTES]};
}

int
ob_view_planes(PyObject *planes, uint8_t *codes, ob_planes *out)
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
    *out = planes_of(data, codes);
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

static PyObject *
plane_item(const ob_call *call, PyObject *planes, int plane)
{
    PyObject *item = PyDict_GetItemString(planes, plane_names[plane]);
    if (item == NULL) { /* check_keys has seen it */
        ob_fail(call, PyExc_MemoryError, "'%s' could not be read", plane_names[plane]);
    }
    return item;
}

int
ob_take_planes(ob_call *call, PyObject *planes, size_t *n, size_t *k, ob_planes *out)
{
    unsigned seen = 0;
    if (!PyDict_Check(planes)) {
        return ob_fail(call, PyExc_TypeError, "'planes' must be a dict of arrays, got %.80s",
                       Py_TYPE(planes)->tp_name);
    }
    PyObject *item;
    void *data[PLANES] = {NULL};
    if (check_keys(call, planes, &seen) < 0) {
        return -1;
    }
    if (!(seen >> CONTROL & 1u)) {
        return ob_fail(call, PyExc_ValueError, "'planes' lacks the key 'control'");
    }
    if ((item = plane_item(call, planes, CONTROL)) == NULL ||
        (data[CONTROL] = ob_take_control(call, item, plane_names[CONTROL], OB_WRITE)) == NULL ||
        check_rule(call, rule_of(data[CONTROL]), seen) < 0) {
        return -1;
    }
    const double *control = data[CONTROL];
    npy_intp rows = *n == SIZE_MAX ? OB_FREE : (npy_intp)rows_of(*n, control);
    npy_intp columns = *k == SIZE_MAX ? OB_FREE : (npy_intp)*k;
    for (int i = 0; i < CONTROL; i++) {
        int type = 0;
        if (!(seen >> i & 1u)) {
            continue;
        }
        ob_spec spec = plane_spec(i, rule_of(control), rows, columns, &type);
        if ((item = plane_item(call, planes, i)) == NULL) {
            return -1;
        }
        ob_view *view = ob_take_array(call, item, plane_names[i], spec);
        if (view == NULL) {
            return -1;
        }
        data[i] = view->data;
        rows = i == ROW_FACTOR ? PyArray_DIM(view->array, 0) : rows;
        columns = i == COL_FACTOR ? PyArray_DIM(view->array, 0) : columns;
    }
    if (rows > OB_MAX_K || columns > OB_MAX_K) {
        return ob_fail(call, PyExc_ValueError, "'planes' must be of at most %u rows and columns",
                       OB_MAX_K);
    }
    if (*n == SIZE_MAX) { /* the fewest outputs that have so many rows in training */
        const size_t stripes = control[OB_CTL_STRIPES] > 1 ? (size_t)control[OB_CTL_STRIPES] : 1;
        *n = rows > 0 ? (size_t)control[OB_CTL_STRIPE] + stripes * (size_t)(rows - 1) + 1 : 0;
    }
    *k = (size_t)columns;
    *out = planes_of(data, NULL);
    return 0;
}

uint8_t *
ob_take_packed_of(ob_call *call, PyObject *packed, size_t *n, size_t k, const ob_planes *planes,
                  unsigned flags)
{
    size_t most = *n; /* the rows in training bound N from both sides, and so does the array */
    if (planes->stripes > 1) {
        most = *n > 0 ? *n + planes->stripes - 1 : planes->stripe;
    }
    if (PyArray_Check(packed) && PyArray_NDIM((PyArrayObject *)packed) == 5) {
        const size_t held = 64 * (size_t)PyArray_DIM((PyArrayObject *)packed, 0);
        *n = held < *n ? *n : held > most ? most : held;
    }
    return ob_take_packed(call, packed, *n, k, flags);
}

PyObject *
ob_new_planes(size_t n, size_t k, PyArrayObject *control, int votes, const uint8_t *packed)
{
    PyObject *planes = control != NULL ? PyDict_New() : NULL;
    for (int i = 0; planes != NULL && i < PLANES; i++) {
        const double *values = PyArray_DATA(control);
        const npy_intp rows = (npy_intp)rows_of(n, values);
        int type = 0;
        if (!has_plane(rule_of(values), i, votes)) {
            continue;
        }
        ob_spec spec = plane_spec(i, rule_of(values), rows, (npy_intp)k, &type);
        PyArrayObject *array = i == CONTROL ? (PyArrayObject *)Py_NewRef(control)
                                            : ob_new_typed(type, spec.ndim, spec.dims, 1);
        if (array == NULL || PyDict_SetItemString(planes, plane_names[i], (PyObject *)array) < 0) {
            Py_CLEAR(planes);
        }
        Py_XDECREF(array);
    }
    Py_XDECREF(control);
    ob_planes view;
    if (planes != NULL && ob_view_planes(planes, NULL, &view) < 0) {
        Py_CLEAR(planes);
    }
    if (planes != NULL) {
        Py_BEGIN_ALLOW_THREADS ob_start_residual(n, k, packed, &view);
        Py_END_ALLOW_THREADS
    }
    return planes;
}

PyObject *
ob_plane_specs(size_t n, size_t k, const double *control, int votes)
{
    PyObject *specs = PyDict_New();
    for (int i = 0; specs != NULL && i < PLANES; i++) {
        int type = 0;
        if (!has_plane(rule_of(control), i, votes)) {
            continue;
        }
        ob_spec spec =
            plane_spec(i, rule_of(control), (npy_intp)rows_of(n, control), (npy_intp)k, &type);
        PyArray_Descr *dtype = PyArray_DescrFromType(type);
        PyObject *shape = PyArray_IntTupleFromIntp(spec.ndim, spec.dims);
        PyObject *entry =
            dtype != NULL && shape != NULL ? PyTuple_Pack(2, shape, (PyObject *)dtype) : NULL;
        if (entry == NULL || PyDict_SetItemString(specs, plane_names[i], entry) < 0) {
            Py_CLEAR(specs);
        }
        Py_XDECREF(entry);
        Py_XDECREF(shape);
        Py_XDECREF((PyObject *)dtype);
    }
    return specs;
}
