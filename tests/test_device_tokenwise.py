"""Layers by chunks of tokens on a device whose copies are late: swapped to HOST, or by way of HOST to NVMe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import DecodeScope, Tier
from tests.conftest import build_lora
from tests.fake_device import FakeDevice
from tests.test_tokenwise_engine import NUM_LAYERS, SEQ_LEN, chunked, plain_steps, same_bits, steps
from tests.tokenwise import waiting_in

LATE = 0.0005


def run(folder: Path, chosen: Any, layer_inputs: Tier, *, dropout: float, record: bool = False):  # type: ignore[no-untyped-def]
    """Results of two steps with late copies and poisoned memory, bytes written by them, and the device."""
    device = FakeDevice(late_seconds=LATE, kernels_are_late=False)
    options = RuntimeOptions(
        activations=chosen, layer_inputs=layer_inputs, decode_scope=DecodeScope.LINEAR, num_slots=1, poison=True,
        record=record, device=device,
    )  # fmt: skip
    model = build_lora("llama", torch.bfloat16, num_layers=NUM_LAYERS, dropout=dropout).train()
    with Engine(
        model, bits=4, batch_size=2, seq_len=SEQ_LEN, lr=1e-2, device="cpu", host_memory="64MiB", nvme=folder,
        options=options,
    ) as engine:  # fmt: skip
        built_bytes = engine.report()["bytes_written"]
        found = steps(engine, engine.step)
        report, recorder = engine.report(), engine._runtime.recorder
        assert report["tokenwise"]["refused"] == {}
        assert report["tokenwise"]["no_room_bytes"] == 0
        assert report["tokenwise"]["swapped_bytes"] > 0
        assert report["tokenwise"]["loaded_bytes"] == report["tokenwise"]["swapped_bytes"]
        if record:
            assert recorder is not None and [str(race) for race in recorder.check()] == []
        written_bytes = report["bytes_written"] - built_bytes
    device.close()
    return found, written_bytes, device


@pytest.mark.parametrize(
    "share, tier, layer_inputs",
    [
        (1.0, Tier.HOST, Tier.HOST),
        (1.0, Tier.NVME, Tier.HOST),
        (0.0, Tier.HOST, Tier.NVME),
        (1.0, Tier.NVME, Tier.DEVICE),
    ],
)
def test_one_chunk_on_a_late_device_is_bit_equal_to_plain(
    share: float, tier: Tier, layer_inputs: Tier, tmp_path: Path
) -> None:
    found, written_bytes, device = run(
        tmp_path, waiting_in(chunked(share, 1), tier), layer_inputs, dropout=0.1, record=True
    )
    same_bits(found, plain_steps("llama", 4, 0.1))
    on_nvme = (tier if share else layer_inputs) is Tier.NVME
    assert (written_bytes > 0) is on_nvme
    assert device.to_host.num_copies > 2 * NUM_LAYERS


def test_chunks_that_wait_in_different_places_give_the_same(tmp_path: Path) -> None:
    results = []
    for tier, layer_inputs in ((Tier.HOST, Tier.DEVICE), (Tier.NVME, Tier.NVME)):
        for share in (0.5, 1.0):
            found, _, _ = run(tmp_path, waiting_in(chunked(share, 2), tier), layer_inputs, dropout=0.0)
            results.append(found)
    for found in results[1:]:
        same_bits(found, results[0])
