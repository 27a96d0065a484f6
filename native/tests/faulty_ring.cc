#include "faulty_ring.h"

#include <utility>

#include "io_ring_of.h"

namespace offload_rt::testing {

IoRingPtr faulty_ring(std::unique_ptr<FaultyKernel<ThreadKernel>> kernel, const IoRingOptions& options) {
  return IoRingPtr(
      new IoRingOf<FaultyKernel<ThreadKernel>>(std::move(kernel), options, IoBackend::threads, ""));
}

IoRingPtr faulty_ring(std::unique_ptr<FaultyKernel<UringKernel>> kernel, const IoRingOptions& options) {
  return IoRingPtr(
      new IoRingOf<FaultyKernel<UringKernel>>(std::move(kernel), options, IoBackend::io_uring, ""));
}

}  // namespace offload_rt::testing
