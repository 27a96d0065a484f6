// What the kernel was told of in advance: memory whose pages it keeps pinned and described, and open files.
//
// Memory is registered in pieces, because the kernel takes at most 1 GiB at a time. The ring ends a request
// where a piece ends, so that every request lies in one:
//
//     memory   |-------- piece 7 --------|-------- piece 8 --------|--- piece 2 ---|
//                       request [====]   |[====] request
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

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

// A number in one of the kernel's tables; kNotFixed where the kernel was not told.
using FixedIndex = std::int32_t;
inline constexpr FixedIndex kNotFixed = -1;
inline constexpr FixedIndex kMaxFixedBuffers = 1024, kMaxFixedFiles = 64;

struct MemoryPiece {
  std::span<std::byte> bytes;
  FixedIndex index = kNotFixed;
};

// An open file as its descriptor shows it. A descriptor that was closed and then given to another file,
// although the kernel's table still holds the first one, is noticed by this.
struct FileIdentity {
  dev_t device = 0;
  ino_t inode = 0;
  int flags = 0;
  bool operator==(const FileIdentity&) const = default;
};

inline Status identify(int fd, FileIdentity& file) {
  struct stat found;
  file.flags = ::fcntl(fd, F_GETFL);
  if (file.flags < 0 || ::fstat(fd, &found) != 0)
    return Status::from_errno(errno, "descriptor " + std::to_string(fd));
  file.device = found.st_dev;
  file.inode = found.st_ino;
  return {};
}

// Thread-safe. A change may block while the kernel pins pages; looking something up never waits for that.
template <class Kernel>
class IoRegistry {
 public:
  IoRegistry(Kernel& kernel, std::size_t piece_bytes) : kernel_(kernel), piece_bytes_(piece_bytes) {
    for (FixedIndex index = kMaxFixedBuffers; index > 0;) free_buffers_.push_back(--index);
    for (FixedIndex index = kMaxFixedFiles; index > 0;) free_files_.push_back(--index);
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

  // A descriptor that was registered for another file is registered anew.
  Status add_file(int fd) {
    FileIdentity identity;
    if (Status status = identify(fd, identity); !status.ok()) return status;
    const std::lock_guard changing(change_mutex_);
    if (files_.contains(fd))
      if (Status status = remove(fd); !status.ok()) return status;
    if (free_files_.empty()) return Status::from_errno(ENOSPC, "the table of registered files is full");
    const FixedIndex index = free_files_.back();
    if (Status status = kernel_.set_file(index, fd); !status.ok()) return status;
    free_files_.pop_back();
    const std::lock_guard lock(table_mutex_);
    files_[fd] = {identity, index};
    return {};
  }

  Status drop_file(int fd) {
    const std::lock_guard changing(change_mutex_);
    return files_.contains(fd) ? remove(fd) : Status::invalid("this file is not registered");
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

  [[nodiscard]] FixedIndex find_file(int fd, const FileIdentity& identity) const {
    const std::lock_guard lock(table_mutex_);
    const auto found = files_.find(fd);
    return found != files_.end() && found->second.identity == identity ? found->second.index : kNotFixed;
  }

 private:
  struct File {
    FileIdentity identity;
    FixedIndex index = kNotFixed;
  };

  void release(const std::vector<MemoryPiece>& pieces) {
    for (const MemoryPiece& piece : pieces)
      if (kernel_.set_buffer(piece.index, {}).ok()) free_buffers_.push_back(piece.index);
    // A place that cannot be cleared is not used again; its pages stay pinned until the ring is gone.
  }

  Status remove(int fd) {
    const FixedIndex index = files_.at(fd).index;
    {
      const std::lock_guard lock(table_mutex_);
      files_.erase(fd);
    }
    if (Status status = kernel_.set_file(index, -1); !status.ok()) return status;
    free_files_.push_back(index);
    return {};
  }

  Kernel& kernel_;
  const std::size_t piece_bytes_;
  std::mutex change_mutex_;         // one change at a time; guards the free numbers
  mutable std::mutex table_mutex_;  // taken to change the tables, and to read them without change_mutex_
  std::map<std::byte*, std::vector<MemoryPiece>> regions_;  // by start; all pieces but the last are full
  std::map<int, File> files_;                               // by descriptor
  std::vector<FixedIndex> free_buffers_, free_files_;
};

}  // namespace offload_rt
