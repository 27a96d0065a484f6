// A ring over a kernel that fails as told. Its template is compiled once, in faulty_ring.cc, for all tests.
#pragma once

#include <memory>

#include "faulty_kernel.h"
#include "io_kernel_threads.h"
#include "io_kernel_uring.h"
#include "io_ring.h"

namespace offload_rt::testing {

[[nodiscard]] IoRingPtr faulty_ring(std::unique_ptr<FaultyKernel<ThreadKernel>> kernel,
                                    const IoRingOptions& options);
[[nodiscard]] IoRingPtr faulty_ring(std::unique_ptr<FaultyKernel<UringKernel>> kernel,
                                    const IoRingOptions& options);

}  // namespace offload_rt::testing
