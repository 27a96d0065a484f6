#include "io_kernel_uring.h"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <utility>

namespace offload_rt {
namespace {

namespace abi = io_uring_abi;

// GCC's atomic_ref wants a non-const object, also to load from it.
std::uint32_t load_acquire(std::uint32_t& index) {
  return std::atomic_ref<std::uint32_t>(index).load(std::memory_order_acquire);
}

void store_release(std::uint32_t& index, std::uint32_t value) {
  std::atomic_ref<std::uint32_t>(index).store(value, std::memory_order_release);
}

std::uint8_t opcode_of(IoKind kind, bool fixed_memory) {
  if (kind == IoKind::sync) return abi::kOpFsync;
  if (kind == IoKind::read) return fixed_memory ? abi::kOpReadFixed : abi::kOpRead;
  return fixed_memory ? abi::kOpWriteFixed : abi::kOpWrite;
}

}  // namespace

OwnedFd::OwnedFd(OwnedFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

OwnedFd& OwnedFd::operator=(OwnedFd&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

OwnedFd::~OwnedFd() {
  if (fd_ >= 0) ::close(fd_);
}

KernelMapping::~KernelMapping() {
  if (start_ != nullptr) ::munmap(start_, length_);
}

Status KernelMapping::map(int fd, std::int64_t which, std::size_t length) {
  void* start = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, which);
  if (start == MAP_FAILED) return Status::from_errno(errno, "mapping an io_uring queue");
  start_ = start;
  length_ = length;
  if (::madvise(start, length, MADV_DONTFORK) != 0)
    return Status::from_errno(errno, "madvise(MADV_DONTFORK)");
  return {};
}

Status UringKernel::open(unsigned depth, std::unique_ptr<UringKernel>& kernel) {
  std::unique_ptr<UringKernel> fresh(new UringKernel());
  if (Status status = fresh->set_up(depth); !status.ok()) return status;
  kernel = std::move(fresh);
  return {};
}

Status UringKernel::set_up(unsigned depth) {
  abi::Params params{};
  params.flags = abi::kSetupClamp;
  ring_ = OwnedFd(static_cast<int>(::syscall(abi::kSysSetup, depth, &params)));
  if (ring_.get() < 0) return Status::from_errno(errno, "io_uring_setup");
  if ((params.features & abi::kFeatureReadWrite) == 0)
    return Status::from_errno(ENOSYS, "io_uring of this kernel has no plain read and write (Linux 5.6 has)");
  if (params.cq_entries < depth) return Status::from_errno(ENOSPC, "io_uring_setup gave too short a queue");

  const std::size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(std::uint32_t);
  const std::size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(abi::Cqe);
  const bool single = (params.features & abi::kFeatureSingleMmap) != 0;
  if (Status status =
          rings_.map(ring_.get(), abi::kOffsetSqRing, single ? std::max(sq_bytes, cq_bytes) : sq_bytes);
      !status.ok())
    return status;
  if (!single)
    if (Status status = second_ring_.map(ring_.get(), abi::kOffsetCqRing, cq_bytes); !status.ok())
      return status;
  if (Status status = entries_.map(ring_.get(), abi::kOffsetSqes, params.sq_entries * sizeof(abi::Sqe));
      !status.ok())
    return status;

  const KernelMapping& cq = single ? rings_ : second_ring_;
  sq_tail_ = rings_.at<std::uint32_t>(params.sq_off.tail);
  sq_array_ = rings_.at<std::uint32_t>(params.sq_off.array);
  sq_mask_ = *rings_.at<std::uint32_t>(params.sq_off.ring_mask);
  sq_size_ = params.sq_entries;
  cq_head_ = cq.at<std::uint32_t>(params.cq_off.head);
  cq_tail_ = cq.at<std::uint32_t>(params.cq_off.tail);
  cq_mask_ = *cq.at<std::uint32_t>(params.cq_off.ring_mask);
  cqes_ = cq.at<abi::Cqe>(params.cq_off.cqes);
  sqes_ = entries_.at<abi::Sqe>(0);
  refused_ = std::make_unique<IoCompletion[]>(depth);

  event_ = OwnedFd(::eventfd(0, EFD_CLOEXEC));
  if (event_.get() < 0) return Status::from_errno(errno, "eventfd");
  const int event_fd = event_.get();
  if (::syscall(abi::kSysRegister, ring_.get(), abi::kRegisterEventFd, &event_fd, 1) != 0)
    return Status::from_errno(errno, "io_uring_register(eventfd)");

  no_buffers_ = make_table();  // a kernel without one serves all the same
  return {};
}

// Places to be filled later.
Status UringKernel::make_table() {
  std::array<iovec, kMaxFixedBuffers> no_memory{};
  abi::TableRegister table{};
  table.num_entries = kMaxFixedBuffers;
  table.entries = reinterpret_cast<std::uint64_t>(no_memory.data());
  if (::syscall(abi::kSysRegister, ring_.get(), abi::kRegisterBuffers, &table, sizeof table) == 0) return {};
  return Status::from_errno(errno, "io_uring_register(table)");
}

Status UringKernel::set_buffer(FixedIndex index, std::span<std::byte> memory) {
  if (!no_buffers_.ok()) return no_buffers_;
  const iovec entry{memory.data(), memory.size()};
  abi::TableUpdate update{};
  update.first = static_cast<std::uint32_t>(index);
  update.entries = reinterpret_cast<std::uint64_t>(&entry);
  update.num_entries = 1;
  long done;
  do done = ::syscall(abi::kSysRegister, ring_.get(), abi::kUpdateBuffers, &update, sizeof update);
  while (done < 0 && errno == EINTR);
  return done == 1 ? Status() : Status::from_errno(done < 0 ? errno : EINVAL, "io_uring_register");
}

std::size_t UringKernel::submit(std::span<const IoRequest> requests) {
  const std::size_t count = std::min<std::size_t>(requests.size(), sq_size_);
  const std::uint32_t start = *sq_tail_;
  for (std::size_t i = 0; i < count; ++i) {
    const IoRequest& request = requests[i];
    const std::uint32_t index = (start + static_cast<std::uint32_t>(i)) & sq_mask_;
    abi::Sqe& sqe = sqes_[index];
    sqe = {};
    const bool fixed = request.buffer != kNotFixed;
    sqe.opcode = opcode_of(request.kind, fixed);
    if (fixed) sqe.buf_index = static_cast<std::uint16_t>(request.buffer);
    sqe.fd = request.fd;
    if (request.kind == IoKind::sync) {
      sqe.rw_flags = abi::kFsyncDatasync;  // of the whole file: an address is refused, a range not needed
    } else {
      sqe.off = request.offset;
      sqe.addr = reinterpret_cast<std::uint64_t>(request.address);
      sqe.len = request.length;
    }
    sqe.user_data = request.slot;
    sq_array_[index] = index;
  }
  store_release(*sq_tail_, start + static_cast<std::uint32_t>(count));  // [Note: ring indices]

  long taken;
  do taken = ::syscall(abi::kSysEnter, ring_.get(), count, 0, 0, nullptr, 0);
  while (taken < 0 && errno == EINTR);
  const int refusal = taken < 0 ? errno : 0;
  const auto num_taken = static_cast<std::size_t>(std::max(taken, 0L));
  store_release(*sq_tail_,
                start + static_cast<std::uint32_t>(num_taken));  // take back what was not looked at

  // EAGAIN and EBUSY: short of memory, or completions must be reaped first. Later, then.
  if (refusal == 0 || refusal == EAGAIN || refusal == EBUSY) return num_taken;
  for (std::size_t i = 0; i < count; ++i) refused_[num_refused_++] = {requests[i].slot, -refusal};
  wake();
  return count;
}

std::size_t UringKernel::take_completions(std::span<IoCompletion> completions) {
  std::size_t count = 0;
  while (num_refused_ > 0 && count < completions.size()) completions[count++] = refused_[--num_refused_];
  std::uint32_t head = *cq_head_;
  const std::uint32_t tail = load_acquire(*cq_tail_);  // [Note: ring indices]
  while (head != tail && count < completions.size()) {
    const abi::Cqe& cqe = cqes_[head++ & cq_mask_];
    completions[count++] = {static_cast<std::uint32_t>(cqe.user_data), cqe.res};
  }
  store_release(*cq_head_, head);
  return count;
}

std::size_t UringKernel::reap(std::span<IoCompletion> completions) {
  if (const std::size_t count = take_completions(completions); count > 0) return count;
  // A completion between the look above and this read has already counted the event up, so it is not slept
  // through. An interrupted read makes the caller look again, no more.
  std::uint64_t events = 0;
  [[maybe_unused]] const ssize_t ignored = ::read(event_.get(), &events, sizeof events);
  return take_completions(completions);
}

void UringKernel::wake() {
  const std::uint64_t one = 1;
  // Fails only if 2^64 - 2 wake-ups are waiting to be read, and then nobody sleeps.
  [[maybe_unused]] const ssize_t ignored = ::write(event_.get(), &one, sizeof one);
}

}  // namespace offload_rt
