/* module.c - slots, state, constants and the method table of onebit_ext._core. */
#define OB_IMPORT_NUMPY
#include "binding.h"

/* ------------------------------------------------------------------ constants */
static PyObject *
names_tuple(size_t count, const char *(*text)(size_t))
{
    PyObject *names = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; names != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(text(i));
        if (name == NULL) {
            Py_CLEAR(names);
            break;
        }
        PyTuple_SET_ITEM(names, (Py_ssize_t)i, name);
    }
    return names;
}

/* Names of the rules that write codes while they vote. */
static PyObject *
moving_rules(void)
{
    PyObject *names = PyList_New(0);
    for (int i = 0; names != NULL && i < OB_RULE_COUNT; i++) {
        PyObject *name = PyUnicode_FromString(ob_rule_name((ob_rule)i));
        if (name == NULL || (ob_rule_moves_in_vote((ob_rule)i) && PyList_Append(names, name) < 0)) {
            Py_CLEAR(names);
        }
        Py_XDECREF(name);
    }
    PyObject *found = names != NULL ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return found;
}

static PyObject *
control_dict(void)
{
    PyObject *fields = PyDict_New();
    for (size_t i = 0; fields != NULL && i < OB_CONTROL_LEN; i++) {
        PyObject *index = PyLong_FromSize_t(i);
        if (index == NULL || PyDict_SetItemString(fields, ob_control_field(i), index) < 0) {
            Py_CLEAR(fields);
        }
        Py_XDECREF(index);
    }
    return fields;
}

/* Steals `value`; NULL passes an exception on. */
static int
add(PyObject *module, const char *name, PyObject *value)
{
    int status = value != NULL ? PyModule_AddObjectRef(module, name, value) : -1;
    Py_XDECREF(value);
    return status;
}

static PyObject *
reference_module(void)
{
    PyObject *module = PyModule_New("onebit_ext._core.reference");
    if (module != NULL &&
        (PyModule_AddFunctions(module, ob_reference_methods) < 0 ||
         PyModule_SetDocString(module, "Naive twins of the operations, for tests: same signatures, "
                                       "same bits, one element at a time.") < 0)) {
        Py_CLEAR(module);
    }
    return module;
}

static int
add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **slot)
{
    *slot = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *slot != NULL ? PyModule_AddType(module, *slot) : -1;
}

static int
module_exec(PyObject *module)
{
    ob_state *state = PyModule_GetState(module);
    if (PyArray_ImportNumPyAPI() < 0) {
        return -1;
    }
    if (ob_isa_error() != NULL) {
        PyErr_SetString(PyExc_ImportError, ob_isa_error());
        return -1;
    }
    PyMethodDef *const tables[] = {ob_formats_methods, ob_linear_methods, ob_flip_methods,
                                   ob_runtime_methods, ob_limits_methods, ob_ranks_methods};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (PyModule_AddFunctions(module, tables[i]) < 0) {
            return -1;
        }
    }
    if (add(module, "CONTROL", control_dict()) < 0 ||
        add(module, "RULES", names_tuple(OB_RULE_COUNT, ob_rule_text)) < 0 ||
        add(module, "RULES_MOVING_IN_VOTE", moving_rules()) < 0 ||
        add(module, "FORMATS", names_tuple(OB_FORMAT_COUNT, ob_format_text)) < 0 ||
        add(module, "ETA_LIMIT", PyFloat_FromDouble((double)OB_ETA_LIMIT)) < 0 ||
        PyModule_AddIntConstant(module, "MAX_K", OB_MAX_K) < 0 ||
        PyModule_AddIntConstant(module, "TOKENS_PER_VOTE", OB_TOKENS_PER_VOTE) < 0 ||
        add(module, "reference", reference_module()) < 0 ||
        add_type(module, &ob_ternary_linear_spec, &state->linear_type) < 0 ||
        add_type(module, &ob_flip_optimizer_spec, &state->optimizer_type) < 0) {
        return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------ definition */
static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    ob_state *state = PyModule_GetState(module);
    Py_VISIT(state->linear_type);
    Py_VISIT(state->optimizer_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    ob_state *state = PyModule_GetState(module);
    Py_CLEAR(state->linear_type);
    Py_CLEAR(state->optimizer_type);
    return 0;
}

static void
module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters /* 3.12; NumPy does not support them either */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "onebit_ext._core",
    .m_doc = "Ternary linear layers that train without a float shadow: the C core.",
    .m_size = sizeof(ob_state),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__core(void)
{
    return PyModuleDef_Init(&module_def);
}
