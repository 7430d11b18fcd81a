// A device for tests, on a machine without one: its memory cannot be read by the host, and it counts what waits for it.
//
// Tensors on it are torch's own "privateuseone" tensors. Each has an address in a region that is reserved without any
// access right, so that code which reads a tensor by its address, as if it lay on the host, dies at once. The bytes
// themselves lie at a fixed distance from there. Every operation is computed by the CPU's kernel on copies; what differs
// from a GPU is speed, and that nothing is asynchronous. So waits are counted where a GPU would have to be waited for: a
// blocking copy from or to the host, a number that is read, a result whose shape depends on values.
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <unordered_set>

namespace {

constexpr size_t REGION = size_t(4) << 30;
char* host_base = nullptr;
char* device_base = nullptr;

// The simplest allocator that gives memory back: freed blocks by size.
std::mutex allocator_lock;
size_t top = 0;
std::multimap<size_t, char*> free_blocks;
std::unordered_map<void*, size_t> sizes;

char* to_host(const void* address) { return host_base + (static_cast<const char*>(address) - device_base); }

void release(void* address) {
  if (!address) return;
  std::lock_guard<std::mutex> lock(allocator_lock);
  auto found = sizes.find(address);
  free_blocks.emplace(found->second, static_cast<char*>(address));
  sizes.erase(found);
}

struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    const at::Device device(at::DeviceType::PrivateUse1, 0);
    if (!size) return {nullptr, nullptr, &release, device};
    const size_t rounded = (size + 511) / 512 * 512;
    std::lock_guard<std::mutex> lock(allocator_lock);
    char* address = nullptr;
    auto block = free_blocks.lower_bound(rounded);
    if (block != free_blocks.end() && block->first <= 2 * rounded) {
      address = block->second;
      sizes[address] = block->first;
      free_blocks.erase(block);
    } else {
      TORCH_CHECK(top + rounded <= REGION, "the test device is out of memory");
      address = device_base + top;
      top += rounded;
      sizes[address] = rounded;
    }
    return {address, address, &release, device};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to_host(to), to_host(from), count);
  }
};
Memory memory;

// Counting. A wait is reported to Python while it happens, so that the report can say which line waited.
thread_local int inside = 0;  // copies that a fallback makes are no part of what is measured
std::unique_ptr<py::function> listener;

struct Inside {
  Inside() { ++inside; }
  ~Inside() { --inside; }
};

void report(const char* kind, const std::string& name) {
  if (inside || !listener) return;
  py::gil_scoped_acquire gil;
  if (listener) (*listener)(kind, name);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr at::DeviceType static_type = at::DeviceType::PrivateUse1;
  static at::Device device() { return at::Device(static_type, 0); }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  at::DeviceType type() const override { return static_type; }
  at::Device exchangeDevice(at::Device) const override { return device(); }
  at::Device getDevice() const override { return device(); }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const override { return stream(); }
  c10::Stream getDefaultStream(at::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  at::DeviceIndex deviceCount() const noexcept override { return 1; }
  // Nothing is asynchronous here, so an event has always happened.
  void record(void** event, const c10::Stream&, const at::DeviceIndex, const c10::EventFlag) const override {
    *event = host_base;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const at::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { report("wait", "synchronize"); }
  void synchronizeEvent(void*) const override { report("wait", "synchronize"); }
  void synchronizeDevice(const at::DeviceIndex) const override { report("wait", "synchronize"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(at::DeviceType::CPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::DataPtr fresh = memory.allocate(bytes);
    const size_t kept = std::min(bytes, storage.nbytes());
    if (kept) memory.copy_data(fresh.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

bool is_far(const at::Tensor& t) { return t.device().type() == at::DeviceType::PrivateUse1; }

// The same bytes as a tensor of the CPU.
at::Tensor near_alias(const at::Tensor& t) {
  if (!is_far(t)) return t;
  auto options = t.options().device(at::kCPU).requires_grad(false);
  if (!t.storage().nbytes()) return at::empty_strided(t.sizes(), t.strides(), options);
  return at::from_blob(to_host(t.data_ptr()), t.sizes(), t.strides(), options);
}

at::Tensor far_empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor far_empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                             std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  // As with CUDA, a copy that may block waits for all that was started before it, in both directions.
  if (is_far(from) != is_far(to)) {
    const char* name = is_far(from) ? "copy to the host" : "copy from the host";
    report(non_blocking ? "copy" : "wait", name);
  }
  near_alias(to).copy_(near_alias(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar read_number(const at::Tensor& t) {
  report("wait", "item");
  return near_alias(t).item();
}

at::Tensor far_as_strided(const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride,
                          std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}

at::Tensor far_view(const at::Tensor& t, c10::IntArrayRef size) { return at::native::view(t, size); }

at::Tensor far_reshape_alias(const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(t, size, stride);
}

at::Tensor far_unfold(const at::Tensor& t, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(t, dim, size, step);
}

const at::Tensor& far_resize_(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  int64_t count = 1;
  for (auto each : sizes) count *= each;
  const size_t needed = (count + t.storage_offset()) * t.element_size();
  if (needed > t.storage().nbytes()) Hooks().resizePrivateUse1Bytes(t.storage(), needed);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return t;
}

at::Tensor& far_set_(at::Tensor& t, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                     c10::IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  t.unsafeGetTensorImpl()->set_storage_offset(offset);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride.empty() ? c10::contiguous_strides(size) : stride);
  return t;
}

const std::unordered_set<std::string> VALUE_SHAPED = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::histc", "aten::nonzero_numpy", "aten::argwhere"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  bool waits = VALUE_SHAPED.count(schema.name()) > 0;
  for (const auto& result : schema.returns()) {
    auto kind = result.type()->kind();
    waits |= kind == c10::TypeKind::BoolType || kind == c10::TypeKind::IntType || kind == c10::TypeKind::FloatType;
  }
  // An index that is a mask has as many results as it has ones.
  if (schema.name() == "aten::index") {
    for (const auto& each : torch::jit::peek(*stack, 1, schema.arguments().size()).toListRef())
      waits |= each.isTensor() && (each.toTensor().scalar_type() == at::kBool || each.toTensor().scalar_type() == at::kByte);
  }
  if (schema.name() == "aten::repeat_interleave" && schema.overload_name() == "Tensor")
    waits |= torch::jit::peek(*stack, 1, 2).isNone();
  if (waits) report("wait", schema.name());
  report("op", schema.name());
  Inside guard;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", far_empty);
  m.impl("empty_strided", far_empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", read_number);
  m.impl("as_strided", far_as_strided);
  m.impl("view", far_view);
  m.impl("_reshape_alias", far_reshape_alias);
  m.impl("unfold", far_unfold);
  m.impl("resize_", far_resize_);
  m.impl("set_.source_Storage_storage_offset", far_set_);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace

PYBIND11_MODULE(_far_device, m) {
  host_base = static_cast<char*>(
      mmap(nullptr, REGION, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  device_base = static_cast<char*>(mmap(nullptr, REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  TORCH_CHECK(host_base != MAP_FAILED && device_base != MAP_FAILED, "no address space for the test device");
  c10::SetAllocator(at::DeviceType::PrivateUse1, &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("near_alias", &near_alias);
  m.def("listen", [](py::object function) {
    listener = function.is_none() ? nullptr : std::make_unique<py::function>(py::reinterpret_borrow<py::function>(function));
  });
}
