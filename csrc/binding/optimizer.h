/* optimizer.h - FlipOptimizer as a C struct. */
#ifndef OB_OPTIMIZER_H
#define OB_OPTIMIZER_H

#include "layer.h"

enum { /* state of one layer beside its planes */
       OB_SCALE_AVG,
       OB_SCALE_AVG_SQ,
       OB_BIAS_AVG,
       OB_BIAS_AVG_SQ,
       OB_BIAS_POWERS, /* float64 (2,): beta1^t, beta2^t */
       OB_MOMENTS
};

typedef struct ob_slot {
    ob_layer *layer; /* strong */
    PyObject *planes;
    PyArrayObject *moments[OB_MOMENTS]; /* those of the bias are NULL without one */
} ob_slot;

typedef struct ob_optimizer {
    PyObject_HEAD size_t count; /* 0 once detached */
    ob_slot *slots;
    ob_rule rule;
    size_t stripes, stripe; /* of every layer */
    double lr, scale_lr, bias_lr, flip_rate;
    int detached, vote_plane;
} ob_optimizer;

/* Every array of a slot with its name in a state_dict, but for the vote plane, which holds something between
 * micro-batches only; returns how many. */
#define OB_SLOT_ARRAYS 16
size_t ob_slot_arrays(const ob_slot *slot, const char *names[OB_SLOT_ARRAYS],
                      PyArrayObject *arrays[OB_SLOT_ARRAYS]);

/* Planes that may take the place of a slot's. */
typedef struct ob_spare {
    PyObject *planes; /* strong; NULL: keep the slot's */
    ob_planes view;
} ob_spare;

/* Fresh planes for the slot's layer by a copy of `control`; -1 with an exception. */
int ob_spare_make(ob_spare *spare, const ob_slot *slot, const double *control);
void ob_spare_use(ob_spare *spare, ob_slot *slot);
PyObject *ob_optimizer_rotate(PyObject *optimizer, PyObject *none);

/* All layers or none; -1 with RuntimeError if detached or one is busy. */
int ob_optimizer_lock(const ob_call *call, ob_optimizer *optimizer);
void ob_optimizer_unlock(ob_optimizer *optimizer);

PyObject *ob_optimizer_stats(PyObject *optimizer, PyObject *none);
PyObject *ob_optimizer_state_dict(PyObject *optimizer, PyObject *none);
PyObject *ob_optimizer_load(PyObject *optimizer, PyObject *args, PyObject *kw);

PyObject *ob_optimizer_new(PyTypeObject *type, PyObject *args, PyObject *kw);
void ob_optimizer_release(ob_optimizer *optimizer); /* detach and drop everything */

#endif
