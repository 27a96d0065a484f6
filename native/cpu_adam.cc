// AdamW over a whole parameter: shares of it to threads.
#include "cpu_adam.h"

#include <algorithm>
#include <utility>

#include "cpu_adam_kernels.h"

namespace offload_rt::adam {

namespace {

// Some 60 us of work (AVX2 or AVX-512, a 2.6 GHz Xeon), against 20 us that starting a thread takes.
constexpr std::size_t kMinElementsPerThread = 32768;
// Shares begin at multiples of this: no two threads write to one cache line of an aligned span, or to one
// absmax.
constexpr std::size_t kElementsPerUnit = kQuantBlockSize;

using Kernel = void (*)(const Parameter&, const Step&, bool streaming_stores);

Kernel kernel_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return &step_avx512;
  if (isa == Isa::avx2) return &step_avx2;
#endif
  static_cast<void>(isa);
  return &step_plain;
}

template <typename T>
std::span<T> part_of(std::span<T> whole, std::size_t begin, std::size_t end) {
  return whole.subspan(begin, end - begin);
}
template <typename T>
Moments<T> part_of(const Moments<T>& whole, std::size_t begin, std::size_t end) {
  return {part_of(whole.exp_avg, begin, end), part_of(whole.exp_avg_sq, begin, end)};
}
QuantizedMoment part_of(const QuantizedMoment& whole, std::size_t begin, std::size_t end) {
  const std::size_t end_block = (end + kQuantBlockSize - 1) / kQuantBlockSize;
  return {part_of(whole.codes, begin, end), part_of(whole.absmax, begin / kQuantBlockSize, end_block),
          whole.map};
}
QuantizedMoments part_of(const QuantizedMoments& whole, std::size_t begin, std::size_t end) {
  return {part_of(whole.exp_avg, begin, end), part_of(whole.exp_avg_sq, begin, end)};
}
std::monostate part_of(std::monostate, std::size_t, std::size_t) { return {}; }
template <typename... Ts>
std::variant<Ts...> part_of(const std::variant<Ts...>& whole, std::size_t begin, std::size_t end) {
  return std::visit([&](const auto& span) -> std::variant<Ts...> { return part_of(span, begin, end); },
                    whole);
}

bool takes_streaming_stores(const Parameter& parameter) {
  if (const auto* weight = std::get_if<std::span<float>>(&parameter.weight))
    return is_aligned_for_streaming(weight->data());
  if (const auto* weight = std::get_if<std::span<BFloat16>>(&parameter.weight))
    return is_aligned_for_streaming(weight->data());
  return false;
}

}  // namespace

void step(const Parameter& parameter, const Step& step, const Execution& execution) {
  const Kernel kernel = kernel_for(execution.isa);
  const bool streaming_stores = execution.streaming_stores && takes_streaming_stores(parameter);
  const std::size_t count = parameter.master.size();
  const std::size_t num_parts = std::clamp<std::size_t>(count / kMinElementsPerThread, 1,
                                                        std::max<std::size_t>(execution.num_threads, 1));
  const std::size_t num_units = (count + kElementsPerUnit - 1) / kElementsPerUnit;
  in_parallel(num_units, num_parts, execution.team,
              [&](std::size_t, std::size_t begin_unit, std::size_t end_unit) {
                const std::size_t begin = begin_unit * kElementsPerUnit;
                const std::size_t end = std::min(end_unit * kElementsPerUnit, count);
                kernel({part_of(parameter.grad, begin, end), part_of(parameter.master, begin, end),
                        part_of(parameter.moments, begin, end), part_of(parameter.weight, begin, end)},
                       step, streaming_stores);
              });
}

}  // namespace offload_rt::adam
