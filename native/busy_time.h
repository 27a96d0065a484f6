// How long something was under way: intervals that overlap count once.
//
//     one      |=========|
//     another       |=========|        |===|
//     busy     |--------------|        |---|
#pragma once

#include <chrono>
#include <cstdint>

namespace offload_rt {

// Not thread-safe: guarded by its owner. Times never go backwards.
class BusyTime {
 public:
  using Clock = std::chrono::steady_clock;

  void begin(Clock::time_point now) {
    if (num_under_way_++ == 0) since_ = now;
  }

  // Each end belongs to a begin.
  void end(Clock::time_point now) {
    if (--num_under_way_ == 0) before_ += now - since_;
  }

  [[nodiscard]] double seconds(Clock::time_point now) const {
    const Clock::duration open = num_under_way_ > 0 ? now - since_ : Clock::duration::zero();
    return std::chrono::duration<double>(before_ + open).count();
  }

 private:
  std::uint64_t num_under_way_ = 0;
  Clock::time_point since_;
  Clock::duration before_ = Clock::duration::zero();
};

}  // namespace offload_rt
