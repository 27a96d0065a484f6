"""A look at the newest commit of a log, without a lock and without changing anything: how a run finds its own again.

Another run may be writing the log meanwhile, and what is seen may not be durable yet ([Note: opening syncs] in
`commit_log`). So it only says whose a log is, and how far; whoever goes on from it opens it.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from offload_rt.errors import StoreCorrupt
from offload_rt.storage.commit_layout import home_layout, read_record
from offload_rt.storage.commit_record import Record, RecordInvalid
from offload_rt.storage.durable import os_error


@dataclass(frozen=True, kw_only=True)
class SeenCommit:
    """The newest one when somebody looked."""

    step: int
    payload: bytes


def peek(folder: Path) -> SeenCommit | None:
    """The newest commit of the log whose home drive's part is `folder`; None where there is none, or no step in it.

    Raises `StoreCorrupt` and `StorageError`. Blocks for the drive.
    """
    layout = home_layout(folder)
    if layout is None:
        return None
    path = folder / "state.bin"
    found: list[tuple[Record, bytes]] = []
    wrong: list[str] = []
    try:
        with closing(open(path, "rb", buffering=0)) as file:
            for place in (0, 1):
                try:
                    record, _, payload = read_record(layout, place, lambda at, num: os.pread(file.fileno(), num, at))
                    found.append((record, payload))
                except RecordInvalid as error:
                    wrong.append(f"record {place}: {error}")
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise os_error("cannot be read", path, error) from None
    if not found:
        raise StoreCorrupt(f"{path}: neither of the two commit records is valid: {'; '.join(wrong)}")
    record, payload = max(found, key=lambda one: one[0].sequence)
    return SeenCommit(step=record.step, payload=payload) if record.step else None
