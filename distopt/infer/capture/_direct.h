// Arithmetic on small tensors, and indexing of vectors, without torch's dispatcher, allocator and iterators.
//
// It is limited to what IEEE 754 rounds exactly, whoever computes it: the results equal ATen's in every bit. It must be
// compiled without contraction of multiplications and additions (-ffp-contract=off). direct.py chooses the operations.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace {

enum class Code { add, sub, rsub, mul, div, neg, square, copy, sum, where, eq, ne, lt, le, gt, ge, reciprocal, gather, scatter_add, sum_pairs };
enum class Layout : int { scalar = 0, contiguous = 1, strided = 2 };

struct Operand {
  int slot = -1;  // read when the program runs; -1: `data` is fixed
  const void* data = nullptr;
  Layout layout = Layout::scalar;
  std::vector<int64_t> offsets;  // of the elements, where they do not lie in the order of the result
  at::Tensor owner;
};

struct Direct;
using Kernel = void (*)(const Direct&, const void* const*);

struct Direct {
  Kernel kernel = nullptr;
  int64_t n = 0;
  int64_t extent = 0;  // of gather: elements of the table; of scatter_add: how many values there are
  void* out = nullptr;
  std::vector<Operand> in;
  at::Tensor result;
};

template <class T>
inline T element(const void* data, const Operand& operand, int64_t i) {
  const T* values = static_cast<const T*>(data);
  switch (operand.layout) {
    case Layout::scalar: return values[0];
    case Layout::contiguous: return values[i];
    default: return values[operand.offsets[i]];
  }
}

template <class T, class R, class F>
inline void unary(const Direct& d, const void* const* data, F f) {
  R* out = static_cast<R*>(d.out);
  const T* a = static_cast<const T*>(data[0]);
  const int64_t n = d.n;
  if (n == 1) {
    out[0] = f(d.in[0].layout == Layout::strided ? a[d.in[0].offsets[0]] : a[0]);
  } else if (d.in[0].layout == Layout::contiguous) {
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = f(element<T>(a, d.in[0], i));
  }
}

template <class T, class R, class F>
inline void binary(const Direct& d, const void* const* data, F f) {
  R* out = static_cast<R*>(d.out);
  const T* a = static_cast<const T*>(data[0]);
  const T* b = static_cast<const T*>(data[1]);
  const Layout la = d.in[0].layout, lb = d.in[1].layout;
  const int64_t n = d.n;
  if (la == Layout::strided || lb == Layout::strided) {
    for (int64_t i = 0; i < n; ++i) out[i] = f(element<T>(a, d.in[0], i), element<T>(b, d.in[1], i));
  } else if (n == 1) {
    out[0] = f(a[0], b[0]);
  } else if (la == Layout::contiguous && lb == Layout::contiguous) {
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], b[i]);
  } else if (la == Layout::contiguous) {
    const T y = b[0];
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], y);
  } else if (lb == Layout::contiguous) {
    const T x = a[0];
    for (int64_t i = 0; i < n; ++i) out[i] = f(x, b[i]);
  } else {
    const R value = f(a[0], b[0]);
    for (int64_t i = 0; i < n; ++i) out[i] = value;
  }
}

template <class T>
void where_kernel(const Direct& d, const void* const* data) {
  T* out = static_cast<T*>(d.out);
  for (int64_t i = 0; i < d.n; ++i) {
    out[i] = element<bool>(data[0], d.in[0], i) ? element<T>(data[1], d.in[1], i) : element<T>(data[2], d.in[2], i);
  }
}

// Indices count from the end where they are negative. Others are an error, whose message is left to an eager step.
inline int64_t wrapped(int64_t index, int64_t size) {
  if (index < 0) index += size;
  TORCH_CHECK_INDEX(index >= 0 && index < size, "index ", index, " is out of bounds for size ", size);
  return index;
}

constexpr int64_t block_size = 1024;  // of indices, which are looked at together before they are used

inline bool all_within(const int64_t* index, int64_t n, int64_t size) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= static_cast<uint64_t>(index[i]) >= static_cast<uint64_t>(size);
  return outside == 0;
}

template <class T>
void gather_kernel(const Direct& d, const void* const* data) {
  T* out = static_cast<T*>(d.out);
  const T* table = static_cast<const T*>(data[0]);
  const int64_t* index = static_cast<const int64_t*>(data[1]);
  const int64_t size = d.extent;
  for (int64_t start = 0; start < d.n; start += block_size) {
    const int64_t end = std::min(d.n, start + block_size);
    if (all_within(index + start, end - start, size)) {
      for (int64_t i = start; i < end; ++i) out[i] = table[index[i]];
    } else {
      for (int64_t i = start; i < end; ++i) out[i] = table[wrapped(index[i], size)];
    }
  }
}

// Sums in the order of the indices, as ATen does on one thread.
template <class T>
void scatter_add_kernel(const Direct& d, const void* const* data) {
  T* out = static_cast<T*>(d.out);
  const int64_t* index = static_cast<const int64_t*>(data[1]);
  const T* values = static_cast<const T*>(data[2]);
  const int64_t size = d.n;
  std::memcpy(out, data[0], size * sizeof(T));
  for (int64_t start = 0; start < d.extent; start += block_size) {
    const int64_t end = std::min(d.extent, start + block_size);
    if (all_within(index + start, end - start, size)) {
      for (int64_t i = start; i < end; ++i) out[index[i]] += values[i];
    } else {
      for (int64_t i = start; i < end; ++i) out[wrapped(index[i], size)] += values[i];
    }
  }
}

// Sums of two, rounded once in whatever order. They begin with zero, as those of one element do.
template <class T>
void sum_pairs_kernel(const Direct& d, const void* const* data) {
  T* out = static_cast<T*>(d.out);
  const T* a = static_cast<const T*>(data[0]);
  for (int64_t i = 0; i < d.n; ++i) out[i] = (T(0) + a[2 * i]) + a[2 * i + 1];
}

template <class From, class To>
void cast_kernel(const Direct& d, const void* const* data) {
  unary<From, To>(d, data, [](From x) { return static_cast<To>(x); });
}

template <class T>
Kernel arithmetic(Code code) {
  switch (code) {
    case Code::add: return [](const Direct& d, const void* const* p) { binary<T, T>(d, p, [](T x, T y) { return x + y; }); };
    case Code::sub: return [](const Direct& d, const void* const* p) { binary<T, T>(d, p, [](T x, T y) { return x - y; }); };
    case Code::rsub: return [](const Direct& d, const void* const* p) { binary<T, T>(d, p, [](T x, T y) { return y - x; }); };
    case Code::mul: return [](const Direct& d, const void* const* p) { binary<T, T>(d, p, [](T x, T y) { return x * y; }); };
    case Code::div: return [](const Direct& d, const void* const* p) { binary<T, T>(d, p, [](T x, T y) { return x / y; }); };
    case Code::neg: return [](const Direct& d, const void* const* p) { unary<T, T>(d, p, [](T x) { return -x; }); };
    case Code::square: return [](const Direct& d, const void* const* p) { unary<T, T>(d, p, [](T x) { return x * x; }); };
    case Code::copy: return cast_kernel<T, T>;
    // ATen's sum of one element begins with zero, which makes 0.0 of -0.0.
    case Code::sum: return [](const Direct& d, const void* const* p) { unary<T, T>(d, p, [](T x) { return T(0) + x; }); };
    case Code::reciprocal: return [](const Direct& d, const void* const* p) { unary<T, T>(d, p, [](T x) { return T(1) / x; }); };
    case Code::where: return where_kernel<T>;
    case Code::gather: return gather_kernel<T>;
    case Code::scatter_add: return scatter_add_kernel<T>;
    case Code::sum_pairs: return sum_pairs_kernel<T>;
    case Code::eq: return [](const Direct& d, const void* const* p) { binary<T, bool>(d, p, [](T x, T y) { return x == y; }); };
    case Code::ne: return [](const Direct& d, const void* const* p) { binary<T, bool>(d, p, [](T x, T y) { return x != y; }); };
    case Code::lt: return [](const Direct& d, const void* const* p) { binary<T, bool>(d, p, [](T x, T y) { return x < y; }); };
    case Code::le: return [](const Direct& d, const void* const* p) { binary<T, bool>(d, p, [](T x, T y) { return x <= y; }); };
    case Code::gt: return [](const Direct& d, const void* const* p) { binary<T, bool>(d, p, [](T x, T y) { return x > y; }); };
    case Code::ge: return [](const Direct& d, const void* const* p) { binary<T, bool>(d, p, [](T x, T y) { return x >= y; }); };
  }
  return nullptr;
}

template <class To>
Kernel cast_from(at::ScalarType from) {
  switch (from) {
    case at::kFloat: return cast_kernel<float, To>;
    case at::kDouble: return cast_kernel<double, To>;
    case at::kBool: return cast_kernel<bool, To>;
    case at::kLong: return cast_kernel<int64_t, To>;
    default: return nullptr;
  }
}

Code code_of(const std::string& name) {
  static const std::vector<std::string> names = {"add", "sub", "rsub", "mul", "div", "neg", "square", "copy", "sum",
                                                 "where", "eq", "ne", "lt", "le", "gt", "ge", "reciprocal",
                                                 "gather", "scatter_add", "sum_pairs"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<Code>(i);
  }
  TORCH_CHECK(false, "no direct arithmetic is named ", name);
}

}  // namespace
