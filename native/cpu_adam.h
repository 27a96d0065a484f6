// One AdamW step over one parameter where it lies, in a single pass over memory: gradient in, float32 master
// and moments updated, the model's weight out.
//
// The arithmetic is that of torch's single-tensor AdamW on a CPU with FMA, with square roots rounded as IEEE
// 754 says; operation by operation it is written in offload_rt/adamw/cpu_adam_torch.py, the plain twin. Every
// instruction set gives the same bits, whatever the length, alignment and number of threads.
//
// Nothing here knows schedules, blocks or where the numbers of a step come from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>

#include "dynamic_map.h"
#include "execution.h"
#include "float16.h"

namespace offload_rt::adam {

// What is the same for all elements, as the float32 that torch makes of each scalar.
struct Step {
  float grad_scale;             // the clipping coefficient, 1 where nothing is clipped
  float decay;                  // 1 - lr * weight_decay
  float exp_avg_weight;         // 1 - beta1
  float exp_avg_sq_decay;       // beta2
  float exp_avg_sq_weight;      // 1 - beta2
  float bias_correction2_sqrt;  // sqrt(1 - beta2 ** step)
  float eps;
  float step_size;  // -lr / (1 - beta1 ** step)
};

template <typename T>
struct Moments {
  std::span<T> exp_avg, exp_avg_sq;
};

// Moments of 8 bits, `kQuantBlockSize` elements to an absmax; the map of exp_avg is signed, that of
// exp_avg_sq is not. The weight is updated with the float32 moments; they are rounded afterwards. A quant
// block with a moment that is NaN or infinite gets that for its absmax.
inline constexpr std::size_t kQuantBlockSize = 256;

struct QuantizedMoment {
  std::span<std::uint8_t> codes;
  std::span<float> absmax;  // ceil(codes / kQuantBlockSize)
  const DynamicMap* map;
};
struct QuantizedMoments {
  QuantizedMoment exp_avg, exp_avg_sq;
};

// The spans have one size, which the bindings check, and share no byte.
struct Parameter {
  std::variant<std::span<const float>, std::span<const BFloat16>> grad;
  std::span<float> master;
  std::variant<Moments<float>, Moments<BFloat16>, QuantizedMoments> moments;
  std::variant<std::monostate, std::span<float>, std::span<BFloat16>> weight;  // the master, rounded
};

// Only the weight is ever written around the caches: the others were just read. A weight that does not begin
// at a multiple of 64 bytes is written through them.
void step(const Parameter& parameter, const Step& step, const Execution& execution);

}  // namespace offload_rt::adam
