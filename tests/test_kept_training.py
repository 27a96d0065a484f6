"""Layers that train and compute nothing again: what they save, kept or put away, through all that a loop does.

The gate (`test_full_parity`) has their bits for each family, optimizer and place. Here are layers called twice, plan
files, forwards that end in the middle, and backward passes that come too late.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.errors import IntegrityError
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.tokenwise.tiles import Places
from planners.plans.activations import Action, ActivationPolicy, whole_batch
from planners.plans.plan import Plan, Tier
from tests.tiny_training import Made, Plain, accumulated_step, batch, differences, engine, model, train

EACH_WAY: dict[str, ActivationPolicy] = {
    "layers.0": whole_batch(Action.SWAP, Tier.HOST),
    "layers.1": whole_batch(Action.SWAP, Tier.NVME),
    "layers.2": whole_batch(Action.KEEP),
}


def made(folder: Path, built: torch.nn.Module | None = None, **given: Any) -> Made:
    options = {"rest": Tier.NVME, "activations": EACH_WAY, **given.pop("options", {})}
    return engine(model() if built is None else built, "", folder, nvme=folder, host_memory="64MiB", options=options,
                  **given)  # fmt: skip


def places_of(run: Made) -> Places:
    tokenwise = run._runtime.tokenwise
    assert tokenwise is not None
    return tokenwise.places


def put_away(run: Made) -> dict[Tier, int]:
    """Bytes that wait in HOST and on the drive now."""
    scratch, in_host = run._runtime.scratch, places_of(run).swapped[Tier.HOST]
    assert scratch is not None
    scratch.take_back()
    free = sum(end - begin for begin, end in scratch._free)
    return {Tier.HOST: in_host._arena.held_bytes(), Tier.NVME: scratch.capacity_bytes - free}  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", [[0, 1, 0, 2], [2, 2, 0]])
def test_layers_that_are_called_twice_or_not_at_all_by_a_tied_model(order: list[int], tmp_path: Path) -> None:
    def built() -> torch.nn.Module:
        found = model(tied=True)
        found.order = order
        return found

    plain = Plain(built(), max_grad_norm=1.0)
    with made(tmp_path, built(), accumulation_steps=2, max_grad_norm=1.0) as run:
        for number in range(3):
            losses = [
                accumulated_step(each, torch.optim.lr_scheduler.ConstantLR(each.optimizer, 1.0), number, 2)
                for each in (plain, run)
            ]
            assert losses[0] == losses[1]
        assert differences(plain.state(), run.state()) == []
        report = run.report()
        assert report["recomputes"] == 0 and report["tokenwise"]["num_passes"] == 3 * 2 * len(order)


def test_a_plan_file_says_what_becomes_of_each_layer_that_trains(tmp_path: Path) -> None:
    plain = Plain(model())
    expected = train(plain, range(3))
    with made(tmp_path) as run:
        plan = replace(run.plan, activations={"layers.0": EACH_WAY["layers.0"], "layers.2": EACH_WAY["layers.2"]})
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert Plan.from_json(file.read_text()) == plan
    with made(tmp_path, plan=file, options={"activations": None, "rest": None}) as run:
        assert "activations kept or put away of 2 of 3 layers; swapped ones wait in host\n" in run.summary()
        assert train(run, range(3)) == expected and differences(plain.state(), run.state()) == []
        report = run.report()
        assert report["recomputes"] == 3 and report["tokenwise"]["num_passes"] == 2 * 3
        groups = report["tokenwise"]["bytes_by_group"]
        assert groups["chunk in host"] > 0 == groups["chunk in nvme"]


def test_a_forward_that_ends_in_the_middle_or_leads_nowhere_frees_what_waited_for_its_backward(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("broken on purpose")

    plain = Plain(model())
    expected = train(plain, range(4))
    with made(tmp_path) as run:
        assert train(run, range(2)) == expected[:2]
        handle = run.model.layers[2].register_forward_hook(fail)
        gc.collect()
        gc.disable()  # nothing may wait for it
        try:
            with AllocationMeter() as cut_off, pytest.raises(KeyError):
                run(**batch(5))
            handle.remove()
            assert put_away(run) == {Tier.HOST: 0, Tier.NVME: 0}
            with AllocationMeter() as dropped:
                loss = run(**batch(5)).loss
                waiting = put_away(run)
                del loss
            assert min(waiting.values()) > 0 and put_away(run) == {Tier.HOST: 0, Tier.NVME: 0}
        finally:
            gc.enable()
        assert cut_off.live_bytes == dropped.live_bytes == 0 < cut_off.peak_bytes
        assert train(run, range(2, 4)) == expected[2:]
        assert differences(plain.state(), run.state()) == []


def test_a_backward_pass_whose_forward_was_before_a_step_is_refused(tmp_path: Path) -> None:
    """Its gradients would be of weights that are not there any more, whatever was kept; torch looks after others."""
    built = model().requires_grad_(False)
    built.layers.requires_grad_(True)
    with made(tmp_path, built) as run:
        late = run(**batch(0)).loss
        run.backward(run(**batch(1)).loss)
        run.step()
        with pytest.raises(IntegrityError, match=r"layers\.2: this backward pass is of a forward from before"):
            run.backward(late)
        assert not list(run.gradients())
