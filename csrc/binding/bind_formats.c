/* bind_formats.c - codes to bytes and back, absmean, starting codes, aligned arrays. */
#include "binding.h"

/* The array that holds (n, k) codes in a format: tile16 and trits5 (strips, steps, 4, 16, 4), rows4
 * (ceil(n/4), k), any other a flat (bytes,). */
static int
format_spec(const ob_call *call, size_t format, size_t n, size_t k, unsigned flags, ob_spec *spec)
{
    size_t bytes = 0;
    ob_status status = ob_format_bytes((ob_format_id)format, n, k, &bytes);
    if (status == OB_INVALID || status == OB_OVERFLOW) {
        return ob_fail(call, PyExc_ValueError, "format '%s' cannot hold the shape (%zu, %zu)",
                       ob_format_text(format), n, k);
    }
    if (status != OB_OK) {
        return ob_fail_status(call, status);
    }
    switch (format) {
    case OB_FORMAT_tile16:
    case OB_FORMAT_trits5:
        *spec = ob_packed_spec((ob_format_id)format, n, k, flags);
        break;
    case OB_FORMAT_rows4:
        *spec = (ob_spec){OB_KIND_U8, flags, 2, {(npy_intp)((n + 3) / 4), (npy_intp)k}, NULL};
        break;
    default:
        *spec = (ob_spec){OB_KIND_U8, flags, 1, {(npy_intp)bytes}, NULL};
    }
    return 0;
}

/* As ob_fail_status, but a bad content is the fault of the argument `name`. */
static int
fail_content(const ob_call *call, ob_status status, const char *name, const char *wanted)
{
    if (status == OB_INVALID || status == OB_RESERVED_CODE) {
        return ob_fail(call, PyExc_ValueError, "'%s' must hold %s, got something else: %s", name,
                       wanted, ob_status_text(status));
    }
    return ob_fail_status(call, status);
}

static PyObject *
pack(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"codes", "format", NULL};
    PyObject *codes, *format_name = NULL;
    ob_call call = {.function = "pack"};
    size_t format = OB_FORMAT_tile16;
    ob_spec spec;
    PyArrayObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O|O", keys, &codes, &format_name) ||
        (format_name && ob_take_name(&call, format_name, "format", OB_FORMAT_COUNT, ob_format_text,
                                     &format) < 0)) {
        return NULL;
    }
    ob_view *view =
        ob_take_array(&call, codes, "codes", (ob_spec){OB_KIND_I8, 0, 2, {OB_FREE, OB_FREE}, "NK"});
    if (view == NULL) {
        return NULL;
    }
    const size_t n = ob_view_dim(view, 0), k = ob_view_dim(view, 1);
    if (format_spec(&call, format, n, k, 0, &spec) < 0 ||
        (result = ob_new_typed(NPY_UINT8, spec.ndim, spec.dims, 0)) == NULL) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status =
        ob_pack((ob_format_id)format, n, k, view->data, PyArray_DATA(result));
    Py_END_ALLOW_THREADS if (fail_content(&call, status, "codes", "-1, 0 and 1 only") < 0)
    {
        Py_CLEAR(result);
    }
done:
    ob_release(&call);
    return (PyObject *)result;
}

/* packed, shape and format of unpack() and validate() */
static ob_view *
take_formatted(ob_call *call, PyObject *packed, PyObject *shape, PyObject *format_name,
               const char *format_key, size_t *format, size_t *n, size_t *k)
{
    ob_spec spec;
    *format = OB_FORMAT_tile16;
    if (ob_take_shape(call, shape, "shape", n, k) < 0 ||
        (format_name && ob_take_name(call, format_name, format_key, OB_FORMAT_COUNT, ob_format_text,
                                     format) < 0) ||
        format_spec(call, *format, *n, *k, 0, &spec) < 0) {
        return NULL;
    }
    return ob_take_array(call, packed, "packed", spec);
}

static PyObject *
unpack(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"packed", "shape", "format", NULL};
    PyObject *packed, *shape, *format_name = NULL;
    ob_call call = {.function = "unpack"};
    size_t format, n = 0, k = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|O", keys, &packed, &shape, &format_name)) {
        return NULL;
    }
    ob_view *view = take_formatted(&call, packed, shape, format_name, "format", &format, &n, &k);
    if (view == NULL) {
        return NULL;
    }
    PyArrayObject *codes = ob_new_typed(NPY_INT8, 2, (npy_intp[]){(npy_intp)n, (npy_intp)k}, 0);
    if (codes != NULL) {
        ob_status status;
        Py_BEGIN_ALLOW_THREADS status =
            ob_unpack((ob_format_id)format, n, k, view->data, PyArray_DATA(codes));
        Py_END_ALLOW_THREADS if (fail_content(&call, status, "packed", "ternary codes") < 0)
        {
            Py_CLEAR(codes);
        }
    }
    ob_release(&call);
    return (PyObject *)codes;
}

static PyObject *
validate(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"packed", "shape", "format", NULL};
    PyObject *packed, *shape, *format_name = NULL;
    ob_call call = {.function = "validate"};
    size_t format, n = 0, k = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|O", keys, &packed, &shape, &format_name)) {
        return NULL;
    }
    ob_view *view = take_formatted(&call, packed, shape, format_name, "format", &format, &n, &k);
    if (view == NULL) {
        return NULL;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status = ob_validate((ob_format_id)format, n, k, view->data);
    Py_END_ALLOW_THREADS int failed =
        fail_content(&call, status, "packed", "ternary codes and clean padding") < 0;
    ob_release(&call);
    return failed ? NULL : Py_NewRef(Py_None);
}

static PyObject *
convert(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"packed", "shape", "source", "target", NULL};
    PyObject *packed, *shape, *source, *target;
    ob_call call = {.function = "convert"};
    size_t from, to, n = 0, k = 0;
    ob_spec spec;
    PyArrayObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OOOO", keys, &packed, &shape, &source, &target) ||
        ob_take_name(&call, target, "target", OB_FORMAT_COUNT, ob_format_text, &to) < 0) {
        return NULL;
    }
    ob_view *view = take_formatted(&call, packed, shape, source, "source", &from, &n, &k);
    if (view == NULL) {
        return NULL;
    }
    if (format_spec(&call, to, n, k, 0, &spec) < 0 ||
        (result = ob_new_typed(NPY_UINT8, spec.ndim, spec.dims, 0)) == NULL) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status =
        ob_convert((ob_format_id)from, (ob_format_id)to, n, k, view->data, PyArray_DATA(result));
    Py_END_ALLOW_THREADS if (fail_content(&call, status, "packed", "ternary codes") < 0)
    {
        Py_CLEAR(result);
    }
done:
    ob_release(&call);
    return (PyObject *)result;
}

/* ------------------------------------------------------------------ codes from floats or a seed */
PyObject *
ob_py_absmean(const char *name, ob_absmean_op op, PyObject *args, PyObject *kw)
{
    static char *keys[] = {"w", NULL};
    PyObject *w, *result = NULL;
    ob_call call = {.function = name};
    PyArrayObject *packed = NULL, *scale = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "O", keys, &w)) {
        return NULL;
    }
    ob_view *view =
        ob_take_array(&call, w, "w", (ob_spec){OB_KIND_FLOAT, 0, 2, {OB_FREE, OB_FREE}, "NK"});
    if (view == NULL) {
        return NULL;
    }
    const size_t n = ob_view_dim(view, 0), k = ob_view_dim(view, 1);
    if (n > OB_MAX_K || k > OB_MAX_K) {
        ob_fail(&call, PyExc_ValueError, "'w' must have at most %u rows and columns", OB_MAX_K);
        goto done;
    }
    if ((packed = ob_new_packed(n, k)) == NULL ||
        (scale = ob_new_typed(NPY_FLOAT, 1, (npy_intp[]){1}, 0)) == NULL) {
        goto done;
    }
    ob_status status;
    Py_BEGIN_ALLOW_THREADS status =
        op(n, k, ob_view_dtype(view), view->data, PyArray_DATA(packed), PyArray_DATA(scale));
    Py_END_ALLOW_THREADS if (fail_content(&call, status, "w", "finite numbers") == 0)
    {
        result = PyTuple_Pack(2, packed, scale);
    }
done:
    Py_XDECREF(packed);
    Py_XDECREF(scale);
    ob_release(&call);
    return result;
}

static PyObject *
absmean(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    return ob_py_absmean("absmean", ob_absmean, args, kw);
}

static PyObject *
random_codes(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"out_features", "in_features", "seed", NULL};
    PyObject *rows, *columns, *number = NULL;
    ob_call call = {.function = "random_codes"};
    size_t n = 0, k = 0, seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO|O", keys, &rows, &columns, &number) ||
        ob_take_size(&call, rows, "out_features", 0, OB_MAX_K, &n) < 0 ||
        ob_take_size(&call, columns, "in_features", 0, OB_MAX_K, &k) < 0 ||
        (number && ob_take_size(&call, number, "seed", 0, ((size_t)1 << 53) - 1, &seed) < 0)) {
        return NULL;
    }
    PyArrayObject *packed = ob_new_packed(n, k);
    if (packed != NULL) {
        Py_BEGIN_ALLOW_THREADS ob_random_codes(n, k, seed, PyArray_DATA(packed));
        Py_END_ALLOW_THREADS
    }
    return (PyObject *)packed;
}

/* ------------------------------------------------------------------ aligned arrays */
static int
take_dims(const ob_call *call, PyObject *shape, npy_intp dims[OB_MAX_DIMS], int *ndim)
{
    size_t length = 0;
    if (!PyTuple_Check(shape) && !PyList_Check(shape)) {
        *ndim = 1;
        int status = ob_take_size(call, shape, "shape", 0, (size_t)NPY_MAX_INTP, &length);
        dims[0] = (npy_intp)length;
        return status;
    }
    PyObject *items = PySequence_Tuple(shape);
    if (items == NULL) {
        return -1;
    }
    int status = 0;
    Py_ssize_t count = PyTuple_GET_SIZE(items);
    if (count > OB_MAX_DIMS) {
        status = ob_fail(call, PyExc_ValueError, "'shape' must have at most %d entries, got %zd",
                         OB_MAX_DIMS, count);
    }
    for (Py_ssize_t i = 0; status == 0 && i < count; i++) {
        status = ob_take_size(call, PyTuple_GET_ITEM(items, i), "shape", 0, (size_t)NPY_MAX_INTP,
                              &length);
        dims[i] = (npy_intp)length;
    }
    *ndim = (int)count;
    Py_DECREF(items);
    return status;
}

static PyObject *
empty(PyObject *Py_UNUSED(self), PyObject *args, PyObject *kw)
{
    static char *keys[] = {"shape", "dtype", NULL};
    PyObject *shape, *type;
    ob_call call = {.function = "empty"};
    npy_intp dims[OB_MAX_DIMS];
    int ndim = 0;
    PyArray_Descr *descr = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kw, "OO", keys, &shape, &type) ||
        take_dims(&call, shape, dims, &ndim) < 0) {
        return NULL;
    }
    if (!PyArray_DescrConverter(type, &descr)) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            ob_fail(&call, PyExc_TypeError, "'dtype' must be a NumPy dtype, got %.60R", type);
        }
        return NULL;
    }
    int plain = PyTypeNum_ISNUMBER(descr->type_num) || PyTypeNum_ISBOOL(descr->type_num) ||
                PyTypeNum_ISUSERDEF(descr->type_num);
    if (!plain || PyDataType_REFCHK(descr) || PyDataType_ELSIZE(descr) == 0 ||
        !PyArray_ISNBO(descr->byteorder)) {
        ob_fail(&call, PyExc_TypeError, "'dtype' must be a native number type, got %S", descr);
        Py_DECREF(descr);
        return NULL;
    }
    return (PyObject *)ob_new_array(descr, ndim, dims, 1);
}

/* ------------------------------------------------------------------ method table */
PyDoc_STRVAR(
    pack_doc,
    "pack($module, /, codes, format='tile16')\n--\n\n"
    "codes int8 (N, K) in {-1, 0, 1} -> uint8 bytes of the format.\n\n"
    "tile16: (ceil(N/64), ceil(K/16), 4, 16, 4), what every kernel reads; trits5: (ceil(N/64),\n"
    "ceil(K/20), 4, 16, 4), five codes a byte, for inference; rows4: (N/4, K), the layout of\n"
    "transformers; seq2: (bytes,), four codes a byte in order.  64-byte aligned.");
PyDoc_STRVAR(unpack_doc,
             "unpack($module, /, packed, shape, format='tile16')\n--\n\n"
             "Bytes of a format -> codes int8 `shape` = (N, K).  ValueError on a reserved code.");
PyDoc_STRVAR(convert_doc, "convert($module, /, packed, shape, source, target)\n--\n\n"
                          "Bytes of one format -> bytes of another, for codes of `shape` = (N, K). "
                          " ValueError on a reserved code.");
PyDoc_STRVAR(validate_doc,
             "validate($module, /, packed, shape, format='tile16')\n--\n\n"
             "ValueError if the bytes hold a reserved code or dirty padding; otherwise None.");
PyDoc_STRVAR(absmean_doc, "absmean($module, /, w)\n--\n\n"
                          "w (N, K) float32 or bfloat16 -> (packed tile16, scale float32 (1,)).\n\n"
                          "scale = max(mean |w|, 1e-5), codes = clamp(rint(w / scale), -1, 1): "
                          "BitNet b1.58, arXiv 2402.17764.");
PyDoc_STRVAR(random_codes_doc, "random_codes($module, /, out_features, in_features, seed=0)\n--\n\n"
                               "tile16 codes of (N, K): -1, 0 and 1 with probability 1/3 each, a "
                               "hash of (seed, row, column).");
PyDoc_STRVAR(empty_doc,
             "empty($module, /, shape, dtype)\n--\n\n"
             "A zeroed array of up to 8 dimensions, 64-byte aligned, huge pages advised.");

PyMethodDef ob_formats_methods[] = {
    OB_METHOD("pack", pack, pack_doc),
    OB_METHOD("unpack", unpack, unpack_doc),
    OB_METHOD("convert", convert, convert_doc),
    OB_METHOD("validate", validate, validate_doc),
    OB_METHOD("absmean", absmean, absmean_doc),
    OB_METHOD("random_codes", random_codes, random_codes_doc),
    OB_METHOD("empty", empty, empty_doc),
    {NULL, NULL, 0, NULL},
};
