// Which instruction sets this processor has and this kernel lets programs use.
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace offload_rt {

// Every feature that any fast path here chooses by, whether present or not; names as compilers spell them.
[[nodiscard]] std::vector<std::pair<std::string_view, bool>> detect_isa();

// The instruction sets that kernels are written for: avx2 with FMA and F16C; avx512 with F, BW, DQ and VL.
enum class Isa : std::uint8_t { plain, avx2, avx512 };

[[nodiscard]] std::string_view name_of(Isa isa);

// What this processor can run, slowest first.
[[nodiscard]] std::vector<Isa> available_isas();

}  // namespace offload_rt
