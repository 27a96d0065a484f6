// Inside AdamW: the kernels, one for each instruction set, on one thread, over all elements of a parameter.
#pragma once

#include "cpu_adam.h"

namespace offload_rt::adam {

void step_plain(const Parameter& parameter, const Step& step, bool streaming_stores);
#if defined(__x86_64__)
void step_avx2(const Parameter& parameter, const Step& step, bool streaming_stores);
void step_avx512(const Parameter& parameter, const Step& step, bool streaming_stores);
#endif

}  // namespace offload_rt::adam
