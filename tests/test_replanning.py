"""A plan made again while training: what leads to one and what does not, and that no number changes.

step     1 2 | 3 4 5 6    | 7 8   | 9 ..
         warm| one window | asked | the other plan, where it is worth it, from the forward on
"""

import gc
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError, StorageError
from offload_rt.memory import mapped
from offload_rt.meter import COMPUTE, DEVICE_UPDATE, SSD_READ, SSD_WRITE, Reading
from offload_rt.plans import asked, planning
from offload_rt.plans.asked import Asked, measured
from offload_rt.plans.cuts import same_cuts
from offload_rt.profiling import calibrate
from offload_rt.running import rehearsal, replanning
from offload_rt.running.drift import MARGIN, has_drifted
from offload_rt.running.steps import WARM_STEPS, StepReading
from offload_rt.transfers.throttle import Throttle
from offload_rt.wiring import assembly, runtime_assembly
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import PlanInfeasible, format_bytes
from planners.optimiser.mip import plan_optimal
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.plan import Tier
from planners.plans.vocabulary import HeadTiles
from planners.problems.hardware import Drive
from planners.problems.measured import KeptPass, MeasuredSeconds
from planners.simulator.division import divided
from planners.simulator.simulate import simulate
from tests.conftest import build_lora, language_batch
from tests.parity import BATCH_SIZE, SEQ_LEN
from tests.test_planning import SECONDS as HEAD_SECONDS
from tests.test_planning import machine, question

ROOT = Path(__file__).resolve().parents[1]
KIB, MIB = 1 << 10, 1 << 20
RATE = 2e6
SLOW = 3.0
SECONDS = MeasuredSeconds(
    forward=0.01, backward=0.02, kept=KeptPass(forward=0.01, backward=0.01, saved_bytes=20000)
)  # fmt: skip
WINDOW_STEPS, ADOPT_STEPS = 4, 2
"""Fewer than a real run's, so that these are fast."""
FOUND_AT = WARM_STEPS + WINDOW_STEPS
ASKED_UNTIL = FOUND_AT + ADOPT_STEPS
CHANGED_IN = ASKED_UNTIL + 1
"""The step whose forward begins with the change."""


def drives(rate=RATE):
    return (Drive(capacity_bytes=1 << 30, read_bytes_per_second=rate, write_bytes_per_second=rate),)


@pytest.fixture(scope="module")
def hardware(tmp_path_factory):
    """A machine whose best plan is another one, and a good deal faster, where its drive is three times slower."""
    device = 4 * MIB
    while True:
        found = replace(machine(device, 0), drives=drives())
        _, _, problem = question(build_lora(), tmp_path_factory.mktemp("drive"), found, 4, SECONDS)
        plan = plan_optimal(problem)
        slow = measured(problem, {SSD_READ: SLOW, SSD_WRITE: SLOW})
        if simulate(divided(slow, plan), plan).step_seconds > 1.2 * plan_optimal(slow).predicted["step_seconds"]:
            return found
        taken = plan.predicted_bytes(Tier.DEVICE) + problem.hardware.device.reserve_bytes
        device = min(device, taken) - plan.classes[0].weights.total_bytes // 4


@pytest.fixture(autouse=True)
def no_clocks(monkeypatch):
    without_clocks(monkeypatch)


def without_clocks(monkeypatch):
    """Seconds that nobody measured, and links on a clock that only sleeping moves."""
    slept = [0.0]

    def sleep(seconds):
        slept[0] += seconds

    monkeypatch.setattr(replanning, "WINDOW_STEPS", WINDOW_STEPS)
    monkeypatch.setattr(replanning, "ADOPT_STEPS", ADOPT_STEPS)
    monkeypatch.setattr(rehearsal, "ROOM", 0)  # of nothing: these budgets are for weights
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: SECONDS)
    monkeypatch.setattr(planning, "profile_head", lambda **_: HEAD_SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: 1e9)
    monkeypatch.setattr(assembly, "Throttle", lambda of: Throttle(of, clock=lambda: slept[0], sleep=sleep))


@pytest.fixture(scope="module")
def undisturbed(hardware, tmp_path_factory):
    """A run whose plan is never made again, of as many steps as any other here."""
    with pytest.MonkeyPatch.context() as patches:
        without_clocks(patches)
        folder = tmp_path_factory.mktemp("undisturbed")
        with Run(folder, emulate=hardware, options=RuntimeOptions(replan=False)) as run:
            run.train(ASKED_UNTIL + WINDOW_STEPS + 3)
            assert run.decisions == [] and run.engine.plan == run.first_plan
            assert run.engine.report()["replanning"]["off"] == "switched off"
    return run


class Position:
    """Where a run is in its data; the next batch is drawn before the forward that takes it."""

    def __init__(self):
        self.number = 0

    def draw(self):
        self.number += 1
        return language_batch(self.number, BATCH_SIZE, SEQ_LEN)

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Run:
    """An engine whose meter shows, for the bytes that were really moved, the seconds that `factors` say: by resource,
    how many times as long as planned first, and in each step.
    """

    def __init__(self, folder, factors=lambda step: {}, model=None, **arguments):
        folder.mkdir(exist_ok=True)
        arguments = {"nvme": folder, "plan": "optimise", "lr": 1e-2, "max_grad_norm": 0.05, "bits": 4, **arguments}
        arguments.setdefault("options", RuntimeOptions(fill=False))
        self.engine = Engine(
            build_lora(dropout=0.1) if model is None else model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, device="cpu",
            **arguments,
        )  # fmt: skip
        self.position = Position()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.engine.optimizer, lambda step: 1 / (1 + step))
        self.engine.track("position", self.position)
        self.engine.track("scheduler", self.scheduler)
        self.first_plan = self.engine.plan
        self.trace = []
        expected = dict(self.first_plan.predicted.get("busy_seconds", {}))
        meter = self.engine.step_meter

        def finish(*_):
            moved = dict(meter._read().since(meter._before).moved_bytes)
            now = factors(self.engine.step_number)
            busy = {name: size / RATE * now.get(name, 1.0) for name, size in moved.items() if size}
            replanner = self.engine._changes.replanner
            for name in (COMPUTE, DEVICE_UPDATE):
                busy[name] = replanner._expected.get(name, expected.get(name, 0.0)) * now.get(name, 1.0)
            meter.num_steps += 1
            if meter.num_steps > WARM_STEPS:
                meter.steps.append(
                    StepReading(
                        seconds=1.0, outside_seconds=0.0, resources=Reading(busy_seconds=busy, moved_bytes=moved)
                    )
                )
            meter._restart()

        meter._finish = finish

    def train(self, until):
        while self.engine.step_number < until:
            loss = self.engine(**self.position.draw()).loss
            self.engine.backward(loss)
            self.engine.step()
            self.scheduler.step()
            self.trace.append([loss.detach(), *(p.detach().clone() for p in self.engine.trainable.values())])
        return self

    def loop(self, until):
        """As `train`, by a loop that knows torch alone."""
        optimizer, parameters = self.engine.optimizer, self.engine.trainable.values()
        while self.engine.step_number < until:
            loss = self.engine.model(**self.position.draw()).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(parameters), self.engine.config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            self.scheduler.step()
            self.trace.append([loss.detach(), *(p.detach().clone() for p in parameters)])
        return self

    @property
    def decisions(self):
        return self.engine.report()["replanning"]["decisions"]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.engine.close()


def equal(run, other, first=0):
    """Whether the steps of `run` are those of `other` from number `first` on, to the bit."""
    return all(
        torch.equal(one, another)
        for step, beside in zip(run.trace, other.trace[first : first + len(run.trace)], strict=True)
        for one, another in zip(step, beside, strict=True)
    )


def slow_drive(step):
    return {SSD_READ: SLOW, SSD_WRITE: SLOW}


def test_a_drive_three_times_slower_changes_the_plan_and_no_number(hardware, undisturbed, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="offload_rt")
    last = ASKED_UNTIL + 6
    with Run(tmp_path / "nvme", slow_drive, emulate=hardware) as run:
        run.train(ASKED_UNTIL)
        assert run.engine.plan == run.first_plan and run.decisions == []
        before = run.engine.report()
        gc.disable()  # memory comes back without it
        try:
            watch = mapped.Watch()
            accounts = {id(account) for account in run.engine._runtime.tiers.accounts.values()}
            arena_bytes = run.engine._runtime.tiers.account(Tier.DEVICE).arena_bytes
            run.train(CHANGED_IN)
            changes = [
                (id(m.account) in accounts, m.num_bytes, is_mapped) for m, is_mapped in watch.changes if m.num_bytes
            ]
            watch.close()
        finally:
            gc.enable()
        (decision,) = run.decisions
        assert decision["result"] == "changed" and decision["step"] == ASKED_UNTIL
        assert decision["seconds_after"] < decision["seconds_before"] and decision["change_seconds"] >= 0
        assert run.engine.plan != run.first_plan and run.engine.plan.planner == "optimiser"
        given_back = [num_bytes for ours, num_bytes, is_mapped in changes if ours and not is_mapped]
        assert sum(given_back) == arena_bytes, "all of it, before the next plan's memory"
        assert not any(not ours and is_mapped for ours, _, is_mapped in changes[: len(given_back)])
        run.train(last)
        after = run.engine.report()
        assert equal(run, undisturbed), "to the bit"
        assert after["bytes_read"] > before["bytes_read"] > 0, "what the change read counts"
        assert after["recomputes"] >= before["recomputes"]
        assert after["step"] == last and after["peaks"]["over"] == []
        run.engine.save_checkpoint(tmp_path / "saved")
    assert f"step {ASKED_UNTIL}: ssd_read takes 3.00 times as long as planned" in caplog.text
    assert "the plan is changed (" in caplog.text


@pytest.mark.full
def test_a_loop_that_steps_by_the_optimizer_has_its_plan_made_again_at_the_same_step(hardware, undisturbed, tmp_path):
    last = CHANGED_IN + 1
    with Run(tmp_path / "nvme", slow_drive, emulate=hardware) as run:
        run.loop(ASKED_UNTIL)
        assert run.engine.plan == run.first_plan
        run.loop(last)
        assert [(each["result"], each["step"]) for each in run.decisions] == [("changed", ASKED_UNTIL)]
        assert run.engine.plan != run.first_plan and equal(run, undisturbed)


def test_what_the_options_fix_stays_fixed_where_a_plan_is_made_again(hardware, tmp_path):
    """By drift, and by a rehearsal; the optimiser would have more slots."""
    with Run(tmp_path / "run", emulate=hardware, options=RuntimeOptions(num_slots=1)) as run:
        made_of = run.engine._runtime.made_of
        free, _ = made_of.asked.best(made_of.workload, made_of.problem)
        drifted = replanning._answer(made_of, made_of.asked, made_of.problem, run.first_plan, 0)
        rehearsed = rehearsal._planned_again(run.engine._runtime, 1.0, 0)
        plans = [run.first_plan, drifted.plan, rehearsed.plan, free]
        slots = [ring.num_slots for plan in plans for ring in plan.rings if ring.name == "layers"]
    assert slots == [1, 1, 1, 2]


def test_noise_and_outliers_change_nothing(hardware, tmp_path):
    def noisy(step):
        factor = (0.82, 1.0, 1.24, 0.9)[step % 4] if step % 5 else 9.0
        return {SSD_READ: factor, COMPUTE: 1 / factor, DEVICE_UPDATE: 50.0}  # of what takes next to nothing

    with Run(tmp_path / "nvme", noisy, emulate=hardware) as run:
        run.train(FOUND_AT + 2 * WINDOW_STEPS)
        assert (
            run.decisions == []
            and run.engine._changes.replanner._under_way is None
            and run.engine.plan == run.first_plan
        )
    assert has_drifted([1.01 + MARGIN] * 3) and has_drifted([0.7] * 3)
    assert not has_drifted([2.0, 1.2, 2.0]) and not has_drifted([2.0, 0.5]) and not has_drifted([1.2, 0.9])


def test_it_is_not_changed_twice_within_so_many_steps(hardware, tmp_path, monkeypatch):
    apart = 2 * WINDOW_STEPS
    monkeypatch.setattr(replanning, "APART_STEPS", apart)

    def swings(step):
        return slow_drive(step) if step <= ASKED_UNTIL else {COMPUTE: 2.0}

    with Run(tmp_path / "nvme", swings, emulate=hardware) as run:
        run.train(CHANGED_IN)
        (first,) = run.decisions
        run.train(ASKED_UNTIL + apart - 1)
        assert run.decisions == [first] and run.engine._changes.replanner._under_way is None
        run.train(ASKED_UNTIL + 2 * apart)
        second = run.decisions[1]
        assert second["step"] >= ASKED_UNTIL + apart and second["because"].startswith("compute takes 2.00 times")


def test_what_was_found_once_is_not_found_again(hardware, tmp_path, monkeypatch):
    monkeypatch.setattr(replanning, "LEAST_GAIN", 1.0)
    with Run(tmp_path / "nvme", slow_drive, emulate=hardware) as run:
        run.train(ASKED_UNTIL + WINDOW_STEPS + ADOPT_STEPS)  # when the next answer would have come
        (kept,) = run.decisions
        assert kept["result"] == "kept" and "faster" in kept["why"] and run.engine.plan == run.first_plan


def test_a_change_that_costs_more_than_it_gains_is_left(hardware, tmp_path, monkeypatch):
    monkeypatch.setattr(Asked, "change_seconds", lambda *_: 1e9)
    with Run(tmp_path / "nvme", slow_drive, emulate=hardware) as run:
        (kept,) = run.train(ASKED_UNTIL).decisions
        assert "does not pay for itself" in kept["why"] and run.engine.plan == run.first_plan


def test_where_there_is_no_other_plan_the_one_that_runs_stays(hardware, tmp_path, monkeypatch):
    def failed(problem, *, freedoms=None):
        raise RuntimeError("a solver's own")

    def infeasible(problem, *, freedoms=None):
        raise PlanInfeasible(tier="device", phase="step", need_bytes=2, have_bytes=1, ways_out=[])

    def cut_otherwise(*answer):
        return replace(planning.lowered(*answer), layer_major=True)

    with Run(tmp_path / "nvme", slow_drive, emulate=hardware) as run:
        monkeypatch.setattr(planning, "plan_optimal", failed)
        (kept,) = run.train(CHANGED_IN).decisions
        assert kept["result"] == "kept" and "the optimiser failed" in kept["why"]
        assert run.engine.plan == run.first_plan
        made_of = run.engine._runtime.made_of
        monkeypatch.setattr(asked, "lowered", cut_otherwise)
        for ask, why in ((infeasible, "no plan fits"), (plan_optimal, "cuts otherwise")):
            monkeypatch.setattr(planning, "plan_optimal", ask)
            answer = replanning._answer(made_of, made_of.asked, made_of.problem, run.first_plan, 0)
            assert answer.plan is None and why in answer.why


def test_a_change_that_fails_goes_back_and_trains_on(hardware, undisturbed, tmp_path, monkeypatch):
    last = ASKED_UNTIL + 3
    with Run(tmp_path / "nvme", slow_drive, emulate=hardware) as run:
        run.train(ASKED_UNTIL)
        attach, failures = runtime_assembly.RuntimeAssembly._attach, []

        def broken(self, *arguments):
            if not failures:
                failures.append(self.plan)
                raise StorageError("the drive fell off", path="/dev/null", errno=5)
            return attach(self, *arguments)

        monkeypatch.setattr(runtime_assembly.RuntimeAssembly, "_attach", broken)
        run.train(last)
        (kept,) = run.decisions
        assert failures and failures[0] != run.first_plan, "it was tried"
        assert kept["result"] == "kept" and "the drive fell off" in kept["why"]
        assert run.engine.plan == run.first_plan and equal(run, undisturbed)


def test_a_late_answer_is_waited_for_at_the_same_step(hardware, tmp_path, monkeypatch):
    def late(problem, *, freedoms=None):
        time.sleep(0.3)
        return plan_optimal(problem)

    with Run(tmp_path / "nvme", slow_drive, emulate=hardware) as run:
        monkeypatch.setattr(planning, "plan_optimal", late)
        (decision,) = run.train(CHANGED_IN).decisions
        assert decision["step"] == ASKED_UNTIL and decision["result"] == "changed"
    with Run(tmp_path / "nvme", slow_drive, emulate=hardware) as closed_meanwhile:
        closed_meanwhile.train(FOUND_AT)
        thread = closed_meanwhile.engine._changes.replanner._under_way.thread
    assert not thread.is_alive(), "close waits for it"


def test_shorter_sequences_are_computing_that_is_faster_and_longer_ones_are_refused(hardware, tmp_path):
    with Run(tmp_path / "nvme", lambda step: {COMPUTE: 0.3}, emulate=hardware) as run:
        (decision,) = run.train(CHANGED_IN).decisions
        assert decision["because"] == "compute takes 0.30 times as long as planned"
        longer = torch.zeros(1, SEQ_LEN + 1, dtype=torch.long)
        with pytest.raises(ConfigError, match=f"seq_len: a batch of {SEQ_LEN + 1} tokens a row came"):
            run.engine(input_ids=longer, labels=longer)


def test_memory_that_others_take_is_given_up(hardware, undisturbed, tmp_path, monkeypatch):
    """The budget was what was free. Then less is left than the plan needs."""
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "nvme"
    folder.mkdir()
    known = calibrate.identity("cpu", (folder.resolve(),))
    calibrate.keep(calibrate.cache_name(known), known, calibrate.Measurement(hardware, {}, 1.0))
    last = ASKED_UNTIL + WINDOW_STEPS + 3
    with Run(folder) as run:
        run.train(FOUND_AT - 1)
        used = run.engine._runtime.tiers.account(Tier.DEVICE).used_bytes
        monkeypatch.setattr(replanning, "free_memory_bytes", lambda: 0)
        short = used // 16 // KIB * KIB
        taken = run.engine._base.resident_bytes + used - short
        monkeypatch.setattr(replanning, "resident_bytes", lambda: taken)
        run.train(FOUND_AT)
        assert run.engine._changes.replanner._under_way is None, "it may be back at the end of the next window"
        run.train(last)
        (decision,) = run.decisions
        assert decision["step"] == ASKED_UNTIL + WINDOW_STEPS
        assert decision["because"] == f"memory is short by {format_bytes(short)}"
        assert decision["result"] == "changed", decision["why"]
        assert run.engine._runtime.tiers.account(Tier.DEVICE).used_bytes <= used - short
    assert equal(run, undisturbed)


def test_what_cannot_change_over_says_so(hardware, tmp_path):
    def off(**arguments):
        with Run(tmp_path / "nvme", **arguments) as run:
            return run.engine.report()["replanning"]["off"]

    assert off(plan="auto") is None, "the fixed rule's, which answers where memory is short"
    with Run(tmp_path / "nvme", emulate=hardware) as run:
        assert run.engine.report()["replanning"]["off"] is None
        plan = run.first_plan
    assert off(plan=plan, emulate=hardware) == "the plan was given"


KILLED = """
import os, sys
from pathlib import Path
import pytest
from offload_rt.wiring.runtime_assembly import RuntimeAssembly
from planners.problems.hardware import load_hardware
from tests import test_replanning as here
here.without_clocks(pytest.MonkeyPatch())
folder, hardware = map(Path, sys.argv[1:])
run = here.Run(folder, here.slow_drive, emulate=load_hardware(hardware), commit_every=1).train(here.ASKED_UNTIL)
RuntimeAssembly._attach = lambda *arguments: os._exit(42)
run.train(here.CHANGED_IN)
"""


@pytest.mark.full  # a process that imports everything; test_full_kill kills changes, too
def test_a_run_killed_in_the_middle_of_a_change_goes_on_from_its_last_step(hardware, undisturbed, tmp_path):
    folder, machine_file = tmp_path / "nvme", tmp_path / "machine.json"
    machine_file.write_text(hardware.to_json())
    program = [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(machine_file)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 42, done.stderr
    with Run(folder, emulate=hardware, commit_every=1) as run:
        run.engine.load_checkpoint(run.engine.commit_folder)
        assert run.engine.step_number == ASKED_UNTIL, "the change is behind the commit that was due"
        assert run.scheduler.last_epoch == run.position.number == ASKED_UNTIL
        run.train(ASKED_UNTIL + 2)
    assert equal(run, undisturbed, first=ASKED_UNTIL)


def test_plans_with_other_chunks_give_other_numbers(hardware, tmp_path):
    with Run(tmp_path / "nvme", emulate=hardware) as run:
        plan, workload = run.first_plan, run.engine._runtime.made_of.workload

    def same(one, other):
        return same_cuts(one, other, workload)

    def by_chunks(*lengths):
        policy = ActivationPolicy(chunks=tuple(Chunk(num_tokens=length, action=Action.RECOMPUTE) for length in lengths))
        return replace(plan, activations={draft.name: policy for draft in workload.layers})

    tokens = workload.config.seq_len
    assert same(plan, replace(plan, resident=())) and same(plan, by_chunks(tokens))
    assert not same(plan, by_chunks(tokens // 2)) and same(by_chunks(tokens // 2), by_chunks(tokens // 2, tokens // 2))
    assert not same(by_chunks(tokens // 2), by_chunks(tokens // 4)), "one length that goes on to the end"
    assert not same(by_chunks(tokens // 2), by_chunks(tokens // 2, tokens // 4)), "as long at most"
    assert not same(plan, replace(plan, head_chunk_tokens=3))
    tiles = HeadTiles(block="head", rest=Tier.HOST, tile_rows=8, tile_bytes=4 * KIB, product_bytes=0)
    tiled = replace(plan, head_tiles=tiles)
    assert same(tiled, replace(plan, head_tiles=replace(tiles, rest=Tier.NVME, num_slots=3)))
    assert not same(tiled, replace(plan, head_tiles=replace(tiles, tile_rows=4))) and not same(tiled, plan)


def test_a_plan_for_shorter_sequences_has_the_memory_of_the_longest(hardware, tmp_path):
    """Batches of a quarter of seq_len come, whose layers take less than planned; then the longest one comes again."""

    def shorter(self):
        self.number += 1
        whole = language_batch(self.number, BATCH_SIZE, SEQ_LEN)
        return {name: value[:, : SEQ_LEN // 4] for name, value in whole.items()}

    def faster(step):
        return {COMPUTE: 0.25}

    runs = []
    for name, factors, replan in (("nvme", lambda step: {}, False), ("other", faster, True)):
        with Run(tmp_path / name, factors, emulate=hardware, options=RuntimeOptions(replan=replan)) as run:
            runs.append(run)
            draw = run.position.draw
            run.position.draw = lambda of=run.position: shorter(of)
            run.train(CHANGED_IN)
            run.position.draw = draw
            run.train(CHANGED_IN + 1)
            assert run.engine.report()["peaks"]["over"] == []
            used = run.engine._runtime.tiers.account(Tier.DEVICE).used_bytes
            assert used <= run.engine.config.device_memory_bytes
    undisturbed, run = runs
    (decision,) = run.engine._changes.replanner.decisions
    assert decision.because == "compute takes 0.25 times as long as planned"
    assert equal(run, undisturbed)
