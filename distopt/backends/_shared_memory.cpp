// Sums of tensors over the ranks of one machine, through memory that all of them map. It has for each rank two counters,
// its last call, and SLOTS slots. A tensor goes through the slots in parts, of which all ranks count the same:
//   a rank writes part n into its slot n % SLOTS, when all have read part n - SLOTS, and then publishes n;
//   when all have published n, each rank adds up the slots in the order of ranks, so that all get the same bits.
// Who has started a sum takes it further only while it waits: ranks must wait for their sums in the same order too.
// A wait looks at the counters for a while and then sleeps on a futex, which who moves a counter wakes.
#include <linux/futex.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

constexpr std::uint64_t SLOTS = 2;
constexpr std::size_t LINE = 128;  // bytes that processors fetch together
constexpr std::chrono::microseconds SPIN{100};

using Clock = std::chrono::steady_clock;

struct alignas(LINE) Bell {
  std::atomic<std::uint32_t> rings;
  std::atomic<std::uint32_t> sleepers;
};

struct alignas(LINE) Counters {
  std::atomic<std::uint64_t> published;  // parts that this rank has written
  std::atomic<std::uint64_t> read;       // parts that this rank has added up
};

// The last call of a rank, of any collective; the number is 0 while the text is written.
struct alignas(LINE) Call {
  static constexpr std::size_t LENGTH = 2 * LINE - sizeof(std::atomic<std::uint64_t>);
  std::atomic<std::uint64_t> number;
  char text[LENGTH];
};

// What is in a slot; equal on all ranks.
struct alignas(LINE) Header {
  std::uint64_t call;
  std::uint64_t bytes;
  std::uint64_t dtype;
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free);

template <typename T>
void add_slots(void* into, const std::vector<const void*>& slots, std::size_t bytes) {
  T* __restrict__ out = static_cast<T*>(into);
  const std::size_t n = bytes / sizeof(T);
  const T* first = static_cast<const T*>(slots[0]);
  const T* second = static_cast<const T*>(slots[1]);
  for (std::size_t i = 0; i < n; ++i) out[i] = first[i] + second[i];
  for (std::size_t rank = 2; rank < slots.size(); ++rank) {
    const T* slot = static_cast<const T*>(slots[rank]);
    for (std::size_t i = 0; i < n; ++i) out[i] += slot[i];
  }
}

using Add = void (*)(void*, const std::vector<const void*>&, std::size_t);

constexpr Add ADDERS[] = {add_slots<float>, add_slots<double>, add_slots<std::int64_t>};

std::uint64_t code_of(const std::string& dtype) {
  if (dtype == "torch.float32") return 0;
  if (dtype == "torch.float64") return 1;
  if (dtype == "torch.int64") return 2;
  throw std::invalid_argument("sums in shared memory are not of " + dtype);
}

// The default arithmetic: the caller's may round otherwise, or take denormal numbers for 0, on one rank and not others.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }

 private:
  std::fenv_t before_;
};

class Sums {
 public:
  Sums(py::buffer memory, int rank, int world_size, std::size_t slot_bytes)
      : memory_(memory.request(true)), rank_(rank), world_size_(world_size), slot_bytes_(slot_bytes) {
    if (world_size < 2 || rank < 0 || rank >= world_size || slot_bytes == 0 || slot_bytes % LINE != 0)
      throw std::invalid_argument("no such rank, or slots of no whole lines");
    if (static_cast<std::size_t>(memory_.size * memory_.itemsize) < num_bytes(world_size, slot_bytes))
      throw std::invalid_argument("the memory is too small");
    parts_.resize(world_size);
    auto* base = static_cast<char*>(memory_.ptr);
    if (reinterpret_cast<std::uintptr_t>(base) % LINE != 0) throw std::invalid_argument("the memory is not aligned");
    bell_ = reinterpret_cast<Bell*>(base);
    counters_ = reinterpret_cast<Counters*>(base + sizeof(Bell));
    calls_ = reinterpret_cast<Call*>(base + sizeof(Bell) + world_size * sizeof(Counters));
    slots_ = base + sizeof(Bell) + world_size * (sizeof(Counters) + sizeof(Call));
  }

  static std::size_t num_bytes(int world_size, std::size_t slot_bytes) {
    return sizeof(Bell) + world_size * (sizeof(Counters) + sizeof(Call) + SLOTS * (sizeof(Header) + slot_bytes));
  }

  // Tells the others what this rank calls now.
  void note(std::uint64_t number, const std::string& text) {
    Call& call = calls_[rank_];
    call.number.store(0, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    std::strncpy(call.text, text.c_str(), Call::LENGTH - 1);
    call.number.store(number, std::memory_order_release);
  }

  // The number and text of a rank's last call; 0 where it is being written or there is none.
  std::pair<std::uint64_t, std::string> last_call(int rank) const {
    if (rank < 0 || rank >= world_size_) throw std::invalid_argument("no such rank");
    const Call& call = calls_[rank];
    const std::uint64_t number = call.number.load(std::memory_order_acquire);
    std::string text(call.text, strnlen(call.text, Call::LENGTH));
    std::atomic_thread_fence(std::memory_order_acquire);
    if (call.number.load(std::memory_order_relaxed) != number) return {0, ""};
    return {number, text};
  }

  // Starts a sum and returns its number; the tensor must stay where it is until `wait` has returned true.
  std::uint64_t start(std::uintptr_t address, std::size_t bytes, const std::string& dtype, std::uint64_t call) {
    const std::uint64_t code = code_of(dtype);
    if (address == 0 && bytes > 0) throw std::invalid_argument("the tensor has no memory");
    std::lock_guard lock(mutex_);
    started_.push_back({reinterpret_cast<char*>(address), bytes, {call, bytes, code}});
    ++num_started_;
    progress();
    return num_started_;
  }

  // Waits until a sum is done and returns whether it is, after so many seconds at most.
  bool wait(std::uint64_t sum, double seconds) {
    const auto began = Clock::now();
    const auto end = began + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    py::gil_scoped_release released;
    while (true) {
      const std::uint32_t rings = bell_->rings.load(std::memory_order_seq_cst);
      if (is_done(sum)) return true;
      const auto now = Clock::now();
      if (now >= end) return false;
      if (now - began < SPIN)
        sched_yield();
      else
        sleep(rings, end - now);
    }
  }

  // The ranks that the sum under way waits for, or an empty list.
  std::vector<int> missing() {
    std::lock_guard lock(mutex_);
    std::vector<int> ranks;
    for (int rank = 0; rank < world_size_ && !started_.empty(); ++rank)
      if (has_written() ? !has_published(counters_[rank]) : !has_freed(counters_[rank])) ranks.push_back(rank);
    return ranks;
  }

 private:
  struct Sum {
    char* tensor;
    std::size_t bytes;  // that are still to be summed
    Header header;
  };

  bool is_done(std::uint64_t sum) {
    std::lock_guard lock(mutex_);
    progress();
    return sum <= num_started_ - started_.size();
  }

  // Takes the sums as far as they come without the others. The part under way has the number `num_read_`.
  void progress() {
    while (!started_.empty()) {
      Sum& sum = started_.front();
      const std::size_t part = std::min(sum.bytes, slot_bytes_);
      if (!has_written()) {
        for (int rank = 0; rank < world_size_; ++rank)
          if (!has_freed(counters_[rank])) return;
        std::memcpy(header(rank_), &sum.header, sizeof(Header));
        std::memcpy(slot(rank_), sum.tensor, part);
        publish(counters_[rank_].published, ++num_published_);
      }
      for (int rank = 0; rank < world_size_; ++rank)
        if (!has_published(counters_[rank])) return;
      for (int rank = 0; rank < world_size_; ++rank) {
        check(rank, *header(rank), sum.header);
        parts_[rank] = slot(rank);
      }
      {
        const DefaultArithmetic arithmetic;
        ADDERS[sum.header.dtype](sum.tensor, parts_, part);
      }
      publish(counters_[rank_].read, ++num_read_);
      sum.tensor += part;
      sum.bytes -= part;
      if (sum.bytes == 0) started_.pop_front();
    }
  }

  bool has_written() const { return num_published_ > num_read_; }
  bool has_freed(const Counters& c) const { return c.read.load(std::memory_order_acquire) + SLOTS > num_read_; }
  bool has_published(const Counters& c) const { return c.published.load(std::memory_order_acquire) > num_read_; }
  Header* header(int rank) const {
    return reinterpret_cast<Header*>(slots_ +
                                     (rank * SLOTS + num_read_ % SLOTS) * (sizeof(Header) + slot_bytes_));
  }
  char* slot(int rank) const { return reinterpret_cast<char*>(header(rank) + 1); }

  static void check(int rank, const Header& theirs, const Header& ours) {
    if (theirs.call == ours.call && theirs.bytes == ours.bytes && theirs.dtype == ours.dtype) return;
    throw std::runtime_error("rank " + std::to_string(rank) + " sums " + describe(theirs) + ", and this rank " +
                             describe(ours));
  }

  static std::string describe(const Header& header) {
    const char* names[] = {"float32", "float64", "int64"};
    return std::to_string(header.bytes) + " bytes of " + names[header.dtype % 3] + " in call " +
           std::to_string(header.call);
  }

  void publish(std::atomic<std::uint64_t>& counter, std::uint64_t value) {
    counter.store(value, std::memory_order_release);
    bell_->rings.fetch_add(1, std::memory_order_seq_cst);
    if (bell_->sleepers.load(std::memory_order_seq_cst) > 0) futex(FUTEX_WAKE, INT_MAX, nullptr);
  }

  void sleep(std::uint32_t rings, Clock::duration left) {
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
    const timespec limit{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
    bell_->sleepers.fetch_add(1, std::memory_order_seq_cst);
    futex(FUTEX_WAIT, rings, &limit);  // returns at once if the bell has rung since
    bell_->sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }

  void futex(int operation, std::uint32_t value, const timespec* limit) {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&bell_->rings), operation, value, limit, nullptr, 0);
  }

  py::buffer_info memory_;
  int rank_;
  int world_size_;
  std::size_t slot_bytes_;
  std::vector<const void*> parts_;
  Bell* bell_;
  Counters* counters_;
  Call* calls_;
  char* slots_;
  std::mutex mutex_;
  std::deque<Sum> started_;
  std::uint64_t num_started_ = 0;
  std::uint64_t num_published_ = 0;
  std::uint64_t num_read_ = 0;
};

}  // namespace

PYBIND11_MODULE(_shared_memory, module) {
  py::class_<Sums>(module, "Sums")
      .def(py::init<py::buffer, int, int, std::size_t>(), py::arg("memory"), py::arg("rank"), py::arg("world_size"),
           py::arg("slot_bytes"))
      .def_static("num_bytes", &Sums::num_bytes, py::arg("world_size"), py::arg("slot_bytes"))
      .def("note", &Sums::note, py::arg("number"), py::arg("text"))
      .def("last_call", &Sums::last_call, py::arg("rank"))
      .def("start", &Sums::start, py::arg("address"), py::arg("num_bytes"), py::arg("dtype"), py::arg("call"))
      .def("wait", &Sums::wait, py::arg("number"), py::arg("seconds"))
      .def("missing", &Sums::missing);
}
