// Asynchronous reads and writes of files, of any length, over io_uring or a pool of threads.
//
// This is what the rest of the program sees. It is not a store: it knows file descriptors, offsets and
// memory, and neither opens a file nor allocates a buffer. Memory, descriptor and alignment (with O_DIRECT:
// offset, address and length in the drive's sectors) are the caller's, who keeps all three until the
// operation was waited for.
//
// A sync (fdatasync) covers what was waited for before it was submitted: operations are not ordered among
// themselves, and one in flight beside a sync may or may not be covered.
//
// The life of an operation, here 2.5 MiB read in requests of 1 MiB:
//
//   caller                completion thread                                  kernel
//   ------                -----------------                                  ------
//   submit ──▶ queue ──▶  cut   [ 1 MiB ][ 1 MiB ][.5 ]  ──submit──▶  at most `depth` in flight at a device
//     │ ticket                    ▲                                            │
//     │                           └── the rest of a short one ◀─┐              │
//     │                         the one place that looks ───────┴── result ◀───┘
//     ▼                           │
//   wait ◀────────── finished: every byte is there, or it failed and no request of it is in flight any more
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "status.h"

namespace offload_rt {

using Ticket = std::uint64_t;

struct IoOperation {
  IoKind kind = IoKind::read;
  int fd = -1;
  std::string path{};            // evidence only, never opened
  std::uint64_t offset = 0;      // bytes
  std::byte* address = nullptr;  // the source of a write is not changed
  std::uint64_t length = 0;      // bytes
};

struct IoCounters {
  std::uint64_t bytes_read = 0;  // each byte once, however often it was asked for
  std::uint64_t bytes_written = 0;
  std::uint64_t operations = 0;             // submitted
  std::uint64_t requests = 0;               // handed to the kernel, resubmitted ones included
  std::uint64_t resubmitted = 0;            // rests of short ones, and ones the kernel refused for the moment
  std::uint64_t max_in_flight = 0;          // requests at once
  std::uint64_t fixed_memory_requests = 0;  // of `requests`, those into registered memory
  double read_seconds = 0;                  // with a read submitted and not finished
  double write_seconds = 0;                 // with a write or a sync submitted and not finished
};

// An operation that was submitted while the ring recorded. Times are std::chrono::steady_clock's.
struct IoRecord {
  IoKind kind = IoKind::read;
  std::string path;
  std::uint64_t offset = 0;  // bytes
  std::uint64_t length = 0;  // bytes
  double submitted_seconds = 0;
  double begun_seconds = -1;     // its first request was cut; negative: not yet
  double finished_seconds = -1;  // negative: not yet
};

struct IoRecords {
  std::vector<IoRecord> operations{};  // those that finished first, in that order, then the unfinished
  std::uint64_t left_out = 0;          // finished when there were as many as was said
};

enum class IoBackend : std::uint8_t { automatic, io_uring, threads };

struct IoRingOptions {
  unsigned depth = 64;                // requests in flight at one device, [1, 1024]
  std::uint32_t io_bytes = 1U << 20;  // longest request; a multiple of 4096, at most 1 GiB
  IoBackend backend = IoBackend::automatic;
  std::uint32_t piece_bytes = 1U << 30;  // in which memory is registered; as io_bytes, and 1 GiB but in tests

  // Requests in flight at all devices: room for four that are busy at once.
  [[nodiscard]] unsigned num_slots() const { return 4 * depth; }
};

// All members may be called from any thread. Destruction forgets what is queued and waits for what is in
// flight.
class IoRing {
 public:
  virtual ~IoRing() = default;
  IoRing(const IoRing&) = delete;
  IoRing& operator=(const IoRing&) = delete;

  // Never blocks on the drive. The only errors are the caller's (invalid) and `closed`.
  virtual Status submit(const IoOperation& operation, Ticket& ticket) = 0;

  // Gives the operation's outcome once, and forgets the ticket. `timed_out` leaves it waitable; its `detail`
  // holds what was outstanding.
  virtual Status wait(Ticket ticket, double timeout_seconds) = 0;

  virtual Status done(Ticket ticket, bool& finished) const = 0;

  // Depth, at most the ring's, and request length for the device that the open file `fd` lies on. Not for
  // what is cut already.
  virtual Status tune(int fd, unsigned depth, std::uint32_t io_bytes) = 0;

  // Tells the kernel of page-aligned `memory` in advance: it pins and describes the pages once instead of
  // with every request. Blocks while it does, and the pages stay in memory. Refused without io_uring
  // (EOPNOTSUPP), to ordinary users beyond RLIMIT_MEMLOCK (ENOMEM), and where the table is full (ENOSPC):
  // everything works as before, then. The memory must be forgotten before it is unmapped, when no operation
  // on it is unfinished.
  virtual Status register_memory(std::span<std::byte> memory) = 0;
  virtual Status forget_memory(std::byte* start) = 0;

  // One line per unfinished operation: ticket, kind, path, offset, bytes, requests in flight, age.
  [[nodiscard]] virtual std::string outstanding() const = 0;
  [[nodiscard]] virtual IoCounters counters() const = 0;

  // Forgets what was recorded. Of operations submitted from now on it records when each began and finished,
  // of the first `most` that do; 0: of none. What was under way before is not recorded.
  virtual void record(std::size_t most) = 0;
  [[nodiscard]] virtual IoRecords records() const = 0;

  // Accepts nothing more, waits for all that was submitted, and gives the first failure that nobody has
  // waited for. Tickets stay waitable. A second call gives ok. `timed_out`, as in wait(), leaves it to be
  // called again. Of what no request was made yet, nothing is done with `and_forget_queued`.
  virtual Status close(double timeout_seconds, bool and_forget_queued) = 0;
  Status close() { return close(kForever, /*and_forget_queued=*/false); }
  static constexpr double kForever = 3.2e9;  // a century

  // Whether this is the copy of a ring in a forked child. It has none of its threads, so nothing here will
  // ever finish, nor can its mutexes be trusted.
  [[nodiscard]] bool forked() const;

  [[nodiscard]] IoBackend backend() const { return backend_; }
  [[nodiscard]] const std::string& fallback_reason() const { return fallback_reason_; }

 protected:
  IoRing(IoBackend backend, std::string fallback_reason);

 private:
  int owner_process_;
  IoBackend backend_;
  std::string fallback_reason_;  // why threads serve although `automatic` prefers io_uring; else empty
};

// Destroys a ring where it was opened, and lets a forked child merely forget it.
struct IoRingDeleter {
  void operator()(IoRing* ring) const;
};
using IoRingPtr = std::unique_ptr<IoRing, IoRingDeleter>;

// `automatic` takes io_uring if the kernel grants it and threads otherwise; naming a back end is binding.
Status open_io_ring(const IoRingOptions& options, IoRingPtr& ring);

// Whether this process may use io_uring; containers often forbid it. The message says why not.
Status probe_io_uring();

}  // namespace offload_rt
