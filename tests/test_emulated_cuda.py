"""The GPU path without a GPU: `test_gpu` on the emulated device, in a process that has "cuda" from its start."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a CUDA of its own"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

HERE = Path(__file__).parent
SOME = (
    "(on_emulated_cuda or leased or locked or streams or land or arrive or refused or reserved"
    " or traced or goes_through or changes_over or plan_on_the_gpu_is or (llama-bf16-x2 and None))"
    " and not resident and not 2-host and not 2-nvme"
)
"""Of `test_gpu` what is over in seconds, and the device's own tests; of rings the smallest and the largest."""
MIN_SOME = 45


def run_emulated(tmp_path: Path, files: list[str], chosen: str, **settings: int) -> dict[str, int]:
    """`settings` are the device's, without their prefix."""
    named = {f"OFFLOAD_EMULATED_{name}": str(value) for name, value in {"LATE_US": 2000, **settings}.items()}
    found = tmp_path / "found.xml"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "tests.emulated_cuda", "-o", "addopts=", "-p", "no:cacheprovider",
            "-q", f"--junit-xml={found}", "-k", chosen, *(str(HERE / name) for name in files),
        ],
        cwd=HERE.parent, env={**os.environ, **named}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ElementTree.parse(found).getroot().find("testsuite")
    assert suite is not None
    return {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}


def test_what_a_gpu_runs_runs(tmp_path: Path) -> None:
    found = run_emulated(tmp_path, ["on_emulated_cuda.py", "test_gpu.py"], SOME, DEVICES=2)
    assert found["tests"] >= MIN_SOME and found["skipped"] == found["failures"] == found["errors"] == 0


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_all_that_a_gpu_runs_runs(tmp_path: Path) -> None:
    found = run_emulated(tmp_path, ["test_gpu.py"], "test")
    assert found["tests"] > 60 and found["skipped"] == found["failures"] == found["errors"] == 0
