// CRC32C (Castagnoli, RFC 3720 section 12.1): detects that bytes changed on their way to or from a drive.
//
// Not a defence against someone who changes them on purpose. Chunks compose: the checksum of one chunk is the
// seed of the next, so that crc32c(b, crc32c(a)) == crc32c(a + b).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace offload_rt {

// By the processor's own instruction where it has one (found at run time), else crc32c_plain.
[[nodiscard]] std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t seed = 0);

// The twin: slicing by 8, on any machine.
[[nodiscard]] std::uint32_t crc32c_plain(std::span<const std::byte> bytes, std::uint32_t seed = 0);

// Whether crc32c has an instruction to use here.
[[nodiscard]] bool crc32c_in_hardware();

}  // namespace offload_rt
