"""benchmarks/full_finetune.py runs end to end on a tiny model and writes what a reader needs. No time is asserted."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
OURS = "ours_nvme+device_memory=torch*4"
TIERS = "ours_tiers+device_memory=torch*4"


def run(folder, *arguments):
    command = [sys.executable, str(BENCHMARKS / "full_finetune.py"), "--smoke", "--nvme", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.full
@pytest.mark.timeout(1200)  # steps of four contenders, and processes that import everything
@pytest.mark.parametrize("names", [["torch", OURS], ["torch", "ours", OURS, TIERS]])
def test_the_benchmark_measures_what_it_says(disk_folder, names):
    out, trace = disk_folder / "out.json", disk_folder / "trace.json"
    done = run(disk_folder, "--contenders", ",".join(names), "--json", str(out), "--trace", str(trace))
    assert done.returncode == 0, done.stderr[-3000:]

    results = json.loads(out.read_text())
    assert {"commit", "command", "configuration", "cpu", "drive", "load_average"} <= set(results)
    assert str(disk_folder) not in out.read_text()
    assert results["drive"]["bytes_per_second"]["median"] > 0
    rows = results["contenders"]
    assert list(rows) == names and not results["left_out"]
    for row in rows.values():
        assert len(row["seconds"]["values"]) == 1 and row["peak_bytes"] > 0 and row["num_clipped"] == 0
        assert 0 < sum(row["phases"].values()) <= row["seconds"]["median"], "parts of one step by one clock"
        # all contenders train the same model by the same steps
        assert row["losses"][:3] == pytest.approx(rows["torch"]["losses"][:3], abs=2e-3)
    for name in {"ours", TIERS} & rows.keys():  # TIERS has the budget and drive of OURS, which may not use the memory
        assert rows[name]["training"]["mode"] == "after" and rows[name]["bytes_written"] == 0
    on_nvme = rows[OURS]
    assert on_nvme["training"]["mode"] == "speculative" and on_nvme["training"]["num_ahead_of_norm"] > 0
    assert on_nvme["training"]["num_commits"] == on_nvme["training"]["num_steps"]
    assert on_nvme["planned_bytes"] <= 4 * rows["torch"]["peak_bytes"]

    # Every byte of state goes out in a step, and the drive saw what the engine says.
    breakdown = on_nvme["breakdown"]
    assert breakdown["bytes_written"] >= on_nvme["report"]["training"]["state_bytes"]
    assert on_nvme["bytes_written"] >= breakdown["bytes_written"]
    threads = breakdown["threads"]
    assert 0 < sum(threads["MainThread"].values()) <= breakdown["seconds"] * (1 + 1e-6)
    assert {"forward of layers", "backward of layers", "updates finish", "commit"} <= threads["MainThread"].keys()
    assert {"AdamW", "checksum"} <= threads["offload_rt-updates"].keys()
    assert f"{OURS} / limit by torch" in results["ratios"]

    found = json.loads(trace.read_text())["traceEvents"]
    lanes = {event["args"]["name"]: event["tid"] for event in found if event["ph"] == "M"}
    assert {"MainThread", "offload_rt-updates", "read 0", "write 0"} <= lanes.keys()
    assert all(event["dur"] >= 0 for event in found if event["ph"] == "X")
    # Parts of one lane nest; those of a lane of transfers do not even do that.
    for lane, number in lanes.items():
        spans = sorted((e["ts"], -e["dur"]) for e in found if e["ph"] == "X" and e["tid"] == number)
        ends: list[float] = []
        for begin, minus_dur in spans:
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or (begin - minus_dur <= ends[-1] + 1e-3 and " 0" not in lane), lane
            ends.append(begin - minus_dur)


@pytest.mark.full  # four processes that import everything
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="it is there")
@pytest.mark.parametrize("apart", [["--apart"], []])
def test_a_contender_that_is_not_installed_is_left_out_with_a_sentence(disk_folder, apart):
    names = "zero3_nvme,ours_nvme+device_memory=zero3_nvme/4,torch"
    done = run(disk_folder, "--contenders", names, *apart)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "zero3_nvme: left out: deepspeed is not installed" in done.stdout
    assert "its budget is the peak of zero3_nvme" in done.stdout
    assert "  torch  " in done.stdout


def test_a_budget_that_refers_to_nobody_is_refused(disk_folder):
    done = run(disk_folder, "--contenders", "ours_nvme+device_memory=zero3_nvme/4")
    assert done.returncode != 0
    assert "zero3_nvme, which does not take part" in done.stderr
