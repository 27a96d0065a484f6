"""The comparison of predicted and measured steps, small: it runs, and what links worked is what was predicted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = ["all tiers, link in", "SSD write", "activations each way", "full, gradients out"]


@pytest.mark.full  # most of it is starting a process
def test_links_work_as_long_as_predicted_and_every_case_is_told(tmp_path):
    out = tmp_path / "prediction.json"
    command = [sys.executable, "benchmarks/prediction.py", "--hidden", "128", "--layers", "3", "--tokens", "32"]
    command += ["--steps", "1", "--folder", str(tmp_path), "--json", str(out), "--cases", *CASES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(out.read_text())["runs"]
    assert list(run["results"]) == CASES
    for found in run["results"].values():
        assert found["error"] == pytest.approx(found["predicted_seconds"] / found["measured_seconds"]["median"] - 1)
        for name, seconds in found["measured_busy_seconds"].items():
            assert seconds == pytest.approx(found["predicted_busy_seconds"][name], rel=0.01, abs=1e-9), name
    assert run["results"]["SSD write"]["measured_busy_seconds"]["ssd_write"] > 0
