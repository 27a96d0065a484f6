#include "io_kernel_threads.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "io_thread.h"

namespace offload_rt {
namespace {

constexpr unsigned kMaxWorkers = 32;

IoCompletion perform(const IoRequest& request) {
  const auto offset = static_cast<off_t>(request.offset);
  ssize_t result = 0;
  switch (request.kind) {
    case IoKind::read:
      result = ::pread(request.fd, request.address, request.length, offset);
      break;
    case IoKind::write:
      result = ::pwrite(request.fd, request.address, request.length, offset);
      break;
    case IoKind::sync:
      result = ::fdatasync(request.fd);
      break;
  }
  return {request.slot, static_cast<std::int32_t>(result < 0 ? -errno : result)};
}

}  // namespace

Status ThreadKernel::open(unsigned depth, std::unique_ptr<ThreadKernel>& kernel) {
  std::unique_ptr<ThreadKernel> fresh(new ThreadKernel());
  try {
    for (unsigned i = 0; i < std::min(depth, kMaxWorkers); ++i)
      fresh->workers_.push_back(start_io_thread("offload-io", [self = fresh.get()] { self->work(); }));
  } catch (const std::system_error& error) {
    return Status::from_errno(error.code().value(), "starting the I/O threads");
  }
  kernel = std::move(fresh);
  return {};
}

ThreadKernel::~ThreadKernel() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_arrived_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadKernel::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_arrived_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const IoRequest request = queue_.front();
    queue_.pop_front();
    lock.unlock();
    const IoCompletion completion = perform(request);
    lock.lock();
    completions_.push_back(completion);
    completion_arrived_.notify_one();
  }
}

std::size_t ThreadKernel::submit(std::span<const IoRequest> requests) {
  {
    const std::lock_guard lock(mutex_);
    queue_.insert(queue_.end(), requests.begin(), requests.end());
  }
  if (requests.size() == 1)
    work_arrived_.notify_one();
  else
    work_arrived_.notify_all();
  return requests.size();
}

std::size_t ThreadKernel::reap(std::span<IoCompletion> completions) {
  std::unique_lock lock(mutex_);
  completion_arrived_.wait(lock, [this] { return woken_ || !completions_.empty(); });
  woken_ = false;
  const std::size_t count = std::min(completions.size(), completions_.size());
  const auto end = completions_.begin() + static_cast<std::ptrdiff_t>(count);
  std::copy(completions_.begin(), end, completions.begin());
  completions_.erase(completions_.begin(), end);
  return count;
}

Status ThreadKernel::set_buffer(FixedIndex, std::span<std::byte>) {
  return Status::from_errno(EOPNOTSUPP, "memory is registered with io_uring only");
}

void ThreadKernel::wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  completion_arrived_.notify_one();
}

}  // namespace offload_rt
