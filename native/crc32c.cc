// The instruction takes 8 bytes, has a latency of 3 cycles and can start every cycle, so one stream runs at a
// third of what the processor can do. Three neighbouring stretches are therefore summed side by side and
// joined:
//
//     |<---- stretch ---->|<---- stretch ---->|<---- stretch ---->|
//      crc a (from seed)   crc b (from 0)      crc c (from 0)
//
//     crc of all three = shift(shift(a) ^ b) ^ c
//
// where shift(x) is x after another `stretch` zero bytes: a linear map over GF(2), kept as 4 tables of 256
// words. The method is Mark Adler's (crc32c.c, 2013); the tables are computed by the compiler here.
#include "crc32c.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define CRC32C_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#if defined(__clang__)
#define CRC32C_TARGET __attribute__((target("crc")))
#else
#define CRC32C_TARGET __attribute__((target("+crc")))
#endif
#endif

namespace offload_rt {
namespace {

static_assert(std::endian::native == std::endian::little, "words are loaded as they lie");

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // reflected, as CRC32C is

std::uint64_t load_word(const std::byte* from) {
  std::uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

using ByteTable = std::array<std::uint32_t, 256>;

// tables[k][b]: the byte b followed by k zero bytes.
constexpr std::array<ByteTable, 8> make_slices() {
  std::array<ByteTable, 8> tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (std::size_t zeros = 1; zeros < 8; ++zeros)
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = tables[zeros - 1][byte];
      tables[zeros][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  return tables;
}

constexpr std::array<ByteTable, 8> kSlices = make_slices();

#if defined(CRC32C_TARGET)

// A linear map on 32-bit words: column i is the image of bit i.
using BitMatrix = std::array<std::uint32_t, 32>;

constexpr std::uint32_t apply(const BitMatrix& matrix, std::uint32_t word) {
  std::uint32_t image = 0;
  for (std::size_t bit = 0; word != 0; word >>= 1, ++bit)
    if ((word & 1) != 0) image ^= matrix[bit];
  return image;
}

// The map of `num_bytes` zero bytes, a power of two, by repeated squaring; laid out for one lookup per byte.
constexpr std::array<ByteTable, 4> make_shift(std::size_t num_bytes) {
  BitMatrix matrix{};
  matrix[0] = kPolynomial;  // one zero bit
  for (std::size_t bit = 1; bit < 32; ++bit) matrix[bit] = 1U << (bit - 1);
  for (std::size_t bits = 1; bits < num_bytes * 8; bits *= 2) {
    BitMatrix square{};
    for (std::size_t bit = 0; bit < 32; ++bit) square[bit] = apply(matrix, matrix[bit]);
    matrix = square;
  }
  std::array<ByteTable, 4> tables{};
  for (std::size_t place = 0; place < 4; ++place)
    for (std::uint32_t byte = 0; byte < 256; ++byte) tables[place][byte] = apply(matrix, byte << (8 * place));
  return tables;
}

template <std::size_t kStretch>
std::uint32_t shift(std::uint32_t crc) {
  static constexpr std::array<ByteTable, 4> tables = make_shift(kStretch);
  return tables[0][crc & 0xFF] ^ tables[1][(crc >> 8) & 0xFF] ^ tables[2][(crc >> 16) & 0xFF] ^
         tables[3][crc >> 24];
}

CRC32C_TARGET inline std::uint64_t add_word(std::uint64_t crc, std::uint64_t word) {
#if defined(__x86_64__)
  return _mm_crc32_u64(crc, word);
#else
  return __crc32cd(static_cast<std::uint32_t>(crc), word);
#endif
}

CRC32C_TARGET inline std::uint32_t add_byte(std::uint32_t crc, std::byte byte) {
#if defined(__x86_64__)
  return _mm_crc32_u8(crc, static_cast<std::uint8_t>(byte));
#else
  return __crc32cb(crc, static_cast<std::uint8_t>(byte));
#endif
}

// Consumes as many triples of stretches as there are.
template <std::size_t kStretch>
CRC32C_TARGET std::uint32_t add_triples(std::span<const std::byte>& bytes, std::uint32_t crc) {
  while (bytes.size() >= 3 * kStretch) {
    const std::byte* at = bytes.data();
    std::uint64_t a = crc, b = 0, c = 0;
    for (const std::byte* end = at + kStretch; at != end; at += 8) {
      a = add_word(a, load_word(at));
      b = add_word(b, load_word(at + kStretch));
      c = add_word(c, load_word(at + 2 * kStretch));
    }
    crc = shift<kStretch>(static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b);
    crc = shift<kStretch>(crc) ^ static_cast<std::uint32_t>(c);
    bytes = bytes.subspan(3 * kStretch);
  }
  return crc;
}

CRC32C_TARGET std::uint32_t crc32c_hardware(std::span<const std::byte> bytes, std::uint32_t seed) {
  std::uint32_t crc = ~seed;
  crc = add_triples<8192>(bytes, crc);  // joining costs about 20 cycles: 1 % of a long triple,
  crc = add_triples<256>(bytes, crc);   // a tenth of a short one, still far better than one stream
  while (bytes.size() >= 8) {
    crc = static_cast<std::uint32_t>(add_word(crc, load_word(bytes.data())));
    bytes = bytes.subspan(8);
  }
  for (const std::byte byte : bytes) crc = add_byte(crc, byte);
  return ~crc;
}

#endif  // CRC32C_TARGET

}  // namespace

bool crc32c_in_hardware() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("sse4.2") != 0;
#elif defined(CRC32C_TARGET)
  return (getauxval(AT_HWCAP) & (1UL << 7)) != 0;  // HWCAP_CRC32
#else
  return false;
#endif
}

std::uint32_t crc32c_plain(std::span<const std::byte> bytes, std::uint32_t seed) {
  std::uint32_t crc = ~seed;
  while (bytes.size() >= 8) {
    const std::uint64_t word = load_word(bytes.data()) ^ crc;
    crc = 0;
    for (std::size_t byte = 0; byte < 8; ++byte) crc ^= kSlices[7 - byte][(word >> (8 * byte)) & 0xFF];
    bytes = bytes.subspan(8);
  }
  for (const std::byte byte : bytes)
    crc = (crc >> 8) ^ kSlices[0][(crc ^ static_cast<std::uint8_t>(byte)) & 0xFF];
  return ~crc;
}

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t seed) {
#if defined(CRC32C_TARGET)
  if (crc32c_in_hardware()) return crc32c_hardware(bytes, seed);
#endif
  return crc32c_plain(bytes, seed);
}

}  // namespace offload_rt
