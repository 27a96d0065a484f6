// What a ring counts of its operations: bytes and requests, how long drives were busy, and what happened when
// while it records.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>

#include "busy_time.h"
#include "io_operation.h"
#include "io_ring.h"

namespace offload_rt {

// Not thread-safe: guarded by its owner.
class IoAccount {
 public:
  void submitted(Progress& progress) {
    if (most_records_ > 0) progress.recording = recording_;
    counters_.operations++;
  }

  // It is under way from when it was submitted. One of no bytes never is.
  void begin(const Progress& progress) { busy(progress).begin(progress.submitted); }

  // Before its next request is cut.
  void cut(Progress& progress) const {
    if (progress.recording != 0 && progress.cut == 0) progress.begun = Clock::now();
  }

  void requested(bool into_fixed_memory) {
    counters_.requests++;
    if (into_fixed_memory) counters_.fixed_memory_requests++;
  }

  void resubmitted() { counters_.resubmitted++; }

  void in_flight(std::size_t requests) {
    counters_.max_in_flight = std::max<std::uint64_t>(counters_.max_in_flight, requests);
  }

  void arrived(const Progress& progress, std::uint64_t bytes) {
    const bool read = progress.operation.kind == IoKind::read;
    (read ? counters_.bytes_read : counters_.bytes_written) += bytes;
  }

  void finish(const Progress& progress) {
    const Clock::time_point now = Clock::now();
    busy(progress).end(now);
    if (progress.recording != recording_) return;
    if (records_.operations.size() >= most_records_) {
      ++records_.left_out;
      return;
    }
    records_.operations.push_back(record_of(progress));
    records_.operations.back().finished_seconds = seconds_of(now);
  }

  [[nodiscard]] IoCounters counters() const {
    IoCounters counters = counters_;
    const Clock::time_point now = Clock::now();
    counters.read_seconds = reading_.seconds(now);
    counters.write_seconds = writing_.seconds(now);
    return counters;
  }

  // From now on, of at most so many operations; 0: no more.
  void record(std::size_t most) {
    records_ = {};
    most_records_ = most;
    ++recording_;
  }

  // Those that have finished, then those of `operations` that have not.
  [[nodiscard]] IoRecords records(const std::map<Ticket, Progress>& operations) const {
    IoRecords found = records_;
    for (const auto& [ticket, progress] : operations)
      if (progress.recording == recording_ && !progress.finished)
        found.operations.push_back(record_of(progress));
    return found;
  }

 private:
  BusyTime& busy(const Progress& progress) {
    return progress.operation.kind == IoKind::read ? reading_ : writing_;
  }

  IoCounters counters_;
  BusyTime reading_;
  BusyTime writing_;  // and syncing
  IoRecords records_;
  std::size_t most_records_ = 0;
  std::uint64_t recording_ = 1;  // counts how often it began anew
};

}  // namespace offload_rt
