// Requests by io_uring, through raw system calls: the rings are mapped and their indices kept here, without
// liburing.
//
// One thread submits and reaps. That is more than tidiness: the kernel cancels the requests of a thread that
// exits, so requests must not be submitted by whichever Python thread happens to ask for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "io_kernel.h"
#include "io_uring_abi.h"
#include "status.h"

namespace offload_rt {

// An open descriptor, closed with the object.
class OwnedFd {
 public:
  OwnedFd() = default;
  explicit OwnedFd(int fd) : fd_(fd) {}
  OwnedFd(OwnedFd&& other) noexcept;
  OwnedFd& operator=(OwnedFd&& other) noexcept;
  ~OwnedFd();
  [[nodiscard]] int get() const { return fd_; }

 private:
  int fd_ = -1;
};

// Memory shared with the kernel, unmapped with the object. A forked child does not get it.
class KernelMapping {
 public:
  KernelMapping() = default;
  KernelMapping(const KernelMapping&) = delete;
  KernelMapping& operator=(const KernelMapping&) = delete;
  ~KernelMapping();
  Status map(int fd, std::int64_t which, std::size_t length);

  template <class T>
  [[nodiscard]] T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(start_) + offset);
  }

 private:
  void* start_ = nullptr;
  std::size_t length_ = 0;
};

class UringKernel {
 public:
  // Up to `depth` requests may be in flight; the completion queue is then never full.
  static Status open(unsigned depth, std::unique_ptr<UringKernel>& kernel);

  std::size_t submit(std::span<const IoRequest> requests);
  std::size_t reap(std::span<IoCompletion> completions);
  void wake();
  Status set_buffer(FixedIndex index, std::span<std::byte> memory);

 private:
  UringKernel() = default;
  Status set_up(unsigned depth);
  Status make_table();
  std::size_t take_completions(std::span<IoCompletion> completions);

  // [Note: ring indices] Head and tail run freely and are masked on use. The side that owns an index stores
  // it with release after it has filled or read the entries, and the other side loads it with acquire before
  // it does.
  //
  //     submission   tail: ours, head: the kernel's       completion   tail: the kernel's, head: ours
  //
  // The kernel looks at the submission tail inside io_uring_enter alone, so that after a partial submission
  // the tail can be taken back, and the queue is empty whenever submit() is not running.
  OwnedFd ring_;
  OwnedFd event_;  // counts completions (the kernel adds to it) and wake() calls: reap() sleeps on one thing
  KernelMapping rings_, second_ring_, entries_;  // second_ring_ on kernels that map the two queues apart
  std::uint32_t* sq_tail_ = nullptr;
  std::uint32_t* sq_array_ = nullptr;
  std::uint32_t sq_mask_ = 0, sq_size_ = 0;
  std::uint32_t* cq_head_ = nullptr;
  std::uint32_t* cq_tail_ = nullptr;
  std::uint32_t cq_mask_ = 0;
  io_uring_abi::Sqe* sqes_ = nullptr;
  io_uring_abi::Cqe* cqes_ = nullptr;
  Status no_buffers_;  // why there is no table of registered memory: kernels before Linux 5.13
  // Requests that io_uring_enter refused for good, as completions waiting for the next reap().
  std::unique_ptr<IoCompletion[]> refused_;
  std::size_t num_refused_ = 0;
};

static_assert(IoKernel<UringKernel>);

}  // namespace offload_rt
