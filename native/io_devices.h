// Whose turn it is: operations queue per device, and devices take turns, request by request.
//
//     drive A   [op 1 ........][op 3 ....]     depth 8      A B A B A B ...
//     drive B   [op 2 ........]                depth 32
//
// One queue for all would let the operation in front take every request, and leave the other drive idle. What
// keeps a drive busy differs from drive to drive, so that depth and request length are the device's.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "io_registry.h"
#include "status.h"

namespace offload_rt {

inline Status check_depth(unsigned depth, unsigned most = 1024) {
  if (depth >= 1 && depth <= most) return {};
  return Status::invalid("depth must be in [1, " + std::to_string(most) + "], not " + std::to_string(depth));
}

inline Status check_length(const char* name, std::uint32_t num_bytes) {
  if (num_bytes != 0 && num_bytes % kDirectAlignment == 0 && num_bytes <= 1U << 30) return {};
  return Status::invalid(std::string(name) + " must be a multiple of 4096, at most 1 GiB, not " +
                         std::to_string(num_bytes));
}

// Where an open file lies, and how it was opened.
struct FilePlace {
  dev_t device = 0;
  bool direct = false;  // past the page cache
};

inline Status find_place(int fd, FilePlace& place) {
  struct stat found;
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fstat(fd, &found) != 0)
    return Status::from_errno(errno, "descriptor " + std::to_string(fd));
  place = {.device = found.st_dev, .direct = (flags & O_DIRECT) != 0};
  return {};
}

template <class Operation>
struct IoDevice {
  std::uint64_t number = 0;    // st_dev
  unsigned depth = 0;          // requests in flight at most
  std::uint32_t io_bytes = 0;  // longest request
  unsigned in_flight = 0;
  std::deque<Operation*> queue{};  // not yet cut to their ends, in the order of submission
};

// Not thread-safe: guarded by the ring that owns it. References stay good.
template <class Operation>
class IoDevices {
 public:
  using Device = IoDevice<Operation>;

  IoDevices(unsigned depth, std::uint32_t io_bytes) : depth_(depth), io_bytes_(io_bytes) {}

  Device& of(std::uint64_t number) {
    for (const auto& device : devices_)
      if (device->number == number) return *device;
    devices_.push_back(
        std::make_unique<Device>(Device{.number = number, .depth = depth_, .io_bytes = io_bytes_}));
    return *devices_.back();
  }

  [[nodiscard]] unsigned depth() const { return depth_; }

  // The device whose turn it is among those that have something to do and room to do it; null without one.
  Device* next() {
    for (std::size_t tried = 0; tried < devices_.size(); ++tried) {
      Device& device = *devices_[turn_++ % devices_.size()];
      if (!device.queue.empty() && device.in_flight < device.depth) return &device;
    }
    return nullptr;
  }

  [[nodiscard]] bool idle() const {
    for (const auto& device : devices_)
      if (!device->queue.empty()) return false;
    return true;
  }

  // All that is queued, taken out.
  std::vector<Operation*> drain() {
    std::vector<Operation*> operations;
    for (const auto& device : devices_)
      for (Operation* operation : std::exchange(device->queue, {})) operations.push_back(operation);
    return operations;
  }

 private:
  const unsigned depth_;  // of a device that nothing else is known of
  const std::uint32_t io_bytes_;
  std::vector<std::unique_ptr<Device>> devices_;
  std::size_t turn_ = 0;
};

}  // namespace offload_rt
