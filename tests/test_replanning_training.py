"""A plan made again where state rests in tiers: the change is behind a commit, and no number, step or object is lost.

step      N            N + 1
    step() | scheduler | forward: commit of N, old arenas back, new ones, state from the log | ...
"""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.errors import OffloadError, StorageError
from offload_rt.layers.autograd import RecomputedLayer
from offload_rt.memory import mapped
from offload_rt.meter import CPU, SSD_READ, SSD_WRITE
from offload_rt.plans import planning_training
from offload_rt.plans.asked import Asked
from offload_rt.plans.planning_training import lowered_training
from offload_rt.profiling import calibrate
from offload_rt.running import rehearsal, replanning
from offload_rt.running.rehearsal import planned_bytes
from planners.errors import format_bytes
from planners.optimiser.mip import plan_optimal
from planners.plans.placement import UpdateMode
from planners.plans.plan import Tier
from tests import test_planning_training
from tests.changing_plans import decisions, plan_of, propose, results, with_pieces_in_memory
from tests.conftest import build_base
from tests.full_parity import state_of, training_of
from tests.killed_training import ADAPTERS, EDGES, MAX_NORM, Position, Twin, one_step, resume, scheduled
from tests.test_planning_training import BUDGETS, OPTIONS, asked, seconds_of
from tests.test_replanning import ASKED_UNTIL, FOUND_AT, WINDOW_STEPS, Run, drives, without_clocks
from tests.tiny_training import Plain, accumulated_step, adamw_of_groups, batch, differences, engine, model, train

PATHS = [
    ("in place", "BACKWARD, tight"),
    ("SPECULATIVE, split", "in place"),
    ("AFTER", "SPECULATIVE, split"),
    ("BACKWARD, split", "BACKWARD, tight"),
    ("SPECULATIVE, in parts", "from HOST"),
]
LAST = 6


def made(place: str, folder: Path, **arguments: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return engine(model(dropout=0.2), place, folder, **{"nvme": folder, **arguments})


def over(report: dict[str, Any]) -> int:
    """Bytes of arenas that exceed the plan in a step."""
    return sum(each["bytes"] for each in report["peaks"]["over"] if each["phase"] == "step")


@pytest.mark.parametrize(
    ("places", "accumulation"),
    [
        pytest.param(places, number, id=f"{' to '.join(places)}, x{number}", marks=[] if kept else pytest.mark.full)
        for index, places in enumerate(PATHS)
        for number, kept in ((1, index != 1), (2, index == 1))
    ],
)
def test_a_run_that_changes_over_has_the_bits_of_one_that_does_not(
    places: tuple[str, str], accumulation: int, tmp_path: Path
) -> None:
    """Clipped in some steps, with dropout, a scheduler and param groups, to the second plan and back."""
    twin = Plain(model(dropout=0.2), adamw_of_groups, max_grad_norm=MAX_NORM)
    expected = scheduled(twin)
    one = partial(accumulated_step, accumulation=accumulation)
    given = {"max_grad_norm": MAX_NORM, "accumulation_steps": accumulation, "optimizer": adamw_of_groups}
    with made(places[0], tmp_path / "nvme", **given) as run:
        scheduler, optimizer = scheduled(run), run.optimizer
        run.track("scheduler", scheduler)
        over_before = 0
        first = run.plan
        plans = [plan_of(run, places[1]), first]
        assert plans[0].state != first.state
        for number in range(LAST):
            assert one(run, scheduler, number) == one(twin, expected, number), number
            assert differences(run.state(), twin.state()) == [], number
            if number in (1, 3):
                over_before = over_before or over(run.report())
                propose(run, plans[number // 2])
                assert run.plan != plans[number // 2], "not before the next forward"
            if number in (2, 4):
                assert run.plan == plans[number // 2 - 1]
        report = run.report()
        assert run.optimizer is optimizer and scheduler.get_last_lr() == expected.get_last_lr()
        assert results(run) == ["changed"] * 2 and [each["step"] for each in decisions(run)] == [2, 4]
        assert run.step_number == LAST and report["training"]["num_steps"] == LAST
        assert report["training"]["num_clipped"] > 0
        assert over(report) == over_before == 0, "no phase took more than one plan's memory"


def test_the_old_plans_memory_is_back_before_the_new_one_takes_any(tmp_path: Path) -> None:
    with made("in place", tmp_path) as run:
        train(run, range(2))
        propose(run, plan_of(run, "BACKWARD, tight"))
        account = run._runtime.tiers.account(Tier.DEVICE)
        before, arena_bytes = id(account), account.arena_bytes
        gc.disable()  # memory comes back without it
        try:
            watch = mapped.Watch()
            train(run, [2])
            changes = [(id(m.account) == before, m.num_bytes, there) for m, there in watch.changes if m.num_bytes]
            watch.close()
        finally:
            gc.enable()
        given_back = [num_bytes for old, num_bytes, there in changes if old and not there]
        assert sum(given_back) == arena_bytes > 0
        assert not any(not old and there for old, _, there in changes[: len(given_back)])


def test_the_change_makes_a_commit_of_its_own_with_what_was_tracked_when_the_step_returned(tmp_path: Path) -> None:
    """Of a run that commits every third step, or never: the position in the data is not that of the next batch."""
    for name, every in (("third", 3), ("never", None)):
        folder = tmp_path / name
        with made("AFTER" if every else "in place", folder, commit_every=every) as run:
            scheduler, position = scheduled(run), Position()
            run.track("scheduler", scheduler)
            run.track("position", position)
            torch.manual_seed(1)
            one_step(run, scheduler, position)
            assert run.report()["training"]["num_commits"] == 1, "of what it begins with"
            propose(run, plan_of(run, "SPECULATIVE, split"))
            one_step(run, scheduler, position)
            assert results(run) == ["changed"] and run.report()["training"]["num_commits"] == 2
            tracked = run.committed["tracked"]
            assert run.committed["step"] == tracked["scheduler"]["last_epoch"] == tracked["position"]["number"] == 1
            assert run.committed["groups"][0]["lr"] == pytest.approx(1e-2 / 2), (
                "the scheduler's, as the next step has it"
            )


def test_it_waits_for_gradients_and_for_a_commit(tmp_path: Path) -> None:
    with made("SPECULATIVE, split", tmp_path / "nvme", accumulation_steps=2, max_grad_norm=None) as run:
        twin = Plain(model(dropout=0.2))
        assert train(run, range(2)) == train(twin, range(2))
        other = plan_of(run, "in place")
        for part in (run.model, run):  # the first one behind the engine's back
            torch.manual_seed(2)
            loss = part(**batch(2)).loss
            loss.backward()
            assert run.plan != other, "gradients wait"
            propose(run, other)
        run.step()
        for _ in range(2):
            torch.manual_seed(2)
            twin.backward(twin(**batch(2)).loss)
        twin.step()
        run.save_checkpoint(tmp_path / "saved")
        run.load_checkpoint(tmp_path / "saved")
        assert train(run, [3]) == train(twin, [3])
        assert run.plan != other and results(run) == [], "what was loaded is in no commit"
        assert train(run, [4, 5]) == train(twin, [4, 5])
        assert run.plan == other and results(run) == ["changed"]
        assert differences(run.state(), twin.state()) == []


def test_while_somebody_keeps_a_loss_no_step_is_committed_for_it_and_the_log_says_once_that_it_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with made("in place", tmp_path, commit_every=100) as run, caplog.at_level(logging.WARNING, "offload_rt"):
        train(run, [0])
        other, commits = plan_of(run, "BACKWARD, tight"), run.report()["training"]["num_commits"]
        kept = run(**batch(9)).loss
        propose(run, other, commits=False)
        train(run, range(1, 2 * replanning.WAIT_STEPS + 2))
        assert run.plan != other and run.report()["training"]["num_commits"] == commits
        (said,) = [record.getMessage() for record in caplog.records]
        num = replanning.WAIT_STEPS
        assert said.startswith(f"step {1 + num}: a plan that was made again waits, since step 2, for the backward pass")
        del kept
        train(run, [20])
        assert run.plan != other, "behind a commit"
        train(run, [21])
        assert run.plan == other and results(run) == ["changed"]


def test_steps_left_out_before_a_change_count_after_it(tmp_path: Path) -> None:
    with made("SPECULATIVE, split", tmp_path) as run:
        train(run, range(2))

        def left_out() -> None:
            loss = run(**batch(2)).loss
            run.backward(loss + (loss * 0).sqrt())
            run.step()

        for number in range(4):
            left_out()
            if number == 1:
                propose(run, plan_of(run, "in place"))
        assert results(run) == ["changed"] and run.report()["training"]["num_skipped"] == 4
        with pytest.raises(OffloadError, match="5 steps in a row"):
            left_out()


@pytest.mark.parametrize("where", ["its state is read", "a hook is in"])
def test_a_change_that_fails_goes_back_and_loses_no_step(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = Plain(model(dropout=0.2))
    with made("SPECULATIVE, split", tmp_path, max_grad_norm=None) as run:
        first, failures = run.plan, []
        losses = train(run, range(2))
        propose(run, plan_of(run, "in place"))
        of, name = {
            "its state is read": (type(run._training), "begin_again"), "a hook is in": (RecomputedLayer, "attach"),
        }[where]  # fmt: skip
        whole = getattr(of, name)

        def fails(self: Any, *arguments: Any, **named: Any) -> None:
            whole(self, *arguments, **named)
            if not failures:
                failures.append(self)
                raise StorageError("the drive fell off", path="/dev/null", errno=5)

        monkeypatch.setattr(of, name, fails)
        watch, mapped_now, most = mapped.Watch(), set(), 0
        losses += train(run, range(2, 5))
        for mapping, there in watch.changes:
            if mapping.account is not None:
                (mapped_now.add if there else mapped_now.discard)(mapping)
                most = max(most, len({id(each.account) for each in mapped_now}))
        watch.close()
        assert most == 1, "the memory of the plan that failed was there beside that of the one before"
        assert failures and run.plan == first and results(run) == ["kept"]
        assert "the drive fell off" in decisions(run)[0]["why"]
        assert losses == train(twin, range(5)) and differences(run.state(), twin.state()) == []


def test_a_commit_that_fails_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made("SPECULATIVE, split", tmp_path) as run:
        train(run, range(2))
        plan = run.plan
        propose(run, plan_of(run, "in place"))

        def full(*_: Any) -> None:
            raise StorageError("no room", path="/dev/null", errno=28)

        monkeypatch.setattr(run._training.home.log, "commit", full)
        with pytest.raises(StorageError, match="no room"):
            train(run, [2])
        assert run.plan == plan and results(run) == []
        with pytest.raises(OffloadError, match="the commit of step 2 failed"):
            train(run, [2])


def test_what_was_stepped_behind_backward_goes_on_being(tmp_path: Path) -> None:
    with made("AFTER", tmp_path, commit_every=None) as run:
        train(run, range(2))
        propose(run, plan_of(run, "BACKWARD"))
        train(run, range(2, 5))
        assert run.plan.update_mode is UpdateMode.BACKWARD
        assert run.report()["training"]["num_ahead_of_norm"] > 0


@pytest.mark.parametrize("place", [ADAPTERS, EDGES])
def test_adapters_whose_state_rests_in_tiers_change_over(place: str, tmp_path: Path) -> None:
    """By rows and tiles, too: then the twin is a run by tiles that never changes, since they are a cut."""
    folder = tmp_path / "nvme"
    folder.mkdir()
    (tmp_path / "twin").mkdir()
    with resume(tmp_path / "twin", EDGES)[0] if place == EDGES else nullcontext() as whole, ExitStack() as stack:
        twin = Twin(place, whole)
        run, scheduler, position = resume(folder, place)
        stack.enter_context(run)
        plan = run.plan
        other = with_pieces_in_memory(run, 2)
        for step in range(6):
            twin.reach(step + 1)
            assert one_step(run, scheduler, position) == twin.losses[step]
            assert differences(run.state(), twin.states[step + 1]) == []
            if step in (1, 3):
                propose(run, other if step == 1 else plan)
        assert results(run) == ["changed", "changed"] and run.plan == plan
        if whole is not None:
            found, expected = run.report(), whole.report()
            for counted in ("num_rows", "num_pieces", "num_requests", "page_bytes"):
                assert found["lookups"][counted] == expected["lookups"][counted] > 0
            assert found["recomputes"] == expected["recomputes"]


@pytest.mark.parametrize("how", ["optimise", "auto"])
def test_memory_that_others_take_is_given_up_by_state(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was in memory. The optimiser, or the fixed rule, puts some of it on the drive, and commits begin."""
    without_clocks(monkeypatch)
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning_training, "measured_seconds", lambda workload, *_: seconds_of(workload))
    last = ASKED_UNTIL + WINDOW_STEPS + 3

    def started(name: str, **arguments: Any) -> Run:
        folder = tmp_path / name
        folder.mkdir()
        known = calibrate.identity("cpu", (folder.resolve(),))
        machine = test_planning_training.machine(1 << 20, 0)
        calibrate.keep(calibrate.cache_name(known), known, calibrate.Measurement(machine, {}, 1.0))
        torch.manual_seed(0)
        full = build_base("llama", torch.float32).requires_grad_(True).train()
        return Run(folder, model=full, bits=None, plan=how, **arguments)

    with started("undisturbed", options=replace(OPTIONS, replan=False)) as undisturbed:
        undisturbed.train(last)
        expected = state_of(training_of(undisturbed.engine))
    with started("run", options=OPTIONS) as run:
        first = run.first_plan
        sizes = run.engine._runtime.made_of.problem.training
        assert first.state.is_all_in_memory(sizes) and run.engine.report()["replanning"]["off"] is None
        run.train(FOUND_AT - 1)
        used = run.engine._runtime.tiers.account(Tier.DEVICE).used_bytes
        short, made_of = used // 16, run.engine._runtime.made_of
        while how == "auto" and made_of.plan_again(
            replace(made_of.problem, device_capacity_bytes=used - short)
        ).state.is_all_in_memory(sizes):  # the rule gives up freed memory first
            short += used // 16
        taken = run.engine._base.resident_bytes + used - short
        monkeypatch.setattr(replanning, "free_memory_bytes", lambda: 0)
        monkeypatch.setattr(replanning, "resident_bytes", lambda: taken)
        before = run.engine.report()["training"]["num_commits"]
        run.train(last)
        (decision,) = run.decisions
        assert decision["because"] == f"memory is short by {format_bytes(short)}"
        assert decision["result"] == "changed", decision["why"]
        assert run.engine.plan.planner == first.planner and not run.engine.plan.state.is_all_in_memory(sizes)
        assert run.engine._runtime.tiers.account(Tier.DEVICE).used_bytes <= used - short
        assert run.engine.report()["training"]["num_commits"] - before == last - decision["step"], "each step from here"
        assert differences(state_of(training_of(run.engine)), expected) == []
    assert [step[0] for step in run.trace] == [step[0] for step in undisturbed.trace], "losses"


def test_rates_that_were_measured_are_in_every_question(tmp_path: Path) -> None:
    _, _, found = asked(BUDGETS["split"], tmp_path)
    questions = Asked(questions=tuple(found))
    assert len(found) == 2
    for (was, _), (now, _) in zip(found, questions.measured({SSD_READ: 4.0, CPU: 2.0}).questions, strict=True):
        assert now.hardware.read_bytes_per_second == was.hardware.read_bytes_per_second / 4
        assert now.hardware.host.adamw_params_per_second == was.hardware.host.adamw_params_per_second / 2
        assert now.hardware.device.adamw_params_per_second == was.hardware.device.adamw_params_per_second
    plan = lowered_training(plan_optimal(found[1][0]), *asked(BUDGETS["split"], tmp_path)[:2], found[1][0])
    of_drive = replace(questions, answered=1)
    slower = of_drive.measured({SSD_READ: 4.0, SSD_WRITE: 4.0})
    assert slower.step_seconds(plan) > of_drive.step_seconds(plan)
    assert slower.change_seconds(plan) == pytest.approx(4 * of_drive.change_seconds(plan), rel=0.05)


@pytest.mark.parametrize("layers_train", [True, False])
def test_an_optimised_plan_that_a_rehearsal_finds_too_small_is_made_again(
    layers_train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest step takes 64 KiB more than was planned. A plan is made for so much less memory, and rehearsed."""
    without_clocks(monkeypatch)
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning_training, "measured_seconds", lambda workload, *_: seconds_of(workload))
    monkeypatch.setattr(rehearsal, "ROOM", 1 << 40)
    monkeypatch.setattr(rehearsal, "remembered_bytes", lambda *_: None)  # both plans have the same tensors
    more = 64 << 10

    def started(name: str, device_kib: int, **arguments: Any) -> Run:
        torch.manual_seed(0)
        of = {"model": build_base("llama", torch.float32).requires_grad_(True).train(), "bits": None}
        hardware = replace(test_planning_training.machine(device_kib, 0), drives=drives())
        return Run(tmp_path / name, emulate=hardware, options=OPTIONS, **(of if layers_train else {}), **arguments)

    with started("roomy", 64 << 10) as roomy:
        expected = [step[0] for step in roomy.train(2).trace]
        plan = roomy.engine.plan
        assert roomy.engine.report()["rehearsal"]["result"] in ("fits", "within the budget")
        used = roomy.engine._runtime.tiers.account(Tier.DEVICE).used_bytes - plan.allocator_slack_bytes
    with started("tight", used // 1024 + 64) as run:
        seen: list[Any] = []

        def measured(runtime: Any, *_: Any) -> tuple[int, None]:
            seen.append(runtime.plan)
            return planned_bytes(runtime) + (more if len(seen) < 2 else 0), None

        monkeypatch.setattr(rehearsal, "measure", measured)
        before = run.engine.plan
        account = run.engine._runtime.tiers.account(Tier.DEVICE)
        account.holdings[rehearsal.SLACK] = 0  # there is none to be had
        account.capacity_bytes = account.used_bytes
        run.train(2)
        assert run.engine.report()["rehearsal"]["result"] == "planned again"
        assert len(seen) == 2 and seen[0] == before != seen[1]
        assert run.engine._changes.rehearsal.more_bytes == more and run.engine.plan == seen[-1]
        assert run.engine._runtime.tiers.account(Tier.DEVICE).used_bytes <= (used // 1024 + 64) * 1024
        assert [step[0] for step in run.trace] == expected
        assert not run.engine._changes.rehearsal.is_due


def test_a_batch_of_micro_batches_begins_with_the_change(tmp_path: Path) -> None:
    twin = Plain(model())
    with engine(model(), "from HOST", tmp_path, nvme=tmp_path, accumulation_steps=2) as run:
        other, passed_on = plan_of(run, "BACKWARD, tight"), list[int]()
        for number in range(4):
            parts = [batch(10 * number), batch(10 * number + 1)]
            for part in parts:
                twin.backward(twin(**part).loss / 2)
            twin.step()
            before = run._runtime.turns.num_passed_on
            run.train_batch(parts)
            passed_on.append(run._runtime.turns.num_passed_on - before)
            assert differences(run.state(), twin.state()) == [], number
            if number == 1:
                propose(run, other)
        assert run.plan == other and results(run) == ["changed"] and decisions(run)[0]["step"] == 2
        assert passed_on[0] > 0 and len(set(passed_on)) == 1, "they go through the layers together in every step"


def test_a_loop_that_steps_by_the_optimizer_has_the_step_committed_that_a_change_is_behind(tmp_path: Path) -> None:
    """The backward passes were the engine's, so that it has counted gradients that wait."""
    twin = Plain(model())
    with engine(model(), "in place", tmp_path, nvme=tmp_path, commit_every=100) as run:
        other = plan_of(run, "BACKWARD, tight")
        for number in range(3):
            for each in (twin, run):
                each.backward(each(**batch(number)).loss)
            twin.step()
            if number == 1:
                propose(run, other)
            run.optimizer.step()
            run.optimizer.zero_grad()
            assert differences(run.state(), twin.state()) == [], number
        assert run.plan == other and [each["step"] for each in decisions(run)] == [2]


@pytest.mark.parametrize(("before", "after", "every"), [(True, False, None), (False, True, None), (True, False, 1)])
def test_no_plan_made_again_ends_commits_that_nobody_asked_for(
    before: bool, after: bool, every: int | None, tmp_path: Path
) -> None:
    """before, after: whether state is on NVMe. Each step is committed for that, where nothing is declared."""
    with made("BACKWARD" if before else "in place", tmp_path, commit_every=every) as run:
        other = plan_of(run, "BACKWARD" if after else "in place")
        made_of = replace(run._runtime.made_of, plan_again=lambda _: other)
        answer = replanning._answer(made_of, None, made_of.problem, run.plan, 0)
        ends = before and every is None
        assert (answer.plan is None) is ends and ("would commit no step" in answer.why) is ends, answer.why
