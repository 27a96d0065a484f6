// The part of the kernel's io_uring interface that is used here, as linux/io_uring.h defines it (Linux 5.6
// on).
//
// Written out because that header is missing or too old on the systems that portable wheels are built on. The
// interface is frozen: the kernel only ever appends to it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offload_rt::io_uring_abi {

// The same on every architecture that came to Linux in this century.
inline constexpr long kSysSetup = 425;
inline constexpr long kSysEnter = 426;
inline constexpr long kSysRegister = 427;

inline constexpr std::uint8_t kOpFsync = 3;
inline constexpr std::uint8_t kOpReadFixed = 4;
inline constexpr std::uint8_t kOpWriteFixed = 5;
inline constexpr std::uint8_t kOpRead = 22;
inline constexpr std::uint8_t kOpWrite = 23;

inline constexpr std::uint32_t kFsyncDatasync = 1U << 0;  // of an Sqe's rw_flags

inline constexpr unsigned kRegisterEventFd = 4;
// A table whose places can be filled one at a time, without waiting for the ring to be idle (Linux 5.13).
inline constexpr unsigned kRegisterBuffers = 15;  // "BUFFERS2"
inline constexpr unsigned kUpdateBuffers = 16;    // "BUFFERS_UPDATE"

inline constexpr std::uint32_t kSetupClamp = 1U << 4;
inline constexpr std::uint32_t kFeatureSingleMmap = 1U << 0;
inline constexpr std::uint32_t kFeatureReadWrite =
    1U << 3;  // "RW_CUR_POS": came with kOpRead and kOpWrite in 5.6

inline constexpr std::int64_t kOffsetSqRing = 0;
inline constexpr std::int64_t kOffsetCqRing = 0x8000000;
inline constexpr std::int64_t kOffsetSqes = 0x10000000;

struct Sqe {  // submission queue entry
  std::uint8_t opcode;
  std::uint8_t flags;
  std::uint16_t ioprio;
  std::int32_t fd;
  std::uint64_t off;
  std::uint64_t addr;
  std::uint32_t len;
  std::uint32_t rw_flags;
  std::uint64_t user_data;
  std::uint16_t buf_index;
  std::uint16_t personality;
  std::int32_t splice_fd_in;
  std::uint64_t pad[2];
};
static_assert(sizeof(Sqe) == 64 && offsetof(Sqe, user_data) == 32);

struct Cqe {  // completion queue entry
  std::uint64_t user_data;
  std::int32_t res;
  std::uint32_t flags;
};
static_assert(sizeof(Cqe) == 16);

struct TableRegister {  // "io_uring_rsrc_register"
  std::uint32_t num_entries, flags;
  std::uint64_t reserved, entries, tags;
};
static_assert(sizeof(TableRegister) == 32);

struct TableUpdate {  // "io_uring_rsrc_update2"
  std::uint32_t first, reserved;
  std::uint64_t entries, tags;
  std::uint32_t num_entries, reserved2;
};
static_assert(sizeof(TableUpdate) == 32);

struct SqOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
  std::uint64_t user_addr;
};

struct CqOffsets {
  std::uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
  std::uint64_t user_addr;
};

struct Params {
  std::uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
  std::uint32_t reserved[3];
  SqOffsets sq_off;
  CqOffsets cq_off;
};
static_assert(sizeof(Params) == 120);

}  // namespace offload_rt::io_uring_abi
