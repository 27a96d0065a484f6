// Eight floats of any type in an AVX2 register: loading, rounding, and the largest of magnitudes. A denormal
// stays one. Included where <immintrin.h> is there.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "float16.h"
#include "target_avx2.h"

namespace offload_rt {

inline __m256 load_8(const float* from) { return _mm256_loadu_ps(from); }

inline __m256 load_8(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline __m256 load_8(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Rounded to bfloat16, each in the low half of its 32 bits.
inline __m256i round_to_bfloat16(__m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
}

// The bits of the absolute values: as integers they have the same order, and a NaN is the largest.
inline __m256i magnitude_bits(__m256 values) {
  return _mm256_and_si256(_mm256_castps_si256(values), _mm256_set1_epi32(0x7fffffff));
}

inline std::uint32_t largest_of(__m256i values) {
  __m128i largest = _mm_max_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  largest = _mm_max_epi32(largest, _mm_shuffle_epi32(largest, 0b01'00'11'10));
  largest = _mm_max_epi32(largest, _mm_shuffle_epi32(largest, 0b10'11'00'01));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(largest));
}

}  // namespace offload_rt

#include "target_end.h"
