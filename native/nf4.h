// NF4 with double quantization (QLoRA, arXiv 2305.14314): decode and encode over spans of one blob's
// sections.
//
// What the bytes mean, and where they lie, is written in offload_rt/quantized/nf4_layout.py; what each
// operation must give, to the bit, is the torch twin in offload_rt/quantized/nf4_torch.py. Every instruction
// set gives the same bits: there is no fused multiply-add in any path, and every rounding is to nearest even.
//
// Nothing here knows Python, files, or how many threads are polite: the caller says.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "execution.h"
#include "float16.h"

namespace offload_rt::nf4 {

inline constexpr std::size_t kQuantBlockSize = 64;    // weights that share one absmax
inline constexpr std::size_t kNestedBlockSize = 256;  // absmax codes that share one nested absmax
inline constexpr std::size_t kNestedMapSize = 256;
inline constexpr std::size_t kAbsmaxSteps = 65536;  // steps of [-1, 1] by which an absmax is rounded

inline constexpr std::array<float, 16> kTable = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

struct Encoded {
  std::span<const std::uint8_t> codes;   // ceil(elements / 2)
  std::span<const std::uint8_t> absmax;  // ceil(elements / 64)
  std::span<const float> nested_absmax;  // ceil(absmax / 256)
  float nested_offset;
  std::span<const float, kNestedMapSize> nested_map;
};

// Decodes out.size() elements, from the first. The spans' sizes must fit each other; the bindings check that.
template <typename T>
void decode(const Encoded& encoded, std::span<T> out, const Execution& execution);

// Decodes a (rows, columns) matrix into its transpose: out[column * rows + row].
template <typename T>
void decode_transposed(const Encoded& encoded, std::size_t rows, std::size_t columns, std::span<T> out,
                       const Execution& execution);

// Codes and float32 absmax of a tensor. Returns the index of the first weight that is NaN or infinite, if
// there is one; the outputs are then undefined.
template <typename T>
[[nodiscard]] std::optional<std::size_t> encode(std::span<const T> weights, std::span<std::uint8_t> codes,
                                                std::span<float> absmax, const Execution& execution);

// The second quantization: rounds absmax - offset, scaled by the largest of its nested block, through
// `rounding`.
void encode_absmax(std::span<const float> absmax, float offset,
                   std::span<const std::uint8_t, kAbsmaxSteps> rounding, std::span<std::uint8_t> absmax_codes,
                   std::span<float> nested_absmax);

}  // namespace offload_rt::nf4
