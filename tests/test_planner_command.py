"""`offload-rt plan`: a page, files, errors that help; without torch."""

import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_rt.cli.main import main
from offload_rt.cli.train import OPTIMIZERS
from offload_rt.cli.train_run import _optimizer
from offload_rt.optimizer.rules import rule_for
from planners.optimiser import explain
from planners.optimiser.explain import advise, ways_out
from planners.optimiser.frugal import search_frugal
from planners.optimiser.greedy import infeasible
from planners.optimiser.mip import plan_any
from planners.optimiser.policies import NAMES, plan_by_policy
from planners.plans.plan import Plan
from planners.problems.hardware import named_hardware, with_budgets
from planners.problems.model_workload import STATE_BYTES, make_workload
from planners.problems.problem import Problem
from planners.shapes.models import find_model
from planners.simulator.validate import check
from planners.units import ProblemError
from tests.planner_cases import MIB, TINY, machine, problem

QLORA = ["plan", "--model", "llama3-8b", "--gpu", "rtx4060ti", "--bits", "4", "--nvme", "1TB@7.0r/5.0w", "--no-advice"]


def test_the_page_answers_what_rests_where_and_how_long(capsys):
    assert main([*QLORA, "--seq-len", "2048"]) == 0
    text = capsys.readouterr().out
    for said in ("tokens/s", "lower bound", "what binds", "memory at its peak", "where things rest", "peak by phase"):
        assert said in text
    assert text.startswith("llama3-8b, adapters, 1 x 2048 tokens a step, on rtx4060ti: 15 GiB device")


def test_files_hold_the_plan_the_page_and_the_trace(tmp_path, capsys):
    files = {name: tmp_path / name for name in ("plan.json", "plan.html", "plan.trace")}
    argv = ["--json", str(files["plan.json"]), "--html", str(files["plan.html"]), "--trace", str(files["plan.trace"])]
    assert main([*QLORA, *argv]) == 0
    report = json.loads(files["plan.json"].read_text())
    predicted = report["predicted"]
    for key in ("step_seconds", "tokens_per_second", "flops_per_second", "lower_bound_seconds", "gap",
                "ssd_bytes_written_per_step"):  # fmt: skip
        assert isinstance(predicted[key], (int, float)), key
    assert set(predicted["peak_bytes"]) == {"device", "host", "nvme"}
    assert set(predicted["busy_seconds"]) >= {"compute", "host_to_device", "device_to_host", "ssd_read", "cpu"}
    assert set(predicted["phase_peak_bytes"]["device"]) == {"ingest", "forward", "backward", "update", "save", "resume"}
    assert Plan.from_json(json.dumps(report["plan"])).predicted == predicted
    page = files["plan.html"].read_text()
    assert page.count("<svg") >= 2 and not re.search(r"(src|href)=|https?://", page)
    events = json.loads(files["plan.trace"].read_text())["traceEvents"]
    compute = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert sum(e["dur"] for e in compute) / 1e6 == pytest.approx(predicted["busy_seconds"]["compute"], rel=1e-6)


def test_json_on_standard_output_is_only_json(capsys):
    assert main([*QLORA, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema"] == "offload-plan-report/1" and "tokens/s" in err


def test_a_sweep_is_a_table_and_names_what_does_not_fit(tmp_path, capsys):
    argv = ["plan", "--model", "llama3-8b", "--gpu", "rtx3060", "--nvme", "none", "--no-advice"]
    path = tmp_path / "sweep.json"
    assert main([*argv, "--sweep", "host-memory=4GiB,64GiB", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "4GiB  does not fit" in text and re.search(r"64GiB +[\d.]+ s", text)
    rows = json.loads(path.read_text())["sweep"]
    assert "infeasible" in rows[0] and rows[1]["tokens_per_second"] > 0


def test_infeasible_says_what_is_short_and_ways_out_that_work(capsys):
    argv = ["plan", "--model", "llama3-8b", "--gpu", "rtx3060", "--host-memory", "4GiB", "--nvme", "none"]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "short by" in error and "What would fit: " in error and "2 TB of NVMe" in error


def test_every_way_out_was_planned():
    from planners.errors import PlanInfeasible
    from planners.optimiser.mip import plan_optimal

    p = problem(machine_=machine(device=4 * MIB))
    with pytest.raises(PlanInfeasible) as caught:
        plan_optimal(p)
    assert 1 <= len(ways_out(p, caught.value)) <= 3


def dry_run(path, *argv):
    folder, out = path / "model", path / "report.json"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    argv = ["--seq-len", "512", "--gpu", "rtx3060", "--no-advice", "--json", str(out), *argv]
    code = main(["plan", "--model", str(folder), *argv])
    return json.loads(out.read_text()) if code == 0 else None


@pytest.mark.parametrize("what", [["--full"], ["--bits", "4"]])
def test_a_step_of_several_micro_batches_goes_forward_and_backward_for_each(what, tmp_path, capsys):
    one, four = (dry_run(tmp_path, *what, "--accumulation-steps", n) for n in ("1", "4"))
    assert "4 micro-batches of 1 x 512 tokens a step" in capsys.readouterr().out
    fast, slow = one["predicted"], four["predicted"]
    assert slow["busy_seconds"]["compute"] == pytest.approx(4 * fast["busy_seconds"]["compute"], rel=0.01)
    assert slow["tokens_per_second"] == pytest.approx(4 * 512 / slow["step_seconds"])


def test_micro_batches_go_through_each_layer_together_where_that_is_faster(tmp_path, capsys):
    """The page, the report and a sweep are of that plan. What others do is not asked about so."""
    out = tmp_path / "report.json"

    def reported(*more):
        what = ["--model", "llama3.2-3b", "--full", "--seq-len", "512", "--accumulation-steps", "8", "--no-advice"]
        where = ["--gpu", "rtx3060", "--host-memory", "24GiB", "--nvme", "1TB@7.0r/5.0w", "--json", str(out)]
        assert main(["plan", *what, *where, *more]) == 0
        return json.loads(out.read_text())

    report = reported()
    assert report["plan"]["layer_major"]
    assert "micro-batches through each layer together" in capsys.readouterr().out
    assert (
        reported("--sweep", "accumulation-steps=8")["sweep"][0]["step_seconds"] == report["predicted"]["step_seconds"]
    )
    others = reported("--policy", "memo")
    assert not others["plan"]["layer_major"]
    assert others["predicted"]["step_seconds"] > report["predicted"]["step_seconds"]


@pytest.mark.full
def test_where_sums_of_gradients_do_not_fit_a_batch_at_once_is_a_way_out(tmp_path, capsys):
    argv = ["plan", "--model", "llama3-8b", "--full", "--host-memory", "16GiB", "--nvme", "2TB@7.0r/5.0w"]
    assert main([*argv, "--seq-len", "512", "--accumulation-steps", "4"]) == 1
    assert "batch_size 4 in place of 4 accumulation_steps" in capsys.readouterr().err


@pytest.mark.full
def test_the_least_way_out_of_each_kind_is_found_by_asking_about_few(monkeypatch):
    machine_ = with_budgets(named_hardware("rtx3060"), host_memory_bytes=8 << 30, drives=())
    workload = make_workload(find_model("llama3.2-3b"), batch_size=32, seq_len=1024, rank=None)
    p = Problem(hardware=machine_, workload=workload)
    short = infeasible(search_frugal(p).short)
    refused, kinds = [], list(explain._ways(p, short))

    def noted(other):
        if (plan := plan_any(other)) is None:
            refused.append(other)
        return plan

    monkeypatch.setattr(explain, "plan_any", noted)
    in_turn = [next((change for change, other in ways if noted(other) is not None), None) for ways in kinds]
    refused_in_turn = len(refused)
    found = ways_out(p, short)
    assert found == [change for change in in_turn if change is not None]
    assert "2 TB of NVMe" in found and any(way.startswith("host_memory") for way in found)
    assert in_turn[0] is None and len(kinds[0]) == 5, "16 rows, 8, 4, 2, 1"
    assert len(refused) - refused_in_turn < refused_in_turn / 2, "no plan takes the longest to be found"


def test_advice_is_what_planning_again_gives():
    from dataclasses import replace

    from planners.optimiser.mip import plan_optimal

    p = problem(full=True, machine_=machine(device=40 * MIB, host=48 * MIB))
    plan = plan_optimal(p)
    advice = {a.change: a for a in advise(p, plan)}
    more = replace(p, hardware=replace(p.hardware, drives=p.hardware.drives * 2))
    again = plan_optimal(more).predicted
    assert advice["one more SSD"].step_seconds == again["step_seconds"]
    assert advice["one more SSD"].gain == again["tokens_per_second"] / plan.predicted["tokens_per_second"] - 1


@functools.cache
def roomy_and_its_optimum():
    p = problem(full=True, machine_=machine(device=40 * MIB, host=1 << 30))
    return p, plan_by_policy(p, "optimal").predicted["step_seconds"]


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_a_plan_like_any_other(name):
    p, best_seconds = roomy_and_its_optimum()
    plan = plan_by_policy(p, name)
    check(p, plan)
    if name == "zero-infinity":
        assert all(entry.weights.nvme_bytes == entry.weights.total_bytes for entry in plan.classes)
    assert plan.predicted["step_seconds"] >= best_seconds * 0.98


def test_an_unknown_policy_gets_the_nearest():
    with pytest.raises(ProblemError, match="did you mean 'zero-infinity'"):
        plan_by_policy(problem(), "zero-infinty")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "llama3-80b"], "did you mean 'llama3-8"),
        (["--model", "llama3-8b", "--gpu", "rtx9090"], "gpu: unknown"),
        (["--model", "llama3-8b", "--gpu", "h100", "--hardware", "x"], "give one of the two"),
        (["--model", "llama3-8b", "--hardware", "nowhere.json"], "nowhere.json: No such file"),
        (["--model", "llama3-8b", "--full", "--bits", "4"], "4-bit weights are frozen"),
        (["--model", "llama3-8b", "--full", "--adapters", "lora:r=8"], "give one of the two"),
        (["--model", "llama3-8b", "--adapters", "lora:q=8"], "cannot read 'q=8'"),
        (["--model", "llama3-8b", "--adapters", "lora:r=0"], "between 1 and"),
        (["--model", "llama3-8b", "--adapters", "dora:r=8"], "unknown kind"),
        (["--model", "llama3-8b", "--host-memory", "64"], "is the unit missing, as in '64GiB'"),
        (["--model", "llama3-8b", "--host-memory", "64GX"], "unknown unit"),
        (["--model", "llama3-8b", "--device-memory", "48GiB"], "more than rtx4090 has"),
        (["--model", "llama3-8b", "--nvme", "2TB@7/5"], "cannot read the rates"),
        (["--model", "llama3-8b", "--batch-size", "0"], "batch_size"),
        (["--model", "llama3-8b", "--accumulation-steps", "0"], "accumulation_steps"),
        (["--model", "llama3-8b", "--commit-every", "-1"], "commit_every"),
        (["--model", "llama3-8b", "--policy", "magic"], "policy: unknown"),
        (["--model", "llama3-8b", "--sweep", "colour=red"], "sweep: cannot read"),
        (["--model", "llama3-8b", "--sweep", "seq-len=x"], "not a whole number"),
        (["--model", "llama3-8b", "--sequence-len", "1"], "unknown option"),
        (["--model", "llama3-8b", "--json", "/nowhere/x", "--no-advice"], "/nowhere/x: cannot be written"),
    ],
)
def test_a_wrong_call_is_one_line(argv, message, capsys):
    code = main(["plan", *argv])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_configuration_and_a_profile_from_files(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "machine.json").write_text(named_hardware("laptop").to_json())
    argv = ["plan", "--model", str(tmp_path), "--hardware", str(tmp_path / "machine.json"), "--no-advice"]
    assert main(argv) == 0
    assert "on laptop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("declared", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, "'gptq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, None),
        ({"quantization_config": "fp8"}, None),
    ],
)
def test_a_checkpoint_that_training_refuses_is_planned_with_a_warning(declared, method, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **declared}))
    argv = ["plan", "--model", str(tmp_path), "--policy", "greedy"]
    for more in ([], ["--sweep", "batch-size=1,2"], ["--sweep", f"model=llama3-8b,{tmp_path}"]):
        assert main([*argv, *more]) == 0
        out, err = capsys.readouterr()
        assert "tokens/s" in out
        if method is None:
            assert err == ""
        else:
            assert err.count("\n") == err.count(f"quantized by {method}, and only bitsandbytes NF4 is read") == 1
            assert err.startswith(f"warning: {tmp_path / 'config.json'}: ") and "training refuses this one" in err


def test_planning_imports_no_torch_and_the_package_runs_alone():
    root = Path(__file__).resolve().parents[1]
    code = (
        "import sys; from offload_rt.cli.main import main\n"
        f"assert main({QLORA!r}) == 0\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    alone = subprocess.run([sys.executable, "-m", "planners", *QLORA[1:]], cwd=root, capture_output=True, text=True)
    assert alone.returncode == 0 and "tokens/s" in alone.stdout
    wrong = subprocess.run([sys.executable, "-m", "planners", "--model", "x"], cwd=root, capture_output=True, text=True)
    assert wrong.returncode == 2 and "planners: error: model: unknown" in wrong.stderr


def test_the_optimizers_are_those_of_train_and_their_state_is_what_it_takes():
    assert set(STATE_BYTES) == set(OPTIMIZERS)
    for name, num_bytes in STATE_BYTES.items():
        rule = rule_for(_optimizer(name, 1e-3)([torch.nn.Parameter(torch.ones(2, 2))]))
        real = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in rule.state((1024, 1024)))
        assert (4 + num_bytes) << 20 == pytest.approx((4 << 20) + real, rel=0.01), name


def test_memory_of_a_cpu_is_planned_in_two_tiers_as_train_takes_it(tmp_path):
    argv = ["plan", "--model", "llama3.2-1b", "--gpu", "cpu", "--host-memory", "4GiB", "--device-memory", "3GiB"]
    path = tmp_path / "plan.json"
    assert main([*argv, "--seq-len", "256", "--nvme", "none", "--no-advice", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["model"] == "llama3.2-1b" and 0 < report["predicted"]["peak_bytes"]["host"] <= 4 << 30
