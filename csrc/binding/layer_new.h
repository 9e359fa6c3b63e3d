/* layer_new.h - constructors and properties of TernaryLinear, for its type's slots. */
#ifndef OB_LAYER_NEW_H
#define OB_LAYER_NEW_H

#include "binding.h"

PyObject *ob_layer_new(PyTypeObject *type, PyObject *args, PyObject *kw);
PyObject *ob_layer_from_float(PyObject *type, PyObject *args, PyObject *kw);
PyObject *ob_layer_from_codes(PyObject *type, PyObject *args, PyObject *kw);
PyObject *ob_layer_from_packed(PyObject *type, PyObject *args, PyObject *kw);
PyObject *ob_layer_repack(PyObject *layer, PyObject *args, PyObject *kw);

extern PyGetSetDef ob_layer_properties[];

#endif
