"""What tests of the optimiser's plans on a GPU share: how much a plan may have there, and a machine with its rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload_rt import arguments
from offload_rt.memory.cuda_memory import settle
from offload_rt.plans import planning, training_seconds, workload_sizes
from planners.problems.hardware import Drive, Hardware, Links, named_hardware
from planners.problems.measured import KeptPass, MeasuredSeconds

KIB = 1 << 10
RATE = 2e6
"""Of links, and half of it of drives: for a layer of these tests about as slow as computing it."""
DRIVE = Drive(capacity_bytes=1 << 30, read_bytes_per_second=RATE / 2, write_bytes_per_second=RATE / 2)
SAVED_BYTES = 75_000
LAYER = MeasuredSeconds(forward=0.01, backward=0.03)
HEAD = MeasuredSeconds(forward=0.01, backward=0.02)


def machine(*, with_a_drive: bool) -> Hardware:
    card = named_hardware("rtx4090")
    links = Links(host_to_device_bytes_per_second=RATE, device_to_host_bytes_per_second=RATE, duplex=0.5)
    return replace(card, links=links, drives=(DRIVE,) if with_a_drive else ())


def calibrated(patch: pytest.MonkeyPatch, folder: Path, asked: list[str] | None = None) -> None:
    """This machine was measured, with the device that is asked for; nothing else of it is remembered. Skips where
    there is no solver, which the plans need that are made for it.
    """
    pytest.importorskip("highspy", reason="the optimiser's plans need highspy")
    patch.setenv("OFFLOAD_RT_CACHE", str(folder / "cache"))

    def found(device: str, folders: tuple[object, ...]) -> Hardware:
        if asked is not None:
            asked.append(device)
        return machine(with_a_drive=bool(folders))

    patch.setattr(arguments, "calibrated", found)


def room_for_plans(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """A plan has so much DEVICE memory, whatever CUDA has beside it, which is more than these models and taken then."""
    settle(torch.device("cuda"))
    patch.setattr(workload_sizes, "_device_bytes", lambda model, config: (num_bytes, 0))


def unmeasured(patch: pytest.MonkeyPatch, *, saved_bytes: int = SAVED_BYTES) -> None:
    """Seconds that nobody measured, so that the same plan comes of them, and about the bytes that a layer saves."""
    layer = replace(LAYER, kept=KeptPass(forward=0.01, backward=0.02, saved_bytes=saved_bytes))
    patch.setattr(planning, "profile_layer", lambda *_, **__: layer)
    patch.setattr(planning, "profile_head", lambda **_: HEAD)
    patch.setattr(planning, "updates_per_second", lambda *_: 1e9)
    patch.setattr(training_seconds, "profile_head", lambda **_: HEAD)
    patch.setattr(training_seconds, "steps_per_second", lambda *_, **__: 1e7)
    patch.setattr(training_seconds, "delivery_seconds", lambda *_: 1e-3)
