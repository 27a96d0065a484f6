#include "float16.h"

namespace offload_rt {

float to_float(Half value) {
  const std::uint32_t sign = std::uint32_t{value.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x0400) {  // zero and denormals: units of 2^-24
    return std::bit_cast<float>(sign |
                                std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  }
  const std::uint32_t exponent_shift = magnitude < 0x7c00 ? (127 - 15) << 23 : (255 - 31) << 23;
  return std::bit_cast<float>(sign | ((magnitude << 13) + exponent_shift));
}

template <>
Half from_float<Half>(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  std::uint32_t half = 0;
  if (magnitude > kInfinityBits) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520, the first that rounds past the largest half
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to units of 2^-24, in the low bits
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace offload_rt
