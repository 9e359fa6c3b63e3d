/* args.c - the one view maker, numbers, and the messages of both. */
#include "binding.h"

#include <string.h>

/* ------------------------------------------------------------------ messages */
int
ob_fail(const ob_call *call, PyObject *exception, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    PyObject *text = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (text != NULL) {
        PyErr_Format(exception, "%s(): %U", call->function, text);
        Py_DECREF(text);
    }
    return -1;
}

int
ob_fail_status(const ob_call *call, ob_status status)
{
    switch (status) {
    case OB_OK:
        return 0;
    case OB_NO_MEMORY:
        return ob_fail(call, PyExc_MemoryError, "%s", ob_status_text(status));
    case OB_UNSUPPORTED:
        return ob_fail(call, PyExc_RuntimeError, "%s", ob_status_text(status));
    default:
        return ob_fail(call, PyExc_ValueError, "%s", ob_status_text(status));
    }
}

static unsigned
kind_of(PyArray_Descr *descr)
{
    switch (descr->type_num) {
    case NPY_FLOAT:
        return OB_KIND_F32;
    case NPY_DOUBLE:
        return OB_KIND_F64;
    case NPY_BYTE:
        return OB_KIND_I8;
    case NPY_UBYTE:
        return OB_KIND_U8;
    case NPY_USHORT:
        return OB_KIND_U16;
    case NPY_SHORT:
        return OB_KIND_I16;
    default:
        break;
    }
    if (descr->type_num < NPY_USERDEF || PyDataType_ELSIZE(descr) != 2) {
        return 0;
    }
    const char *dot = strrchr(descr->typeobj->tp_name, '.');
    const char *name = dot != NULL ? dot + 1 : descr->typeobj->tp_name;
    return strcmp(name, "bfloat16") == 0 ? OB_KIND_BF16 : 0;
}

static const char *
kinds_text(unsigned kinds)
{
    switch (kinds) {
    case OB_KIND_F32:
        return "float32";
    case OB_KIND_F64:
        return "float64";
    case OB_KIND_I8:
        return "int8";
    case OB_KIND_U8:
        return "uint8";
    case OB_KIND_I16:
        return "int16";
    case OB_KIND_RAW_BF16:
        return "bfloat16 or uint16";
    default:
        return "float32 or bfloat16";
    }
}

/* "(..., 4096)", "(N, K)", "(1,) or (8,)" */
static void
spec_text(const ob_spec *spec, char *text, size_t room)
{
    size_t used = (size_t)snprintf(text, room, spec->flags & OB_OR_ONE ? "(1,) or (" : "(");
    if (spec->flags & OB_LEADING) {
        used += (size_t)snprintf(text + used, room - used, "..., ");
    }
    for (int i = 0; i < spec->ndim; i++) {
        const char *gap = i > 0 ? ", " : "";
        if (spec->dims[i] == OB_FREE) {
            used += (size_t)snprintf(text + used, room - used, "%s%c", gap, spec->letters[i]);
        }
        else {
            used += (size_t)snprintf(text + used, room - used, "%s%zd", gap, spec->dims[i]);
        }
    }
    int comma = spec->ndim == 1 && !(spec->flags & OB_LEADING);
    snprintf(text + used, room - used, comma ? ",)" : ")");
}

static void
refuse(const ob_call *call, PyObject *exception, const char *name, const ob_spec *spec,
       PyObject *got)
{
    char wanted[256];
    spec_text(spec, wanted, sizeof wanted);
    const char *kinds = kinds_text(spec->kinds);
    if (!PyArray_Check(got)) {
        ob_fail(call, exception, "'%s' must be an array of %s of shape %s, got %.80s", name, kinds,
                wanted, Py_TYPE(got)->tp_name);
        return;
    }
    PyArrayObject *array = (PyArrayObject *)got;
    PyObject *shape = PyArray_IntTupleFromIntp(PyArray_NDIM(array), PyArray_DIMS(array));
    if (shape != NULL) {
        ob_fail(call, exception, "'%s' must be %s of shape %s, got %S %S", name, kinds, wanted,
                (PyObject *)PyArray_DESCR(array), shape);
        Py_DECREF(shape);
    }
}

/* ------------------------------------------------------------------ the view maker */
static int
shape_fits(PyArrayObject *array, const ob_spec *spec)
{
    int extra = PyArray_NDIM(array) - spec->ndim;
    if (extra < 0 || (extra > 0 && !(spec->flags & OB_LEADING))) {
        return 0;
    }
    const npy_intp *dims = PyArray_DIMS(array) + extra;
    if ((spec->flags & OB_OR_ONE) && dims[0] == 1) {
        return 1;
    }
    for (int i = 0; i < spec->ndim; i++) {
        if (spec->dims[i] != OB_FREE && dims[i] != spec->dims[i]) {
            return 0;
        }
    }
    return 1;
}

static int
check_layout(const ob_call *call, PyArrayObject *array, const char *name, unsigned flags)
{
    if (!PyArray_IS_C_CONTIGUOUS(array)) {
        return ob_fail(call, PyExc_ValueError,
                       "'%s' must be C-contiguous, got strides that are not; make a copy with "
                       "numpy.ascontiguousarray",
                       name);
    }
    if (!PyArray_ISALIGNED(array)) {
        return ob_fail(call, PyExc_ValueError, "'%s' must be aligned to its element size, got %p",
                       name, PyArray_DATA(array));
    }
    if ((flags & OB_ALIGN64) && PyArray_NBYTES(array) > 0 &&
        (uintptr_t)PyArray_DATA(array) % 64 != 0) {
        return ob_fail(call, PyExc_ValueError,
                       "'%s' must be aligned to 64 bytes, got %p; onebit_ext.empty makes such "
                       "arrays",
                       name, PyArray_DATA(array));
    }
    if ((flags & OB_WRITE) && !PyArray_ISWRITEABLE(array)) {
        return ob_fail(call, PyExc_BufferError, "'%s' must be writeable, got a read-only array",
                       name);
    }
    return 0;
}

ob_view *
ob_take_array(ob_call *call, PyObject *object, const char *name, ob_spec spec)
{
    if (!PyArray_Check(object)) {
        refuse(call, PyExc_TypeError, name, &spec, object);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (!(kind_of(PyArray_DESCR(array)) & spec.kinds) || !PyArray_ISNOTSWAPPED(array)) {
        refuse(call, PyExc_TypeError, name, &spec, object);
        return NULL;
    }
    if (!shape_fits(array, &spec)) {
        refuse(call, PyExc_ValueError, name, &spec, object);
        return NULL;
    }
    if (check_layout(call, array, name, spec.flags) < 0) {
        return NULL;
    }
    ob_hold_array(call, array, name, (spec.flags & OB_WRITE) != 0);
    return &call->views[call->count - 1];
}

void
ob_hold_array(ob_call *call, PyArrayObject *array, const char *name, int write)
{
    /* OB_MAX_VIEWS bounds every caller: the longest call, vote(), holds 16 arrays */
    Py_INCREF(array);
    call->views[call->count++] = (ob_view){.name = name,
                                           .array = array,
                                           .data = PyArray_DATA(array),
                                           .bytes = (size_t)PyArray_NBYTES(array),
                                           .write = write};
}

ob_spec
ob_spec_like(PyArrayObject *like)
{
    ob_spec spec = {kind_of(PyArray_DESCR(like)), 0, PyArray_NDIM(like), {0}, NULL};
    if (spec.kinds & OB_KIND_RAW_BF16) {
        spec.kinds = OB_KIND_RAW_BF16;
    }
    for (int i = 0; i < spec.ndim; i++) {
        spec.dims[i] = PyArray_DIM(like, i);
    }
    return spec;
}

int
ob_check_overlap(const ob_call *call)
{
    for (size_t i = 0; i < call->count; i++) {
        const ob_view *output = &call->views[i];
        if (!output->write || output->bytes == 0) {
            continue;
        }
        uintptr_t start = (uintptr_t)output->data;
        for (size_t j = 0; j < call->count; j++) {
            const ob_view *other = &call->views[j];
            uintptr_t from = (uintptr_t)other->data;
            if (j != i && other->bytes > 0 && start < from + other->bytes &&
                from < start + output->bytes) {
                return ob_fail(call, PyExc_BufferError,
                               "'%s' is written and must not share memory with '%s'", output->name,
                               other->name);
            }
        }
    }
    return 0;
}

void
ob_release(ob_call *call)
{
    for (size_t i = 0; i < call->count; i++) {
        Py_DECREF(call->views[i].array);
    }
    call->count = 0;
}

ob_dtype
ob_view_dtype(const ob_view *view)
{
    return kind_of(PyArray_DESCR(view->array)) == OB_KIND_F32 ? OB_F32 : OB_BF16;
}

size_t
ob_view_dim(const ob_view *view, int axis)
{
    int index = axis < 0 ? axis + PyArray_NDIM(view->array) : axis;
    return (size_t)PyArray_DIM(view->array, index);
}

size_t
ob_view_rows(const ob_view *view)
{
    size_t rows = 1; /* cannot overflow: NumPy bounds the product of the non-zero dimensions */
    for (int i = 0; i + 1 < PyArray_NDIM(view->array); i++) {
        rows *= (size_t)PyArray_DIM(view->array, i);
    }
    return rows;
}

/* ------------------------------------------------------------------ new arrays */
static void
free_block(PyObject *capsule)
{
    ob_free(PyCapsule_GetPointer(capsule, NULL));
}

static void
free_result(PyObject *capsule)
{
    ob_free_result(PyCapsule_GetPointer(capsule, NULL));
}

static PyArrayObject *
new_array(PyArray_Descr *descr, int ndim, const npy_intp *dims, int zeroed, int result)
{
    if (descr == NULL) {
        return NULL;
    }
    size_t bytes = (size_t)PyDataType_ELSIZE(descr);
    int overflow = 0;
    for (int i = 0; i < ndim; i++) {
        overflow |= __builtin_mul_overflow(bytes, (size_t)dims[i], &bytes);
    }
    if (overflow || bytes > (size_t)PY_SSIZE_T_MAX) {
        Py_DECREF(descr);
        PyErr_NoMemory();
        return NULL;
    }
    const size_t room = bytes > 0 ? bytes : 1;
    void *block = result ? ob_alloc_result(room) : ob_alloc(room);
    PyObject *owner = block != NULL ? PyCapsule_New(block, NULL, result ? free_result : free_block)
                                    : PyErr_NoMemory();
    if (owner == NULL) {
        result ? ob_free_result(block) : ob_free(block);
        Py_DECREF(descr);
        return NULL;
    }
    if (zeroed) {
        memset(block, 0, bytes);
    }
    PyObject *array =
        PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, NULL, block, NPY_ARRAY_CARRAY, NULL);
    if (array == NULL) {
        Py_DECREF(owner);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, owner) < 0) { /* steals owner even then */
        Py_DECREF(array);
        return NULL;
    }
    return (PyArrayObject *)array;
}

PyArrayObject *
ob_new_array(PyArray_Descr *descr, int ndim, const npy_intp *dims, int zeroed)
{
    return new_array(descr, ndim, dims, zeroed, 0);
}

PyArrayObject *
ob_new_typed(int type, int ndim, const npy_intp *dims, int zeroed)
{
    return ob_new_array(PyArray_DescrFromType(type), ndim, dims, zeroed);
}

PyArrayObject *
ob_new_like(const ob_view *x, size_t columns)
{
    npy_intp dims[NPY_MAXDIMS];
    int ndim = PyArray_NDIM(x->array);
    for (int i = 0; i < ndim; i++) {
        dims[i] = PyArray_DIM(x->array, i);
    }
    dims[ndim - 1] = (npy_intp)columns;
    PyArray_Descr *descr = PyArray_DESCR(x->array);
    Py_INCREF(descr);
    return new_array(descr, ndim, dims, 0, 1);
}

int
ob_new_kept(size_t m, size_t k, PyArrayObject **xq, PyArrayObject **sx)
{
    const npy_intp dims[2] = {(npy_intp)m, (npy_intp)ob_padded_k(k)};
    *sx = NULL;
    *xq = new_array(PyArray_DescrFromType(NPY_INT8), 2, dims, 0, 1);
    if (*xq != NULL) {
        *sx = new_array(PyArray_DescrFromType(NPY_FLOAT), 1, dims, 0, 1);
    }
    return *sx != NULL ? 0 : -1;
}

PyObject *
ob_alias(PyArrayObject *array)
{
    PyArray_Descr *descr = PyArray_DESCR(array);
    Py_INCREF(descr);
    PyObject *alias =
        PyArray_NewFromDescr(&PyArray_Type, descr, PyArray_NDIM(array), PyArray_DIMS(array), NULL,
                             PyArray_DATA(array), PyArray_FLAGS(array) & NPY_ARRAY_CARRAY, NULL);
    if (alias == NULL) {
        return NULL;
    }
    PyObject *owner = PyArray_BASE(array) != NULL ? PyArray_BASE(array) : (PyObject *)array;
    Py_INCREF(owner);
    if (PyArray_SetBaseObject((PyArrayObject *)alias, owner) < 0) {
        Py_DECREF(alias);
        return NULL;
    }
    return alias;
}
