// An operation on its way, and one request's worth of it: what the ring remembers of each.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

#include "io_devices.h"
#include "io_registry.h"
#include "io_ring.h"

namespace offload_rt {

using Clock = std::chrono::steady_clock;

struct Progress {
  IoOperation operation;
  IoDevice<Progress>* device = nullptr;
  std::uint64_t cut = 0;   // bytes that have been cut into requests
  std::uint64_t done = 0;  // bytes that have arrived
  std::uint32_t resume_alignment = 1;
  std::uint32_t in_flight = 0;  // requests, those that wait to be submitted included
  bool finished = false;
  std::uint64_t recording = 0;  // which one it was submitted in; 0: none
  Status status;
  Clock::time_point submitted;
  Clock::time_point begun{};  // of what is recorded: when its first request was cut
};

// One request's worth of an operation, from its cutting until its last byte has arrived.
//
//     |<-------------- length --------------->|
//     |== arrived ==|                         |
//     |       ^ resume_from: where the next try starts, `arrived` rounded down as O_DIRECT wants it
struct Slot {
  Progress* owner = nullptr;
  std::uint64_t begin = 0;  // within the operation
  std::uint32_t length = 0;
  std::uint32_t arrived = 0;
  std::uint32_t resume_from = 0;
  std::uint32_t refusals = 0;  // in a row
  FixedIndex buffer = kNotFixed;
};

inline Status evidence(const IoOperation& operation) {
  Status status;
  status.kind = operation.kind;
  status.path = operation.path;
  status.offset = operation.offset;
  status.wanted = operation.length;
  return status;
}

inline double seconds_of(Clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

inline IoRecord record_of(const Progress& progress) {
  const IoOperation& operation = progress.operation;
  IoRecord record{.kind = operation.kind,
                  .path = operation.path,
                  .offset = operation.offset,
                  .length = operation.length,
                  .submitted_seconds = seconds_of(progress.submitted)};
  if (progress.begun != Clock::time_point{}) record.begun_seconds = seconds_of(progress.begun);
  return record;
}

// A line of the dump that a timeout gives.
inline std::string describe(Ticket ticket, const Progress& progress) {
  const IoOperation& operation = progress.operation;
  char age[32];
  std::snprintf(age, sizeof age, "%.3f",
                std::chrono::duration<double>(Clock::now() - progress.submitted).count());
  return "ticket " + std::to_string(ticket) + ": " + operation.path + ": " +
         std::string(name_of(operation.kind)) + " " + std::to_string(progress.done) + " of " +
         std::to_string(operation.length) + " bytes at offset " + std::to_string(operation.offset) + ", " +
         std::to_string(progress.in_flight) + " requests in flight, " + age + " s old";
}

// The dump that a timeout gives: a line for each, the oldest first.
inline std::string describe_unfinished(const std::map<Ticket, Progress>& operations) {
  std::string text;
  for (const auto& [ticket, progress] : operations) {
    if (progress.finished) continue;
    if (!text.empty()) text += '\n';
    text += describe(ticket, progress);
  }
  return text;
}

}  // namespace offload_rt
