// How a call over memory runs: with which instructions, on how many threads, past the caches or through them.
//
// [Note: whose threads] By default threads are started for each call. That costs some 20 us a thread, which
// the callers' smallest shares hide, and it leaves neither idle threads nor state behind. But OpenMP's
// threads, which torch computes with, go on spinning for a while when their work is done: one that is started
// beside them shares its core with one that does nothing. Between the products of a layer, on 2 cores,
// decoding its 44 million weights took 9.5 ms on two started threads, 8.3 ms on one and 4.8 ms on OpenMP's
// two. So whoever calls between torch's operators, on the thread that calls those, lends this the team that
// OpenMP keeps for that thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "isa.h"

namespace offload_rt {

// Calls function(data) on up to `num_threads` threads, this one among them, and returns when all are done:
// the entry point of a parallel region in the OpenMP runtimes of GCC and LLVM, GOMP_parallel.
using Team = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

// That of the runtime which this process has loaded, null where there is none.
[[nodiscard]] Team openmp_team();

struct Execution {
  Isa isa;
  std::size_t num_threads;  // an upper bound: small tensors use fewer
  // Write around the caches: faster for an output that nothing reads soon, slower for one that is read next.
  bool streaming_stores = false;
  Team team = nullptr;  // null starts threads; see [Note: whose threads]
};

template <typename T>
[[nodiscard]] bool is_aligned_for_streaming(const T* out) {
  return reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
}

// Calls work(part, begin, end) for contiguous shares of [0, num_units), on this thread and others; it must
// not throw. A thread takes the next share that is left: what a team or the system does not give is done on
// this one, since what is updated in place must not be left half done.
template <typename Work>
void in_parallel(std::size_t num_units, std::size_t num_parts, Team team, const Work& work) {
  std::atomic<std::size_t> next_part = 0;
  auto take_shares = [&] {
    const auto begin_of = [&](std::size_t part) { return num_units * part / num_parts; };
    for (std::size_t part = next_part++; part < num_parts; part = next_part++)
      work(part, begin_of(part), begin_of(part + 1));
  };
  if (team != nullptr && num_parts > 1) {
    team([](void* data) { (*static_cast<decltype(take_shares)*>(data))(); }, &take_shares,
         static_cast<unsigned>(num_parts), 0);
    return;
  }
  std::vector<std::jthread> threads;
  threads.reserve(num_parts - 1);
  try {
    while (threads.size() + 1 < num_parts) threads.emplace_back(take_shares);
  } catch (const std::system_error&) {  // no more threads: those there are take all shares
  }
  take_shares();
}

}  // namespace offload_rt
