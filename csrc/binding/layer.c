/* layer.c - TernaryLinear: making one, locking it, attaching planes. */
#include "layer.h"

#include <math.h>

#include "layer_new.h"

/* ------------------------------------------------------------------ locks and planes */
int
ob_layer_lock(const ob_call *call, ob_layer *layer, int exclusive)
{
    if (layer->writing || (exclusive && layer->reading > 0)) {
        return ob_fail(call, PyExc_RuntimeError, "the layer is busy in another thread");
    }
    if (exclusive) {
        layer->writing = 1;
    }
    else {
        layer->reading++;
    }
    return 0;
}

void
ob_layer_unlock(ob_layer *layer, int exclusive)
{
    if (exclusive) {
        layer->writing = 0;
    }
    else {
        layer->reading--;
    }
}

void
ob_layer_attach(ob_layer *layer, PyObject *owner, PyObject *planes, const ob_planes *view)
{
    layer->owner = owner;
    layer->planes = Py_NewRef(planes);
    layer->view = *view;
}

void
ob_layer_detach(ob_layer *layer)
{
    layer->owner = NULL;
    Py_CLEAR(layer->planes);
}

PyObject *
ob_layer_label(const ob_layer *layer)
{
    if (layer->name != NULL && layer->name != Py_None) {
        return PyUnicode_FromFormat("%R", layer->name);
    }
    return PyUnicode_FromFormat("(%zu, %zu)", layer->n, layer->k);
}

size_t
ob_layer_scale_len(const ob_layer *layer)
{
    return (size_t)PyArray_DIM(layer->scale, 0);
}

PyObject *
ob_aliased_dict(PyObject *arrays)
{
    PyObject *result = PyDict_New(), *key = NULL, *array = NULL;
    Py_ssize_t position = 0;
    while (result != NULL && PyDict_Next(arrays, &position, &key, &array)) {
        PyObject *alias = ob_alias((PyArrayObject *)array);
        if (alias == NULL || PyDict_SetItem(result, key, alias) < 0) {
            Py_CLEAR(result);
        }
        Py_XDECREF(alias);
    }
    return result;
}

/* ------------------------------------------------------------------ construction */
/* Takes the parts' references, also on failure; bias NULL: none; packed or scale NULL: an exception is passed on. */
static PyObject *
layer_from(PyTypeObject *type, size_t n, size_t k, ob_format_id packing, PyArrayObject *packed,
           PyArrayObject *scale, PyArrayObject *bias, double seed)
{
    ob_layer *layer = packed != NULL && scale != NULL ? (ob_layer *)type->tp_alloc(type, 0) : NULL;
    if (layer == NULL) {
        Py_XDECREF(packed);
        Py_XDECREF(scale);
        Py_XDECREF(bias);
        return NULL;
    }
    const ob_control_init init = {
        .seed = seed, .clip = 3, .beta1 = 0.9, .beta2 = 0.95, .scale_init = 1};
    layer->n = n;
    layer->k = k;
    layer->name = Py_NewRef(Py_None);
    layer->packing = packing;
    layer->packed = packed;
    layer->scale = scale;
    layer->bias = bias;
    layer->scale_grad = ob_new_typed(NPY_FLOAT, 1, PyArray_DIMS(scale), 1);
    layer->bias_grad = bias != NULL ? ob_new_typed(NPY_FLOAT, 1, PyArray_DIMS(bias), 1) : NULL;
    layer->control = ob_new_control(&init);
    if (layer->scale_grad == NULL || layer->control == NULL ||
        (bias != NULL && layer->bias_grad == NULL)) {
        Py_CLEAR(layer);
    }
    return (PyObject *)layer;
}

static PyArrayObject *
filled(size_t length, float value)
{
    PyArrayObject *array = ob_new_typed(NPY_FLOAT, 1, (npy_intp[]){(npy_intp)length}, 0);
    for (size_t i = 0; array != NULL && i < length; i++) {
        ((float *)PyArray_DATA(array))[i] = value;
    }
    return array;
}

static const char *
scale_kind(size_t index)
{
    return index == 0 ? "tensor" : "row";
}

/* A plane in another packing, for the reference to the one given; NULL passes an exception on. */
static PyArrayObject *
repacked(const ob_call *call, PyArrayObject *plane, ob_format_id from, ob_format_id to, size_t n,
         size_t k)
{
    if (plane == NULL || from == to) {
        return plane;
    }
    PyArrayObject *other = ob_new_packed_as(to, n, k);
    if (other != NULL) {
        ob_status status;
        Py_BEGIN_ALLOW_THREADS status =
            ob_convert(from, to, n, k, PyArray_DATA(plane), PyArray_DATA(other));
        Py_END_ALLOW_THREADS if (ob_fail_status(call, status) < 0)
        {
            Py_CLEAR(other);
        }
    }
    Py_DECREF(plane);
    return other;
}

PyObject *
ob_layer_new(PyTypeObject *type, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"in_features", "out_features", "scale", "bias", "seed", "packing", NULL};
    PyObject *columns, *rows, *scale_name = NULL, *bias_flag = NULL, *number = NULL;
    PyObject *packing_name = NULL;
    ob_format_id packing;
    ob_call call = {.function = "TernaryLinear"};
    size_t n = 0, k = 0, per_row = 0, seed = 0;
    int has_bias = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|OOOO", keys, &columns, &rows, &scale_name,
                                     &bias_flag, &number, &packing_name) ||
        ob_take_packing(&call, packing_name, &packing) < 0 ||
        ob_take_size(&call, columns, "in_features", 0, OB_MAX_K, &k) < 0 ||
        ob_take_size(&call, rows, "out_features", 0, OB_MAX_K, &n) < 0 ||
        (scale_name && ob_take_name(&call, scale_name, "scale", 2, scale_kind, &per_row) < 0) ||
        (bias_flag && ob_take_flag(&call, bias_flag, "bias", &has_bias) < 0) ||
        (number && ob_take_size(&call, number, "seed", 0, ((size_t)1 << 53) - 1, &seed) < 0)) {
        return NULL;
    }
    /* codes in -1, 0, 1 with equal shares have variance 2/3: y has that of x */
    const float s = k > 0 ? 1.0f / sqrtf((float)k * (2.0f / 3.0f)) : 1.0f;
    PyArrayObject *packed = ob_new_packed(n, k), *bias = NULL;
    PyArrayObject *scale = packed != NULL ? filled(per_row ? n : 1, s) : NULL;
    if (scale != NULL && has_bias && (bias = filled(n, 0.0f)) == NULL) {
        Py_CLEAR(scale);
    }
    if (scale != NULL) {
        Py_BEGIN_ALLOW_THREADS ob_random_codes(n, k, seed, PyArray_DATA(packed));
        Py_END_ALLOW_THREADS packed = repacked(&call, packed, OB_FORMAT_tile16, packing, n, k);
    }
    return layer_from(type, n, k, packing, packed, scale, bias, (double)seed);
}

/* A caller's parameter (scale or bias), aliased.  NULL with an exception. */
static PyArrayObject *
take_parameter(ob_call *call, PyObject *object, const char *name, size_t n, unsigned flags)
{
    ob_spec spec = {OB_KIND_F32, flags, 1, {(npy_intp)n}, NULL};
    ob_view *view = ob_take_array(call, object, name, spec);
    if (view == NULL) {
        return NULL;
    }
    const float *values = view->data;
    for (size_t i = 0; i < view->bytes / sizeof(float); i++) {
        if (!isfinite(values[i]) || ((flags & OB_OR_ONE) && values[i] <= 0)) {
            ob_fail(call, PyExc_ValueError, "'%s' must be finite%s", name,
                    flags & OB_OR_ONE ? " and positive" : "");
            return NULL;
        }
    }
    view->write = 1; /* an optimizer will write it: no overlap with the others */
    return (PyArrayObject *)ob_alias(view->array);
}

/* scale (if an object) and bias of a from_ constructor; -1 with an exception, nothing held */
static int
take_parameters(ob_call *call, PyObject *scale, PyObject *bias, size_t n, PyArrayObject **scale_out,
                PyArrayObject **bias_out)
{
    *bias_out = NULL;
    if (scale != NULL && !PyArray_Check(scale)) {
        double value = 0.0;
        if (ob_take_double(call, scale, "scale", 0x1p-126, 0x1p126, &value) < 0) {
            return -1;
        }
        *scale_out = filled(1, (float)value);
    }
    else if (scale != NULL) {
        *scale_out = take_parameter(call, scale, "scale", n, OB_OR_ONE);
    }
    int failed = scale != NULL && *scale_out == NULL;
    if (!failed && bias != Py_None) {
        *bias_out = take_parameter(call, bias, "bias", n, 0);
        failed = *bias_out == NULL;
    }
    if (failed || ob_check_overlap(call) < 0) {
        if (scale != NULL) {
            Py_CLEAR(*scale_out);
        }
        Py_CLEAR(*bias_out);
        return -1;
    }
    return 0;
}

/* from_float and from_codes read a matrix (N, K) and pack it */
static PyObject *
layer_from_matrix(PyTypeObject *type, ob_call *call, PyObject *matrix, const char *name,
                  unsigned kinds, PyObject *scale, PyObject *bias, PyObject *packing_name)
{
    ob_format_id packing, first = OB_FORMAT_tile16; /* of absmean */
    PyArrayObject *packed = NULL, *factor = NULL, *offset = NULL;
    PyObject *layer = NULL;
    if (ob_take_packing(call, packing_name, &packing) < 0) {
        return NULL;
    }
    ob_view *view =
        ob_take_array(call, matrix, name, (ob_spec){kinds, 0, 2, {OB_FREE, OB_FREE}, "NK"});
    if (view == NULL) {
        return NULL;
    }
    const size_t n = ob_view_dim(view, 0), k = ob_view_dim(view, 1);
    if (n > OB_MAX_K || k > OB_MAX_K) {
        ob_fail(call, PyExc_ValueError, "'%s' must have at most %u rows and columns", name,
                OB_MAX_K);
        goto done;
    }
    if (take_parameters(call, scale, bias, n, &factor, &offset) < 0 ||
        (packed = ob_new_packed_as(scale == NULL ? first : packing, n, k)) == NULL ||
        (scale == NULL && (factor = filled(1, 1.0f)) == NULL)) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = scale == NULL
                                        ? ob_absmean(n, k, ob_view_dtype(view), view->data,
                                                     PyArray_DATA(packed), PyArray_DATA(factor))
                                        : ob_pack(packing, n, k, view->data, PyArray_DATA(packed));
    Py_END_ALLOW_THREADS if (status == OB_INVALID)
    {
        ob_fail(call, PyExc_ValueError, "'%s' must hold %s only", name,
                scale == NULL ? "finite numbers" : "-1, 0 and 1");
    }
    else if (ob_fail_status(call, status) == 0)
    {
        packed = repacked(call, packed, scale == NULL ? first : packing, packing, n, k);
        layer = layer_from(type, n, k, packing, packed, factor, offset, 0);
        packed = factor = offset = NULL;
    }
done:
    Py_XDECREF(packed);
    Py_XDECREF(factor);
    Py_XDECREF(offset);
    ob_release(call);
    return layer;
}

PyObject *
ob_layer_from_float(PyObject *type, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"w", "bias", "packing", NULL};
    PyObject *w, *bias = Py_None, *packing = NULL;
    ob_call call = {.function = "TernaryLinear.from_float"};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O|OO", keys, &w, &bias, &packing)) {
        return NULL;
    }
    return layer_from_matrix((PyTypeObject *)type, &call, w, "w", OB_KIND_FLOAT, NULL, bias,
                             packing);
}

PyObject *
ob_layer_from_codes(PyObject *type, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"codes", "scale", "bias", "packing", NULL};
    PyObject *codes, *scale, *bias = Py_None, *packing = NULL;
    ob_call call = {.function = "TernaryLinear.from_codes"};
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|OO", keys, &codes, &scale, &bias, &packing)) {
        return NULL;
    }
    return layer_from_matrix((PyTypeObject *)type, &call, codes, "codes", OB_KIND_I8, scale, bias,
                             packing);
}

PyObject *
ob_layer_from_packed(PyObject *type, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"packed", "scale", "shape", "bias", "packing", NULL};
    PyObject *packed, *scale, *shape, *bias = Py_None, *packing_name = NULL, *layer = NULL;
    ob_format_id packing;
    PyArrayObject *factor = NULL, *offset = NULL;
    ob_call call = {.function = "TernaryLinear.from_packed"};
    size_t n = 0, k = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOO|OO", keys, &packed, &scale, &shape, &bias,
                                     &packing_name) ||
        ob_take_packing(&call, packing_name, &packing) < 0 ||
        ob_take_shape(&call, shape, "shape", &n, &k) < 0) {
        return NULL;
    }
    uint8_t *codes = ob_take_packed_as(&call, packed, packing, n, k, 0);
    if (codes == NULL || take_parameters(&call, scale, bias, n, &factor, &offset) < 0) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = ob_validate(packing, n, k, codes);
    Py_END_ALLOW_THREADS if (status != OB_OK)
    {
        ob_fail(&call, PyExc_ValueError, "'packed' must hold ternary codes and clean padding: %s",
                ob_status_text(status));
        Py_DECREF(factor);
        Py_XDECREF(offset);
        goto done;
    }
    layer = layer_from((PyTypeObject *)type, n, k, packing,
                       (PyArrayObject *)ob_alias((PyArrayObject *)packed), factor, offset, 0);
done:
    ob_release(&call);
    return layer;
}

PyObject *
ob_layer_repack(PyObject *object, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"packing", NULL};
    ob_layer *self = (ob_layer *)object;
    PyObject *name, *layer;
    ob_call call = {.function = "TernaryLinear.repack"};
    ob_format_id packing;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &name) ||
        ob_take_packing(&call, name, &packing) < 0 || ob_layer_lock(&call, self, 0) < 0) {
        return NULL;
    }
    PyArrayObject *packed = ob_new_packed_as(packing, self->n, self->k);
    ob_status status = OB_OK;
    if (packed != NULL) {
        Py_BEGIN_ALLOW_THREADS status =
            ob_convert(self->packing, packing, self->n, self->k, PyArray_DATA(self->packed),
                       PyArray_DATA(packed));
        Py_END_ALLOW_THREADS
    }
    ob_layer_unlock(self, 0);
    if (packed == NULL || ob_fail_status(&call, status) < 0) {
        Py_XDECREF(packed);
        return NULL;
    }
    PyArrayObject *bias = self->bias != NULL ? (PyArrayObject *)ob_alias(self->bias) : NULL;
    PyArrayObject *scale = (PyArrayObject *)ob_alias(self->scale);
    if (self->bias != NULL && bias == NULL) {
        Py_CLEAR(scale);
    }
    layer = layer_from(Py_TYPE(object), self->n, self->k, packing, packed, scale, bias, 0);
    if (layer != NULL) {
        Py_XSETREF(((ob_layer *)layer)->name, Py_NewRef(self->name));
    }
    return layer;
}
