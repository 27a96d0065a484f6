"""Full fine-tuning as the optimiser plans it where there is no drive: state rests in memory, and no log is charged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload_rt._engine import Engine
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE
from offload_rt.plans import planning_training
from offload_rt.tiering.resting import splits_of
from planners.plans.placement import Tier, UpdateMode
from planners.problems.hardware import Hardware
from tests import test_planning_training, test_replanning
from tests.full_parity import NORMS, OPTIMIZERS, build, one_loss, run_engine, run_plain, state_of, training_of
from tests.parity import BATCH_SIZE, SEQ_LEN
from tests.test_full_parity import ieee_square_root as ieee_square_root
from tests.test_planning_training import BUDGETS, KIB, OPTIONS, case_of, seconds_of, tiers_of
from tests.test_replanning import ASKED_UNTIL, CHANGED_IN, Run, without_clocks
from tests.tiny_training import differences

CLIPPED = replace(BUDGETS["all in memory"], clipping="rarely")
CASE = case_of(CLIPPED)


def machine(device_kib: int, host_kib: int, rate: float = 2e9) -> Hardware:
    """Of the links' rate both ways, and with no drive at all."""
    found = test_planning_training.machine(device_kib, host_kib)
    links = replace(found.links, host_to_device_bytes_per_second=rate, device_to_host_bytes_per_second=rate)
    return replace(found, links=links, drives=())


@pytest.fixture(autouse=True)
def unmeasured_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_training, "measured_seconds", lambda workload, *_: seconds_of(workload))


def engine(**arguments: Any) -> Engine:
    return Engine(
        build(CASE), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, max_grad_norm=NORMS[CLIPPED.clipping],
        optimizer=OPTIMIZERS[CASE.optimizer], options=OPTIONS, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device_kib", "host_kib", "rate", "weights"),
    [
        pytest.param(700, 4096, 2e9, Tier.HOST, id="weights and state in HOST"),
        pytest.param(1000, 4096, 2e6, Tier.DEVICE, id="weights in DEVICE, state in HOST", marks=pytest.mark.full),
        pytest.param(4000, 0, 2e9, Tier.DEVICE, id="one tier", marks=pytest.mark.full),
    ],
)
def test_an_optimised_plan_has_the_bits_of_the_rules_and_of_plain_pytorch(
    device_kib: int, host_kib: int, rate: float, weights: Tier, tmp_path: Path
) -> None:
    hardware, expected = machine(device_kib, host_kib, rate), run_plain(CASE)
    memory = Tier.HOST if host_kib else Tier.DEVICE
    with engine(device_memory="64MiB", host_memory="64MiB" if host_kib else None) as ruled:
        by_rule = run_engine(CASE, ruled)
        assert ruled.plan.planner == "fixed streaming rule"
    file = tmp_path / "plan.json"
    with engine(plan="optimise", emulate=hardware) as run:
        plan = run.plan
        assert plan.planner == "optimiser" and plan.update_mode is UpdateMode.AFTER
        assert tiers_of(plan) == ((weights,), (memory,))
        assert plan.state is not None and plan.state.is_all_in_memory(run._runtime.made_of.problem.training)
        assert plan.predicted_bytes(Tier.NVME) == 0
        found = run_engine(CASE, run)
        throttle = run._runtime.links.throttle
        assert throttle is not None
        before = throttle.moved_bytes()
        run.backward(one_loss(run, 0, 0))
        run.step()
        after, report = throttle.moved_bytes(), run.report()
        file.write_text(plan.to_json())
    for step, (plain, rule, got) in enumerate(zip(expected, by_rule, found, strict=True), 1):
        assert [key for key in got if not got[key].equal(rule[key])] == [], f"step {step}"
        wrong = [key for key in got if not key.startswith("gradient") and not got[key].equal(plain[key])]
        assert wrong == [], f"step {step}"
    assert report["bytes_written"] == report["bytes_read"] == 0
    for resource in (HOST_TO_DEVICE, DEVICE_TO_HOST):
        num_bytes = after.get(resource, 0) - before.get(resource, 0)
        assert num_bytes == pytest.approx(plan.predicted["busy_seconds"][resource] * rate, abs=1), resource
    assert report["memory"]["device"] <= device_kib * KIB and report["memory"]["host"] <= host_kib * KIB
    with engine(plan=file, emulate=hardware) as again:
        assert again.plan == plan


def test_a_link_that_drifts_is_asked_about_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It becomes slow: weights that came over it rest in DEVICE memory from then on, and no number changes."""
    without_clocks(monkeypatch)
    rate = 2e8
    monkeypatch.setattr(test_replanning, "RATE", rate)
    hardware, last = machine(900, 4096, rate), CHANGED_IN

    def slow_links(step: int) -> dict[str, float]:
        return dict.fromkeys((HOST_TO_DEVICE, DEVICE_TO_HOST), 10.0) if step else {}

    def started(factors: Callable[[int], dict[str, float]], **plan: Any) -> Run:
        given = {"model": build(CASE), "bits": None, "nvme": None, "options": OPTIONS, "emulate": hardware}
        return Run(tmp_path, factors, **given, **plan)

    with started(slow_links) as run:
        workload = run.engine._runtime.made_of.workload
        first = run.train(ASKED_UNTIL).engine.plan
        assert first == run.first_plan
        run.train(last)
        (decision,) = run.decisions
        assert decision["result"] == "changed", decision["why"]
        assert decision["step"] == ASKED_UNTIL and f"{HOST_TO_DEVICE} takes 10.00 times" in decision["because"]
        assert decision["seconds_after"] < decision["seconds_before"]
        other = run.engine.plan
        sizes = [sum(split.device_bytes for split in splits_of(p, workload).values()) for p in (first, other)]
        assert other.planner == "optimiser" and sizes[0] < sizes[1]
        found = state_of(training_of(run.engine))
    with started(lambda step: {}, plan=first) as steady:
        steady.train(last)
        assert steady.engine.plan == first and differences(found, state_of(training_of(steady.engine))) == []
    assert [step[0] for step in run.trace] == [step[0] for step in steady.trace], "losses"
