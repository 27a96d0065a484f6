"""`plan="auto"` on a device whose memory holds layers by chunks only: what waits there for its copies is charged.

The device lets go of what leaves it only when the host has waited for that copy: as late as any device may be. Then
its memory comes back in the calling thread, so that all of it is counted to the byte, whatever other threads do.

    leaves        input, result of layer 1 | of layer 2 | ..     at most a window, which the plan charges
    comes ahead                                            .. | of layer 2 | of layer 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.memory.arena import Slot
from offload_rt.running.rehearsal import planned_bytes
from offload_rt.tiering.device_stash import DeviceStash
from offload_rt.transfers.device_copies import DeviceCopies
from offload_rt.transfers.transfer import Transfer
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Tier
from planners.rule.streaming_problem import Cuts
from tests.fake_device import FakeDevice
from tests.test_tokenwise_engine import same_bits
from tests.tokenwise import build_with_adapters

TOKENS, NUM_LAYERS, HIDDEN = 1024, 3, 64
INPUT_BYTES = 2 * TOKENS * HIDDEN
BUDGET = 21 << 18
ON_THEIR_WAY = "layer inputs on their way"


@dataclass(frozen=True)
class Run:
    found: dict[str, torch.Tensor]
    """Of each step the loss and what was trained."""
    cuts: Cuts
    charged_bytes: int
    """For what is on its way."""
    measured_bytes: int
    """Tensors in DEVICE memory at most."""
    report: dict[str, Any]


def run(folder: Path | None = None, **options: Any) -> Run:
    """Two steps of a small Llama with adapters. Whatever was measured must be within what the budget was told of."""
    model = build_with_adapters(num_layers=NUM_LAYERS, hidden=HIDDEN, most_tokens=TOKENS)
    ids = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    found = {}
    with Engine(
        model, batch_size=1, seq_len=TOKENS, lr=1e-2, device="cpu", device_memory=BUDGET, host_memory="64MiB",
        nvme=folder, options=RuntimeOptions(fill=False, **options),
    ) as engine:  # fmt: skip
        for step in range(2):
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            found[f"{step}: loss"] = loss.detach()
            found |= {f"{step}: {name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        report, account = engine.report(), engine._runtime.tiers.account(Tier.DEVICE)
        assert report["rehearsal"]["measured_bytes"] <= planned_bytes(engine._runtime)
        assert account.used_bytes <= BUDGET
        return Run(
            found, engine._runtime.cuts, account.holdings.get(ON_THEIR_WAY, 0),
            report["rehearsal"]["measured_bytes"], report,
        )  # fmt: skip


def run_on_device(folder: Path, home: Tier, monkeypatch: pytest.MonkeyPatch) -> Run:
    """On one that is as late as can be to let go of what leaves it."""
    save, leaving = DeviceCopies.save, {}

    def save_and_hold(self: DeviceCopies, *saved: tuple[torch.Tensor, Slot]) -> Transfer:
        transfer = save(self, *saved)
        wait, leaving[transfer] = transfer.wait, saved

        def let_go(timeout_seconds: float | None = None) -> None:
            wait(timeout_seconds)
            leaving.pop(transfer, None)

        transfer.wait = let_go  # type: ignore[method-assign]
        return transfer

    monkeypatch.setattr(DeviceCopies, "save", save_and_hold)
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(folder / "cache"))  # nothing was measured before
    device = FakeDevice(late_seconds=0.0005, kernels_are_late=False)
    nvme = folder if home is Tier.NVME else None
    found = run(nvme, device=device, layer_inputs=None if home is Tier.HOST else home, rest=Tier.HOST)
    device.close()
    assert found.cuts.chunk_tokens is not None, "it fits by chunks only"
    assert found.report["tokenwise"]["refused"] == {} and found.report["tokenwise"]["no_room_bytes"] == 0
    assert found.report["tokenwise"]["bytes_by_group"][f"input in {home.value}"] >= 2 * NUM_LAYERS * INPUT_BYTES
    return found


@cache
def run_on_the_cpu() -> Run:
    """Where nothing is ever on its way."""
    return run()


@pytest.mark.parametrize("home", [Tier.HOST, pytest.param(Tier.NVME, marks=pytest.mark.full)])
def test_what_fits_by_chunks_only_runs_within_its_budget_to_the_bits_of_the_cpu(
    home: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_on_device(tmp_path, home, monkeypatch)
    expected = run_on_the_cpu()
    assert found.cuts == expected.cuts and expected.charged_bytes == 0
    same_bits(found.found, expected.found)
    held_by_copies = found.measured_bytes - expected.measured_bytes
    assert 2 * INPUT_BYTES <= held_by_copies <= found.charged_bytes, "a layer's input and its attention's result"


def test_a_window_that_is_larger_than_its_charge_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of two layers, in place of one's."""
    made = DeviceStash.__init__

    def wide(self: DeviceStash, *args: Any, window_bytes: int, **others: Any) -> None:
        made(self, *args, window_bytes=2 * window_bytes, **others)

    monkeypatch.setattr(DeviceStash, "__init__", wide)
    found = run_on_device(tmp_path, Tier.HOST, monkeypatch)
    assert found.measured_bytes - run_on_the_cpu().measured_bytes > found.charged_bytes
