"""benchmarks/qlora.py runs end to end on a tiny model and writes what a reader needs. No time is asserted."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "qlora.py"
TINY = "--layers 2 --tokens 64 --rounds 1 --hidden 128 --intermediate 256 --heads 4 --kv-heads 2 --vocabulary 256"


@pytest.mark.full
def test_the_qlora_benchmark_runs_end_to_end_and_writes_json(disk_folder):
    names = ["ours+num_slots=1+stream_edges=1", "bnb" if importlib.util.find_spec("bitsandbytes") else "bf16"]
    out = disk_folder / "out.json"
    command = [sys.executable, str(SCRIPT), *TINY.split(), "--threads", "1", "--contenders", ",".join(names)]
    command += ["--nvme", str(disk_folder), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    results = json.loads(out.read_text())
    assert {"commit", "command", "configuration", "cpu", "lengths"} <= set(results)
    assert str(disk_folder) not in out.read_text()
    (found,) = results["lengths"]
    rows = found["contenders"]
    assert list(rows) == names
    for row in rows.values():
        assert len(row["seconds"]["values"]) == 1
        assert len(row["losses"]) == 2
        assert row["peak_bytes"] > 0
        assert row["instruction_set"]
        parts = row["breakdown"]["timed"]["parts"]
        phases = [seconds for name, seconds in parts.items() if not name.startswith(" ")]
        assert sum(phases) == pytest.approx(row["breakdown"]["timed"]["seconds"], rel=0.02)
        assert row["breakdown"]["memory"]["peak_bytes"] > 0
        assert row["breakdown"]["profiled"]["parts"]["matrix products"] > 0

    # It measured what it says: ours decoded and read from the drive, and both 4-bit models are the same model.
    ours = rows[names[0]]
    counted = ours["breakdown"]["timed"]["counted"]
    assert counted["decodes"] > 0
    # Of two layers, backward finds the last one there. The head stays in its slot: the embedding goes by rows.
    assert counted["bytes_read"] == ours["report"]["stored_bytes"] - 256 * 128 * 2
    assert ours["breakdown"]["timed"]["parts"]["  of which NF4 decode"] > 0
    assert any(line.startswith("read under way") for line in ours["breakdown"]["timeline"])
    if "bnb" in rows:
        assert ours["losses"][0] == pytest.approx(rows["bnb"]["losses"][0], abs=2e-3)
    assert f"{names[0]} / {names[1]}" in found["ratios"]
    assert names[0] in done.stdout


def test_an_unknown_switch_ends_with_its_name(disk_folder):
    command = [
        sys.executable,
        str(SCRIPT),
        *TINY.split(),
        "--contenders",
        "ours+num_slits=1",
        "--nvme",
        str(disk_folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "num_slits" in done.stderr
