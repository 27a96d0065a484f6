// The instruction agrees with the tables, both with the published values, and chunks compose.
#include <array>
#include <span>
#include <string_view>
#include <vector>

#include "check.h"
#include "crc32c.h"
#include "scratch.h"

using namespace offload_rt;
using namespace offload_rt::testing;

namespace {

void agrees_with_published_values() {
  // RFC 3720, appendix B.4, and the check value of the CRC catalogue.
  std::array<std::byte, 32> bytes{};
  CHECK_EQUAL(crc32c(bytes), 0x8A9136AAU);
  CHECK_EQUAL(crc32c_plain(bytes), 0x8A9136AAU);
  bytes.fill(std::byte{0xFF});
  CHECK_EQUAL(crc32c(bytes), 0x62A8AB43U);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i);
  CHECK_EQUAL(crc32c(bytes), 0x46DD794EU);
  constexpr std::string_view digits = "123456789";
  CHECK_EQUAL(crc32c(std::as_bytes(std::span(digits))), 0xE3069283U);
  CHECK_EQUAL(crc32c_plain(std::as_bytes(std::span(digits))), 0xE3069283U);
  CHECK_EQUAL(crc32c({}), 0U);
}

void agrees_with_its_plain_twin_at_every_edge() {
  const Buffer buffer(3 * 8192 * 2 + 3 * 256 + 100);
  std::vector<std::size_t> lengths{767, 768, 769, 1535, 1536, 1537, 24575, 24576, 24577, buffer.size() - 8};
  for (std::size_t length = 0; length <= 130; ++length) lengths.push_back(length);
  for (const std::size_t length : lengths)
    for (const std::size_t start : {0, 1, 3, 7})
      for (const std::uint32_t seed : {0U, 1U, 0xDEADBEEFU, ~0U}) {
        const auto bytes = std::span<const std::byte>(buffer.span()).subspan(start, length);
        CHECK_EQUAL(crc32c(bytes, seed), crc32c_plain(bytes, seed));
      }
}

void chunks_compose() {
  const Buffer buffer(100'003);
  const std::span<const std::byte> bytes = buffer.span();
  const std::uint32_t whole = crc32c(bytes);
  for (const std::size_t cut : {0UL, 1UL, 8UL, 4096UL, 24576UL, 65537UL, 100'003UL})
    CHECK_EQUAL(crc32c(bytes.subspan(cut), crc32c(bytes.first(cut))), whole);
}

void one_flipped_bit_changes_it() {
  const Buffer buffer(30'000);
  const std::uint32_t before = crc32c(buffer.span());
  for (const std::size_t at : {0UL, 8191UL, 8192UL, 16384UL, 24576UL, 29'999UL}) {
    buffer.data()[at] ^= std::byte{0x10};
    CHECK(crc32c(buffer.span()) != before);
    buffer.data()[at] ^= std::byte{0x10};
  }
}

}  // namespace

int main() {
  Suite suite;
  suite.run("agrees_with_published_values", agrees_with_published_values);
  suite.run("agrees_with_its_plain_twin_at_every_edge", agrees_with_its_plain_twin_at_every_edge);
  suite.run("chunks_compose", chunks_compose);
  suite.run("one_flipped_bit_changes_it", one_flipped_bit_changes_it);
  return suite.finish("crc32c");
}
