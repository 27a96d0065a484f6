// Requests by pread, pwrite and fdatasync on a pool of threads: for kernels and containers that refuse
// io_uring.
//
// A pool of its own, not the ring's bookkeeping: a worker performs one request at a time and reports the
// result as io_uring would, so that everything above cannot tell the difference.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "io_kernel.h"
#include "status.h"

namespace offload_rt {

class ThreadKernel {
 public:
  // Starts min(depth, 32) workers, since a blocked worker is one request at the drive.
  static Status open(unsigned depth, std::unique_ptr<ThreadKernel>& kernel);
  ~ThreadKernel();
  ThreadKernel(const ThreadKernel&) = delete;
  ThreadKernel& operator=(const ThreadKernel&) = delete;

  std::size_t submit(std::span<const IoRequest> requests);
  std::size_t reap(std::span<IoCompletion> completions);
  void wake();
  Status set_buffer(FixedIndex index, std::span<std::byte> memory);  // refused: pread pins nothing

 private:
  ThreadKernel() = default;
  void work();

  std::mutex mutex_;
  std::condition_variable work_arrived_, completion_arrived_;
  std::deque<IoRequest> queue_;
  std::deque<IoCompletion> completions_;
  bool woken_ = false;
  bool stopping_ = false;
  std::vector<std::thread> workers_;  // last: they use all of the above
};

static_assert(IoKernel<ThreadKernel>);

}  // namespace offload_rt
