// What a ring asks of whatever performs its requests: the seam between bookkeeping and the operating system.
//
// Three things satisfy it: UringKernel, ThreadKernel, and, in the tests alone, FaultyKernel. A ring takes its
// kernel as a template parameter, so that the seam costs production code nothing.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "io_registry.h"
#include "status.h"

namespace offload_rt {

struct IoRequest {
  std::uint32_t slot = 0;  // comes back in the completion; unique among the requests in flight
  IoKind kind = IoKind::read;
  int fd = -1;
  std::uint64_t offset = 0;
  std::byte* address = nullptr;
  std::uint32_t length = 0;
  FixedIndex buffer = kNotFixed;  // all of [address, address + length) lies in this registered piece
};

struct IoCompletion {
  std::uint32_t slot = 0;
  std::int32_t result = 0;  // bytes, or a negative errno
};

// submit: takes requests from the front and says how many. Fewer than all is no error (the queue is full for
// now);
//         the ring offers the rest again. A lasting failure comes back as a completion of each request taken.
// reap:   blocks until a completion or a wake() is there, then moves completions out, perhaps none.
// wake:   makes the current or the next reap return.
// set_buffer: puts memory into a place of the kernel's table; empty memory clears it.
// Submit and reap belong to one thread. Any thread may call wake, and one at a time set_buffer.
template <class Kernel>
concept IoKernel =
    requires(Kernel kernel, std::span<const IoRequest> requests, std::span<IoCompletion> completions,
             FixedIndex index, std::span<std::byte> memory) {
      { kernel.submit(requests) } -> std::same_as<std::size_t>;
      { kernel.reap(completions) } -> std::same_as<std::size_t>;
      { kernel.wake() } -> std::same_as<void>;
      { kernel.set_buffer(index, memory) } -> std::same_as<Status>;
    };

}  // namespace offload_rt
