"""CRC32C (Castagnoli), the checksum of every extent: the native instruction, or a plain twin in numpy.

The twin cuts the data into lanes, runs the bytewise table over all lanes at once, and joins their results with the
matrix of "append so many zero bytes" over GF(2).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from offload_rt.native import native_core

_POLYNOMIAL = 0x82F63B78
_LANES = 4096
_CHUNK_BYTES = 4 << 20

UInt32s = npt.NDArray[np.uint32]


def crc32c(data: memoryview, seed: int = 0) -> int:
    """CRC32C of `data`, continuing from `seed`, the checksum of what came before it."""
    core = native_core()
    if core is not None:
        return int(core.crc32c(data, seed))
    return crc32c_plain(data, seed)


def crc32c_plain(data: memoryview, seed: int = 0) -> int:
    """The twin of `crc32c`, some hundred MB/s."""
    everything = np.frombuffer(data, dtype=np.uint8)
    state = seed ^ 0xFFFFFFFF
    for begin in range(0, len(everything), _CHUNK_BYTES):
        chunk = everything[begin : begin + _CHUNK_BYTES]
        lane_bytes = len(chunk) // _LANES
        if lane_bytes:
            columns = np.ascontiguousarray(chunk[: lane_bytes * _LANES].reshape(_LANES, lane_bytes).T)
            lanes = np.zeros(_LANES, dtype=np.uint32)
            lanes[0] = state
            state = _join(_run(lanes, columns), lane_bytes)
        for byte in chunk[lane_bytes * _LANES :]:
            state = int(_table()[(state ^ int(byte)) & 0xFF]) ^ (state >> 8)
    return state ^ 0xFFFFFFFF


@lru_cache(maxsize=1)
def _table() -> UInt32s:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


def _run(lanes: UInt32s, columns: npt.NDArray[np.uint8]) -> UInt32s:
    table = _table()
    for column in columns:
        lanes = table[(lanes ^ column) & 0xFF] ^ (lanes >> 8)
    return lanes


@lru_cache(maxsize=64)
def _zeros_matrix(num_bytes: int) -> tuple[int, ...]:
    """Row i is what the state 1 << i becomes after `num_bytes` zero bytes."""
    if num_bytes == 1:
        table = _table()
        return tuple(int(table[(1 << bit) & 0xFF]) ^ ((1 << bit) >> 8) for bit in range(32))
    half = _zeros_matrix(num_bytes // 2)
    doubled = tuple(_apply(half, row) for row in half)
    if num_bytes % 2:
        one = _zeros_matrix(1)
        doubled = tuple(_apply(one, row) for row in doubled)
    return doubled


def _apply(matrix: tuple[int, ...], state: int) -> int:
    result = 0
    for bit in range(32):
        if state >> bit & 1:
            result ^= matrix[bit]
    return result


def _join(lanes: UInt32s, lane_bytes: int) -> int:
    """The state after all lanes, each of `lane_bytes`; halves the number of lanes until one is left."""
    while len(lanes) > 1:
        left, right = lanes[0::2], lanes[1::2]
        shifted = np.zeros_like(left)
        for bit, row in enumerate(_zeros_matrix(lane_bytes)):
            shifted ^= np.where(left >> np.uint32(bit) & np.uint32(1), np.uint32(row), np.uint32(0))
        lanes = shifted ^ right
        lane_bytes *= 2
    return int(lanes[0])
