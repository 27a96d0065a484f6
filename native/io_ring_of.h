// The bookkeeping of asynchronous I/O over any kernel: cutting operations into requests, keeping every device
// busy, submitting the rests of short ones, waking waiters. It makes no I/O system call of its own.
//
// [Note: who touches what]
//   completion thread alone   the kernel's submit and reap, `batch_`, `slots_`
//   under `mutex_`            operations, the queues, the account
//   registry_, any thread     the kernel's set_buffer
//   any thread                kernel's wake
// The lock is not held while the kernel is submitted to: a buffered read that hits the page cache is copied
// inside that call, and would make submit() block for as long.
//
// [Note: operation lifetime] An operation is finished only when no request of it is in flight, also when it
// failed: until then the kernel may still write into its memory, which the waiter is about to reuse.
#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "io_account.h"
#include "io_devices.h"
#include "io_kernel.h"
#include "io_operation.h"
#include "io_registry.h"
#include "io_ring.h"
#include "io_thread.h"
#include "io_verdict.h"

namespace offload_rt {

template <IoKernel Kernel>
class IoRingOf final : public IoRing {
 public:
  IoRingOf(std::unique_ptr<Kernel> kernel, const IoRingOptions& options, IoBackend backend,
           std::string fallback_reason)
      : IoRing(backend, std::move(fallback_reason)),
        kernel_(std::move(kernel)),
        registry_(*kernel_, options.piece_bytes),
        devices_(options.depth, options.io_bytes),
        slots_(options.num_slots()),
        completions_(options.num_slots()) {
    for (std::uint32_t slot = options.num_slots(); slot > 0; --slot) free_slots_.push_back(slot - 1);
    batch_.reserve(options.num_slots());
    thread_ = start_io_thread("offload-ring", [this] { run(); });
  }

  ~IoRingOf() override {
    begin_to_stop(/*and_forget_queued=*/true);
    if (thread_.joinable()) thread_.join();
  }

  Status submit(const IoOperation& operation, Ticket& ticket) override {
    if (forked()) return Status::invalid("a ring does not survive fork; open one in the child");
    constexpr auto kLastOffset = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (operation.offset > kLastOffset || operation.length > kLastOffset - operation.offset)
      return Status::invalid(operation.path + ": offset plus length is past the largest file");
    // A descriptor that is not open is found out by the request itself, so that there is one way to fail.
    FilePlace place;
    static_cast<void>(find_place(operation.fd, place));
    {
      const std::lock_guard lock(mutex_);
      if (closing_) {
        Status status = evidence(operation);
        status.code = StatusCode::closed;
        return status;
      }
      ticket = next_ticket_++;
      Progress& progress = operations_[ticket];
      progress.operation = operation;
      progress.device = &devices_.of(place.device);
      progress.resume_alignment = place.direct ? kDirectAlignment : 1;
      progress.submitted = Clock::now();
      account_.submitted(progress);
      if (operation.length == 0 && operation.kind != IoKind::sync) {
        progress.finished = true;
        return {};
      }
      progress.device->queue.push_back(&progress);
      account_.begin(progress);
    }
    kernel_->wake();
    return {};
  }

  Status tune(int fd, unsigned depth, std::uint32_t io_bytes) override {
    if (Status status = check_depth(depth, devices_.depth()); !status.ok()) return status;
    if (Status status = check_length("io_bytes", io_bytes); !status.ok()) return status;
    FilePlace place;
    if (Status status = find_place(fd, place); !status.ok()) return status;
    const std::lock_guard lock(mutex_);
    IoDevice<Progress>& device = devices_.of(place.device);
    device.depth = depth;
    device.io_bytes = io_bytes;
    return {};
  }

  Status register_memory(std::span<std::byte> memory) override {
    if (forked()) return Status::invalid("a ring does not survive fork; register with one of the child's");
    return registry_.add_memory(memory);
  }
  Status forget_memory(std::byte* start) override {
    return forked() ? Status() : registry_.drop_memory(start);  // in a child: the parent's to drop
  }

  Status wait(Ticket ticket, double timeout_seconds) override {
    if (forked()) return Status::invalid("a ring does not survive fork; its operations are the parent's");
    if (Status status = check_timeout(timeout_seconds); !status.ok()) return status;
    const Clock::time_point deadline = deadline_after(timeout_seconds);
    std::unique_lock lock(mutex_);
    for (;;) {
      // Looked up anew each time: another waiter may have taken the ticket meanwhile.
      const auto found = operations_.find(ticket);
      if (found == operations_.end()) return Status::unknown_ticket(ticket);
      Progress& progress = found->second;
      if (progress.finished) {
        Status status = std::move(progress.status);
        operations_.erase(found);
        return status;
      }
      if (Clock::now() >= deadline) return late(progress);
      finished_.wait_until(lock, deadline);
    }
  }

  Status done(Ticket ticket, bool& finished) const override {
    const std::lock_guard lock(mutex_);
    const auto found = operations_.find(ticket);
    if (found == operations_.end()) return Status::unknown_ticket(ticket);
    finished = found->second.finished;
    return {};
  }

  std::string outstanding() const override {
    const std::lock_guard lock(mutex_);
    return describe_unfinished(operations_);
  }

  IoCounters counters() const override {
    const std::lock_guard lock(mutex_);
    return account_.counters();
  }

  void record(std::size_t most) override {
    const std::lock_guard lock(mutex_);
    account_.record(most);
  }

  IoRecords records() const override {
    const std::lock_guard lock(mutex_);
    return account_.records(operations_);
  }

  Status close(double timeout_seconds, bool and_forget_queued) override {
    if (forked()) return Status::invalid("a ring does not survive fork; the parent closes it");
    if (Status status = check_timeout(timeout_seconds); !status.ok()) return status;
    const Clock::time_point deadline = deadline_after(timeout_seconds);
    const std::lock_guard only_one(close_mutex_);
    if (!thread_.joinable()) return {};
    begin_to_stop(and_forget_queued);
    {
      std::unique_lock lock(mutex_);
      while (const Progress* first = first_unfinished()) {
        if (Clock::now() >= deadline) return late(*first);
        finished_.wait_until(lock, deadline);
      }
    }
    thread_.join();
    const std::lock_guard lock(mutex_);
    for (const auto& [ticket, progress] : operations_)
      if (!progress.status.ok()) return progress.status;
    return {};
  }

 private:
  static constexpr auto kPause = std::chrono::milliseconds(1);

  // ---- completion thread ----

  void run() {
    while (fill_batch()) {
      const std::size_t taken = kernel_->submit(batch_);
      batch_.erase(batch_.begin(), batch_.begin() + static_cast<std::ptrdiff_t>(taken));
      num_in_kernel_ += taken;
      bool pause = false;
      if (num_in_kernel_ == 0 && !batch_.empty()) {
        // The queue is full of nothing of ours, so no completion will come to try again after.
        const IoCompletion refused{batch_.front().slot, -EAGAIN};
        batch_.erase(batch_.begin());
        pause = settle({&refused, 1});
      } else {
        const std::size_t count = kernel_->reap(completions_);
        num_in_kernel_ -= count;
        pause = settle({completions_.data(), count});
      }
      if (pause) std::this_thread::sleep_for(kPause);
    }
  }

  // Puts requests into the slots that devices have room for, first the rests of earlier ones, then each queue
  // in its order. False when the ring is to stop and nothing is left.
  bool fill_batch() {
    const std::lock_guard lock(mutex_);
    if (forget_queued_) forget_queued();
    for (; !again_.empty(); again_.pop_front()) add_to_batch(again_.front());
    while (!free_slots_.empty()) {
      IoDevice<Progress>* device = devices_.next();
      if (device == nullptr) break;
      Progress& progress = *device->queue.front();
      if (progress.status.ok()) cut_next(progress);
      if (!progress.status.ok() || progress.cut == progress.operation.length) device->queue.pop_front();
    }
    const std::size_t in_flight = slots_.size() - free_slots_.size();
    account_.in_flight(in_flight);
    return !(closing_ && in_flight == 0 && devices_.idle());
  }

  void cut_next(Progress& progress) {
    account_.cut(progress);
    const std::uint32_t slot = free_slots_.back();
    free_slots_.pop_back();
    std::uint64_t length =
        std::min<std::uint64_t>(progress.operation.length - progress.cut, progress.device->io_bytes);
    std::byte* const address = progress.operation.address + progress.cut;
    const MemoryPiece piece = registry_.find_memory(address);
    if (piece.index != kNotFixed)
      length = std::min<std::uint64_t>(
          length, static_cast<std::uint64_t>(piece.bytes.data() + piece.bytes.size() - address));
    slots_[slot] = {.owner = &progress,
                    .begin = progress.cut,
                    .length = static_cast<std::uint32_t>(length),
                    .buffer = piece.index};
    progress.cut += length;
    progress.in_flight++;
    progress.device->in_flight++;
    add_to_batch(slot);
  }

  void add_to_batch(std::uint32_t index) {
    const Slot& slot = slots_[index];
    const IoOperation& operation = slot.owner->operation;
    const std::uint64_t skip = slot.begin + slot.resume_from;
    batch_.push_back({.slot = index,
                      .kind = operation.kind,
                      .fd = operation.fd,
                      .offset = operation.offset + skip,
                      .address = operation.address + skip,
                      .length = slot.length - slot.resume_from,
                      .buffer = slot.buffer});
    account_.requested(slot.buffer != kNotFixed);
  }

  // True if the kernel keeps refusing and wants a pause.
  bool settle(std::span<const IoCompletion> completions) {
    const std::lock_guard lock(mutex_);
    bool pause = false;
    for (const IoCompletion& completion : completions) {
      carry_on(completion);
      pause |= slots_[completion.slot].refusals > kPatientRefusals;
    }
    return pause;
  }

  void carry_on(const IoCompletion& completion) {
    Slot& slot = slots_[completion.slot];
    const Verdict verdict = judge(slot, completion.result);
    slot.arrived += verdict.num_new_bytes;
    slot.owner->done += verdict.num_new_bytes;
    account_.arrived(*slot.owner, verdict.num_new_bytes);
    if (verdict.code != StatusCode::ok) tell_failure(slot, verdict.code, verdict.error_number);
    if (verdict.over) {
      retire(completion.slot);
    } else {
      slot.resume_from = slot.arrived - slot.arrived % slot.owner->resume_alignment;
      account_.resubmitted();
      again_.push_back(completion.slot);
    }
  }

  void retire(std::uint32_t index) {
    Slot& slot = slots_[index];
    Progress& progress = *slot.owner;
    slot = {};
    free_slots_.push_back(index);
    progress.device->in_flight--;
    if (--progress.in_flight > 0) return;  // [Note: operation lifetime]
    if (progress.status.ok() && progress.done < progress.operation.length) return;
    finish(progress);
  }

  void finish(Progress& progress) {
    if (!progress.status.ok()) {
      progress.status.done = progress.done;
      std::erase(progress.device->queue, &progress);  // it may not have been cut to its end
    }
    progress.finished = true;
    account_.finish(progress);
    finished_.notify_all();
  }

  void forget_queued() {
    for (Progress* progress : devices_.drain()) {
      progress->status = evidence(progress->operation);
      progress->status.code = StatusCode::closed;
      progress->status.failed_at = progress->operation.offset + progress->cut;
      if (progress->in_flight == 0) finish(*progress);
    }
  }

  // ---- the caller's thread ----

  static Status check_timeout(double seconds) {
    return seconds >= 0 ? Status()
                        : Status::invalid("timeout_seconds must be 0 or more");  // nor not a number
  }

  static Clock::time_point deadline_after(double seconds) {
    // Adding more than the clock can hold would wrap around.
    const auto limit = std::chrono::duration<double>(std::min(seconds, kForever));
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(limit);
  }

  void begin_to_stop(bool and_forget_queued) {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
      forget_queued_ |= and_forget_queued;
    }
    kernel_->wake();
  }

  [[nodiscard]] const Progress* first_unfinished() const {
    for (const auto& [ticket, progress] : operations_)
      if (!progress.finished) return &progress;
    return nullptr;
  }

  [[nodiscard]] Status late(const Progress& progress) const {
    Status status = evidence(progress.operation);
    status.code = StatusCode::timed_out;
    status.done = progress.done;
    status.detail = describe_unfinished(operations_);
    return status;
  }

  std::unique_ptr<Kernel> kernel_;
  IoRegistry<Kernel> registry_;

  // [Note: who touches what]
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  std::map<Ticket, Progress> operations_;  // pointers to a map's values stay good; the dump is in order
  Ticket next_ticket_ = 1;
  IoDevices<Progress> devices_;
  std::deque<std::uint32_t> again_;  // slots whose rest is to be submitted
  std::vector<std::uint32_t> free_slots_;
  IoAccount account_;
  bool closing_ = false;
  bool forget_queued_ = false;
  std::mutex close_mutex_;

  std::vector<Slot> slots_;
  std::vector<IoRequest> batch_;  // cut, and not yet taken by the kernel
  std::vector<IoCompletion> completions_;
  std::size_t num_in_kernel_ = 0;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace offload_rt
