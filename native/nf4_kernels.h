// Inside NF4: the functions that exist once for each instruction set, over whole quant blocks, on one thread.
//
// [Note: sixteen products]
// The 64 weights of a quant block take only 16 values, table[code] * absmax. A kernel computes and rounds
// those 16 and then looks them up by code, instead of multiplying and rounding 64 times: the same bits, a
// quarter of the work.
#pragma once

#include <algorithm>
#include <bit>

#include "nf4.h"

namespace offload_rt::nf4 {

inline constexpr std::size_t kCodesPerBlock = kQuantBlockSize / 2;  // bytes
inline constexpr float kSmallestAbsmax = 1e-38f;  // what bitsandbytes clamps to before it divides

// kMidpoints[i] separates code i from i + 1; a weight that lies on it takes the lower code.
inline constexpr std::array<float, 15> kMidpoints = [] {
  std::array<float, 15> midpoints{};
  for (std::size_t i = 0; i < midpoints.size(); ++i) midpoints[i] = (kTable[i] + kTable[i + 1]) / 2;
  return midpoints;
}();

// Blocks are `absmax.size()`; `codes` has 32 bytes for each and `out` 64 elements.
template <typename T>
using DecodeBlocks = void (*)(const std::uint8_t* codes, std::span<const float> absmax, T* out,
                              bool streaming_stores);

// Stops at the first block with a weight that is not finite and returns its index, otherwise `absmax.size()`.
template <typename T>
using EncodeBlocks = std::size_t (*)(const T* weights, std::uint8_t* codes, std::span<float> absmax);

template <typename T>
struct Kernels {
  DecodeBlocks<T> decode_blocks;
  EncodeBlocks<T> encode_blocks;
};

template <typename T>
[[nodiscard]] Kernels<T> plain_kernels();
#if defined(__x86_64__)
template <typename T>
[[nodiscard]] Kernels<T> avx2_kernels();
template <typename T>
[[nodiscard]] Kernels<T> avx512_kernels();
#endif

// The code of a weight that was divided by its absmax: how many midpoints lie below it.
[[nodiscard]] inline std::uint8_t code_of(float scaled) {
  std::uint8_t code = 0;
  for (const float midpoint : kMidpoints)
    code = static_cast<std::uint8_t>(code + (scaled > midpoint ? 1 : 0));
  return code;
}

}  // namespace offload_rt::nf4
