// Loops over many small tensors, where a call from Python for each would take longer than the work. Whatever is out of
// the ordinary is answered with NotImplemented and left to packing.py, which has the same loops in Python.
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

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

// A step of Adam. Torch's kernel rounds an element in the rest of a vector register differently from one that fills it,
// so an element's last bit follows from what lies beside it: replicas part whose parameters are grouped differently.
// Here every element goes through the same operations of IEEE 754, whatever instructions the compiler finds for them;
// and where parameters lie side by side, each has constants of its own. The operations are those of torch's plain loops
// on a processor with fused multiply-add, but for the square root: MKL's, which torch takes, errs in the last bit.

struct Constants {
  double beta1, beta2, eps, weight_decay;
  bool maximize, is_decoupled, is_pyro;  // of AdamW, of ClippedAdam
};

// One parameter: `size` is the rate over the correction of the mean, `root` the root of that of the square.
template <typename T>
struct Piece {
  T* param;
  const T* grad;
  T *mean, *square, *max_square;  // null: the mean is the gradient; no largest square is kept
  std::size_t numel;
  double size, root, shrink;
};

enum class Mean { none, lerp, pyro };  // the gradient itself; as in torch's Adam; as in Pyro's

template <typename T, Mean kind, bool has_max, bool decays>
[[gnu::always_inline]] inline void step(const Piece<T>& x, const Constants& c) {
  T* __restrict param = x.param;
  const T* __restrict grad = x.grad;
  T* __restrict mean = x.mean;
  T* __restrict square = x.square;
  T* __restrict max_square = x.max_square;
  const T sign = c.maximize ? -1 : 1, eps = c.eps;
  const T hold = c.beta1, weight = 1 - c.beta1, keep = c.beta2, take = 1 - c.beta2;
  const T size = x.size, root = x.root, shrink = x.shrink, decay = c.weight_decay;
  for (std::size_t i = 0; i < x.numel; ++i) {
    const T p = param[i] * shrink;
    T g = grad[i] * sign;
    if constexpr (decays) g = std::fma(p, decay, g);
    T m = g;
    if constexpr (kind == Mean::lerp) mean[i] = m = std::fma(weight, g - mean[i], mean[i]);
    if constexpr (kind == Mean::pyro) mean[i] = m = std::fma(g, weight, mean[i] * hold);
    T v = square[i] = std::fma(take * g, g, square[i] * keep);
    if constexpr (has_max) v = max_square[i] = v <= max_square[i] ? max_square[i] : v;  // NaN stays
    param[i] = p - size * m / (std::sqrt(v) / root + eps);
  }
}

template <typename T, Mean kind>
[[gnu::always_inline]] inline void step_kind(const Piece<T>& x, const Constants& c) {
  const bool decays = c.weight_decay != 0 && !c.is_decoupled;
  if (x.max_square) return decays ? step<T, kind, true, true>(x, c) : step<T, kind, true, false>(x, c);
  return decays ? step<T, kind, false, true>(x, c) : step<T, kind, false, false>(x, c);
}

template <typename T>
[[gnu::always_inline]] inline void step_any(const Piece<T>& x, const Constants& c) {
  if (x.mean == nullptr) return step_kind<T, Mean::none>(x, c);
  return c.is_pyro ? step_kind<T, Mean::pyro>(x, c) : step_kind<T, Mean::lerp>(x, c);
}

// The widest registers that the processor has, found out when the module is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_WIDTH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_WIDTH
#endif
FOR_EACH_WIDTH void step_floats(const Piece<float>& x, const Constants& c) { step_any(x, c); }
FOR_EACH_WIDTH void step_doubles(const Piece<double>& x, const Constants& c) { step_any(x, c); }
void step_piece(const Piece<float>& x, const Constants& c) { step_floats(x, c); }
void step_piece(const Piece<double>& x, const Constants& c) { step_doubles(x, c); }

constexpr std::int64_t grain = 32768;  // elements of a thread, as in torch

template <typename T>
void step_pieces(const std::vector<Piece<T>>& pieces, const Constants& c) {
  for (const auto& piece : pieces) {
    const auto part = [&](std::int64_t from, std::int64_t to) {
      Piece<T> x = piece;
      for (T** at : {&x.param, &x.mean, &x.square, &x.max_square}) *at = *at ? *at + from : nullptr;
      x.grad += from;
      x.numel = to - from;
      step_piece(x, c);
    };
    const auto numel = static_cast<std::int64_t>(piece.numel);
    numel <= grain ? part(0, numel) : at::parallel_for(0, numel, grain, part);
  }
}

// The tensors of a list; false when one is out of the ordinary.
bool read_tensors(PyObject* list, std::vector<const at::Tensor*>& out) {
  if (!PyList_CheckExact(list)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const at::Tensor* t = tensor(PyList_GET_ITEM(list, i));
    if (t == nullptr || !is_plain(*t)) return false;
    out.push_back(t);
  }
  return true;
}

bool read_numbers(PyObject* list, std::vector<double>& out) {
  if (!PyList_CheckExact(list)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) out.push_back(PyFloat_AsDouble(PyList_GET_ITEM(list, i)));
  return !PyErr_Occurred();
}

using Lists = std::vector<std::vector<const at::Tensor*>>;

// What depends on a parameter's step count and rate. ClippedAdam adds eps before the correction of the root.
template <typename T>
void set_constants(Piece<T>& x, double step, double rate, const Constants& c) {
  const double root = std::sqrt(1 - std::pow(c.beta2, step)), correction = 1 - std::pow(c.beta1, step);
  x.root = c.is_pyro ? 1 : root;
  x.size = (c.is_pyro ? rate * root : rate) / correction;
  x.shrink = c.is_decoupled ? 1 - rate * c.weight_decay : 1;
}

// Walks through tensors and, in each, through the parameters that lie in it side by side.
template <typename T>
bool step_lists(const Lists& lists, const std::vector<std::vector<double>>& numbers, const Constants& c) {
  const std::vector<double>&numels = numbers[0], &steps = numbers[1], &rates = numbers[2];
  std::vector<Piece<T>> pieces;
  pieces.reserve(numels.size());
  std::size_t next = 0;
  for (std::size_t i = 0; i < lists[0].size(); ++i) {
    const auto at_of = [&](int k) {
      return lists[k].empty() ? nullptr : static_cast<T*>(lists[k][i]->mutable_data_ptr());
    };
    T *param = at_of(0), *grad = at_of(1), *mean = at_of(2), *square = at_of(3), *max_square = at_of(4);
    std::int64_t rest = lists[0][i]->numel();
    for (; next < numels.size() && (rest > 0 || numels[next] == 0); ++next) {
      const auto numel = static_cast<std::int64_t>(numels[next]);
      if (numel > rest || numel < 0) return false;
      Piece<T> x{param, grad, mean, square, max_square, static_cast<std::size_t>(numel)};
      if (next > 0 && steps[next] == steps[next - 1] && rates[next] == rates[next - 1]) {
        x.size = pieces.back().size;
        x.root = pieces.back().root;
        x.shrink = pieces.back().shrink;
      } else {
        set_constants(x, steps[next], rates[next], c);
      }
      pieces.push_back(x);
      for (T** at : {&param, &grad, &mean, &square, &max_square}) *at = *at ? *at + numel : nullptr;
      rest -= numel;
    }
    if (rest != 0) return false;
  }
  if (next != numels.size()) return false;
  {
    pybind11::gil_scoped_release release;
    step_pieces(pieces, c);
  }
  for (const at::Tensor* t : lists[0])
    if (!t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
  return true;
}

// adam((params, grads, means, squares, max_squares), (numels, steps, rates), beta1, beta2, eps, weight_decay, maximize,
// is_decoupled, is_pyro): takes a step of Adam; `step_adam_` of kernels.py says what each is.
PyObject* adam(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9 || !PyTuple_CheckExact(args[0]) || !PyTuple_CheckExact(args[1])) return not_implemented();
  if (PyTuple_GET_SIZE(args[0]) != 5 || PyTuple_GET_SIZE(args[1]) != 3) return not_implemented();
  Lists lists(5);
  std::vector<std::vector<double>> numbers(3);
  for (int i = 0; i < 5; ++i)
    if (!read_tensors(PyTuple_GET_ITEM(args[0], i), lists[i])) return not_implemented();
  for (int i = 0; i < 3; ++i)
    if (!read_numbers(PyTuple_GET_ITEM(args[1], i), numbers[i])) return PyErr_Occurred() ? nullptr : not_implemented();
  const Constants c{PyFloat_AsDouble(args[2]), PyFloat_AsDouble(args[3]), PyFloat_AsDouble(args[4]),
                    PyFloat_AsDouble(args[5]), args[6] == Py_True,        args[7] == Py_True,
                    args[8] == Py_True};
  if (PyErr_Occurred()) return nullptr;
  if (lists[0].empty()) Py_RETURN_NONE;

  const auto dtype = lists[0][0]->scalar_type();
  for (const auto& list : lists) {
    const bool may_lack = &list == &lists[2] || &list == &lists[4];
    if (list.size() != lists[0].size() && !(may_lack && list.empty())) return not_implemented();
    for (std::size_t i = 0; i < list.size(); ++i)
      if (list[i]->scalar_type() != dtype || list[i]->numel() != lists[0][i]->numel()) return not_implemented();
  }
  for (const auto& each : numbers)
    if (each.size() != numbers[0].size()) return not_implemented();
  if (dtype == at::kFloat && step_lists<float>(lists, numbers, c)) Py_RETURN_NONE;
  if (dtype == at::kDouble && step_lists<double>(lists, numbers, c)) Py_RETURN_NONE;
  return not_implemented();
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
    {"adam", (PyCFunction)(void*)guarded<adam, PyObject*, PyObject* const*, Py_ssize_t>, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "distopt.optim._bulk", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__bulk() {
  PyObject* result = PyModule_Create(&module);
  if (result != nullptr && PyModule_AddStringConstant(result, "TORCH", DISTOPT_TORCH) < 0) Py_CLEAR(result);
  return result;
}
