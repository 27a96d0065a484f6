// CUDA for a torch that was built without it: tensors of device "cuda" in RAM, streams that are threads.
//
// Loaded ahead of torch, it gives torch what its CUDA library would: an allocator, a guard (current device,
// streams, events), hooks, and kernels. Kernels are torch's own for CPUs: `cpu_fallback` copies arguments out
// of device memory and results into it. So the code that runs on it is the code that runs on a GPU, line for
// line. A tensor on the wrong device, a copy that nothing orders, memory that is given back too early are
// found as a GPU finds them, or sooner:
//
//   kernels  run where they are launched, when all that their stream was given before is over.
//   copies   between locked host memory and the device are asynchronous: late, by as much as
//            OFFLOAD_EMULATED_LATE_US says, and torn in halves. All others wait for their stream.
//   chance   is drawn from a generator of the device's own.
//   devices  take calls that name none for the one that is current in the calling thread, at first cuda:0,
//            and have a context from then on: of memory, of events that are waited for, of addresses.
//   memory   belongs to a stream. It is given back, and poisoned, when the stream has come there; freed
//            blocks are kept for their stream and size, as torch's allocator keeps them.
#define AT_PER_OPERATOR_HEADERS  // those of all operators take a third of the time to compile
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::seconds(60);
constexpr int kPoison = 0xFF;  // NaN in every float

size_t setting(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

// A place in a stream.
struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool passed = false;
  Clock::time_point when;

  void pass() {
    std::lock_guard<std::mutex> lock(mutex);
    passed = true;
    when = Clock::now();
    changed.notify_all();
  }
  bool is_passed() {
    std::lock_guard<std::mutex> lock(mutex);
    return passed;
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    TORCH_CHECK(changed.wait_for(lock, kPatience, [&] { return passed; }),
                "emulated CUDA: an event is never passed");
  }
};

struct Event {
  std::shared_ptr<Mark> mark;  // of the last record
};

class Queue {
 public:
  explicit Queue(uint64_t seed) : random_(seed), thread_([this] { run(); }) { thread_.detach(); }

  void give(std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex_);
    work_.push_back(std::move(work));
    changed_.notify_all();
  }
  bool idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return work_.empty() && !busy_;
  }
  void drain() {
    std::unique_lock<std::mutex> lock(mutex_);
    TORCH_CHECK(changed_.wait_for(lock, kPatience, [&] { return work_.empty() && !busy_; }),
                "emulated CUDA: a stream does not come to an end");
  }
  std::shared_ptr<Mark> mark() {
    auto mark = std::make_shared<Mark>();
    give([mark] { mark->pass(); });
    return mark;
  }
  void pause() {
    static const size_t late_us = setting("OFFLOAD_EMULATED_LATE_US", 0);
    if (late_us) std::this_thread::sleep_for(std::chrono::microseconds(random_() % late_us));
  }

 private:
  void run() {
    while (true) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return !work_.empty(); });
      auto work = std::move(work_.front());
      work_.pop_front();
      busy_ = true;
      lock.unlock();
      work();
      work = nullptr;
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  bool busy_ = false;
  std::minstd_rand random_;
  std::thread thread_;
};

// Who is told when a host thread waits for the device: for what, and for how many bytes.
using Told = void (*)(const char* what, uint64_t num_bytes);
std::atomic<Told> told{nullptr};
thread_local bool in_kernel = false;

void tell(const char* what, uint64_t num_bytes = 0) {
  Told whom = told.load();
  if (whom != nullptr && !in_kernel) whom(what, num_bytes);
}

const int kNumDevices = static_cast<int>(setting("OFFLOAD_EMULATED_DEVICES", 1));
thread_local int current_device = 0;

// Who is told which call gives which device a context, and why.
using Touched = void (*)(const char* call, int device);
std::atomic<Touched> touched{nullptr};

void touch(const char* call, int device) {
  Touched whom = touched.load();
  if (whom != nullptr) whom(call, device);
}
thread_local std::map<int, c10::StreamId> current_streams;

std::mutex queues_mutex;
std::map<std::pair<int, c10::StreamId>, Queue*>& queues() {
  static auto* all = new std::map<std::pair<int, c10::StreamId>, Queue*>();
  return *all;
}
c10::StreamId num_streams = 0;

Queue& queue_of(int device, c10::StreamId stream) {
  std::lock_guard<std::mutex> lock(queues_mutex);
  Queue*& found = queues()[{device, stream}];
  if (found == nullptr) found = new Queue(stream + 1);  // lives as long as the process: its thread does
  return *found;
}
Queue& current_queue(int device) { return queue_of(device, current_streams[device]); }

void drain_all(int device) {
  std::vector<Queue*> all;
  {
    std::lock_guard<std::mutex> lock(queues_mutex);
    for (auto& [key, queue] : queues())
      if (key.first == device) all.push_back(queue);
  }
  for (Queue* queue : all) queue->drain();
}

// ---------------------------------------------------------------------------------------------- device
// memory

struct Block {
  char* address;
  size_t num_bytes, asked_bytes;
  int device;
  c10::StreamId stream;
};

struct Memory {
  std::mutex mutex;
  std::map<std::pair<c10::StreamId, size_t>, std::vector<char*>> cached;
  std::map<char*, size_t> segments;  // what the driver gave: address, bytes
  size_t allocated = 0, reserved = 0, peak_allocated = 0, peak_reserved = 0, num_device_alloc = 0,
         num_allocations = 0;
  size_t limit = size_t(2) << 30;
};

Memory& memory_of(int device) {
  static auto* all = new std::vector<Memory>(kNumDevices);
  return all->at(device);
}

void give_cached_back(Memory& memory) {
  for (auto& [key, blocks] : memory.cached)
    for (char* address : blocks) {
      memory.segments.erase(address);
      std::free(address);
      memory.reserved -= key.second;
    }
  memory.cached.clear();
}

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  auto give = [block = *block] {
    std::memset(block.address, kPoison, block.num_bytes);
    Memory& memory = memory_of(block.device);
    std::lock_guard<std::mutex> lock(memory.mutex);
    memory.cached[{block.stream, block.num_bytes}].push_back(block.address);
  };
  Memory& memory = memory_of(block->device);
  {
    std::lock_guard<std::mutex> lock(memory.mutex);
    memory.allocated -= block->num_bytes;
  }
  Queue& queue = queue_of(block->device, block->stream);
  queue.idle() ? give() : queue.give(give);
  delete block;
}

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t asked_bytes) override {
    const int device = current_device;
    if (asked_bytes) touch("cudaMalloc", device);
    const c10::Device place(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    if (asked_bytes == 0) return {nullptr, nullptr, &release, place};
    const size_t num_bytes = (asked_bytes + 511) / 512 * 512;
    const c10::StreamId stream = current_streams[device];
    Memory& memory = memory_of(device);
    char* address = nullptr;
    for (int tries = 0; address == nullptr; ++tries) {
      std::unique_lock<std::mutex> lock(memory.mutex);
      auto found = memory.cached.find({stream, num_bytes});
      if (found != memory.cached.end() && !found->second.empty()) {
        address = found->second.back();
        found->second.pop_back();
      } else {
        if (memory.reserved + num_bytes > memory.limit) {
          lock.unlock();
          drain_all(device);
          lock.lock();
          give_cached_back(memory);
        }
        TORCH_CHECK_WITH(OutOfMemoryError, memory.reserved + num_bytes <= memory.limit,
                         "CUDA out of memory (emulated). Tried to allocate ", num_bytes, " bytes of ",
                         memory.limit, ", ", memory.allocated, " allocated, ", memory.reserved, " reserved");
        address = static_cast<char*>(std::aligned_alloc(512, num_bytes));
        std::memset(address, kPoison, num_bytes);
        memory.segments[address] = num_bytes;
        memory.reserved += num_bytes;
        memory.peak_reserved = std::max(memory.peak_reserved, memory.reserved);
        ++memory.num_device_alloc;
      }
      memory.allocated += num_bytes;
      ++memory.num_allocations;
      memory.peak_allocated = std::max(memory.peak_allocated, memory.allocated);
    }
    return {address, new Block{address, num_bytes, asked_bytes, device, stream}, &release, place};
  }
  void copy_data(void* target, const void* source, size_t num_bytes) const override {
    default_copy_data(target, source, num_bytes);
  }
};

DeviceAllocator& allocator() {
  static auto* one = new DeviceAllocator();
  return *one;
}

int owner_of(const void* pointer) {
  auto* address = static_cast<const char*>(pointer);
  for (int device = 0; device < kNumDevices; ++device) {
    Memory& memory = memory_of(device);
    std::lock_guard<std::mutex> lock(memory.mutex);
    auto after = memory.segments.upper_bound(const_cast<char*>(address));
    if (after == memory.segments.begin()) continue;
    --after;
    if (address < after->first + after->second) return device;
  }
  return -1;
}

// ---------------------------------------------------------------------------------------------- locked host
// memory

std::mutex locked_mutex;
std::map<char*, size_t> locked;
size_t lockable = SIZE_MAX, registered_bytes = 0;  // at once, by cudaHostRegister
int refusal = 0;                                   // stays the answer to whoever asks next, until it is read

bool is_locked(const void* pointer) {
  auto* address = static_cast<char*>(const_cast<void*>(pointer));
  std::lock_guard<std::mutex> lock(locked_mutex);
  auto after = locked.upper_bound(address);
  if (after == locked.begin()) return false;
  --after;
  return address < after->first + after->second;
}

class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t num_bytes) override {
    auto* address = static_cast<char*>(std::aligned_alloc(64, (num_bytes + 64) / 64 * 64));
    std::lock_guard<std::mutex> lock(locked_mutex);
    locked[address] = std::max<size_t>(num_bytes, 1);
    return {address, address, &give_back, c10::DeviceType::CPU};
  }
  void copy_data(void* target, const void* source, size_t num_bytes) const override {
    default_copy_data(target, source, num_bytes);
  }

 private:
  static void give_back(void* address) {
    for (int device = 0; device < kNumDevices; ++device) drain_all(device);
    std::lock_guard<std::mutex> lock(locked_mutex);
    locked.erase(static_cast<char*>(address));
    std::free(address);
  }
};

// ---------------------------------------------------------------------------------------------- chance

at::Generator& generator_of(int device) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>();
    for (int index = 0; index < kNumDevices; ++index) made->push_back(at::detail::createCPUGenerator());
    return made;
  }();
  return all->at(device);
}

at::Tensor state_of(at::Generator& generator) {
  std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}
void set_state(at::Generator& generator, const at::Tensor& state) {
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

// Inside, the CPU's kernels draw from the generator of a device.
class Draws {
 public:
  explicit Draws(int device)
      : lock_(one_at_a_time()), cpu_(at::detail::getDefaultCPUGenerator()), device_(generator_of(device)) {
    before_ = state_of(cpu_);
    set_state(cpu_, state_of(device_));
  }
  ~Draws() {
    set_state(device_, state_of(cpu_));
    set_state(cpu_, before_);
  }
  Draws(const Draws&) = delete;
  Draws& operator=(const Draws&) = delete;

 private:
  static std::mutex& one_at_a_time() {
    static auto* one = new std::mutex();
    return *one;
  }
  std::lock_guard<std::mutex> lock_;
  at::Generator cpu_;
  at::Generator& device_;
  at::Tensor before_;
};

// ---------------------------------------------------------------------------------------------- guard and
// hooks

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;

  static c10::Device place(int device) { return {static_type, static_cast<c10::DeviceIndex>(device)}; }
  static c10::Stream stream(int device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, place(device), id);
  }
  static int index(c10::Device device) { return device.has_index() ? device.index() : current_device; }

  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const int before = current_device;
    setDevice(device);
    return place(before);
  }
  c10::Device getDevice() const override { return place(current_device); }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(index(device) < kNumDevices, "emulated CUDA: invalid device ordinal ", device);
    current_device = index(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = index(device); }
  c10::Stream getStream(c10::Device device) const override {
    return stream(index(device), current_streams[index(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(index(device), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    std::lock_guard<std::mutex> lock(queues_mutex);
    return stream(index(device), ++num_streams);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const c10::Stream before = getStream(next.device());
    current_streams[next.device_index()] = next.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(kNumDevices);
  }

  void record(void** event, const c10::Stream& on, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    touch("cudaEventRecord", on.device_index());
    if (*event == nullptr) *event = new Event();
    static_cast<Event*>(*event)->mark = queue_of(on.device_index(), on.id()).mark();
  }
  void block(void* event, const c10::Stream& on) const override {
    if (event == nullptr) return;
    auto mark = static_cast<Event*>(event)->mark;
    if (mark) queue_of(on.device_index(), on.id()).give([mark] { mark->wait(); });
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || static_cast<Event*>(event)->mark->is_passed();
  }
  void synchronizeEvent(void* event) const override {
    tell("event");
    touch("cudaEventSynchronize", current_device);
    if (event != nullptr) static_cast<Event*>(event)->mark->wait();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex) const override {
    auto first = static_cast<Event*>(begin)->mark, last = static_cast<Event*>(end)->mark;
    TORCH_CHECK(first->is_passed() && last->is_passed(), "emulated CUDA: both events must have been passed");
    return std::chrono::duration<double, std::milli>(last->when - first->when).count();
  }
  bool queryStream(const c10::Stream& on) const override {
    return queue_of(on.device_index(), on.id()).idle();
  }
  void synchronizeStream(const c10::Stream& on) const override {
    tell("stream");
    queue_of(on.device_index(), on.id()).drain();
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override { drain_all(device); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

namespace at {

struct CUDAHooks final : public CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(kNumDevices); }
  int getNumGPUs() const override { return kNumDevices; }
  DeviceIndex current_device() const override { return static_cast<DeviceIndex>(::current_device); }
  DeviceIndex getCurrentDevice() const override { return static_cast<DeviceIndex>(::current_device); }
  void setCurrentDevice(DeviceIndex device) const override { ::current_device = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return static_cast<DeviceIndex>(std::exchange(::current_device, static_cast<int>(device)));
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* pointer) const override { return is_locked(pointer); }
  Allocator* getPinnedMemoryAllocator() const override {
    static auto* one = new PinnedAllocator();
    return one;
  }
  Allocator* getCUDADeviceAllocator() const override { return &allocator(); }
  const Generator& getDefaultGenerator(DeviceIndex device) const override {
    return generator_of(device < 0 ? ::current_device : device);
  }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
  Device getDeviceFromPtr(void* pointer) const override {
    touch("cudaPointerGetAttributes", ::current_device);
    const int device = owner_of(pointer);
    TORCH_CHECK(device >= 0, "emulated CUDA: ", pointer, " is no device memory");
    return Guard::place(device);
  }
  void deviceSynchronize(DeviceIndex device) const override { drain_all(device); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

// ---------------------------------------------------------------------------------------------- kernels

const c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator(), kKeys, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU's. For kernels that run at once.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), tensor.storage().nbytes(),
      c10::DataPtr(tensor.storage().mutable_data(), c10::DeviceType::CPU), nullptr, false);
  auto seen = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  seen.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                    tensor.storage_offset());
  if (tensor.is_conj()) seen._set_conj(true);
  if (tensor.is_neg()) seen._set_neg(true);
  return seen;
}

bool same_bytes(const at::Tensor& target, const at::Tensor& source) {
  return target.scalar_type() == source.scalar_type() && target.sizes() == source.sizes() &&
         target.is_contiguous() && source.is_contiguous();
}

// As a GPU: addresses, whoever holds them. Pageable memory has been read when this returns.
void copy_later(Queue& queue, void* target, const void* source, size_t num_bytes, bool is_pageable) {
  auto* begin = static_cast<const char*>(source);
  std::vector<char> read;
  if (is_pageable) read.assign(begin, begin + num_bytes);
  queue.give([=, &queue, read = std::move(read)] {
    const char* from = is_pageable ? read.data() : begin;
    auto* to = static_cast<char*>(target);
    const size_t half = num_bytes / 2;
    queue.pause();
    std::memcpy(to, from, half);
    queue.pause();
    std::memcpy(to + half, from + half, num_bytes - half);
  });
}

at::Tensor& copy_(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  if (target.numel() == 0) return target;
  const int device = target.is_cuda() ? target.get_device() : source.get_device();
  Queue& queue = current_queue(device);
  const at::Tensor& host = target.is_cuda() ? source : target;
  if (non_blocking && host.is_cpu() && same_bytes(target, source)) {
    const bool is_pageable = !is_locked(host.const_data_ptr());
    if (target.is_cuda() || !is_pageable) {
      copy_later(queue, target.mutable_data_ptr(), source.const_data_ptr(), target.nbytes(), is_pageable);
      return target;
    }
  }
  if (!source.is_cuda() || !target.is_cuda())
    tell(source.is_cuda() ? "to host" : "to device", target.nbytes());
  if (source.is_cuda() && source.get_device() != device) current_queue(source.get_device()).drain();
  queue.drain();
  on_host(target).copy_(on_host(source.expand_as(target)));
  return target;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  at::Tensor written = target;
  copy_(written, source, non_blocking);
  return target;
}

const at::Tensor& resize_(const at::Tensor& tensor, at::IntArrayRef size,
                          std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(tensor.device());
  return at::native::resize_(tensor, size, format);
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  resize_(target, source.sizes(), std::nullopt);
  return copy_from(source, target, false);
}

void record_stream(at::Tensor&, c10::Stream) {
  TORCH_CHECK(false, "emulated CUDA: record_stream keeps memory as long as a stream says; leases do here");
}

// What a library of products keeps for each thread and stream. Of a thread that ended, the next one has it.
constexpr size_t kWorkspaceBytes = size_t(4) << 20;

class Workspaces {
 public:
  ~Workspaces() {
    std::lock_guard<std::mutex> lock(mutex());
    for (auto& [key, workspace] : held_) idle()[key].push_back(std::move(workspace));
  }
  void take(int device) {
    const Key key{device, current_streams[device]};
    if (held_.count(key)) return;
    {
      std::lock_guard<std::mutex> lock(mutex());
      auto& left = idle()[key];
      if (!left.empty()) {
        held_[key] = std::move(left.back());
        left.pop_back();
        return;
      }
    }
    held_[key] = allocator().allocate(kWorkspaceBytes);
  }

 private:
  using Key = std::pair<int, c10::StreamId>;
  static std::mutex& mutex() {
    static auto* one = new std::mutex();
    return *one;
  }
  static std::map<Key, std::vector<c10::DataPtr>>& idle() {
    static auto* all = new std::map<Key, std::vector<c10::DataPtr>>();
    return *all;
  }
  std::map<Key, c10::DataPtr> held_;
};
thread_local Workspaces workspaces;

bool multiplies(const std::string& name) {
  return name == "aten::mm" || name == "aten::addmm" || name == "aten::bmm" || name == "aten::baddbmm";
}

// Kernels that take indices of the host, too.
bool takes_both(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
}

// Whether a kernel of the device can take it: a number of the host's goes along as an argument.
void check_device(const at::Tensor& tensor, const at::Tensor& first, const std::string& name) {
  if (!tensor.defined() || tensor.device() == first.device() || (tensor.is_cpu() && tensor.dim() == 0))
    return;
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ",
              first.device(), " and ", tensor.device(), "! (emulated, in ", name, ")");
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  const size_t num_arguments = op.schema().arguments().size();
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& argument : torch::jit::last(*stack, num_arguments)) {
    if (argument.isTensor()) tensors.push_back(argument.toTensor());
    if (argument.isTensorList())
      for (const at::Tensor& tensor : argument.toTensorVector()) tensors.push_back(tensor);
  }
  c10::OptionalDeviceGuard guard;
  std::optional<Draws> draws;
  for (const at::Tensor& first : tensors) {
    if (!first.defined() || !first.is_cuda()) continue;
    guard.reset_device(first.device());
    if (op.hasTag(at::Tag::nondeterministic_seeded)) draws.emplace(first.get_device());
    if (!takes_both(name))
      for (const at::Tensor& tensor : tensors) check_device(tensor, first, name);
    if (multiplies(name)) workspaces.take(first.get_device());
    current_queue(first.get_device()).drain();
    break;
  }
  if (name == "aten::_local_scalar_dense") tell("number");
  const bool outside = std::exchange(in_kernel, true);
  try {
    at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  } catch (...) {
    in_kernel = outside;
    throw;
  }
  in_kernel = outside;
}

int64_t attention_way(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                      const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_", at::native::set_cpu_);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("record_stream", record_stream);
}

TORCH_LIBRARY(emulated_cuda, m) {
  m.def("rng_state", [](int64_t device) { return state_of(generator_of(static_cast<int>(device))); });
  m.def("set_rng_state", [](const at::Tensor& state, int64_t device) {
    set_state(generator_of(static_cast<int>(device)), state);
  });
  m.def("seed", [](int64_t seed, int64_t device) {
    at::Generator& generator = generator_of(static_cast<int>(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_current_seed(static_cast<uint64_t>(seed));
  });
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

const bool ready = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, &allocator(), 10);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_way);
  return true;
}();

}  // namespace

// ---------------------------------------------------------------------------------------------- for Python
// and cudart

extern "C" {

void emulated_init() { at::globalContext().lazyInitDevice(c10::DeviceType::CUDA); }
int emulated_device() { return current_device; }
int emulated_set_device(int device) { return std::exchange(current_device, device); }
int emulated_device_count() { return kNumDevices; }
int64_t emulated_set_stream(int device, int64_t stream) {
  return std::exchange(current_streams[device], stream);
}
int64_t emulated_stream(int device) { return current_streams[device]; }
void emulated_tell(Told whom) { told = whom; }
void emulated_tell_touched(Touched whom) { touched = whom; }
void emulated_synchronize(int device) {
  tell("device");
  touch("cudaDeviceSynchronize", device);
  drain_all(device);
}
void emulated_launch(int device) { current_queue(device).drain(); }  // behind it, a kernel may run
void emulated_sleep(int device, int64_t microseconds) {
  current_queue(device).give([=] { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); });
}
// The stream stands still from here on, until the mark that is returned is passed.
void* emulated_hold(int device, int64_t stream) {
  auto* gate = new std::shared_ptr<Mark>(std::make_shared<Mark>());
  queue_of(device, stream).give([mark = *gate] { mark->wait(); });
  return gate;
}
void emulated_resume(void* held) {
  auto* gate = static_cast<std::shared_ptr<Mark>*>(held);
  (*gate)->pass();
  delete gate;
}
// allocated, reserved, their peaks, allocations of the driver, allocations, limit
void emulated_memory(int device, uint64_t* found) {
  Memory& memory = memory_of(device);
  std::lock_guard<std::mutex> lock(memory.mutex);
  const uint64_t now[] = {memory.allocated,     memory.reserved,         memory.peak_allocated,
                          memory.peak_reserved, memory.num_device_alloc, memory.num_allocations,
                          memory.limit};
  std::copy(std::begin(now), std::end(now), found);
}
void emulated_reset_peaks(int device) {
  Memory& memory = memory_of(device);
  std::lock_guard<std::mutex> lock(memory.mutex);
  memory.peak_allocated = memory.allocated;
  memory.peak_reserved = memory.reserved;
}
void emulated_limit(int device, uint64_t num_bytes) { memory_of(device).limit = num_bytes; }
void emulated_empty_cache(int device) {
  drain_all(device);
  Memory& memory = memory_of(device);
  std::lock_guard<std::mutex> lock(memory.mutex);
  give_cached_back(memory);
}

// What Python's storage.resize_(0) does in a build for GPUs. `storage` is its _cdata.
void emulated_let_go(void* storage) {
  auto* found = static_cast<c10::StorageImpl*>(storage);
  found->set_data_ptr_noswap(allocator().allocate(0));
  found->set_nbytes(0);
}

// From now on no more than `num_bytes` can be registered at once. Returns what is.
uint64_t emulated_lockable(uint64_t num_bytes) {
  std::lock_guard<std::mutex> lock(locked_mutex);
  lockable = num_bytes;
  return registered_bytes;
}

int cudaHostRegister(void* address, size_t num_bytes, unsigned) {
  touch("cudaHostRegister", current_device);
  std::lock_guard<std::mutex> lock(locked_mutex);
  if (refusal != 0) return refusal;
  if (locked.count(static_cast<char*>(address)))
    return refusal = 712;  // cudaErrorHostMemoryAlreadyRegistered
  if (num_bytes > lockable - std::min(lockable, registered_bytes))
    return refusal = 2;  // cudaErrorMemoryAllocation
  locked[static_cast<char*>(address)] = num_bytes;
  registered_bytes += num_bytes;
  return 0;
}
int cudaHostUnregister(void* address) {
  touch("cudaHostUnregister", current_device);
  std::lock_guard<std::mutex> lock(locked_mutex);
  auto found = locked.find(static_cast<char*>(address));
  if (found == locked.end()) return refusal = 713;  // cudaErrorHostMemoryNotRegistered
  registered_bytes -= found->second;
  locked.erase(found);
  return 0;
}
int cudaGetLastError() {
  std::lock_guard<std::mutex> lock(locked_mutex);
  return std::exchange(refusal, 0);
}
const char* cudaGetErrorString(int code) {
  return code == 2     ? "out of memory (emulated)"
         : code == 712 ? "already registered (emulated)"
         : code == 713 ? "not registered (emulated)"
                       : "no error";
}
}
