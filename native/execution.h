// How a call over memory runs: with which instructions, on how many threads, past the caches or through them.
//
// Threads are started for each call. That costs some 20 us a thread, which the callers' smallest shares hide,
// and it leaves neither idle threads nor state behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "isa.h"

namespace offload_rt {

struct Execution {
  Isa isa;
  std::size_t num_threads;  // an upper bound: small tensors use fewer
  // Write around the caches: faster for an output that nothing reads soon, slower for one that is read next.
  bool streaming_stores = false;
};

template <typename T>
[[nodiscard]] bool is_aligned_for_streaming(const T* out) {
  return reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
}

// Calls work(part, begin, end) for contiguous shares of [0, num_units), the first on this thread; it must not
// throw. A share for which the system gives no thread is done on this one: what is updated in place must not
// be left half done.
template <typename Work>
void in_parallel(std::size_t num_units, std::size_t num_parts, const Work& work) {
  const auto begin_of = [&](std::size_t part) { return num_units * part / num_parts; };
  std::vector<std::jthread> threads;
  threads.reserve(num_parts - 1);
  std::size_t num_started = 1;
  try {
    for (; num_started < num_parts; ++num_started) {
      const std::size_t part = num_started;
      threads.emplace_back([&, part] { work(part, begin_of(part), begin_of(part + 1)); });
    }
  } catch (const std::system_error&) {
    for (std::size_t part = num_started; part < num_parts; ++part)
      work(part, begin_of(part), begin_of(part + 1));
  }
  work(0, 0, begin_of(1));
}

}  // namespace offload_rt
