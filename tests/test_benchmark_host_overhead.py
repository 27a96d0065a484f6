"""benchmarks/host_overhead.py runs end to end and writes what a reader needs. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "host_overhead.py"


@pytest.mark.full
@pytest.mark.parametrize("trains", ["lora", "full"])
def test_the_benchmark_of_the_hosts_time_counts_the_same_calls_each_time(trains: str, tmp_path: Path) -> None:
    found = []
    for number in range(2):
        out = tmp_path / f"{number}.json"
        command = [sys.executable, str(SCRIPT), "--layers", "1", "--rounds", "1", "--trains", trains]
        command += ["--contenders", "recomputed", "resident", "streamed", "--json", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert str(tmp_path) not in out.read_text()
        (run,) = json.loads(out.read_text())["runs"]
        found.append(run["per_layer"][trains])
    for name, first in found[0].items():
        second = found[1][name]
        assert {"median", "min", "max", "of_least"} <= first["step"]["thread"].keys()
        assert first["forward"]["python"] == second["forward"]["python"] > 0
    assert found[0]["streamed"]["did"]["fetches"] > found[0]["resident"]["did"]["fetches"] == 0
