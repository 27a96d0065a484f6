// What every native call that can fail gives back: a code, and the evidence a person needs to act on it.
//
// It is data, not control flow: the core never throws for the world's failures, it returns a Status that the
// compiler will not let anyone drop. The bindings turn one into a Python exception with the same fields.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace offload_rt {

enum class StatusCode : std::uint8_t {
  ok,
  os_error,        // the kernel said no; `error_number` says why
  end_of_file,     // the file is shorter than the read
  no_progress,     // a write was accepted, and wrote nothing
  timed_out,       // not finished yet; the operation goes on
  unknown_ticket,  // never given out, or already waited for
  closed,          // the ring accepts nothing more
  invalid,         // the caller's mistake; `detail` names it
};

enum class IoKind : std::uint8_t { read, write, sync };  // sync: fdatasync, which moves no bytes

[[nodiscard]] std::string_view name_of(StatusCode code);
[[nodiscard]] std::string_view name_of(IoKind kind);

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::ok;
  int error_number = 0;  // errno, positive; 0 where the kernel reported none
  IoKind kind = IoKind::read;
  std::string path{};
  std::uint64_t offset = 0;     // where the operation starts in the file, bytes
  std::uint64_t wanted = 0;     // its length, bytes
  std::uint64_t done = 0;       // bytes that arrived all the same, anywhere in the range
  std::uint64_t failed_at = 0;  // the lowest file offset that failed
  std::string detail{};         // for what is not an I/O operation: the whole message

  [[nodiscard]] bool ok() const { return code == StatusCode::ok; }

  // "weights.bin: read 4096 of 1048576 bytes at offset 8192 (errno 5, EIO, failed at offset 12288)"
  [[nodiscard]] std::string message() const;

  static Status invalid(std::string detail);
  static Status unknown_ticket(std::uint64_t ticket);
  // A system call that belongs to no operation, such as setting up the ring.
  static Status from_errno(int error_number, std::string detail);
};

// "EIO" for the errors that storage gives; the system's sentence for the others.
[[nodiscard]] std::string describe_errno(int error_number);

}  // namespace offload_rt
