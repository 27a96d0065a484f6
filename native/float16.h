// The 16-bit floating-point types, and their conversions in plain C++.
#pragma once

#include <bit>
#include <cstdint>

namespace offload_rt {

// A bfloat16 or half as its 16 bits: distinct types, so that one cannot be taken for the other.
struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

inline constexpr std::uint32_t kInfinityBits = 0x7f800000;

// Conversions, round to nearest even, denormals kept. A NaN becomes a quiet NaN.
[[nodiscard]] inline float to_float(float value) { return value; }
[[nodiscard]] inline float to_float(BFloat16 value) {
  return std::bit_cast<float>(std::uint32_t{value.bits} << 16);
}
[[nodiscard]] float to_float(Half value);

template <typename T>
[[nodiscard]] T from_float(float value);

template <>
[[nodiscard]] inline float from_float<float>(float value) {
  return value;
}
template <>
[[nodiscard]] inline BFloat16 from_float<BFloat16>(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffff) > kInfinityBits) return {0x7fc0};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
[[nodiscard]] Half from_float<Half>(float value);

}  // namespace offload_rt
