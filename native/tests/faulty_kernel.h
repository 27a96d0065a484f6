// A kernel that fails as told: wraps a real one and spoils chosen requests. Tests alone instantiate it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "io_kernel.h"

namespace offload_rt::testing {

// What happens to one request. The default is nothing.
struct Fault {
  static constexpr std::uint32_t kAll = ~0U;

  int error_number = 0;               // complete with this, without performing it
  bool empty = false;                 // complete with 0 bytes, without performing it
  std::uint32_t at_most = kAll;       // perform only so many bytes: a short read or write
  bool held = false;                  // perform it, and keep the completion until let_go()
  std::chrono::milliseconds slow{0};  // perform it, and hand the completion out so much later
  bool refused = false;               // do not take it, nor what follows: the queue is full
};

// Called for each request that is offered, with the number of requests offered before it.
using FaultPlan = std::function<Fault(const IoRequest& request, std::uint64_t number)>;

template <IoKernel Inner>
class FaultyKernel {
 public:
  FaultyKernel(std::unique_ptr<Inner> inner, FaultPlan plan)
      : inner_(std::move(inner)), plan_(std::move(plan)) {}

  std::size_t submit(std::span<const IoRequest> requests) {
    std::size_t taken = 0;
    for (const IoRequest& request : requests) {
      const Fault fault = plan_(request, num_offered_++);
      if (fault.refused) break;
      if (fault.error_number != 0 || fault.empty) {
        made_up_.push_back({request.slot, -fault.error_number});
        inner_->wake();
      } else {
        if (fault.held) note_held(request.slot);
        slow_[request.slot] = fault.slow;
        IoRequest performed = request;
        performed.length = std::min(performed.length, fault.at_most);
        while (inner_->submit({&performed, 1}) == 0) {
        }
      }
      ++taken;
    }
    return taken;
  }

  std::size_t reap(std::span<IoCompletion> completions) {
    std::size_t count = 0;
    for (; !made_up_.empty() && count < completions.size(); made_up_.pop_front())
      completions[count++] = made_up_.front();
    if (count > 0 || (count = take_released(completions)) > 0) return count;
    const std::size_t num_real = inner_->reap(completions);
    for (std::size_t i = 0; i < num_real; ++i) {
      std::this_thread::sleep_for(std::exchange(slow_[completions[i].slot], {}));
      if (!keep_if_held(completions[i])) completions[count++] = completions[i];
    }
    return count;
  }

  void wake() { inner_->wake(); }
  Status set_buffer(FixedIndex index, std::span<std::byte> memory) {
    return inner_->set_buffer(index, memory);
  }

  // From the test's thread, which keeps the ring alive until this has returned.
  void let_go() {
    {
      const std::lock_guard lock(mutex_);
      letting_go_ = true;
    }
    wake();
  }

  // How many held requests the real kernel has already performed.
  [[nodiscard]] std::size_t num_kept() {
    const std::lock_guard lock(mutex_);
    return kept_.size();
  }

 private:
  void note_held(std::uint32_t slot) {
    const std::lock_guard lock(mutex_);
    if (!letting_go_) held_slots_.push_back(slot);
  }

  bool keep_if_held(const IoCompletion& completion) {
    const std::lock_guard lock(mutex_);
    if (std::erase(held_slots_, completion.slot) == 0 || letting_go_) return false;
    kept_.push_back(completion);
    return true;
  }

  std::size_t take_released(std::span<IoCompletion> completions) {
    const std::lock_guard lock(mutex_);
    std::size_t count = 0;
    if (letting_go_)
      for (; !kept_.empty() && count < completions.size(); kept_.pop_back())
        completions[count++] = kept_.back();
    return count;
  }

  std::unique_ptr<Inner> inner_;
  FaultPlan plan_;
  std::uint64_t num_offered_ = 0;
  std::deque<IoCompletion> made_up_;
  std::map<std::uint32_t, std::chrono::milliseconds> slow_;  // by slot

  std::mutex mutex_;  // guards the rest
  std::vector<std::uint32_t> held_slots_;
  std::vector<IoCompletion> kept_;
  bool letting_go_ = false;
};

}  // namespace offload_rt::testing
