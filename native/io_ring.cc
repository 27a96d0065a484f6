#include "io_ring.h"

#include <unistd.h>

#include <system_error>
#include <utility>

#include "io_kernel_threads.h"
#include "io_kernel_uring.h"
#include "io_ring_of.h"

namespace offload_rt {
namespace {

Status check(const IoRingOptions& options) {
  if (Status status = check_depth(options.depth); !status.ok()) return status;
  if (Status status = check_length("io_bytes", options.io_bytes); !status.ok()) return status;
  return check_length("piece_bytes", options.piece_bytes);
}

template <class Kernel>
Status open_with(const IoRingOptions& options, IoBackend backend, std::string fallback_reason,
                 IoRingPtr& ring) {
  std::unique_ptr<Kernel> kernel;
  if (Status status = Kernel::open(options.num_slots(), kernel); !status.ok()) return status;
  try {
    ring.reset(new IoRingOf<Kernel>(std::move(kernel), options, backend, std::move(fallback_reason)));
  } catch (const std::system_error& error) {
    return Status::from_errno(error.code().value(), "starting the completion thread");
  }
  return {};
}

}  // namespace

IoRing::IoRing(IoBackend backend, std::string fallback_reason)
    : owner_process_(::getpid()), backend_(backend), fallback_reason_(std::move(fallback_reason)) {}

bool IoRing::forked() const { return ::getpid() != owner_process_; }

void IoRingDeleter::operator()(IoRing* ring) const {
  if (!ring->forked()) delete ring;
}

Status open_io_ring(const IoRingOptions& options, IoRingPtr& ring) {
  if (Status status = check(options); !status.ok()) return status;
  std::string fallback_reason;
  if (options.backend != IoBackend::threads) {
    Status status = open_with<UringKernel>(options, IoBackend::io_uring, {}, ring);
    if (status.ok() || options.backend == IoBackend::io_uring) return status;
    fallback_reason = status.message();
  }
  return open_with<ThreadKernel>(options, IoBackend::threads, std::move(fallback_reason), ring);
}

Status probe_io_uring() {
  std::unique_ptr<UringKernel> kernel;
  return UringKernel::open(1, kernel);
}

}  // namespace offload_rt
