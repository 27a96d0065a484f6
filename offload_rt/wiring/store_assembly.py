"""Builds the store of what never changes of a workload."""

from __future__ import annotations

from collections.abc import Callable

from offload_rt.checkpoint.ingest import block_pieces
from offload_rt.storage.store import Store
from offload_rt.wiring.workload import Workload

Progress = Callable[[str, int, int], None]
"""Called with a phase, bytes done and bytes in all."""


def build_store(store: Store, workload: Workload, progress: Progress | None) -> None:
    """Writes all that never changes, encoded, to a store that is not complete. Blocks."""
    total = sum(draft.spec.compute_bytes for draft in workload.frozen)
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress("encoding", done, total)

    builder = store.build([draft.spec for draft in workload.frozen])
    try:
        for draft in workload.frozen:
            builder.write(draft.spec, block_pieces(draft, workload.sources, progress=advance))
        builder.finish()
    finally:
        builder.close()
