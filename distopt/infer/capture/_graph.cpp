// Runs the operations of a recorded step without Python: operators of torch's dispatcher, arithmetic on small tensors
// that needs none of its overhead (_direct.h), arithmetic on large ones in loops over blocks (_loops.h), and calls back
// into Python where the step has them. program.py builds the programs.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "_direct.h"
#include "_loops.h"

namespace py = pybind11;
using c10::IValue;

bool all_hold(PyObject* tests);  // _quick_tests.cpp

namespace {

// Instructions.

enum class Kind { slot, constant, tensors, optional_tensors };

struct Argument {
  Kind kind = Kind::constant;
  int slot = -1;
  IValue constant;
  std::vector<int> slots;
};

enum class Runner { aten, direct, loop, host, pack };

struct Instruction {
  Runner runner = Runner::aten;
  std::optional<c10::OperatorHandle> op;
  std::vector<Argument> args;
  std::vector<int> outs;
  std::vector<int> dead;  // slots whose values no later instruction reads
  int index = 0;          // into the program's list of direct arithmetic, or of host functions
  size_t num_results = 0;
};

// What a tensor that comes from outside must look like, since the program's strides and offsets were computed for it.
struct Expected {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  c10::Device device;
  bool conjugate, negative;  // whether the values stand for their conjugates or negatives, as of x.conj()

  explicit Expected(const at::Tensor& t)
      : sizes(t.sizes().vec()),
        strides(t.strides().vec()),
        dtype(t.scalar_type()),
        device(t.device()),
        conjugate(t.is_conj()),
        negative(t.is_neg()) {}

  bool matches(const at::Tensor& t) const {
    return t.defined() && t.scalar_type() == dtype && t.device() == device && t.sizes() == at::IntArrayRef(sizes) &&
           t.strides() == at::IntArrayRef(strides) && t.is_conj() == conjugate && t.is_neg() == negative;
  }
};

struct Foreign {
  int slot;
  at::Tensor tensor;
  Expected expected;
  at::Tensor compared;  // a copy of the values that it must have; undefined: any
  bool written;
  bool requires_grad;  // an eager step would leave a gradient in it
};

struct Check {
  int slot;
  bool answer;
};

struct Gradient {
  int param;
  int slot;
  Expected expected;
};

// Hooks on a parameter's gradient run in autograd alone. Bits: on the gradient, after it is accumulated, on its node.
int hooks_of(const at::Tensor& param) {
  namespace impl = torch::autograd::impl;
  if (impl::get_autograd_meta(param) == nullptr) return 0;
  int found = impl::hooks(param).empty() ? 0 : 1;
  if (impl::post_acc_grad_hooks(param) != nullptr) found |= 2;
  const auto node = impl::try_get_grad_accumulator(param);
  if (node != nullptr && !(node->pre_hooks().empty() && node->post_hooks().empty())) found |= 4;
  return found;
}

// How the processor rounds, and whether denormals are zeros (torch.set_flush_denormal).
unsigned float_control() {
#if defined(__SSE2__)
  return _mm_getcsr() & ~0x3fu;  // without the flags of what has happened
#else
  return 0;
#endif
}

enum Status : int { ran = -1, inputs_differ = -2, gradients_differ = -3, constants_differ = -4, busy = -5, not_finite = -6 };

bool same_values(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return std::memcmp(a.const_data_ptr(), b.const_data_ptr(), b.nbytes()) == 0;
  const at::Tensor packed = a.contiguous();
  return std::memcmp(packed.const_data_ptr(), b.contiguous().const_data_ptr(), packed.nbytes()) == 0;
}

class Program {
 public:
  // Instructions, in order.

  void add_op(const std::string& name, const std::string& overload, const py::list& args, std::vector<int> outs) {
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const auto& schema = op.schema();
    TORCH_CHECK(args.size() == schema.arguments().size(), name, ".", overload, " takes other arguments");
    Instruction instruction;
    instruction.op = op;
    instruction.outs = std::move(outs);
    instruction.num_results = schema.returns().size();
    for (size_t i = 0; i < args.size(); ++i) {
      const auto pair = py::reinterpret_borrow<py::tuple>(args[i]);
      instruction.args.push_back(argument(pair, schema.arguments()[i]));
    }
    code_.push_back(std::move(instruction));
  }

  // operands: (slot or -1, fixed tensor or None, layout, offsets)
  void add_direct(const std::string& name, at::Tensor result, at::ScalarType from, int out, const py::list& operands,
                  int64_t extent) {
    Direct direct;
    direct.extent = extent;
    const Code code = code_of(name);
    const auto to = result.scalar_type();
    if (code == Code::copy) direct.kernel = to == at::kFloat ? cast_from<float>(from) : cast_from<double>(from);
    else direct.kernel = from == at::kFloat ? arithmetic<float>(code) : arithmetic<double>(code);
    TORCH_CHECK(direct.kernel != nullptr, "no direct arithmetic ", name, " for ", from);
    direct.n = result.numel();
    direct.out = result.mutable_data_ptr();
    direct.result = result;
    Instruction instruction;
    instruction.runner = Runner::direct;
    instruction.outs = {out};
    for (const auto& each : operands) {
      const auto pair = py::reinterpret_borrow<py::tuple>(each);
      Operand operand;
      operand.slot = pair[0].cast<int>();
      if (operand.slot < 0) {
        operand.owner = pair[1].cast<at::Tensor>();
        operand.data = operand.owner.const_data_ptr();
      } else {
        Argument a;
        a.kind = Kind::slot;
        a.slot = operand.slot;
        instruction.args.push_back(std::move(a));
      }
      operand.layout = static_cast<Layout>(pair[2].cast<int>());
      operand.offsets = pair[3].cast<std::vector<int64_t>>();
      direct.in.push_back(std::move(operand));
    }
    instruction.index = static_cast<int>(directs_.size());
    directs_.push_back(std::move(direct));
    fixed_.emplace_back(out, std::move(result));
    code_.push_back(std::move(instruction));
  }

  // operations: (name, operands, whether it writes an output, which output or temporary it writes), where operands are
  // (source, index, fixed tensor or None, whether it is one number, period); outs: (slot, tensor that looks like it).
  void add_loop(const py::list& operations, const py::list& outs, int num_temporaries) {
    loops::Loop loop;
    Instruction instruction;
    instruction.runner = Runner::loop;
    for (const auto& each : outs) {
      const auto pair = py::reinterpret_borrow<py::tuple>(each);
      instruction.outs.push_back(pair[0].cast<int>());
      loop.like.push_back(pair[1].cast<at::Tensor>());
    }
    loop.num_temporaries = num_temporaries;
    loop.n = loop.like.at(0).numel();
    loop.itemsize = loop.like.at(0).element_size();
    const bool is_double = loop.like.at(0).scalar_type() == at::kDouble;
    for (const auto& each : operations) {
      const auto fields = py::reinterpret_borrow<py::tuple>(each);
      loops::Operation operation;
      for (const auto& operand : fields[1]) {
        operation.in.push_back(loop_operand(py::reinterpret_borrow<py::tuple>(operand), loop));
        if (operation.in.back().source != loops::Source::slot) continue;
        Argument a;
        a.kind = Kind::slot;
        a.slot = operation.in.back().index;
        instruction.args.push_back(std::move(a));
      }
      auto shape = loops::Shape::vector_vector;
      if (operation.in.back().is_scalar && operation.in.size() == 2) shape = loops::Shape::vector_scalar;
      if (operation.in.front().is_scalar) shape = loops::Shape::scalar_vector;
      operation.kernel = loops::kernel_of(fields[0].cast<std::string>(), is_double, shape);
      operation.to_output = fields[2].cast<bool>();
      operation.index = fields[3].cast<int>();
      loop.operations.push_back(std::move(operation));
    }
    instruction.index = static_cast<int>(loops_.size());
    loops_.push_back(std::move(loop));
    code_.push_back(std::move(instruction));
  }

  // A function of Python's, which returns the tensors of `outs`; nothing if there are none.
  void add_host(py::object function, const std::vector<int>& ins, const std::vector<int>& outs) {
    Instruction instruction;
    instruction.runner = Runner::host;
    instruction.index = static_cast<int>(hosts_.size());
    instruction.args = slot_arguments(ins);
    instruction.outs = outs;
    hosts_.push_back(std::move(function));
    code_.push_back(std::move(instruction));
  }

  // Copies tensors side by side into one that stays.
  void add_pack(const std::vector<int>& ins, at::Tensor flat) {
    Instruction instruction;
    instruction.runner = Runner::pack;
    instruction.index = static_cast<int>(packs_.size());
    instruction.args = slot_arguments(ins);
    packs_.push_back(std::move(flat));
    code_.push_back(std::move(instruction));
  }

  // Values.

  void set_fixed(int slot, at::Tensor tensor) { fixed_.emplace_back(slot, tensor.detach()); }

  void set_foreign(int slot, at::Tensor tensor, std::optional<at::Tensor> compared, bool written) {
    foreign_.push_back({slot, tensor, Expected(tensor), compared.value_or(at::Tensor()), written, tensor.requires_grad()});
  }

  // The first slots are the parameters', then come the gradients of those that have one, then the arguments.
  void set_inputs(const py::tuple& params, const std::vector<int>& with_grad, const std::vector<at::Tensor>& args) {
    params_ = params;
    for (const auto& each : params) {
      const at::Tensor& param = THPVariable_Unpack(each.ptr());
      param_tensors_.push_back(param);
      param_expected_.emplace_back(param);
      requires_grad_.push_back(param.requires_grad());
      hooks_.push_back(hooks_of(param));
    }
    with_grad_.assign(params.size(), no_grad);
    for (int index : with_grad) {
      with_grad_[index] = written_grad;
      grad_expected_.emplace_back(param_tensors_[index].grad());
    }
    for (const auto& arg : args) arg_expected_.emplace_back(arg);
  }

  void add_loss(int slot) { losses_.push_back(slot); }
  void add_check(int slot, bool answer) { checks_.push_back({slot, answer}); }
  // Adds the value of `slot` to the gradient that the parameter has.
  void add_accumulation(int param, int slot) { accumulations_.emplace_back(param, slot); }
  void add_gradient(int param, int slot, const at::Tensor& like) { grads_.push_back({param, slot, Expected(like)}); }

  // By parameter, memory of its shape that its gradient is left in; undefined: memory of the program's.
  void set_gradient_buffers(std::vector<std::optional<at::Tensor>> buffers) {
    buffers_.assign(param_tensors_.size(), at::Tensor());
    for (size_t i = 0; i < buffers.size() && i < buffers_.size(); ++i) {
      if (buffers[i].has_value()) buffers_[i] = buffers[i]->detach();
    }
    views_.clear();
    storages_.clear();
  }

  void finish(int num_slots) {
    slots_.resize(num_slots);
    for (const auto& each : accumulations_) with_grad_[each.first] = accumulated_grad;
    std::vector<char> kept(num_slots, 0);
    std::vector<int> last(num_slots, -1);
    for (auto& [slot, tensor] : fixed_) slots_[slot] = tensor;
    for (auto& [slot, tensor] : fixed_) kept[slot] = 1;
    for (const auto& each : foreign_) kept[each.slot] = 1;
    for (int slot : losses_) kept[slot] = 1;
    for (const auto& each : checks_) kept[each.slot] = 1;
    for (const auto& each : grads_) kept[each.slot] = 1;
    for (const auto& each : accumulations_) kept[each.second] = 1;
    for (int i = 0; i < static_cast<int>(code_.size()); ++i) {
      for (const auto& a : code_[i].args) {
        if (a.kind == Kind::slot) last[a.slot] = i;
        for (int slot : a.slots) {
          if (slot >= 0) last[slot] = i;
        }
      }
      for (int slot : code_[i].outs) {
        if (slot >= 0) last[slot] = i;
      }
    }
    for (int slot = 0; slot < num_slots; ++slot) {
      if (kept[slot]) transient_.push_back(slot);
      else if (last[slot] >= 0) code_[last[slot]].dead.push_back(slot);
    }
    // What is kept to the end is let go of at the end, unless it is fixed.
    std::vector<char> is_fixed(num_slots, 0);
    for (auto& [slot, tensor] : fixed_) is_fixed[slot] = 1;
    std::erase_if(transient_, [&](int slot) { return is_fixed[slot] != 0; });
  }

  // run(store, args, losses): `ran`, a status, or the index of the first check whose answer is another one. Unless it
  // is `ran`, gradients and torch's generator are as they were. A loss that is not finite is left to an eager step, in
  // which Pyro's validation names the site.
  int run(const py::dict& store, const std::vector<at::Tensor>& args, std::vector<double>& losses) {
    if (running_) return Status::busy;
    if (!looks_as_built(store, args)) return Status::inputs_differ;
    const int status = set_values(args);
    if (status != Status::ran) return clear(status);
    running_ = true;
    const auto saved = save_written();
    auto generator = at::detail::getDefaultCPUGenerator();
    at::Tensor state;
    {
      std::lock_guard<std::mutex> lock(generator.mutex());
      state = generator.get_state();
    }
    int failed = Status::ran;
    try {
      py::gil_scoped_release release;
      at::AutoDispatchBelowADInplaceOrView guard;
      run_code();
      failed = failed_check();
      if (failed == Status::ran) failed = read_losses(losses);
    } catch (...) {
      restore(generator, state, saved);
      running_ = false;
      clear(Status::inputs_differ);
      throw;
    }
    running_ = false;
    if (failed != Status::ran) {
      restore(generator, state, saved);
      return clear(failed);
    }
    for (auto& each : foreign_) {
      if (each.written) each.tensor.unsafeGetTensorImpl()->bump_version();
    }
    accumulate_gradients();
    hand_out_gradients();
    return clear(Status::ran);
  }

  // Whether run() would run the operations.
  bool matches(const py::dict& store, const std::vector<at::Tensor>& args) {
    if (running_ || !looks_as_built(store, args)) return false;
    return clear(set_values(args)) == Status::ran;
  }

  int num_instructions() const { return static_cast<int>(code_.size()); }
  int num_direct() const { return static_cast<int>(directs_.size()); }
  int num_loops() const { return static_cast<int>(loops_.size()); }

 private:
  static loops::Operand loop_operand(const py::tuple& fields, loops::Loop& loop) {
    loops::Operand operand;
    operand.source = static_cast<loops::Source>(fields[0].cast<int>());
    operand.index = fields[1].cast<int>();
    if (operand.source == loops::Source::fixed) {
      operand.owner = fields[2].cast<at::Tensor>();
      operand.data = static_cast<const char*>(operand.owner.const_data_ptr());
    }
    operand.is_scalar = fields[3].cast<bool>();
    operand.period = fields[4].cast<int64_t>();
    if (operand.period > 0) operand.tile = loop.num_tiles++;
    return operand;
  }

  static std::vector<Argument> slot_arguments(const std::vector<int>& slots) {
    std::vector<Argument> arguments(slots.size());
    for (size_t i = 0; i < slots.size(); ++i) {
      arguments[i].kind = Kind::slot;
      arguments[i].slot = slots[i];
    }
    return arguments;
  }

  static Argument argument(const py::tuple& pair, const c10::Argument& schema) {
    Argument result;
    const auto kind = pair[0].cast<std::string>();
    if (kind == "slot") {
      result.kind = Kind::slot;
      result.slot = pair[1].cast<int>();
    } else if (kind == "tensors" || kind == "optional_tensors") {
      result.kind = kind == "tensors" ? Kind::tensors : Kind::optional_tensors;
      result.slots = pair[1].cast<std::vector<int>>();
    } else if (schema.type()->kind() == c10::TypeKind::TensorType && !pair[1].is_none()) {
      result.constant = wrapped_number(pair[1]);
    } else {
      result.constant = torch::jit::toIValue(pair[1], schema.real_type());
    }
    return result;
  }

  // A Python number where an operator takes a tensor: it has a type of its own, and gives way to those of tensors.
  static at::Tensor wrapped_number(const py::object& value) {
    at::Tensor result;
    if (PyBool_Check(value.ptr())) result = at::scalar_tensor(value.cast<bool>(), at::kBool);
    else if (PyLong_Check(value.ptr())) result = at::scalar_tensor(value.cast<int64_t>(), at::kLong);
    else result = at::scalar_tensor(value.cast<double>(), at::kDouble);
    result.unsafeGetTensorImpl()->set_wrapped_number(true);
    return result;
  }

  // Which products have the bits of others was found out with this many threads, and constants were computed with this
  // rounding, and denormals or zeros in their place.
  bool looks_as_built(const py::dict& store, const std::vector<at::Tensor>& args) const {
    const bool same_arithmetic = at::get_num_threads() == num_threads_ && float_control() == float_control_;
    return same_arithmetic && same_params(store) && same_args(args);
  }

  bool same_params(const py::dict& store) const {
    if (store.size() != param_tensors_.size()) return false;
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    for (size_t i = 0; PyDict_Next(store.ptr(), &position, &key, &value); ++i) {
      if (value != PyTuple_GET_ITEM(params_.ptr(), i)) return false;
      const at::Tensor& param = param_tensors_[i];
      if (!param_expected_[i].matches(param) || param.requires_grad() != requires_grad_[i]) return false;
      if (hooks_of(param) != hooks_[i]) return false;
    }
    return true;
  }

  bool same_args(const std::vector<at::Tensor>& args) const {
    if (args.size() != arg_expected_.size()) return false;
    for (size_t i = 0; i < args.size(); ++i) {
      if (!arg_expected_[i].matches(args[i]) || args[i].requires_grad() || is_written(args[i])) return false;
    }
    return true;
  }

  // Whether the step writes to the memory of an argument: when it was recorded they were apart.
  bool is_written(const at::Tensor& arg) const {
    for (const auto& each : foreign_) {
      if (each.written && each.tensor.is_alias_of(arg)) return true;
    }
    return false;
  }

  int set_values(const std::vector<at::Tensor>& args) {
    for (const auto& each : foreign_) {
      if (!each.expected.matches(each.tensor)) return Status::constants_differ;
      if (each.tensor.requires_grad() != each.requires_grad) return Status::constants_differ;
      if (each.compared.defined() && !same_values(each.tensor, each.compared)) return Status::constants_differ;
    }
    size_t slot = 0, grad = 0;
    for (const auto& param : param_tensors_) slots_[slot++] = param;
    for (size_t i = 0; i < param_tensors_.size(); ++i) {
      const at::Tensor& g = param_tensors_[i].grad();
      if (g.defined() != (with_grad_[i] != no_grad)) return Status::gradients_differ;
      if (with_grad_[i] == no_grad) continue;
      if (!grad_expected_[grad++].matches(g)) return Status::gradients_differ;
      slots_[slot++] = g;
    }
    for (const auto& arg : args) slots_[slot++] = arg;
    num_inputs_ = slot;
    for (const auto& each : foreign_) slots_[each.slot] = each.tensor;
    return Status::ran;
  }

  void run_code() {
    torch::jit::Stack stack;
    stack.reserve(16);
    for (auto& instruction : code_) {
      switch (instruction.runner) {
        case Runner::direct: run_direct(directs_[instruction.index]); break;
        case Runner::loop: run_loop(loops_[instruction.index], instruction.outs); break;
        case Runner::host: run_host(instruction); break;
        case Runner::pack: run_pack(instruction); break;
        case Runner::aten: run_op(instruction, stack); break;
      }
      for (int slot : instruction.dead) slots_[slot] = IValue();
    }
  }

  void run_direct(const Direct& direct) const {
    const void* data[3];
    for (size_t i = 0; i < direct.in.size(); ++i) {
      const Operand& operand = direct.in[i];
      data[i] = operand.slot < 0 ? operand.data : slots_[operand.slot].toTensor().const_data_ptr();
    }
    direct.kernel(direct, data);
  }

  void run_loop(loops::Loop& loop, const std::vector<int>& slots) {
    for (auto& operation : loop.operations) {
      for (auto& operand : operation.in) {
        if (operand.source != loops::Source::slot) continue;
        operand.data = static_cast<const char*>(slots_[operand.index].toTensor().const_data_ptr());
      }
    }
    std::vector<at::Tensor> outs;
    for (const auto& like : loop.like) outs.push_back(at::empty(like.sizes(), at::TensorOptions().dtype(like.scalar_type())));
    loop.run(outs);
    for (size_t i = 0; i < outs.size(); ++i) slots_[slots[i]] = std::move(outs[i]);
  }

  void run_host(const Instruction& instruction) {
    py::gil_scoped_acquire acquire;
    py::tuple args(instruction.args.size());
    for (size_t i = 0; i < args.size(); ++i) args[i] = py::cast(slots_[instruction.args[i].slot].toTensor());
    const py::object results = hosts_[instruction.index](*args);
    if (instruction.outs.empty()) return;
    size_t i = 0;
    for (const auto& each : results) slots_[instruction.outs.at(i++)] = THPVariable_Unpack(each.ptr());
    TORCH_CHECK(i == instruction.outs.size(), "a host call returned ", i, " tensors");
  }

  void run_pack(const Instruction& instruction) const {
    at::Tensor flat = packs_[instruction.index];
    int64_t offset = 0;
    for (const auto& a : instruction.args) {
      const at::Tensor& value = slots_[a.slot].toTensor();
      const at::Tensor packed = value.is_contiguous() ? value : value.contiguous();
      std::memcpy(static_cast<char*>(flat.mutable_data_ptr()) + offset, packed.const_data_ptr(), packed.nbytes());
      offset += packed.nbytes();
    }
  }

  void run_op(const Instruction& instruction, torch::jit::Stack& stack) {
    for (const auto& a : instruction.args) {
      switch (a.kind) {
        case Kind::slot: stack.push_back(slots_[a.slot]); break;
        case Kind::constant: stack.push_back(a.constant); break;
        case Kind::tensors: {
          c10::List<at::Tensor> list;
          list.reserve(a.slots.size());
          for (int slot : a.slots) list.push_back(slots_[slot].toTensor());
          stack.emplace_back(std::move(list));
          break;
        }
        case Kind::optional_tensors: {
          c10::List<std::optional<at::Tensor>> list;
          for (int slot : a.slots) list.push_back(slot < 0 ? std::nullopt : std::make_optional(slots_[slot].toTensor()));
          stack.emplace_back(std::move(list));
          break;
        }
      }
    }
    instruction.op->callBoxed(&stack);
    if (instruction.num_results == 1 && stack.back().isTensorList()) {
      const auto list = stack.back().toTensorVector();
      for (size_t i = 0; i < list.size(); ++i) {
        if (instruction.outs[i] >= 0) slots_[instruction.outs[i]] = list[i];
      }
    } else {
      for (size_t i = 0; i < instruction.num_results; ++i) {
        if (instruction.outs[i] >= 0) slots_[instruction.outs[i]] = std::move(stack[i]);
      }
    }
    stack.clear();
  }

  int failed_check() const {
    for (size_t i = 0; i < checks_.size(); ++i) {
      if (slots_[checks_[i].slot].toTensor().item<bool>() != checks_[i].answer) return static_cast<int>(i);
    }
    return Status::ran;
  }

  int read_losses(std::vector<double>& losses) const {
    for (int slot : losses_) {
      losses.push_back(slots_[slot].toTensor().item<double>());
      if (!std::isfinite(losses.back())) return Status::not_finite;
    }
    return Status::ran;
  }

  using Saved = std::vector<std::pair<at::Tensor, at::Tensor>>;

  // Tensors outside that the step writes to, and copies of their values: a step that fails must leave nothing behind.
  Saved save_written() const {
    at::AutoDispatchBelowADInplaceOrView guard;
    Saved saved;
    for (const auto& each : foreign_) {
      if (each.written) saved.emplace_back(each.tensor, each.tensor.clone());
    }
    for (size_t i = 0; i < with_grad_.size(); ++i) {
      if (with_grad_[i] == written_grad) saved.emplace_back(param_tensors_[i].grad(), param_tensors_[i].grad().clone());
    }
    return saved;
  }

  static void restore(at::Generator& generator, const at::Tensor& state, const Saved& saved) {
    {
      std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_state(state);
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    for (const auto& [tensor, values] : saved) tensor.copy_(values);
  }

  // As AccumulateGrad does for a gradient that is there: one addition, in place.
  void accumulate_gradients() {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (const auto& [param, slot] : accumulations_) {
      at::Tensor& grad = param_tensors_[param].mutable_grad();
      const at::Tensor& value = slots_[slot].toTensor();
      at::Tensor& buffer = buffer_of(param);
      at::Tensor& sum = buffer.defined() ? buffer : grad;
      if (grad.is_contiguous() && value.is_contiguous() && sum.is_contiguous() && grad.numel() <= max_direct &&
          grad.scalar_type() == at::kFloat && value.scalar_type() == at::kFloat) {
        add_to(sum, grad, value);
      } else {
        at::add_out(sum, grad, value);
      }
      if (sum.const_data_ptr() != grad.const_data_ptr()) grad = sum.alias();
    }
  }

  static void add_to(at::Tensor& sum, const at::Tensor& grad, const at::Tensor& value) {
    float* to = static_cast<float*>(sum.mutable_data_ptr());
    const float* a = static_cast<const float*>(grad.const_data_ptr());
    const float* b = static_cast<const float*>(value.const_data_ptr());
    for (int64_t i = 0, n = grad.numel(); i < n; ++i) to[i] = a[i] + b[i];
  }

  at::Tensor& buffer_of(int param) {
    static at::Tensor none;
    return buffers_.empty() ? none : buffers_[param];
  }

  // Gradients become views of one buffer, which is used again unless somebody still holds one of them.
  void hand_out_gradients() {
    if (grads_.empty()) return;
    if (views_.empty() || storage_in_use()) allocate_views();
    for (size_t i = 0; i < grads_.size(); ++i) {
      const at::Tensor& value = slots_[grads_[i].slot].toTensor();
      at::Tensor& view = views_[i];
      if (value.strides() == view.strides() && value.scalar_type() == view.scalar_type() &&
          value.is_non_overlapping_and_dense()) {
        std::memcpy(view.mutable_data_ptr(), value.const_data_ptr(), value.nbytes());
      } else {
        at::AutoDispatchBelowADInplaceOrView guard;
        view.copy_(value);
      }
      param_tensors_[grads_[i].param].mutable_grad() = view.alias();
    }
  }

  bool storage_in_use() const {
    for (const auto& [storage, count] : storages_) {
      if (storage.use_count() != count) return true;
    }
    return false;
  }

  void allocate_views() {
    at::AutoDispatchBelowADInplaceOrView guard;
    views_.clear();
    storages_.clear();
    std::vector<std::pair<at::ScalarType, std::pair<at::Tensor, int64_t>>> buffers;
    for (const auto& g : grads_) {
      if (buffer_of(g.param).defined()) continue;
      const int64_t n = c10::multiply_integers(g.expected.sizes);
      bool known = false;
      for (auto& [dtype, buffer] : buffers) {
        if (dtype != g.expected.dtype) continue;
        buffer.second += n;
        known = true;
      }
      if (!known) buffers.push_back({g.expected.dtype, {at::Tensor(), n}});
    }
    for (auto& [dtype, buffer] : buffers) {
      buffer.first = at::empty({buffer.second}, at::TensorOptions().dtype(dtype));
      buffer.second = 0;
    }
    for (const auto& g : grads_) {
      if (buffer_of(g.param).defined()) {
        views_.push_back(buffer_of(g.param));
        continue;
      }
      for (auto& [dtype, buffer] : buffers) {
        if (dtype != g.expected.dtype) continue;
        views_.push_back(buffer.first.as_strided(g.expected.sizes, g.expected.strides, buffer.second));
        buffer.second += c10::multiply_integers(g.expected.sizes);
      }
    }
    for (auto& [dtype, buffer] : buffers) {
      c10::Storage storage = buffer.first.storage();
      buffer.first.reset();
      storages_.emplace_back(std::move(storage), 0);
    }
    for (auto& [storage, count] : storages_) count = storage.use_count();
  }

  int clear(int status) {
    for (size_t i = 0; i < num_inputs_; ++i) slots_[i] = IValue();
    for (int slot : transient_) slots_[slot] = IValue();
    if (status != Status::ran) {
      for (const auto& instruction : code_) {
        for (int slot : instruction.dead) slots_[slot] = IValue();
      }
    }
    return status;
  }

  // What becomes of a gradient that a parameter has before the step.
  enum : char { no_grad, written_grad, accumulated_grad };
  static constexpr int64_t max_direct = 2048;

  std::vector<Instruction> code_;
  std::vector<Direct> directs_;
  std::vector<loops::Loop> loops_;
  std::vector<py::object> hosts_;
  std::vector<at::Tensor> packs_;
  std::vector<IValue> slots_;
  std::vector<std::pair<int, at::Tensor>> fixed_;
  std::vector<Foreign> foreign_;
  py::tuple params_;
  std::vector<at::Tensor> param_tensors_;
  std::vector<Expected> param_expected_, grad_expected_, arg_expected_;
  std::vector<char> requires_grad_, with_grad_;
  std::vector<int> hooks_, losses_, transient_;
  std::vector<Check> checks_;
  std::vector<Gradient> grads_;
  std::vector<std::pair<int, int>> accumulations_;
  std::vector<at::Tensor> views_, buffers_;
  std::vector<std::pair<c10::Storage, size_t>> storages_;
  size_t num_inputs_ = 0;
  const int num_threads_ = at::get_num_threads();
  const unsigned float_control_ = float_control();
  bool running_ = false;
};

}  // namespace

PYBIND11_MODULE(_graph, m) {
  m.attr("TORCH") = DISTOPT_TORCH;
  m.def("all_hold", [](const py::tuple& tests) { return all_hold(tests.ptr()); });
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("add_op", &Program::add_op)
      .def("add_direct",
           [](Program& p, const std::string& name, at::Tensor result, const at::Tensor& like, int out, const py::list& operands,
              int64_t extent) {
             p.add_direct(name, std::move(result), like.scalar_type(), out, operands, extent);
           })
      .def("add_loop", &Program::add_loop)
      .def("add_host", &Program::add_host)
      .def("add_pack", &Program::add_pack)
      .def("set_fixed", &Program::set_fixed)
      .def("set_foreign", &Program::set_foreign)
      .def("set_inputs", &Program::set_inputs)
      .def("add_loss", &Program::add_loss)
      .def("add_check", &Program::add_check)
      .def("add_accumulation", &Program::add_accumulation)
      .def("add_gradient", &Program::add_gradient)
      .def("set_gradient_buffers", &Program::set_gradient_buffers)
      .def("finish", &Program::finish)
      .def("matches", &Program::matches)
      .def("run",
           [](Program& p, const py::dict& store, const std::vector<at::Tensor>& args) {
             std::vector<double> losses;
             const int status = p.run(store, args, losses);
             return std::make_pair(status, losses);
           })
      .def_property_readonly("num_instructions", &Program::num_instructions)
      .def_property_readonly("num_direct", &Program::num_direct)
      .def_property_readonly("num_loops", &Program::num_loops);
}
