// What a result says of a request: that it is over, or how it goes on. The one place that looks at a result.
//
//     |== arrived ==|-- rest --|     the kernel was short: the rest is submitted again
//     |== arrived ==|                nothing more comes: the end of the file, or a write that gets nowhere
//     |== arrived ==| -EAGAIN        not now: again, so often in a row
//     |== arrived ==| -EIO           failed
#pragma once

#include <cerrno>
#include <cstdint>

#include "io_operation.h"
#include "status.h"

namespace offload_rt {

// A drive or kernel that keeps saying "not now" is given about a second.
inline constexpr std::uint32_t kMaxRefusals = 1000;
inline constexpr std::uint32_t kPatientRefusals = 8;  // at once; from then on with a pause

struct [[nodiscard]] Verdict {
  bool over = false;                // the request needs no further try
  std::uint32_t num_new_bytes = 0;  // arrived by this try, for the first time
  StatusCode code = StatusCode::ok;
  int error_number = 0;
};

// `result`: bytes, or a negative errno. Counts refusals in `slot`, and changes nothing else of it.
inline Verdict judge(Slot& slot, std::int32_t result) {
  const IoKind kind = slot.owner->operation.kind;
  if (result < 0) {
    const int error_number = -result;
    const bool for_now = error_number == EINTR || error_number == EAGAIN;
    if (for_now && ++slot.refusals <= kMaxRefusals) return {};
    return {.over = true, .code = StatusCode::os_error, .error_number = error_number};
  }
  if (kind == IoKind::sync) return {.over = true};
  const std::uint32_t reached = slot.resume_from + static_cast<std::uint32_t>(result);
  if (reached > slot.arrived) {
    slot.refusals = 0;
    return {.over = reached == slot.length, .num_new_bytes = reached - slot.arrived};
  }
  // It repeated, at most, what had arrived before, since O_DIRECT went back to an aligned start. That is the
  // end of a file that is not aligned, if it stays so; a drive that is short twice gets on.
  if (result != 0 && ++slot.refusals <= kPatientRefusals) return {};
  return {.over = true, .code = kind == IoKind::read ? StatusCode::end_of_file : StatusCode::no_progress};
}

// Requests fail in any order. The lowest place is the one that is told, so that the same fault gives the same
// message: requests are cut in order, and those in flight are seen to their ends although others have failed.
inline void tell_failure(const Slot& slot, StatusCode code, int error_number) {
  Status& told = slot.owner->status;
  const std::uint64_t here = slot.owner->operation.offset + slot.begin + slot.arrived;
  if (!told.ok() && told.failed_at <= here) return;
  told = evidence(slot.owner->operation);
  told.code = code;
  told.error_number = error_number;
  told.failed_at = here;
}

}  // namespace offload_rt
