// Files and buffers for the I/O tests.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "check.h"

namespace offload_rt::testing {

inline constexpr std::size_t kAlignment = 4096;

// A file that exists only as long as its descriptor. On a file system with O_DIRECT, unlike a memfd.
class ScratchFile {
 public:
  explicit ScratchFile(int extra_flags = 0) {
    const char* folder = std::getenv("TMPDIR");
    path_ = std::string(folder != nullptr ? folder : "/var/tmp") + "/native_test_XXXXXX";
    fd_ = ::mkostemp(path_.data(), O_CLOEXEC | extra_flags);
    CHECK(fd_ >= 0);
    ::unlink(path_.c_str());
  }
  ~ScratchFile() { ::close(fd_); }
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  [[nodiscard]] int fd() const { return fd_; }

 private:
  std::string path_;
  int fd_;
};

// Aligned for O_DIRECT, filled with a pattern that depends on `seed` and shows a piece that landed elsewhere.
class Buffer {
 public:
  explicit Buffer(std::size_t length, std::uint32_t seed = 0)
      : memory_(static_cast<std::byte*>(
            std::aligned_alloc(kAlignment, (length + kAlignment) / kAlignment * kAlignment))),
        length_(length) {
    std::uint32_t state = seed * 2654435761U + 1;
    for (std::size_t i = 0; i < length; ++i) {
      state = state * 1664525U + 1013904223U;
      memory_.get()[i] = static_cast<std::byte>(state >> 24);
    }
  }

  [[nodiscard]] std::byte* data() const { return memory_.get(); }
  [[nodiscard]] std::span<std::byte> span() const { return {memory_.get(), length_}; }
  [[nodiscard]] std::size_t size() const { return length_; }
  bool operator==(const Buffer& other) const {
    return std::equal(span().begin(), span().end(), other.span().begin(), other.span().end());
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t length_;
};

}  // namespace offload_rt::testing
