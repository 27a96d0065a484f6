#include "dynamic_map.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace offload_rt {

std::optional<DynamicMap> DynamicMap::of(std::span<const float, kSize> values) {
  DynamicMap map;
  std::copy(values.begin(), values.end(), map.values_.begin());
  for (std::size_t i = 0; i + 1 < kSize; ++i) {
    if (!(values[i] < values[i + 1])) return std::nullopt;
    map.midpoints_[i] = (values[i] + values[i + 1]) / 2;
  }
  map.midpoints_[kSize - 1] = std::numeric_limits<float>::infinity();

  const auto last = map.midpoints_.end() - 1;
  for (std::uint32_t cut = 0; cut < kNumCuts; ++cut) {
    const float smallest = cut == 0 ? 0.0f : std::bit_cast<float>((cut + kSmallestCut) << 16);
    const float beyond = std::bit_cast<float>((cut + kSmallestCut + 1) << 16);
    // Positive x in [smallest, beyond), negative x in (-beyond, -smallest].
    const auto first = std::lower_bound(map.midpoints_.begin(), last, smallest);
    const auto first_negative = std::upper_bound(map.midpoints_.begin(), last, -beyond);
    if (std::lower_bound(first, last, beyond) - first > 1) return std::nullopt;
    if (std::upper_bound(first_negative, last, -smallest) - first_negative > 1) return std::nullopt;
    map.first_codes_[cut] = static_cast<std::uint8_t>(first - map.midpoints_.begin());
    map.first_codes_[kNumCuts + cut] = static_cast<std::uint8_t>(first_negative - map.midpoints_.begin());
  }
  return map;
}

}  // namespace offload_rt
