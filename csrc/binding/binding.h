/* binding.h - what the files of the binding share.  The only folder that sees Python.h.
 *
 * Every entry point: parse -> views -> check all -> allocate -> release the GIL -> run -> return.
 * Nothing is written before the last check; nothing of Python is touched without the GIL. */
#ifndef OB_BINDING_H
#define OB_BINDING_H

#ifndef PY_SSIZE_T_CLEAN
#define PY_SSIZE_T_CLEAN
#endif
#include <Python.h>

#ifndef NPY_NO_DEPRECATED_API
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#endif
#ifndef NPY_TARGET_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#endif
#define PY_ARRAY_UNIQUE_SYMBOL ob_numpy_api
#ifndef OB_IMPORT_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../onebit.h"
#include "args.h"

typedef struct ob_state {
    PyTypeObject *linear_type;
    PyTypeObject *optimizer_type;
} ob_state;

/* Tables of the module's functions, one per file; module.c joins them. */
extern PyMethodDef ob_formats_methods[];
extern PyMethodDef ob_linear_methods[];
extern PyMethodDef ob_flip_methods[];
extern PyMethodDef ob_runtime_methods[];
extern PyMethodDef ob_limits_methods[];
extern PyMethodDef ob_ranks_methods[];
extern PyMethodDef ob_reference_methods[];

extern PyType_Spec ob_ternary_linear_spec;
extern PyType_Spec ob_flip_optimizer_spec;

#define OB_METHOD(name, function, doc) \
    {name, (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS, doc}

/* The operations that have a naive twin: one body, two function pointers. */
typedef ob_status (*ob_forward_op)(const ob_weights *, size_t, ob_dtype, const void *, void *,
                                   int8_t *, float *);
typedef ob_status (*ob_input_op)(const ob_weights *, size_t, ob_dtype, const void *, void *,
                                 const double *, size_t *);
typedef ob_status (*ob_vote_op)(const ob_weights *, size_t, ob_dtype, const void *, const int8_t *,
                                const float *, ob_planes *, const double *, float *, float *,
                                size_t *);
typedef ob_status (*ob_flip_op)(size_t, size_t, uint8_t *, ob_planes *, uint64_t *);
typedef ob_status (*ob_absmean_op)(size_t, size_t, ob_dtype, const void *, uint8_t *, float *);

PyObject *ob_py_linear_forward(const char *name, ob_forward_op op, PyObject *args, PyObject *kw);
PyObject *ob_py_linear_backward_input(const char *name, ob_input_op op, PyObject *args,
                                      PyObject *kw);
PyObject *ob_py_vote(const char *name, ob_vote_op op, PyObject *args, PyObject *kw);
PyObject *ob_py_flip(const char *name, ob_flip_op op, PyObject *args, PyObject *kw);
PyObject *ob_py_absmean(const char *name, ob_absmean_op op, PyObject *args, PyObject *kw);

#endif
