"""CRC32C: published values, the plain twin against the definition, and chunks that compose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_rt import checksum
from offload_rt.checksum import crc32c, crc32c_plain


def by_definition(data, seed=0):
    """One bit at a time."""
    crc = seed ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def some_bytes(length):
    return memoryview(bytes((i * 7919 + i // 251) % 256 for i in range(length)))


@pytest.mark.parametrize("function", [crc32c, crc32c_plain])
def test_published_values(function):
    assert function(memoryview(b"")) == 0
    assert function(memoryview(b"123456789")) == 0xE3069283
    assert function(memoryview(bytes(32))) == 0x8A9136AA  # RFC 3720, B.4
    assert function(memoryview(b"\xff" * 32)) == 0x62A8AB43


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 8191, 8192, 12_289, 40_961])
def test_the_twin_agrees_with_the_definition(length):
    assert crc32c_plain(some_bytes(length), 5) == by_definition(some_bytes(length), 5)


@pytest.mark.parametrize("length", [0, 1, 4097, (4 << 20) - 1, 4 << 20, (4 << 20) + 1])
def test_both_give_the_same(length):
    assert crc32c(some_bytes(length)) == crc32c_plain(some_bytes(length))


def test_a_large_buffer_is_the_sum_of_its_pieces():
    """Over the size at which the twin cuts."""
    data = some_bytes(checksum._CHUNK_BYTES + 10_001)
    for cut in (0, 1, 4096, checksum._CHUNK_BYTES):
        assert crc32c_plain(data[cut:], crc32c_plain(data[:cut])) == crc32c(data)


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_chunks_compose(data, seed, cut):
    view = memoryview(data)
    for function in (crc32c, crc32c_plain):
        assert function(view[cut:], function(view[:cut], seed)) == by_definition(data, seed)


@given(st.integers(0, 9999), st.integers(0, 7))
def test_every_flipped_bit_changes_it(position, bit):
    data = bytearray(some_bytes(10_000))
    before = crc32c(memoryview(data))
    data[position] ^= 1 << bit
    assert crc32c(memoryview(data)) != before
