#include "status.h"

#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

namespace offload_rt {

std::string_view name_of(StatusCode code) {
  switch (code) {
    case StatusCode::ok:
      return "ok";
    case StatusCode::os_error:
      return "os_error";
    case StatusCode::end_of_file:
      return "end_of_file";
    case StatusCode::no_progress:
      return "no_progress";
    case StatusCode::timed_out:
      return "timed_out";
    case StatusCode::unknown_ticket:
      return "unknown_ticket";
    case StatusCode::closed:
      return "closed";
    case StatusCode::invalid:
      return "invalid";
  }
  return "unknown";
}

std::string_view name_of(IoKind kind) {
  switch (kind) {
    case IoKind::read:
      return "read";
    case IoKind::write:
      return "write";
    case IoKind::sync:
      return "fdatasync";
  }
  return "unknown";
}

// strerrorname_np would do this, but only from glibc 2.32 on.
std::string describe_errno(int error_number) {
  using Name = std::pair<int, std::string_view>;
  static constexpr std::array names{
      Name{EPERM, "EPERM"},         Name{EINTR, "EINTR"},   Name{EIO, "EIO"},
      Name{ENXIO, "ENXIO"},         Name{EBADF, "EBADF"},   Name{EAGAIN, "EAGAIN"},
      Name{ENOMEM, "ENOMEM"},       Name{EACCES, "EACCES"}, Name{EFAULT, "EFAULT"},
      Name{EBUSY, "EBUSY"},         Name{ENODEV, "ENODEV"}, Name{EINVAL, "EINVAL"},
      Name{EMFILE, "EMFILE"},       Name{EFBIG, "EFBIG"},   Name{ENOSPC, "ENOSPC"},
      Name{EROFS, "EROFS"},         Name{ENOSYS, "ENOSYS"}, Name{EDQUOT, "EDQUOT"},
      Name{ECANCELED, "ECANCELED"}, Name{ENFILE, "ENFILE"},
  };
  for (const auto& [number, name] : names)
    if (number == error_number) return std::string(name);
  return std::generic_category().message(error_number);
}

Status Status::invalid(std::string detail) {
  Status status;
  status.code = StatusCode::invalid;
  status.detail = std::move(detail);
  return status;
}

Status Status::unknown_ticket(std::uint64_t ticket) {
  Status status;
  status.code = StatusCode::unknown_ticket;
  status.detail = "ticket " + std::to_string(ticket) + " was never given out, or was already waited for";
  return status;
}

Status Status::from_errno(int error_number, std::string detail) {
  Status status;
  status.code = StatusCode::os_error;
  status.error_number = error_number;
  status.detail = std::move(detail) + " (errno " + std::to_string(error_number) + ", " +
                  describe_errno(error_number) + ")";
  return status;
}

std::string Status::message() const {
  if (code == StatusCode::ok) return "ok";
  if (!detail.empty()) return detail;
  std::string text = path + ": " + std::string(name_of(kind)) + " " + std::to_string(done) + " of " +
                     std::to_string(wanted) + " bytes at offset " + std::to_string(offset) + " (";
  if (code == StatusCode::os_error)
    text += "errno " + std::to_string(error_number) + ", " + describe_errno(error_number);
  else if (code == StatusCode::end_of_file)
    text += "end of file";
  else
    text += std::string(name_of(code));
  if (code != StatusCode::timed_out) text += ", failed at offset " + std::to_string(failed_at);
  return text + ")";
}

}  // namespace offload_rt
