/* layer_properties.c - what Python sees of a TernaryLinear: views, never copies. */
#include "layer.h"

#include <stddef.h>

#include "layer_new.h"

/* The closure of an array property is the offset of its pointer in ob_layer. */
static PyObject *
get_array(PyObject *object, void *offset)
{
    PyArrayObject *array = *(PyArrayObject **)((char *)object + (uintptr_t)offset);
    return array != NULL ? ob_alias(array) : Py_NewRef(Py_None);
}

static PyObject *
get_size(PyObject *object, void *offset)
{
    return PyLong_FromSize_t(*(size_t *)((char *)object + (uintptr_t)offset));
}

static PyObject *
get_planes(PyObject *object, void *Py_UNUSED(closure))
{
    ob_layer *self = (ob_layer *)object;
    return self->planes != NULL ? ob_aliased_dict(self->planes) : Py_NewRef(Py_None);
}

static PyObject *
get_residual(PyObject *object, void *Py_UNUSED(closure))
{
    ob_layer *self = (ob_layer *)object;
    PyObject *array = self->planes != NULL ? PyDict_GetItemString(self->planes, "residual") : NULL;
    return array != NULL ? ob_alias((PyArrayObject *)array) : Py_NewRef(Py_None);
}

static PyObject *
get_packing(PyObject *object, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(ob_format_name(((ob_layer *)object)->packing));
}

static PyObject *
get_name(PyObject *object, void *Py_UNUSED(closure))
{
    return Py_NewRef(((ob_layer *)object)->name);
}

static int
set_name(PyObject *object, PyObject *value, void *Py_UNUSED(closure))
{
    if (value == NULL || (value != Py_None && !PyUnicode_Check(value))) {
        PyErr_Format(PyExc_TypeError, "TernaryLinear.name must be a str or None, got %.80s",
                     value != NULL ? Py_TYPE(value)->tp_name : "del");
        return -1;
    }
    Py_XSETREF(((ob_layer *)object)->name, Py_NewRef(value));
    return 0;
}

static PyObject *
get_paused(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((ob_layer *)object)->paused);
}

static int
set_paused(PyObject *object, PyObject *value, void *Py_UNUSED(closure))
{
    ob_call call = {.function = "TernaryLinear"};
    return ob_take_flag(&call, value != NULL ? value : Py_None, "paused",
                        &((ob_layer *)object)->paused);
}

#define ARRAY(name, doc) {#name, get_array, NULL, doc, (void *)offsetof(ob_layer, name)}

PyGetSetDef ob_layer_properties[] = {
    {"in_features", get_size, NULL, "K", (void *)offsetof(ob_layer, k)},
    {"out_features", get_size, NULL, "N", (void *)offsetof(ob_layer, n)},
    {"packing", get_packing, NULL, "'tile16' or 'trits5'", NULL},
    ARRAY(packed, "uint8 (N, K) in `packing`, a view"),
    ARRAY(scale, "float32 (1,) or (N,), a view"),
    ARRAY(bias, "float32 (N,), a view, or None"),
    ARRAY(scale_grad, "float32 like scale, a view; grows with every backward"),
    ARRAY(bias_grad, "float32 (N,), a view, or None"),
    {"planes", get_planes, NULL, "dict of views while an optimizer is attached, or None", NULL},
    {"residual", get_residual, NULL, "the plane of that name, a view, or None", NULL},
    {"name", get_name, set_name, "str or None; named in messages", NULL},
    {"paused", get_paused, set_paused, "bool; True: backward casts no votes", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
