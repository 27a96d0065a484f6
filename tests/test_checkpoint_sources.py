"""Slab streams against whole tensors, and the memory that they need."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from offload_rt.checkpoint import sources as sources_module
from offload_rt.checkpoint.safetensors_reader import Checkpoint, open_checkpoint
from offload_rt.checkpoint.sources import (
    ConcatSource,
    EntrySource,
    MaterialisedSource,
    MemorySource,
    SliceSource,
    TransposedSource,
    cat,
    materialise,
    stack,
)
from offload_rt.errors import CheckpointError


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.arange(7 * 13, dtype=torch.float32).view(7, 13).to(torch.bfloat16),
        "wide": torch.arange(3 * 13, dtype=torch.float32).view(3, 13).to(torch.bfloat16) + 100,
        "stack": torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3),
        "vector": torch.arange(129, dtype=torch.int16),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture(scope="module")
def checkpoint(stored: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    file = tmp_path_factory.mktemp("stored") / "model.safetensors"
    save_file(stored, file)
    return open_checkpoint(file)


def source_cases(checkpoint: Checkpoint, stored: dict[str, torch.Tensor]) -> dict[str, Any]:
    def entry_of(name: str) -> EntrySource:
        return EntrySource(checkpoint, checkpoint.tensors[name])

    matrix, wide, three = entry_of("matrix"), entry_of("wide"), entry_of("stack")
    m, w, s = stored["matrix"], stored["wide"], stored["stack"]
    return {
        "matrix": (matrix, m),
        "vector": (entry_of("vector"), stored["vector"]),
        "empty": (entry_of("empty"), stored["empty"]),
        "slice": (SliceSource(matrix, 13, (2, 13)), m[1:3]),
        "cat 0": (cat([matrix, wide, matrix], 0), torch.cat([m, w, m], 0)),
        "cat 1": (cat([matrix, matrix], -1), torch.cat([m, m], -1)),
        "cat middle": (cat([three, three, three], 1), torch.cat([s, s, s], 1)),
        "cat with empty": (cat([entry_of("empty")] * 2, 1), torch.cat([stored["empty"]] * 2, 1)),
        "stack": (stack([matrix, matrix]), torch.stack([m, m])),
        "stack 2": (stack([matrix, matrix], 2), torch.stack([m, m], 2)),
        "experts": (
            cat([stack([matrix, matrix]), stack([wide, wide])], 1),
            torch.cat([torch.stack([m, m]), torch.stack([w, w])], 1),
        ),
        "memory": (MemorySource(m), m),
        "memory transposed": (MemorySource(m.T), m.T),
        "memory expanded": (MemorySource(s[:, :1].expand(2, 4, 3)), s[:, :1].expand(2, 4, 3)),
        "memory scalar": (MemorySource(torch.tensor(2.5)), torch.tensor(2.5)),
        "transposed": (TransposedSource(matrix), m.T),
        "transposed twice": (TransposedSource(TransposedSource(matrix)), m),
        "transposed of a merge": (TransposedSource(cat([matrix, wide], 0)), torch.cat([m, w]).T),
        "merge of transposed": (
            ConcatSource([TransposedSource(SliceSource(three, i * 15, (5, 3))) for i in range(2)], (2, 3, 5)),
            s.transpose(1, 2),
        ),
        "materialised transposed": (TransposedSource(MaterialisedSource((13, 7), m.dtype, lambda: m.T)), m),
        "materialised": (MaterialisedSource((13, 7), m.dtype, lambda: m.T), m.T),
    }  # fmt: skip


@pytest.mark.parametrize("staging_bytes", [6, 64, 1 << 20])
def test_slabs_of_any_size_are_the_tensor(
    checkpoint: Checkpoint,
    stored: dict[str, torch.Tensor],
    staging_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources_module, "_STAGING_BYTES", staging_bytes)
    for name, (source, expected) in source_cases(checkpoint, stored).items():
        assert source.shape == tuple(expected.shape), name
        assert torch.equal(materialise(source), expected), name
        flat = expected.reshape(-1)
        item = source.dtype.itemsize
        for max_elements in (1, 5, 64, 1000):
            for multiple in {1, min(4, max_elements), max_elements}:
                for boundary in (None, 1, 13):
                    max_bytes = max_elements * item + item - 1
                    pieces = [slab.clone() for slab in source.slabs(max_bytes, multiple, boundary=boundary)]
                    label = f"{name} {max_elements} {multiple} {boundary}"
                    assert torch.equal(torch.cat([torch.empty(0, dtype=source.dtype), *pieces]), flat), label
                    begin = 0
                    for piece in pieces:
                        end = begin + piece.numel()
                        last = end == flat.numel() or (boundary is not None and end % boundary == 0)
                        assert piece.dim() == 1 and piece.is_contiguous() and piece.dtype == source.dtype
                        assert 0 < piece.nbytes <= max_bytes, label
                        assert last or piece.numel() % multiple == 0, label
                        assert boundary is None or begin // boundary == (end - 1) // boundary, label
                        begin = end


def test_slab_sizes_that_hold_nothing_are_refused() -> None:
    source = MemorySource(torch.zeros(8))
    for max_bytes, multiple in [(3, 1), (16, 5), (0, 1), (16, 0)]:
        with pytest.raises(ValueError, match="max_bytes"):
            source.slabs(max_bytes, multiple)
    with pytest.raises(ValueError, match="boundary"):
        source.slabs(16, boundary=0)


def test_memory_slabs_are_copies() -> None:
    tensor = torch.ones(8)
    for slab in MemorySource(tensor).slabs(16):
        slab.fill_(math.nan)
    assert torch.equal(tensor, torch.ones(8))


def test_sources_that_do_not_fit_together_are_refused(checkpoint: Checkpoint) -> None:
    matrix, vector = (EntrySource(checkpoint, checkpoint.tensors[n]) for n in ("matrix", "vector"))
    with pytest.raises(ValueError, match="do not concatenate"):
        cat([matrix, vector], 0)
    with pytest.raises(ValueError, match="one dtype"):
        ConcatSource([matrix, vector], (220,))
    with pytest.raises(ValueError, match="is not the 91 elements"):
        ConcatSource([matrix], (92,))
    with pytest.raises(ValueError, match="outside"):
        SliceSource(matrix, 90, (2,))
    with pytest.raises(CheckpointError, match="a conversion gave"):
        list(MaterialisedSource((2,), torch.float32, lambda: torch.zeros(3)).slabs(64))


def test_materialised_source_is_loaded_once_a_pass() -> None:
    tensor = torch.randn(6, 5)
    loads = []
    source = MaterialisedSource((6, 5), tensor.dtype, lambda: loads.append(1) or tensor)  # type: ignore[func-returns-value]
    for stream in (source, TransposedSource(source)):
        assert not stream.streamed
        loads.clear()
        assert len(list(stream.slabs(16))) == 8
        assert len(loads) == 1


class PeakBytes(TorchDispatchMode):
    """The peak of all storages that torch operations create while it is on, but for the given tensors'."""

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self._existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._references: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            pointer = storage.data_ptr()
            if pointer not in self._existing:
                self._references[pointer] += 1
                self._sizes[pointer] = storage.nbytes()
                weakref.finalize(result, self._drop, pointer)
                self.peak = max(self.peak, sum(self._sizes.values()))
        return result

    def _drop(self, pointer: int) -> None:
        self._references[pointer] -= 1
        if not self._references[pointer]:
            del self._sizes[pointer]


def test_streams_of_a_tensor_need_memory_for_one_slab(tmp_path: Path) -> None:
    experts = {f"e{i}": torch.randn(96, 512) for i in range(8)}
    save_file(experts, tmp_path / "model.safetensors")
    max_bytes = 16 * 1024
    with open_checkpoint(tmp_path) as checkpoint:
        parts = [EntrySource(checkpoint, checkpoint.tensors[name]) for name in experts]
        whole = torch.stack(list(experts.values()))
        cases = {
            "entry": (parts[0], 1),
            "stack": (stack(parts), 1),
            "cat": (cat(parts, 1), 1),
            "memory": (MemorySource(whole), 1),
            "memory transposed": (MemorySource(whole.transpose(1, 2)), 1),
            "transposed, with its strip": (TransposedSource(parts[0]), 2),
        }
        for name, (source, num_slabs) in cases.items():
            total = 0
            with PeakBytes(whole) as memory:
                for slab in source.slabs(max_bytes):
                    total += slab.nbytes
            assert total == math.prod(source.shape) * 4
            assert max_bytes <= memory.peak <= num_slabs * max_bytes, name


def test_transposing_reads_whole_rows_once_a_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.randn(300, 200)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        read: list[int] = []
        real = Checkpoint.read_into

        def count(self: Checkpoint, item: Any, begin: int, buffer: memoryview) -> None:
            read.append(len(buffer))
            real(self, item, begin, buffer)

        monkeypatch.setattr(Checkpoint, "read_into", count)
        source = TransposedSource(EntrySource(checkpoint, checkpoint.tensors["w"]))
        list(source.slabs(300 * 50 * 4))
        assert (sum(read), len(read)) == (4 * 300 * 200 * 4, 4 * 4)
        read.clear()
        list(source.slabs(1 << 20))
        assert (sum(read), len(read)) == (300 * 200 * 4, 1)
