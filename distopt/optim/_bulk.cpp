// Loops over many small tensors, where a call from Python for each would take longer than the work. Whatever is out of
// the ordinary is answered with NotImplemented and left to packing.py, which has the same loops in Python.
#include <torch/csrc/autograd/python_variable.h>

#include <cstddef>
#include <cstring>

namespace {

// The tensor behind `object`, null unless it is a Tensor or a Parameter and no subclass of them.
const at::Tensor* tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

// Whether a tensor's bytes here are its values, as they are not in fake, functional, conjugate, negative, zero tensors.
bool is_plain(const at::Tensor& t) {
  const auto keys = t.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU) && t.has_storage() && t.is_contiguous();
}

bool is_like(const at::Tensor& t, const at::Tensor& plain) {
  return t.key_set() == plain.key_set() && t.dtype() == plain.dtype();
}

PyObject* not_implemented() { return Py_NewRef(Py_NotImplemented); }

// same(a, b): whether two tuples hold the same objects.
PyObject* same(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_CheckExact(args[0]) || !PyTuple_CheckExact(args[1])) return not_implemented();
  const Py_ssize_t n = PyTuple_GET_SIZE(args[0]);
  if (n != PyTuple_GET_SIZE(args[1])) Py_RETURN_FALSE;
  const auto* a = reinterpret_cast<PyTupleObject*>(args[0])->ob_item;
  const auto* b = reinterpret_cast<PyTupleObject*>(args[1])->ob_item;
  return PyBool_FromLong(n == 0 || std::memcmp(a, b, n * sizeof(PyObject*)) == 0);
}

// addresses(params): where they are in memory, as bytes.
PyObject* addresses(PyObject*, PyObject* params) {
  if (!PyTuple_CheckExact(params)) return not_implemented();
  const Py_ssize_t n = PyTuple_GET_SIZE(params);
  PyObject* result = PyBytes_FromStringAndSize(nullptr, n * sizeof(void*));
  if (result == nullptr) return nullptr;
  auto* out = PyBytes_AS_STRING(result);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const at::Tensor* p = tensor(PyTuple_GET_ITEM(params, i));
    if (p == nullptr || !p->has_storage()) {
      Py_DECREF(result);
      return not_implemented();
    }
    const void* address = p->const_data_ptr();
    std::memcpy(out + i * sizeof(void*), &address, sizeof(void*));
  }
  return result;
}

// bump(params): counts a change in each parameter's version.
PyObject* bump(PyObject*, PyObject* params) {
  if (!PyTuple_CheckExact(params)) return not_implemented();
  const Py_ssize_t n = PyTuple_GET_SIZE(params);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const at::Tensor* p = tensor(PyTuple_GET_ITEM(params, i));
    if (p == nullptr || p->is_inference()) return not_implemented();
  }
  for (Py_ssize_t i = 0; i < n; ++i) tensor(PyTuple_GET_ITEM(params, i))->unsafeGetTensorImpl()->bump_version();
  Py_RETURN_NONE;
}

// dense(params): whether each has a gradient that is strided and contiguous.
PyObject* dense(PyObject*, PyObject* params) {
  if (!PyTuple_CheckExact(params)) return not_implemented();
  for (Py_ssize_t i = 0, n = PyTuple_GET_SIZE(params); i < n; ++i) {
    const at::Tensor* p = tensor(PyTuple_GET_ITEM(params, i));
    if (p == nullptr) return not_implemented();
    const at::Tensor& g = p->grad();
    if (!g.defined() || g.layout() != c10::kStrided || !g.is_contiguous()) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// gather(params, home, buffer): copies each .grad into `buffer`, side by side; false when `params` do not fill `home`.
PyObject* gather(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_CheckExact(args[0])) return not_implemented();
  const at::Tensor *home = tensor(args[1]), *buffer = tensor(args[2]);
  if (!home || !buffer || !is_plain(*home) || !is_plain(*buffer) || !is_like(*home, *buffer)) return not_implemented();
  if (home->numel() != buffer->numel()) return not_implemented();
  const auto item = static_cast<std::ptrdiff_t>(buffer->itemsize());
  const char* at = static_cast<const char*>(home->const_data_ptr());
  char* to = static_cast<char*>(buffer->mutable_data_ptr());
  const char* end = to + buffer->nbytes();
  for (Py_ssize_t i = 0, n = PyTuple_GET_SIZE(args[0]); i < n; ++i) {
    const at::Tensor* p = tensor(PyTuple_GET_ITEM(args[0], i));
    if (p == nullptr || !is_like(*p, *home)) return not_implemented();
    const std::ptrdiff_t bytes = p->numel() * item;
    if (p->const_data_ptr() != at || bytes > end - to || !p->is_contiguous()) Py_RETURN_FALSE;
    const at::Tensor& g = p->grad();
    if (!g.defined() || !is_like(g, *buffer) || !g.is_contiguous() || g.numel() != p->numel()) return not_implemented();
    std::memcpy(to, g.const_data_ptr(), bytes);
    at += bytes;
    to += bytes;
  }
  return PyBool_FromLong(to == end);
}

template <auto function, typename... Args>
PyObject* guarded(Args... args) {  // what torch throws becomes an exception of Python
  HANDLE_TH_ERRORS
  return function(args...);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"same", (PyCFunction)(void*)guarded<same, PyObject*, PyObject* const*, Py_ssize_t>, METH_FASTCALL, nullptr},
    {"addresses", guarded<addresses, PyObject*, PyObject*>, METH_O, nullptr},
    {"bump", guarded<bump, PyObject*, PyObject*>, METH_O, nullptr},
    {"dense", guarded<dense, PyObject*, PyObject*>, METH_O, nullptr},
    {"gather", (PyCFunction)(void*)guarded<gather, PyObject*, PyObject* const*, Py_ssize_t>, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "distopt.optim._bulk", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__bulk() {
  PyObject* result = PyModule_Create(&module);
  if (result != nullptr && PyModule_AddStringConstant(result, "TORCH", DISTOPT_TORCH) < 0) Py_CLEAR(result);
  return result;
}
