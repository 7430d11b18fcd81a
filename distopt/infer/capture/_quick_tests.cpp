// Looks whether objects hold what they held, by identity. quick_tests.py makes the tests.
#include <Python.h>

namespace {

// What a test compares, as numbered in quick_tests.py; its three objects follow.
enum Kind : long { item, size, keys, values, elements, attributes, type, absent };

bool has_item(PyObject* table, PyObject* key, PyObject* value) {
  if (PyDict_CheckExact(table)) return PyDict_GetItemWithError(table, key) == value;
  PyObject* found = PyObject_GetItem(table, key);  // of a class: a view of its dictionary
  Py_XDECREF(found);
  return found == value;
}

bool has_size(PyObject* container, PyObject* expected) {
  return PyObject_Size(container) == PyLong_AsSsize_t(expected);
}

// Whether a dictionary has these keys, or these values, in this order.
bool has_all(PyObject* table, PyObject* expected, bool are_keys) {
  if (PyDict_GET_SIZE(table) != PyTuple_GET_SIZE(expected)) return false;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t i = 0; PyDict_Next(table, &position, &key, &value); ++i) {
    if ((are_keys ? key : value) != PyTuple_GET_ITEM(expected, i)) return false;
  }
  return true;
}

bool has_elements(PyObject* list, PyObject* expected) {
  if (PyList_GET_SIZE(list) != PyTuple_GET_SIZE(expected)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(expected); ++i) {
    if (PyList_GET_ITEM(list, i) != PyTuple_GET_ITEM(expected, i)) return false;
  }
  return true;
}

bool has_attributes(PyObject* object, PyObject* table) {
  PyObject* found = PyObject_GenericGetDict(object, nullptr);
  Py_XDECREF(found);
  return found == table;
}

bool has_none_of(PyObject* table, PyObject* names) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
    if (PyDict_Contains(table, PyTuple_GET_ITEM(names, i)) != 0) return false;
  }
  return true;
}

bool holds(long kind, PyObject* a, PyObject* b, PyObject* c) {
  switch (kind) {
    case item: return has_item(a, b, c);
    case size: return has_size(a, b);
    case keys: return has_all(a, b, true);
    case values: return has_all(a, b, false);
    case elements: return has_elements(a, b);
    case attributes: return has_attributes(a, b);
    case type: return reinterpret_cast<PyObject*>(Py_TYPE(a)) == b;
    case absent: return has_none_of(a, b);
    default: return false;
  }
}

}  // namespace

// Whether all tests hold: a tuple of (kind, object, object, object), one after the other.
bool all_hold(PyObject* tests) {
  for (Py_ssize_t i = 0; i + 3 < PyTuple_GET_SIZE(tests); i += 4) {
    PyObject** test = &PyTuple_GET_ITEM(tests, i);
    if (!holds(PyLong_AsLong(test[0]), test[1], test[2], test[3])) {
      PyErr_Clear();  // of a key that is not there any more
      return false;
    }
  }
  return true;
}
