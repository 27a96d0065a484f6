"""CRC32C of the native core agrees with the definition, bit by bit, and composes over chunks."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_checksum import by_definition

native = pytest.importorskip("_offload_rt_native", reason="the native extension is not built")

EDGES = [0, 1, 7, 8, 9, 63, 64, 65, 767, 768, 769, 4095, 4096, 4097, 24575, 24576, 24577, 25344, 100_003]


def random_bytes(length: int) -> bytes:
    return np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()


def test_published_values():
    assert native.crc32c(b"") == 0
    assert native.crc32c(b"123456789") == 0xE3069283
    assert native.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert native.crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("length", EDGES)
def test_agrees_with_the_plain_twin(length):
    data = random_bytes(length)
    assert native.crc32c(data) == by_definition(data)


@given(data=st.binary(max_size=2000), seed=st.integers(0, 2**32 - 1), start=st.integers(0, 9))
def test_agrees_with_the_plain_twin_for_any_seed_and_alignment(data, seed, start):
    assert native.crc32c(memoryview(data)[start:], seed) == by_definition(data[start:], seed)


@given(cuts=st.lists(st.integers(0, 100_003), max_size=5))
def test_chunks_compose(cuts):
    data = memoryview(random_bytes(100_003))
    crc = 0
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        crc = native.crc32c(data[start:end], crc)
    assert crc == native.crc32c(data)


def test_any_contiguous_buffer_is_taken():
    data = random_bytes(4096)
    expected = native.crc32c(data)
    assert native.crc32c(bytearray(data)) == expected
    assert native.crc32c(np.frombuffer(data, dtype=np.float32).reshape(32, 32)) == expected
    with pytest.raises((BufferError, ValueError)):
        native.crc32c(np.zeros((8, 8), dtype=np.uint8)[:, ::2])


def test_threads_agree_on_a_large_buffer():
    """Large buffers are summed without the GIL, so these run at the same time."""
    data = np.arange(8 << 20, dtype=np.uint8)
    results = []
    threads = [threading.Thread(target=lambda: results.append(native.crc32c(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [native.crc32c(data)] * 4


def test_isa_tells_whether_each_feature_is_there():
    features = native.isa()
    assert features and all(isinstance(present, bool) for present in features.values())
