// Sixteen floats of any type in an AVX-512 register; otherwise as floats_avx2.h.
//
// AVX512-BF16's conversion is not used: it flushes denormals to zero.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "float16.h"
#include "target_avx512.h"

namespace offload_rt {

inline __m512 load_16(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load_16(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 load_16(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline __m256i round_to_bfloat16(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

inline __m512i magnitude_bits(__m512 values) {
  return _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7fffffff));
}

inline std::uint32_t largest_of(__m512i values) {
  return static_cast<std::uint32_t>(_mm512_reduce_max_epi32(values));
}

}  // namespace offload_rt

#include "target_end.h"
