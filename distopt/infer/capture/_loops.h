// Exact arithmetic on large tensors, many operations in one loop over blocks that stay in a core's cache.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace loops {

constexpr int64_t block_size = 1024;  // elements, as in loops.py

// Bytes between blocks in memory besides their own: at multiples of 4,096 all would fall into the same lines of a cache.
constexpr int64_t padding = 192;

// Each loop is compiled for two sets of instructions, of which the processor decides. Neither contracts.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DISTOPT_CLONES __attribute__((target_clones("default", "avx2")))
#else
#define DISTOPT_CLONES
#endif

using Kernel = void (*)(void* out, const void* a, const void* b, int64_t n);

// `out` is apart from the operands, or the same memory as one of them.
#define DISTOPT_LOOP(name, T, expression)                                                       \
  DISTOPT_CLONES inline void name##_vv(void* out, const void* a, const void* b, int64_t n) {    \
    T* to = static_cast<T*>(out);                                                               \
    const T* xs = static_cast<const T*>(a);                                                     \
    const T* ys = static_cast<const T*>(b);                                                     \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; ++i) {                                      \
      const T x = xs[i];                                                                        \
      [[maybe_unused]] const T y = ys[i];                                                       \
      to[i] = expression;                                                                       \
    }                                                                                           \
  }                                                                                             \
  DISTOPT_CLONES inline void name##_vs(void* out, const void* a, const void* b, int64_t n) {    \
    T* to = static_cast<T*>(out);                                                               \
    const T* xs = static_cast<const T*>(a);                                                     \
    [[maybe_unused]] const T y = *static_cast<const T*>(b);                                     \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; ++i) {                                      \
      const T x = xs[i];                                                                        \
      to[i] = expression;                                                                       \
    }                                                                                           \
  }                                                                                             \
  DISTOPT_CLONES inline void name##_sv(void* out, const void* a, const void* b, int64_t n) {    \
    T* to = static_cast<T*>(out);                                                               \
    const T x = *static_cast<const T*>(a);                                                      \
    const T* ys = static_cast<const T*>(b);                                                     \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; ++i) {                                      \
      [[maybe_unused]] const T y = ys[i];                                                       \
      to[i] = expression;                                                                       \
    }                                                                                           \
  }

#define DISTOPT_LOOPS(name, expression)   \
  DISTOPT_LOOP(name##_float, float, expression) \
  DISTOPT_LOOP(name##_double, double, expression)

DISTOPT_LOOPS(add, x + y)
DISTOPT_LOOPS(sub, x - y)
DISTOPT_LOOPS(rsub, y - x)
DISTOPT_LOOPS(mul, x* y)
DISTOPT_LOOPS(div, x / y)
DISTOPT_LOOPS(neg, -x)
DISTOPT_LOOPS(square, x* x)
DISTOPT_LOOPS(copy, x)
DISTOPT_LOOPS(reciprocal, 1 / x)

// Which operand is one number.
enum class Shape { vector_vector, vector_scalar, scalar_vector };

inline Kernel kernel_of(const std::string& name, bool is_double, Shape shape) {
#define DISTOPT_KERNELS(each)                                                                               \
  if (name == #each) {                                                                                      \
    if (shape == Shape::vector_vector) return is_double ? each##_double_vv : each##_float_vv;               \
    if (shape == Shape::vector_scalar) return is_double ? each##_double_vs : each##_float_vs;               \
    return is_double ? each##_double_sv : each##_float_sv;                                                  \
  }
  DISTOPT_KERNELS(add)
  DISTOPT_KERNELS(sub)
  DISTOPT_KERNELS(rsub)
  DISTOPT_KERNELS(mul)
  DISTOPT_KERNELS(div)
  DISTOPT_KERNELS(neg)
  DISTOPT_KERNELS(square)
  DISTOPT_KERNELS(copy)
  DISTOPT_KERNELS(reciprocal)
#undef DISTOPT_KERNELS
  TORCH_CHECK(false, "no loop computes ", name);
}

enum class Source : int { slot, fixed, temporary, output };

struct Operand {
  Source source = Source::fixed;
  int index = 0;  // of the slot, the temporary or the output
  at::Tensor owner;
  bool is_scalar = false;
  int64_t period = 0;  // elements after which it begins anew; 0: it has all elements of the result
  int tile = -1;       // which repeats it over a block
  const char* data = nullptr;  // of this run
};

struct Operation {
  Kernel kernel = nullptr;
  std::vector<Operand> in;
  bool to_output = false;
  int index = 0;  // of the output or the temporary that it writes
};

struct Loop {
  std::vector<Operation> operations;
  std::vector<at::Tensor> like;  // one for each output, on no device
  int num_temporaries = 0, num_tiles = 0;
  int64_t n = 0;
  int64_t itemsize = 0;

  // `outs` are contiguous, one for each output.
  void run(const std::vector<at::Tensor>& outs) const {
    std::vector<char*> to;
    for (const auto& each : outs) to.push_back(static_cast<char*>(each.mutable_data_ptr()));
    // Split as ATen splits its own loops: where a thread flushes denormals and another does not, both do as there.
    at::parallel_for(0, n, at::internal::GRAIN_SIZE, [&](int64_t first, int64_t last) {
      std::unique_ptr<char, decltype(&std::free)> buffer(
          static_cast<char*>(std::aligned_alloc(64, stride() * (num_temporaries + num_tiles + 1))), &std::free);
      TORCH_CHECK(buffer != nullptr, "no memory for a loop's blocks");
      fill_tiles(buffer.get() + stride() * num_temporaries, first);
      for (int64_t at = first; at < last; at += block_size) {
        run_block(at, std::min(block_size, last - at), to, buffer.get());
      }
    });
  }

 private:
  int64_t stride() const { return block_size * itemsize + padding; }

  // Repeats what has a period over a block, from the element at which this thread begins.
  void fill_tiles(char* tiles, int64_t first) const {
    for (const auto& operation : operations) {
      for (const auto& each : operation.in) {
        if (each.tile < 0) continue;
        char* tile = tiles + each.tile * stride();
        for (int64_t i = 0; i < block_size; ++i) {
          std::memcpy(tile + i * itemsize, each.data + (first + i) % each.period * itemsize, itemsize);
        }
      }
    }
  }

  void run_block(int64_t first, int64_t count, const std::vector<char*>& to, char* buffer) const {
    const int64_t offset = first * itemsize;
    for (const auto& operation : operations) {
      const char* data[2] = {nullptr, nullptr};
      for (size_t i = 0; i < operation.in.size(); ++i) {
        const Operand& each = operation.in[i];
        if (each.is_scalar) data[i] = each.data;
        else if (each.tile >= 0) data[i] = buffer + (num_temporaries + each.tile) * stride();
        else if (each.source == Source::temporary) data[i] = buffer + each.index * stride();
        else if (each.source == Source::output) data[i] = to[each.index] + offset;
        else data[i] = each.data + offset;
      }
      if (operation.in.size() == 1) data[1] = data[0];
      char* out = operation.to_output ? to[operation.index] + offset : buffer + operation.index * stride();
      operation.kernel(out, data[0], data[1], count);
    }
  }
};

}  // namespace loops
