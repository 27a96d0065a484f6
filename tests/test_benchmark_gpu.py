"""benchmarks/gpu.py runs to its end without a GPU, on small shapes, and writes what a reader needs."""

import importlib
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


def run(out, *words):
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module


@pytest.mark.full  # many processes that import everything
@pytest.mark.parametrize(
    "sections, kinds",
    [
        (["links"], ["resident", "host", "optimised", "unoffloaded", "plain"]),
        (
            ["decode", "products", "adam"],
            ["plain", "full", "fsdp2", "full_plain", "full_fsdp2", "full_device", "swap", "host@8GiB", "bnb"],
        ),
    ],
)
def test_the_gpu_benchmark_runs_end_to_end_and_writes_json(disk_folder, sections, kinds):
    out = disk_folder / "out.json"
    done = run(out, "--minutes", "20", "--sections", *sections, "steps", "--contenders", *kinds)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    found = json.loads(out.read_text())
    assert found["smoke"] is True
    assert found["machine"]["name"]
    assert set(found["installed"]) >= {"bitsandbytes", "accelerate", "deepspeed"}
    rows = found["steps"]["tiny"]["contenders"]
    assert list(rows) == kinds
    assert all(len(row["losses"]) == 2 for row in rows.values() if "skipped" not in row)
    if "links" in sections:
        assert set(found["links"]["bytes_per_second"]) >= {"to_device", "to_host", "both_ways"}
        assert rows["resident"]["losses"] == rows["host"]["losses"] == rows["optimised"]["losses"], "as plans do"
        assert rows["optimised"]["predicted_step_seconds"] > 0
        assert found["steps"]["tiny"]["optimised_over_predicted"]["optimised"] > 0
        assert found["steps"]["tiny"]["optimised_over_rule"]["optimised"] > 0
        assert rows["resident"]["a_step"]["fetches"] == 0 < rows["host"]["a_step"]["fetches"]
        assert found["steps"]["tiny"]["predicted_seconds"] > 0
        assert rows["unoffloaded"]["losses"] == pytest.approx(rows["plain"]["losses"], rel=1e-2)
        assert "tiny: unoffloaded_over_plain " in done.stdout
        assert "tiny: optimised_over_predicted optimised " in done.stdout
    else:
        assert found["decode"]["shapes"]["96x128"]["over_copy"]["decode"]["median"] > 0
        product = found["products"]["shapes"]["32x64"]
        assert product["error_over_decoding"]["decoded first, again"] == 1.0 and product["left_out"] == {}
        assert product["error_over_decoding"]["fp8"] > 5
        assert len(product["seconds"]["decoded"]) == len(found["products"]["tokens"])
        assert "product 32x64 decoded first, again: error 1, time at 1: " in done.stdout
        assert rows["full"]["training"]["num_steps"] == 4
        assert "ours" in found["adam"]["over_copy"]
        assert rows["swap"]["tokenwise"]["swapped_bytes"] > 0
        assert rows["plain"]["losses"] == pytest.approx(rows["fsdp2"]["losses"], rel=1e-2)
        assert rows["full_plain"]["losses"] == pytest.approx(rows["full_fsdp2"]["losses"], rel=1e-2)
        assert list(found["steps"]["tiny"]["time_over_full_plain"]) == ["full", "full_fsdp2", "full_device"]


def test_a_section_without_time_is_an_error_and_the_json_is_there(disk_folder):
    out = disk_folder / "out.json"
    done = run(out, "--minutes", "0", "--sections", "links", "steps", "--contenders", "host")
    found = json.loads(out.read_text())
    assert done.returncode == 1 and "failed: links" in done.stderr
    assert (
        "were left" in found["links"]["error"]
        and "were left" in found["steps"]["tiny"]["contenders"]["host"]["skipped"]
    )


def test_a_command_that_hangs_ends_with_all_that_it_has_started(disk_folder, benchmarks):
    pid = disk_folder / "pid"
    limited = benchmarks("limited")
    says = f"trap 'echo interrupted; exit 3' INT; echo $$ > {pid}; echo begun; sleep 1000 & wait"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what is in the background
    try:
        ended = limited.run_limited(["sh", "-c", says], limited.GRACE_SECONDS + 3.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.code is None and ended.tail.split() == ["begun", "interrupted"]
    for _ in range(1000):  # whoever reaps orphans may be late
        try:
            os.killpg(int(pid.read_text()), 0)
        except ProcessLookupError:
            break
        if all(state == "Z" for state in states(int(pid.read_text()))):
            break
        time.sleep(0.01)
    else:
        pytest.fail("something of it still runs")
    assert limited.run_limited([sys.executable, "-c", "print('x' * 9000); raise SystemExit(3)"], 60.0).code == 3


def test_the_gate_says_which_tests_failed_and_why_and_ends_one_that_hangs(disk_folder, benchmarks, monkeypatch):
    pytest.importorskip("pytest_timeout")
    gate, path = benchmarks("gpu_gate"), disk_folder / "test_it.py"
    monkeypatch.setattr(gate, "TEST_SECONDS", 1)
    hangs = "import time\n\n\ndef test_hangs(): time.sleep(200)\n\n\n"
    path.write_text(hangs + "def test_good(): pass\n\n\ndef test_bad():\n    assert 1 == 2, 'evidence'\n")
    found = gate.tested(path, 200.0)
    assert "Timeout" in found["tests"].pop("test_hangs")["why"] and "::test_hangs - Failed" in found["failed"].pop(0)
    assert found["ok"] is False and found["summary"].startswith("2 failed, 1 passed")
    assert "::test_bad - AssertionError: evidence" in found["failed"][0] and len(found["failed"]) == 1
    assert any("test_good PASSED" in line for line in found["tail"]), "a line for each, for a gate that is cut off"
    outcomes = {name: of["outcome"] for name, of in found["tests"].items()}
    assert outcomes == {"test_good": "passed", "test_bad": "failure"}
    assert "evidence" in found["tests"]["test_bad"]["why"] and found["tests"]["test_good"]["seconds"] >= 0


def test_a_run_on_a_gpu_ends_at_once_where_something_is_missing_that_it_measures(benchmarks, monkeypatch, capsys):
    gpu, gate = benchmarks("gpu"), benchmarks("gpu_gate")
    monkeypatch.setattr(gate, "why_not", lambda: "no such file")
    assert gate.missing(["json", "no_such_module"]) == [
        "no_such_module", "the native core (no such file): python setup.py build_ext --inplace",
    ]  # fmt: skip
    monkeypatch.setattr(gpu, "GPU", True)
    monkeypatch.setattr(gpu, "missing", lambda: ["peft"])
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "missing here: peft. --anyway measures without" in capsys.readouterr().err


def test_without_a_solver_all_but_the_optimisers_plans_is_measured(benchmarks, monkeypatch):
    steps, gate, gpu = benchmarks("gpu_steps"), benchmarks("gpu_gate"), benchmarks("gpu")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "highspy" else there(name))
    assert list(gate.missing_parts()) == ["highspy"] and "highspy" not in gate.MODULES
    options = SimpleNamespace(device_memory="24GiB")
    row = steps.row(options, "cuda", "tiny", "optimised@8GiB", time.monotonic() + 1000)
    assert row == {"skipped": "highspy is not installed"}
    assert gpu.told(row) == "skipped: highspy is not installed"


def test_a_contender_that_failed_is_told_in_a_line(benchmarks):
    done = {"seconds": {"median": 1.5}, "host_seconds": {"median": 0.2}, "peak_bytes": 3 << 30}
    told = benchmarks("gpu").told(done | {"profile": {"hidden": 0.97}})
    assert told == "1.500 s, given in 0.200 s, peak 3.0 GiB, 97% of its copies hidden"
    failed = {"making_seconds": 3.0, "error": ["Traceback", *["x" * 500] * 40, "RuntimeError: no kernel"]}
    assert benchmarks("gpu").told(failed) == "failed: RuntimeError: no kernel"
    ratios = {"unoffloaded_over_plain": 1.0123, "optimised_over_predicted": {"optimised@8GiB": 0.9871}}
    result = {"machine": {"name": "a GPU"}, "seconds": 2.0, "smoke": False, "missing": {"highspy": "no plans"}}
    result["steps"] = {"8b": {"contenders": {"plain": done, "host": failed}} | ratios, "section_seconds": 9.0}
    assert benchmarks("gpu").summary_of(result).splitlines() == [
        "a GPU, 2 s", "highspy is missing: no plans", f"8b plain: {benchmarks('gpu').told(done)}",
        "8b host: failed: RuntimeError: no kernel", "8b: unoffloaded_over_plain 1.012",
        "8b: optimised_over_predicted optimised@8GiB 0.987",
    ]  # fmt: skip


def test_a_section_that_is_cut_off_leaves_what_it_had_found_and_its_last_words(benchmarks, monkeypatch, disk_folder):
    gpu, limited = benchmarks("gpu"), benchmarks("limited")
    options = SimpleNamespace(smoke=True)

    def cut_off(command, seconds):
        def found(options):
            yield {"shapes": {"first": 1}}
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setitem(gpu.RUN, "decode", found)
            patch.setattr(sys, "argv", command[1:])
            with pytest.raises(KeyboardInterrupt):
                gpu.main()
        return limited.Ended(None, "RuntimeError: why\n" + "frame #1: <unknown> (in libtorch.so)\n" * 60)

    monkeypatch.setattr(gpu, "run_limited", cut_off)
    found = gpu.measured("decode", options, ["--smoke"], 80.0)
    assert found == {"shapes": {"first": 1}, "error": "not done after 80 s", "tail": ["RuntimeError: why"]}


def test_what_is_raised_beside_the_processes_is_told_with_its_place(benchmarks, monkeypatch, disk_folder):
    gpu, steps = benchmarks("gpu"), benchmarks("gpu_steps")

    def broken(*_):
        raise OSError("no room for a process")

    monkeypatch.setattr(steps, "row", broken)
    options = SimpleNamespace(contenders=["plain"], shapes=["tiny"], nvme=None)
    error = steps.steps(options, "cpu", 0.0, None, lambda _: None)["tiny"]["contenders"]["plain"]["error"]
    assert error[-1] == "OSError: no room for a process" and any("in broken" in line for line in error)
    out = disk_folder / "out.json"
    monkeypatch.setattr(gpu, "measured", broken)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--sections", "links", "--json", str(out)])
    assert gpu.main() == 1
    found = json.loads(out.read_text())["links"]
    assert found["error"] == "OSError: no room for a process" and any("in broken" in line for line in found["tail"])


def test_a_plan_of_ours_that_its_budget_had_no_room_for_is_a_failure(benchmarks, monkeypatch, capsys):
    gpu, steps = benchmarks("gpu"), benchmarks("gpu_steps")
    monkeypatch.setattr(steps, "row", lambda *_: {"out_of_memory": "CUDA out of memory", "where": ["in decode"]})
    words = ["gpu.py", "--smoke", "--sections", "steps", "--contenders", "host@8GiB", "plain"]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu.main() == 1
    assert "failed: tiny host@8GiB: no room in its budget\n" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words[:-2], "plain"])
    assert gpu.main() == 0, "plain PyTorch may need more than there is"


def test_no_bandwidth_is_measured_on_memory_that_nobody_has_written(benchmarks, monkeypatch):
    import torch

    gpu, seen = benchmarks("gpu"), []
    copy = torch.Tensor.copy_

    def noting(target, source, *others, **named):
        seen.append(float(source.float().std()))
        return copy(target, source, *others, **named)

    monkeypatch.setattr(torch.Tensor, "copy_", noting)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what fresh memory reads as, also where the heap gives used one
    for section in (gpu.links, gpu.decode, gpu.adam):
        seen.clear()
        list(section(SimpleNamespace(smoke=True, rounds=1)))
        assert seen and min(seen) > 0, section.__name__
    assert gpu.noise(3_000_001).numel() == 3_000_001


def test_the_peak_of_a_contender_counts_what_was_reserved_before_a_rehearsal_began_anew(benchmarks, monkeypatch):
    step = benchmarks("gpu_step")
    for name, value in {"is_available": True, "max_memory_reserved": 100, "max_memory_allocated": 90}.items():
        monkeypatch.setattr(step.torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(step, "bytes_beside_allocator", lambda device: 7)
    assert step.memory(150, {"gpu": {"reserved_peak_bytes": 140}}) == {
        "peak_bytes": 147, "reserved_bytes": 140, "beside_allocator_bytes": 7, "allocated_bytes": 90,
        "budget_bytes": 150, "within_budget": True,
    }  # fmt: skip
    assert step.memory(None, {})["peak_bytes"] == 107


def test_the_other_sections_leave_time_for_the_steps(benchmarks):
    gpu = benchmarks("gpu")
    assert gpu.seconds_for("decode", ["adam", "steps"], 450.0, 450.0) == 80.0
    assert gpu.seconds_for("decode", ["adam", "steps"], 450.0, 200.0) == 20.0
    assert gpu.seconds_for("decode", ["adam"], 450.0, 50.0) == 50.0
    assert gpu.seconds_for("parity", ["adam"], 400.0, 400.0) == 180.0
    assert gpu.seconds_for("parity", [], 400.0, 400.0) == 400.0, "alone it may take all of the time"


def test_a_contender_that_was_cut_off_tells_what_it_did_and_takes_part_in_no_ratio(benchmarks):
    summary = {"median": 2.0}
    whole = {"seconds": summary, "peak_bytes": 1, "copied_bytes_a_step": 0}
    rows = {"resident": whole, "host": {"making_seconds": 1.0, "seconds": summary, "error": ["its time was over"]}}
    found = benchmarks("gpu_steps").verdict(rows, {"median": 1.0})
    assert "speed_over_resident" not in found
    assert benchmarks("gpu_steps").verdict(rows | {"host": whole}, {"median": 1.0})["speed_over_resident"] == 1.0


def states(group):
    """Of the processes of a group, as the kernel says them."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            yield fields[0]


def test_busy_time_counts_what_overlaps_once_and_no_stretch_that_the_host_named(benchmarks):
    def event(name, begin, end, device="CUDA", note=False):
        span = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
        return SimpleNamespace(
            name=name, device_type=f"DeviceType.{device}", time_range=span, is_user_annotation=note
        )  # fmt: skip

    found, by_name = benchmarks("gpu_step").busy([
        event("gemm", 0, 40), event("gemm", 30, 60), event("aten::mm", 0, 100, "CPU"),
        event("Memcpy HtoD (Pinned -> Device)", 50, 80), event("Memcpy DtoH (Device -> Pinned)", 90, 100),
        event("Optimizer.step#AdamW.step", 0, 1000, note=True),
    ])  # fmt: skip
    seconds = {name: round(took * 1e6) for name, took in found.items()}
    assert seconds == {"kernels": 60, "to_device": 30, "to_host": 10, "any": 90}
    assert round(by_name["gemm"] * 1e6) == 70


def test_bad_calls_are_refused_before_anything_runs(benchmarks):
    import torch

    assert "'plain@8GiB'; allowed: plain, " in benchmarks("gpu_steps").check_names(["host@8GiB", "plain@8GiB"])
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch finds no GPU" in done.stderr


def test_the_native_core_can_be_built_where_only_torch_brings_its_headers():
    says = "import runpy, sys; sys.modules['pybind11'] = None; sys.argv = ['setup.py', '-q', '--version']"
    command = [sys.executable, "-c", f"{says}; print(runpy.run_path('setup.py')['pybind11_headers']())"]
    done = subprocess.run(command, cwd=SCRIPT.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.split()[-1]) / "pybind11" / "pybind11.h").exists()


def test_the_native_core_is_compiled_side_by_side_and_a_warning_is_an_error_where_that_is_asked_for(monkeypatch):
    monkeypatch.chdir(SCRIPT.parent.parent)
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "--version"])
    both = threading.Barrier(2)

    def compile_all(sources, output_dir):
        both.wait(60.0)  # two at once, or never
        return [f"{output_dir}/{source}.o" for source in sources]

    for asked in ("", "1"):
        monkeypatch.setenv("OFFLOAD_RT_WERROR", asked)
        setup = runpy.run_path("setup.py")
        assert ("-Werror" in setup["extensions"]()[0].extra_compile_args) == bool(asked)
    assert setup["side_by_side"](compile_all, 2)(["a.cc", "b.cc"], output_dir="out") == ["out/a.cc.o", "out/b.cc.o"]
