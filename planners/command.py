"""`offload-rt plan` and `python -m planners`: a dry run that needs no GPU, no weights and no torch.

Nothing is imported before it is needed, so that the first line appears at once; the solver comes after it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planners.errors import PlanInfeasible
from planners.units import ProblemError, nearest, parse_size, seconds

if TYPE_CHECKING:
    from planners.plans.plan import Plan
    from planners.problems.problem import Problem

REPORT_SCHEMA = "offload-plan-report/1"
DESCRIPTION = "What would happen, before anything does: where things rest, what a step takes, what would help."
EXAMPLES = """
example:
  offload-rt plan --model llama3-70b --gpu rtx4090 --host-memory 64GiB --nvme 2TB@7.0r/5.0w \\
      --bits 4 --adapters lora:r=16 --seq-len 4096 --batch-size 8

MODEL is a config.json, a folder with one or with safetensors files, such a file, or a well-known name.
Times are predictions of a simulator.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    what = parser.add_argument_group("what")
    what.add_argument("--model", required=True, metavar="MODEL", help="config.json, folder, safetensors file, or name")
    what.add_argument("--bits", type=int, help="4: frozen weights as NF4; left out: 16 bit")
    what.add_argument("--adapters", metavar="KIND", help="lora:r=16,targets=q_proj+v_proj (default: lora:r=16)")
    what.add_argument("--full", action="store_true", help="train all parameters")
    what.add_argument("--optimizer", default="adamw", help="adamw, adamw-8bit, adamw-bf16, lion, sgd or adafactor")
    what.add_argument("--seq-len", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    what.add_argument("--batch-size", type=int, default=1, help="rows of a micro-batch (default: %(default)s)")
    what.add_argument(
        "--accumulation-steps", type=int, default=1, metavar="N",
        help="micro-batches of a step, each of --batch-size rows (default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--clip", action="store_true", help="the gradient's global norm is clipped")
    what.add_argument(
        "--commit-every", type=int, help="steps between durable commits (default: 1 for adapters, else 0)"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--gpu", help="rtx4090, h100, cpu, ... (default: rtx4090)")
    where.add_argument("--hardware", metavar="FILE", help="a measured profile, in place of --gpu")
    where.add_argument("--device-memory", metavar="SIZE", help="hard budget (default: the card's, less a reserve)")
    where.add_argument("--host-memory", metavar="SIZE", help="hard budget (default: the profile's)")
    where.add_argument("--nvme", action="append", metavar="SIZE[@Rr/Ww]", help="2TB@7.0r/5.0w; once per drive; 'none'")
    where.add_argument("--max-written", metavar="SIZE", help="to the drives, per step, at most")
    how = parser.add_argument_group("how")
    how.add_argument("--policy", default="optimal", help="optimal, greedy, zero-infinity, fuyou, memo, ...")
    how.add_argument("--no-advice", action="store_true", help="do not plan again to see what would help")
    how.add_argument("--sweep", metavar="KEY=A,B,C", help="plan for each value of an option: batch-size=1,2,4")
    out = parser.add_argument_group("out")
    out.add_argument("--json", metavar="FILE", help="the plan and what is predicted; - is standard output")
    out.add_argument("--html", metavar="FILE", help="one self-contained page")
    out.add_argument("--trace", metavar="FILE", help="a steady step for ui.perfetto.dev")


def run(arguments: argparse.Namespace) -> int:
    """Plans and writes. Raises `ProblemError` for a malformed question, `PlanInfeasible` where nothing fits."""
    say: Callable[[str], object] = sys.stderr.write if arguments.json == "-" else sys.stdout.write
    if arguments.sweep:
        return _sweep(arguments, say)
    problem = problem_of(arguments)
    from planners.render import headline, html_page, page, trace

    say(headline(problem) + "\n")
    sys.stdout.flush()
    _warn(arguments.model)
    asked, plan = make_plan(problem, arguments.policy)
    from planners.optimiser.explain import advise
    from planners.simulator.validate import check

    replay = check(asked, plan)
    advice = [] if arguments.no_advice or arguments.policy != "optimal" else advise(problem, plan)
    say(page(asked, plan, advice))
    if arguments.json:
        report = json.dumps(report_of(asked, plan, [vars(a) for a in advice]), indent=1) + "\n"
        if arguments.json == "-":
            sys.stdout.write(report)
        else:
            _write(arguments.json, report)
    if arguments.html:
        _write(arguments.html, html_page(asked, plan, replay, advice))
    if arguments.trace:
        _write(arguments.trace, trace(replay))
    return 0


def _warn(model: str) -> None:
    """Warns of what training would refuse `model` for."""
    from planners.shapes.models import quantization_warning

    if warning := quantization_warning(model):
        sys.stderr.write(f"warning: {warning}\n")


def make_plan(problem: Problem, policy: str) -> tuple[Problem, Plan]:
    """Plans by `policy`; greedily, and says so, where the solver is missing or fails. With the question that the plan
    answers: `problem`, or the same with its micro-batches together. Raises `ProblemError` for an unknown policy, and
    `PlanInfeasible`, whose ways out were tried.
    """
    from planners.optimiser.explain import ways_out
    from planners.optimiser.policies import answer_by_policy
    from planners.optimiser.program import SolverFailed, SolverMissing

    try:
        return answer_by_policy(problem, policy)
    except (SolverMissing, SolverFailed) as error:
        sys.stderr.write(f"no optimiser ({error}); the greedy planner serves\n")
        return answer_by_policy(problem, "greedy")
    except PlanInfeasible as short:
        raise PlanInfeasible(
            tier=short.tier,
            phase=short.phase,
            need_bytes=short.need_bytes,
            have_bytes=short.have_bytes,
            ways_out=ways_out(problem, short),
            needs=short.needs,
        ) from None


def report_of(problem: Problem, plan: Plan, advice: list[dict[str, Any]]) -> dict[str, Any]:
    """What `--json` writes. The keys under `predicted` are part of the public contract."""
    return {
        "schema": REPORT_SCHEMA,
        "model": problem.workload.name,
        "machine": problem.hardware.name,
        "predicted": plan.predicted,
        "advice": advice,
        "plan": json.loads(plan.to_json()),
    }


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise ProblemError(f"{path}: cannot be written: {error.strerror}") from error


def problem_of(arguments: argparse.Namespace) -> Problem:
    """The question that the options ask."""
    from planners.problems.hardware import load_hardware, named_hardware, parse_drive, with_budgets
    from planners.problems.model_workload import SUMMING_SHARE, make_workload
    from planners.problems.problem import Problem
    from planners.shapes.models import find_model

    if arguments.gpu and arguments.hardware:
        raise ProblemError("gpu, hardware: give one of the two")
    if arguments.full and arguments.adapters:
        raise ProblemError("full, adapters: give one of the two")
    hardware = load_hardware(arguments.hardware) if arguments.hardware else named_hardware(arguments.gpu or "rtx4090")
    drives = None
    if arguments.nvme:
        drives = () if arguments.nvme == ["none"] else tuple(parse_drive(text) for text in arguments.nvme)
    hardware = with_budgets(
        hardware,
        device_memory_bytes=_size(arguments.device_memory, "device_memory"),
        host_memory_bytes=_size(arguments.host_memory, "host_memory"),
        drives=drives,
    )
    rank, targets = (None, ()) if arguments.full else _adapters(arguments.adapters or "lora:r=16")
    commit = arguments.commit_every
    if commit is not None and not 0 <= commit <= 1 << 30:
        raise ProblemError(f"commit_every: must be at least 0, got {commit}")
    if commit is None and not arguments.full and hardware.drives:
        commit = 1
    workload = make_workload(
        find_model(arguments.model),
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        bits=arguments.bits,
        rank=rank,
        targets=targets,
        optimizer=arguments.optimizer,
        clips=arguments.clip,
        commit_every=commit or None,
        accumulation_steps=arguments.accumulation_steps,
        summing_seconds_per_param=SUMMING_SHARE / hardware.host.adamw_params_per_second,
        num_threads=hardware.device.num_threads,
    )
    return Problem(hardware=hardware, workload=workload, max_written_bytes=_size(arguments.max_written, "max_written"))


def _size(text: str | None, field: str) -> int | None:
    return None if text is None else parse_size(text, field=field)


def _adapters(text: str) -> tuple[int, tuple[str, ...]]:
    """Rank and targets of `lora:r=16,targets=q_proj+v_proj`; what changes no size (alpha, dropout) is accepted."""
    kind, _, rest = text.partition(":")
    if kind != "lora":
        raise ProblemError(f"adapters: unknown kind {kind!r}; {nearest(kind, ['lora'])}")
    rank = 16
    targets: tuple[str, ...] = ()
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in ("r", "alpha", "dropout", "targets") or not equals or not value:
            raise ProblemError(f"adapters: cannot read {part!r}; {nearest(key, ['r', 'alpha', 'dropout', 'targets'])}")
        if key == "r":
            if not value.isdigit():
                raise ProblemError(f"adapters: r={value!r} is not a whole number")
            rank = int(value)
        elif key == "targets" and value != "all-linear":
            targets = tuple(value.split("+"))
    return rank, targets


COUNTS = ("batch-size", "seq-len", "accumulation-steps")
SWEEPABLE = (*COUNTS, "host-memory", "device-memory", "gpu", "model", "nvme", "policy", "adapters")


def _sweep(arguments: argparse.Namespace, say: Callable[[str], object]) -> int:
    """A table over the values of one option."""
    from planners.render import BAR, bar, headline

    key, equals, values = arguments.sweep.partition("=")
    if key not in SWEEPABLE or not equals or not values:
        raise ProblemError(f"sweep: cannot read {arguments.sweep!r}; {nearest(key, SWEEPABLE)}")
    for other in ("html", "trace"):
        if getattr(arguments, other):
            raise ProblemError(f"sweep, {other}: give one of the two")
    rows: list[dict[str, Any]] = []
    for index, text in enumerate(values.split(",")):
        changed = argparse.Namespace(**vars(arguments))
        field = key.replace("-", "_")
        if key in COUNTS:
            if not text.isdigit():
                raise ProblemError(f"sweep: {key}={text!r} is not a whole number")
            setattr(changed, field, int(text))
        else:
            setattr(changed, field, [text] if field == "nvme" else text)
        problem = problem_of(changed)
        if not index:
            say(headline(problem) + "\n")
            sys.stdout.flush()
        if not index or key == "model":
            _warn(changed.model)
        try:
            rows.append({key: text, **make_plan(problem, changed.policy)[1].predicted})
        except PlanInfeasible as short:
            rows.append({key: text, "infeasible": str(short)})
    fastest = max((row["tokens_per_second"] for row in rows if "infeasible" not in row), default=1.0)
    say(f"{key:>16}  {'step':>10}  {'tokens/s':>10}\n")
    for row in rows:
        if "infeasible" in row:
            say(f"{row[key]:>16}  does not fit: {row['infeasible']}\n")
        else:
            rate = row["tokens_per_second"]
            drawn = bar([rate], fastest).rstrip("·")
            say(f"{row[key]:>16}  {seconds(row['step_seconds']):>10}  {rate:>10.4g}  {drawn:<{BAR}}\n")
    if arguments.json:
        report = json.dumps({"schema": REPORT_SCHEMA, "sweep": rows}, indent=1) + "\n"
        if arguments.json == "-":
            sys.stdout.write(report)
        else:
            _write(arguments.json, report)
    return 0
