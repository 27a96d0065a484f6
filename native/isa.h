// Which instruction sets this processor has and this kernel lets programs use.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

namespace offload_rt {

// Every feature that any fast path here chooses by, whether present or not; names as compilers spell them.
[[nodiscard]] std::vector<std::pair<std::string_view, bool>> detect_isa();

}  // namespace offload_rt
