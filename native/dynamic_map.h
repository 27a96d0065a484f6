// The 8-bit numbers of bitsandbytes' block-wise optimizer states: an index into 256 ascending values in [-1,
// 1], times the largest magnitude of its quant block. Rounding is to the nearest value, on a tie to the lower
// one.
//
// [Note: one comparison]
// The nearest value of x is the number of midpoints below x. Cut the numbers by their upper 16 bits (sign,
// exponent, 7 bits of fraction): so finely that no cut holds two midpoints. Then a table says how many lie
// below all of a cut, and one comparison with the next midpoint gives the rest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace offload_rt {

class DynamicMap {
 public:
  static constexpr std::size_t kSize = 256;

  // None where the values do not ascend, or two midpoints fall into one cut.
  [[nodiscard]] static std::optional<DynamicMap> of(std::span<const float, kSize> values);

  // Cuts by magnitude, the upper 16 bits of the number without its sign. What is smaller counts as the
  // smallest.
  static constexpr std::uint32_t kSmallestCut = 0x3380;  // 2^-24
  static constexpr std::uint32_t kLargestCut = 0x3f80;   // 1
  static constexpr std::uint32_t kNumCuts = kLargestCut - kSmallestCut + 1;

  [[nodiscard]] const float* values() const { return values_.data(); }
  // The midpoint above each value; infinity above the last.
  [[nodiscard]] const float* midpoints() const { return midpoints_.data(); }
  // For each cut of the positive numbers, then of the negative ones, the midpoints below it. Followed by
  // three bytes that may be read.
  [[nodiscard]] const std::uint8_t* first_codes() const { return first_codes_.data(); }

 private:
  DynamicMap() = default;

  std::array<float, kSize> values_;
  std::array<float, kSize> midpoints_;
  std::array<std::uint8_t, 2 * kNumCuts + 3> first_codes_{};
};

}  // namespace offload_rt
