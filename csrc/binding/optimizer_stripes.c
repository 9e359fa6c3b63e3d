/* optimizer_stripes.c - FlipOptimizer: block-cyclic training, one stripe of rows after the other. */
#include "optimizer.h"

#include <string.h>

int
ob_spare_make(ob_spare *spare, const ob_slot *slot, const double *control)
{
    ob_layer *layer = slot->layer;
    PyArrayObject *copy = ob_new_typed(NPY_DOUBLE, 1, (npy_intp[]){OB_CONTROL_LEN}, 0);
    if (copy != NULL) {
        memcpy(PyArray_DATA(copy), control, OB_CONTROL_LEN * sizeof *control);
    }
    spare->planes = ob_new_planes(layer->n, layer->k, copy, layer->view.votes != NULL,
                                  PyArray_DATA(layer->packed));
    return spare->planes == NULL ||
                   ob_view_planes(spare->planes, PyArray_DATA(layer->packed), &spare->view) < 0
               ? -1
               : 0;
}

void
ob_spare_use(ob_spare *spare, ob_slot *slot)
{
    Py_XSETREF(slot->planes, spare->planes);
    Py_XSETREF(slot->layer->planes, Py_NewRef(spare->planes));
    slot->layer->view = spare->view;
    spare->planes = NULL;
}

/* The control of a layer as its next stripe begins: that measures first, and nothing of the last one counts. */
static void
next_control(const ob_planes *view, double *control)
{
    memcpy(control, view->control, OB_CONTROL_LEN * sizeof *control);
    control[OB_CTL_RULE] = (double)view->rule;
    control[OB_CTL_STRIPES] = (double)view->stripes;
    control[OB_CTL_STRIPE] = (double)((view->stripe + 1) % view->stripes);
    control[OB_CTL_STEP] = control[OB_CTL_MICRO] = control[OB_CTL_NONFINITE] = 0.0;
    control[OB_CTL_SKETCH_ENERGY] = control[OB_CTL_MOVED] = control[OB_CTL_VOTE_MOVED] = 0.0;
}

PyObject *
ob_optimizer_rotate(PyObject *object, PyObject *Py_UNUSED(none))
{
    ob_optimizer *self = (ob_optimizer *)object;
    ob_call call = {.function = "FlipOptimizer.rotate"};
    if (self->stripes < 2) {
        ob_fail(&call, PyExc_RuntimeError, "all rows are in training: there is no other stripe");
        return NULL;
    }
    if (ob_optimizer_lock(&call, self) < 0) {
        return NULL;
    }
    ob_spare *spares = PyMem_Calloc(self->count + 1, sizeof *spares);
    int failed = spares == NULL;
    if (failed) {
        PyErr_NoMemory();
    }
    for (size_t i = 0; i < self->count && !failed; i++) {
        double control[OB_CONTROL_LEN];
        next_control(&self->slots[i].layer->view, control);
        failed = ob_spare_make(&spares[i], &self->slots[i], control) < 0;
    }
    for (size_t i = 0; i < self->count && !failed; i++) {
        ob_spare_use(&spares[i], &self->slots[i]);
    }
    for (size_t i = 0; spares != NULL && i < self->count; i++) {
        Py_XDECREF(spares[i].planes);
    }
    PyMem_Free(spares);
    ob_optimizer_unlock(self);
    if (failed) {
        return NULL;
    }
    self->stripe = (self->stripe + 1) % self->stripes;
    return Py_NewRef(Py_None);
}
