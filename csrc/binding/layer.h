/* layer.h - TernaryLinear as a C struct: what the layer type and the optimizer type share. */
#ifndef OB_LAYER_H
#define OB_LAYER_H

#include "binding.h"

/* The arrays are private: Python gets aliases of them, so that no attribute set from Python (shape, dtype) can reach
 * the kernels.  Caller's arrays are aliased too, never copied. */
typedef struct ob_layer {
    PyObject_HEAD size_t n, k;
    PyObject *name; /* str or None */
    ob_format_id packing;
    PyArrayObject *packed, *scale, *bias, *scale_grad, *bias_grad;
    PyArrayObject *control; /* keys the rounding of dX while no optimizer is attached */
    PyArrayObject *xq, *sx; /* kept by a forward for one backward, or NULL */
    PyObject *planes;       /* dict while an optimizer is attached, or NULL */
    ob_planes view;         /* of planes */
    PyObject *owner;        /* the optimizer; borrowed: it detaches itself before it dies */
    int paused;             /* backward casts no votes */
    int writing, reading;   /* calls that run without the GIL */
} ob_layer;

/* 0, or -1 with RuntimeError if another thread's call is in the way.  Exclusive for all that writes the layer. */
int ob_layer_lock(const ob_call *call, ob_layer *layer, int exclusive);
void ob_layer_unlock(ob_layer *layer, int exclusive);

/* Planes and ownership; the caller has checked that the layer is free and its arrays writeable. */
void ob_layer_attach(ob_layer *layer, PyObject *owner, PyObject *planes, const ob_planes *view);
void ob_layer_detach(ob_layer *layer);

/* "'name'" or "(512, 2048)" for messages; new reference */
PyObject *ob_layer_label(const ob_layer *layer);

size_t ob_layer_scale_len(const ob_layer *layer);
PyObject *ob_aliased_dict(PyObject *arrays); /* the dict with ob_alias of every array */

#endif
