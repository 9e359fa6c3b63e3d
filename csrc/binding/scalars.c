/* scalars.c - numbers, flags and names from Python, checked, with messages that name them. */
#include "binding.h"

#include <math.h>
#include <string.h>

int
ob_take_size(const ob_call *call, PyObject *object, const char *name, size_t low, size_t high,
             size_t *out)
{
    if (PyBool_Check(object) || !PyIndex_Check(object) || PyArray_Check(object)) {
        return ob_fail(call, PyExc_TypeError, "'%s' must be an integer, got %.80s", name,
                       Py_TYPE(object)->tp_name);
    }
    PyObject *number = PyNumber_Index(object);
    if (number == NULL) {
        return -1;
    }
    int overflow = 0;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    int inside = overflow == 0 && value >= 0 && (size_t)value >= low && (size_t)value <= high;
    if (!inside && overflow == 0) {
        ob_fail(call, PyExc_ValueError, "'%s' must be an integer in [%zu, %zu], got %lld", name,
                low, high, value);
    }
    else if (!inside) { /* no digits: converting a huge int to text is an error of its own */
        ob_fail(call, PyExc_ValueError,
                "'%s' must be an integer in [%zu, %zu], got one beyond 64 bits", name, low, high);
    }
    Py_DECREF(number);
    *out = (size_t)value;
    return inside ? 0 : -1;
}

int
ob_take_double(const ob_call *call, PyObject *object, const char *name, double low, double high,
               double *out)
{
    int number = PyFloat_Check(object) || (PyLong_Check(object) && !PyBool_Check(object)) ||
                 PyArray_IsScalar(object, Floating) || PyArray_IsScalar(object, Integer);
    if (!number) {
        return ob_fail(call, PyExc_TypeError, "'%s' must be a real number, got %.80s", name,
                       Py_TYPE(object)->tp_name);
    }
    double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
            return -1;
        }
        PyErr_Clear();
        value = (double)INFINITY;
    }
    if (!(value >= low && value <= high) || !isfinite(value)) {
        char text[160];
        snprintf(text, sizeof text, "a finite number in [%g, %g], got %g", low, high, value);
        return ob_fail(call, PyExc_ValueError, "'%s' must be %s", name, text);
    }
    *out = value;
    return 0;
}

int
ob_take_flag(const ob_call *call, PyObject *object, const char *name, int *out)
{
    if (!PyBool_Check(object) && !PyArray_IsScalar(object, Bool)) {
        return ob_fail(call, PyExc_TypeError, "'%s' must be a bool, got %.80s", name,
                       Py_TYPE(object)->tp_name);
    }
    *out = PyObject_IsTrue(object);
    return *out < 0 ? -1 : 0;
}

int
ob_take_name(const ob_call *call, PyObject *object, const char *name, size_t count,
             const char *(*text)(size_t), size_t *out)
{
    if (!PyUnicode_Check(object)) {
        return ob_fail(call, PyExc_TypeError, "'%s' must be a str, got %.80s", name,
                       Py_TYPE(object)->tp_name);
    }
    char known[256] = "";
    for (size_t i = 0; i < count; i++) {
        if (PyUnicode_CompareWithASCIIString(object, text(i)) == 0) {
            *out = i;
            return 0;
        }
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s'%s'", i > 0 ? ", " : "", text(i));
    }
    return ob_fail(call, PyExc_ValueError, "'%s' must be one of %s, got %.60R", name, known,
                   object);
}

int
ob_take_betas(const ob_call *call, PyObject *object, const char *name, double out[2])
{
    const double below_one = 1.0 - 0x1p-53;
    if (!PyTuple_Check(object) && !PyList_Check(object)) {
        return ob_fail(call, PyExc_TypeError, "'%s' must be a tuple of two numbers, got %.80s",
                       name, Py_TYPE(object)->tp_name);
    }
    if (PySequence_Fast_GET_SIZE(object) != 2) {
        return ob_fail(call, PyExc_ValueError, "'%s' must be two numbers, got %zd", name,
                       PySequence_Fast_GET_SIZE(object));
    }
    PyObject **items = PySequence_Fast_ITEMS(object);
    int failed = ob_take_double(call, items[0], name, 0.0, below_one, &out[0]) < 0 ||
                 ob_take_double(call, items[1], name, 0.0, below_one, &out[1]) < 0;
    return failed ? -1 : 0;
}

int
ob_take_shape(const ob_call *call, PyObject *object, const char *name, size_t *n, size_t *k)
{
    if (!PyTuple_Check(object) && !PyList_Check(object)) {
        return ob_fail(call, PyExc_TypeError, "'%s' must be a tuple (N, K), got %.80s", name,
                       Py_TYPE(object)->tp_name);
    }
    if (PySequence_Fast_GET_SIZE(object) != 2) {
        return ob_fail(call, PyExc_ValueError, "'%s' must be (N, K), got %zd numbers", name,
                       PySequence_Fast_GET_SIZE(object));
    }
    /* a list could shrink inside an item's __index__ */
    PyObject *pair = PySequence_Tuple(object);
    if (pair == NULL) {
        return -1;
    }
    int failed = ob_take_size(call, PyTuple_GET_ITEM(pair, 0), name, 0, OB_MAX_K, n) < 0 ||
                 ob_take_size(call, PyTuple_GET_ITEM(pair, 1), name, 0, OB_MAX_K, k) < 0;
    Py_DECREF(pair);
    return failed ? -1 : 0;
}
