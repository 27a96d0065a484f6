// The AdamW kernel for AVX-512: sixteen lanes.
#include "cpu_adam_kernels.h"

#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <bit>
#include <type_traits>

#include "floats_avx512.h"
#include "target_avx512.h"

namespace offload_rt::adam {

namespace {

struct Lanes {
  using Floats = __m512;
  using Ints = __m512i;
  static constexpr std::size_t kWidth = 16;

  template <typename T>
  static Floats load(const T* from) {
    return load_16(from);
  }
  static void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
  static void store(BFloat16* to, Floats values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_to_bfloat16(values));
  }
  static void stream(float* to, Floats values) { _mm512_stream_ps(to, values); }
  static void stream(BFloat16* to, Floats values) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), round_to_bfloat16(values));
  }
  static void prefetch(std::uintptr_t address) {
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
  }
  static Floats broadcast(float value) { return _mm512_set1_ps(value); }
  static Floats add(Floats left, Floats right) { return _mm512_add_ps(left, right); }
  static Floats subtract(Floats left, Floats right) { return _mm512_sub_ps(left, right); }
  static Floats multiply(Floats left, Floats right) { return _mm512_mul_ps(left, right); }
  static Floats divide(Floats left, Floats right) { return _mm512_div_ps(left, right); }
  static Floats square_root(Floats values) { return _mm512_sqrt_ps(values); }
  static Floats multiply_add(Floats left, Floats right, Floats addend) {
    return _mm512_fmadd_ps(left, right, addend);
  }

  static Ints load_codes(const std::uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void store_codes(std::uint8_t* to, Ints codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(codes));
  }
  static Floats lookup(const DynamicMap& map, Ints codes) {
    return _mm512_i32gather_ps(codes, map.values(), 4);
  }
  static Ints codes_of(const DynamicMap& map, Floats scaled) {
    const Ints smallest = _mm512_set1_epi32(DynamicMap::kSmallestCut);
    const Ints magnitude = _mm512_max_epi32(_mm512_srli_epi32(magnitude_bits(scaled), 16), smallest);
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(scaled));
    const Ints positive_cut = _mm512_sub_epi32(magnitude, smallest);
    const Ints cut =
        _mm512_mask_add_epi32(positive_cut, negative, positive_cut, _mm512_set1_epi32(DynamicMap::kNumCuts));
    const Ints codes =
        _mm512_and_si512(_mm512_i32gather_epi32(cut, map.first_codes(), 1), _mm512_set1_epi32(0xff));
    const __mmask16 above =
        _mm512_cmp_ps_mask(scaled, _mm512_i32gather_ps(codes, map.midpoints(), 4), _CMP_GT_OQ);
    return _mm512_mask_add_epi32(codes, above, codes, _mm512_set1_epi32(1));
  }
  static Ints maximum(Ints left, Ints right) { return _mm512_max_epi32(left, right); }
};

#include "cpu_adam_lanes.h"

}  // namespace

void step_avx512(const Parameter& parameter, const Step& step, bool streaming_stores) {
  step_lanes_of(parameter, step, streaming_stores);
  if (streaming_stores) _mm_sfence();  // streamed data becomes visible to whoever waits for this thread
}

}  // namespace offload_rt::adam

#include "target_end.h"

#endif
