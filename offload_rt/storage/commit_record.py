"""What a commit is in bytes: one 4 KiB record and the body that it vouches for. Pure; reads and writes no file.

    record, 4096 bytes, little-endian; the rest is zero         body
      0   8  magic "ORT-CMT1"                                     per extent   4  slot that is committed, 0 or 1
      8   4  number of extents                                                 4  CRC32C of the extent's bytes
     12   4  CRC32C of the body                                   then            payload, opaque
     16  16  id of the log
     32   8  sequence number, rises by 1 with every record
     40   8  step
     48   8  length of the body, bytes
     56   4  zero
     60   4  CRC32C of bytes [0, 60)

All of a record lies in one 512-byte sector, so that a torn write of the page leaves the old record or the new one; the
checksum finds what tears it all the same.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from offload_rt.checksum import crc32c

RECORD_BYTES = 4096
_MAGIC = b"ORT-CMT1"
_RECORD = struct.Struct("<8sII16sQQQI")
_VERSION = struct.Struct("<II")


class RecordInvalid(ValueError):
    """Bytes are no record, or not one of this log; the message says in what."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One content of an extent: which of its two slots holds it, and its checksum."""

    slot: int
    crc32c: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """The commit record."""

    log_id: bytes
    sequence: int
    step: int
    num_extents: int
    body_bytes: int
    body_crc32c: int

    def pack(self) -> bytes:
        fields = _RECORD.pack(
            _MAGIC, self.num_extents, self.body_crc32c, self.log_id, self.sequence, self.step, self.body_bytes, 0
        )
        return (fields + struct.pack("<I", crc32c(memoryview(fields)))).ljust(RECORD_BYTES, b"\0")

    @classmethod
    def unpack(cls, page: bytes) -> Record:
        """Raises `RecordInvalid`."""
        fields, expected = page[: _RECORD.size], int.from_bytes(page[_RECORD.size : _RECORD.size + 4], "little")
        if not any(page):
            raise RecordInvalid("never written")
        magic, num_extents, body_crc32c, log_id, sequence, step, body_bytes, _ = _RECORD.unpack(fields)
        if magic != _MAGIC:
            raise RecordInvalid(f"begins with {magic!r}")
        found = crc32c(memoryview(fields))
        if found != expected:
            raise RecordInvalid(f"checksum {found:08x}, expected {expected:08x}")
        return cls(
            log_id=log_id, sequence=sequence, step=step, num_extents=num_extents,
            body_bytes=body_bytes, body_crc32c=body_crc32c,
        )  # fmt: skip


def body_bytes(num_extents: int, payload_bytes: int) -> int:
    """Length of a body in bytes."""
    return num_extents * _VERSION.size + payload_bytes


def pack_body(versions: Sequence[Version], payload: bytes) -> bytes:
    """The committed version of each extent, in the order of the log's layout, and the payload."""
    return b"".join(_VERSION.pack(version.slot, version.crc32c) for version in versions) + payload


def unpack_body(record: Record, body: bytes) -> tuple[list[Version], bytes]:
    """Raises `RecordInvalid` where `body` is not the one that `record` was written for."""
    found = crc32c(memoryview(body))
    if found != record.body_crc32c:
        raise RecordInvalid(f"its body has checksum {found:08x}, expected {record.body_crc32c:08x}")
    table, payload = body[: body_bytes(record.num_extents, 0)], body[body_bytes(record.num_extents, 0) :]
    return [Version(slot=slot, crc32c=checksum) for slot, checksum in _VERSION.iter_unpack(table)], payload
