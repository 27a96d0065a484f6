"""benchmarks/gpu.py runs to its end without a GPU, on small shapes, and writes what a reader needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.parametrize(
    "kinds", [["resident", "host", "swap", "full"], pytest.param(["plain", "full_device"], marks=pytest.mark.full)]
)
def test_the_gpu_benchmark_runs_end_to_end_and_writes_json(disk_folder, kinds):
    out = disk_folder / "out.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", str(out), "--sections", "links", "decode", "adam"]
    done = subprocess.run([*command, "steps", "--contenders", *kinds], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    found = json.loads(out.read_text())
    assert found["smoke"] is True
    assert found["machine"]["name"]
    assert set(found["links"]["bytes_per_second"]) >= {"to_device", "to_host", "both_ways"}
    assert found["decode"]["shapes"]["96x128"]["over_copy"]["decode"]["median"] > 0
    assert "ours" in found["adam"]["over_copy"]
    rows = found["steps"]["tiny"]["contenders"]
    assert list(rows) == kinds
    assert all(len(row["losses"]) == 2 for row in rows.values())
    if kinds[0] == "resident":
        assert rows["resident"]["losses"] == rows["host"]["losses"], "a plan changes no number"
        assert rows["resident"]["a_step"]["fetches"] == 0 < rows["host"]["a_step"]["fetches"]
        assert found["steps"]["tiny"]["predicted_seconds"] > 0
        assert rows["swap"]["tokenwise"]["swapped_bytes"] > 0
        assert rows["full"]["training"]["num_steps"] == 4


def test_without_a_gpu_it_says_so_instead_of_measuring(disk_folder):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch finds no GPU" in done.stderr
