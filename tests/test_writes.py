"""What a step writes to the drive is known before it runs, and counted while it does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from offload_rt.storage import drives
from offload_rt.transfers import links
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Tier
from tests.full_parity import Case, make_engine, one_loss

RECORDS_BYTES = 64 << 10
"""A commit's record, body and payload at most, in these small models."""


@pytest.mark.parametrize(
    ("place", "clipping", "accumulation"),
    [
        ("in place", "not", 1), ("on NVME", "not", 1), ("on NVME", "always", 4),
        ("on NVME but for two layers", "not", 1), ("split", "not", 1), ("split", "rarely", 4),
        ("state in HOST, committed", "not", 1), ("recorded, gradients on NVME", "always", 4), ("stress", "not", 4),
    ],
)  # fmt: skip
def test_a_step_writes_what_was_expected(place: str, clipping: str, accumulation: int, tmp_path: Path) -> None:
    case = Case("llama", "bfloat16", "adamw", accumulation, clipping, False, place)
    with make_engine(case, tmp_path) as engine:
        expected = engine.report()["expected_bytes_written_per_step"]
        assert engine.report()["bytes_written_per_step"] == 0
        # The first step keeps its gradients in any mode, and so does one after a step that clipped.
        for step in range(5):
            for index in range(accumulation):
                engine.backward(one_loss(engine, step, index))
            engine.step()
            if step == 0:
                engine._wear_from = (1, engine._runtime.links.counters.bytes_written)
        written = engine.report()["bytes_written_per_step"]
        if place == "in place":
            assert written == expected == 0
            return
        assert expected > 10 * RECORDS_BYTES
        assert expected - 1 <= written <= expected + RECORDS_BYTES


class Writes:
    """What an engine's I/O was asked to write, by the end of the path, and what it was told of drives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.tuned: dict[str, tuple[int, int]] = {}
        make = links.file_io
        monkeypatch.setattr(links, "file_io", lambda: self._watch(make()))

    def _watch(self, io: Any) -> Any:
        start, tune = io.start, io.tune

        def starting(kind: str, file: Any, offset_bytes: int, buffer: memoryview) -> Any:
            if kind == "write":
                self.ranges.append((Path(file.path).name, offset_bytes, offset_bytes + len(buffer)))
            return start(kind, file, offset_bytes, buffer)

        def tuning(file: Any, depth: int, io_bytes: int) -> None:
            self.tuned[Path(file.path).name] = (depth, io_bytes)
            tune(file, depth, io_bytes)

        io.start, io.tune = starting, tuning
        return io


@pytest.mark.parametrize("place", ["on NVME", "split", "state in HOST, committed"])
def test_a_first_start_writes_each_byte_of_the_log_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = Writes(monkeypatch)
    case = Case("llama", "bfloat16", "adamw", 1, "not", False, place)
    with make_engine(case, tmp_path) as engine:
        layout = engine._training.home.log.layout  # type: ignore[union-attr]
        begins, ends = layout.extents[0].offset_bytes, layout.file_bytes()[0]
        ranges = sorted((b, e) for name, b, e in writes.ranges if name == "state.bin" and e > begins)
        assert ranges[-1][1] == ends
        # The zeros before the first extent may go on into it.
        assert ranges[0][0] <= begins and all(end == begin for (_, end), (begin, _) in pairwise(ranges))


def test_the_log_and_the_gradients_are_written_as_the_drive_likes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, io_bytes = drives.CANDIDATES[-1]
    monkeypatch.setattr(drives, "drive_profile", lambda *_: drives.DriveProfile(depth=depth, io_bytes=io_bytes))
    writes = Writes(monkeypatch)
    with make_engine(Case("plain", "bfloat16", "adamw", 1, "not", False, "stress"), tmp_path):
        scratch = [name for name in writes.tuned if name.startswith("scratch-")]
        assert len(scratch) == 1
        assert {writes.tuned["state.bin"], writes.tuned[scratch[0]]} == {(depth, io_bytes)}


def test_layer_inputs_that_wait_on_the_drive_are_counted(tmp_path: Path) -> None:
    case = Case("qwen", "float32", "adamw", 2, "not", False, "in place")
    options = RuntimeOptions(layer_inputs=Tier.NVME, rest=Tier.NVME)
    with make_engine(case, tmp_path, nvme=tmp_path, options=options) as engine:
        report = engine.report()
        inputs = report["expected_bytes_written_per_step"] - report["training"]["expected_bytes_written_per_step"]
        before = engine._runtime.links.counters.bytes_written
        engine.backward(one_loss(engine, 0, 0))
        assert inputs > 0 and engine._runtime.links.counters.bytes_written - before == inputs / 2
