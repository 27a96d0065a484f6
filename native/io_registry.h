// What the kernel was told of in advance: memory whose pages it keeps pinned and described. (Telling it of
// files gained nothing: docs/log.md.)
//
// Memory is registered in pieces, because the kernel takes at most 1 GiB at a time. The ring ends a request
// where a piece ends, so that every request lies in one:
//
//     memory   |-------- piece 7 --------|-------- piece 8 --------|--- piece 2 ---|
//                       request [====]   |[====] request
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "status.h"

namespace offload_rt {

inline constexpr std::uint32_t kDirectAlignment = 4096;  // at least the sector of any drive

// A number in the kernel's table; kNotFixed where the kernel was not told.
using FixedIndex = std::int32_t;
inline constexpr FixedIndex kNotFixed = -1;
inline constexpr FixedIndex kMaxFixedBuffers = 1024;

struct MemoryPiece {
  std::span<std::byte> bytes;
  FixedIndex index = kNotFixed;
};

// Thread-safe. A change may block while the kernel pins pages; looking something up never waits for that.
template <class Kernel>
class IoRegistry {
 public:
  IoRegistry(Kernel& kernel, std::size_t piece_bytes) : kernel_(kernel), piece_bytes_(piece_bytes) {
    for (FixedIndex index = kMaxFixedBuffers; index > 0;) free_buffers_.push_back(--index);
  }

  Status add_memory(std::span<std::byte> memory) {
    if (memory.empty() || reinterpret_cast<std::uintptr_t>(memory.data()) % kDirectAlignment != 0)
      return Status::invalid("registered memory must begin at a page and not be empty");
    const std::lock_guard changing(change_mutex_);
    const auto next = regions_.lower_bound(memory.data());
    if ((next != regions_.end() && next->first < memory.data() + memory.size()) ||
        find_memory(memory.data()).index != kNotFixed)
      return Status::invalid("memory is registered already");
    if ((memory.size() + piece_bytes_ - 1) / piece_bytes_ > free_buffers_.size())
      return Status::from_errno(ENOSPC, "the table of registered memory is full");
    std::vector<MemoryPiece> pieces;
    for (std::size_t at = 0; at < memory.size(); at += piece_bytes_) {
      MemoryPiece piece{memory.subspan(at, std::min(piece_bytes_, memory.size() - at)), free_buffers_.back()};
      if (Status status = kernel_.set_buffer(piece.index, piece.bytes); !status.ok()) {
        release(pieces);
        return status;
      }
      free_buffers_.pop_back();
      pieces.push_back(piece);
    }
    const std::lock_guard lock(table_mutex_);
    regions_[memory.data()] = std::move(pieces);
    return {};
  }

  Status drop_memory(std::byte* start) {
    const std::lock_guard changing(change_mutex_);
    const auto found = regions_.find(start);
    if (found == regions_.end()) return Status::invalid("this memory is not registered");
    const std::vector<MemoryPiece> pieces = found->second;
    {
      const std::lock_guard lock(table_mutex_);
      regions_.erase(found);
    }
    release(pieces);
    return {};
  }

  // The piece that `address` lies in; its index is kNotFixed where there is none.
  [[nodiscard]] MemoryPiece find_memory(std::byte* address) const {
    const std::lock_guard lock(table_mutex_);
    const auto after = regions_.upper_bound(address);
    if (after == regions_.begin()) return {};
    const auto& [start, pieces] = *std::prev(after);
    const std::size_t number = static_cast<std::size_t>(address - start) / piece_bytes_;
    if (number >= pieces.size()) return {};
    const MemoryPiece& piece = pieces[number];
    return address < piece.bytes.data() + piece.bytes.size() ? piece : MemoryPiece{};
  }

 private:
  void release(const std::vector<MemoryPiece>& pieces) {
    for (const MemoryPiece& piece : pieces)
      if (kernel_.set_buffer(piece.index, {}).ok()) free_buffers_.push_back(piece.index);
    // A place that cannot be cleared is not used again; its pages stay pinned until the ring is gone.
  }

  Kernel& kernel_;
  const std::size_t piece_bytes_;
  std::mutex change_mutex_;         // one change at a time; guards the free numbers
  mutable std::mutex table_mutex_;  // taken to change the tables, and to read them without change_mutex_
  std::map<std::byte*, std::vector<MemoryPiece>> regions_;  // by start; all pieces but the last are full
  std::vector<FixedIndex> free_buffers_;
};

}  // namespace offload_rt
