"""What a step writes to the drive is known before it runs, and counted while it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_rt.workload import RuntimeOptions
from planners.plan import Tier
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


def test_layer_inputs_that_wait_on_the_drive_are_counted(tmp_path: Path) -> None:
    case = Case("qwen", "float32", "adamw", 2, "not", False, "in place")
    options = RuntimeOptions(layer_inputs=Tier.NVME, rest=Tier.NVME)
    with make_engine(case, tmp_path, nvme=tmp_path, options=options) as engine:
        report = engine.report()
        inputs = report["expected_bytes_written_per_step"] - report["training"]["expected_bytes_written_per_step"]
        before = engine._runtime.links.counters.bytes_written
        engine.backward(one_loss(engine, 0, 0))
        assert inputs > 0 and engine._runtime.links.counters.bytes_written - before == inputs / 2
