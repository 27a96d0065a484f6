"""A GPU is measured before the first training there, once, by a process of its own; see `cli.calibrate_first`."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from offload_rt.cli import calibrate_first as module
from offload_rt.cli.calibrate_first import calibrate_first
from offload_rt.errors import ConfigError


@pytest.fixture
def machine(monkeypatch):
    """A GPU that was not measured; what was run and said."""
    seen = SimpleNamespace(known=None, ran=[], said=[], code=0, error="")

    def run(command, **_):
        seen.ran.append(command)
        return subprocess.CompletedProcess(command, seen.code, "", seen.error)

    monkeypatch.setattr(module, "find_device", lambda name: "cpu" if name == "cpu" else "cuda:0")
    monkeypatch.setattr(module, "calibrated_for", lambda *asked: seen.known)
    monkeypatch.setattr(module.subprocess, "run", run)
    return seen


def test_a_gpu_that_was_not_measured_is_measured_with_the_drives_that_will_be_used(machine, tmp_path):
    calibrate_first("auto", [f"{tmp_path}:5GiB"], "auto", machine.said.append)
    words = ["calibrate", "--device", "cuda:0", "--nvme", str(tmp_path.resolve())]
    assert machine.ran == [[sys.executable, "-m", "offload_rt.cli.main", *words]]
    assert len(machine.said) == 1 and "once" in machine.said[0]


def test_what_was_measured_or_needs_no_rates_is_not_measured(machine, tmp_path):
    calibrate_first("cpu", None, "auto", machine.said.append)
    calibrate_first("cuda", None, str(tmp_path / "plan.json"), machine.said.append)
    calibrate_first("cuda", [str(tmp_path / "not there")], "auto", machine.said.append)  # which the engine says
    machine.known = object()
    calibrate_first("cuda", [str(tmp_path)], "auto", machine.said.append)
    assert machine.ran == machine.said == []


def test_a_measurement_that_fails_is_said_and_training_goes_on(machine):
    machine.code, machine.error = 1, "a warning\noffload-rt: error: the GPU has no memory left\n"
    calibrate_first("cuda", None, "auto", machine.said.append)
    assert machine.said[-1].startswith("warning: not measured: offload-rt: error: the GPU has no memory left")
    machine.error = ""
    calibrate_first("cuda", None, "optimise", machine.said.append)
    assert "exit code 1" in machine.said[-1]


@pytest.mark.full
def test_the_command_that_is_run_is_ours(monkeypatch):
    monkeypatch.setattr(module, "find_device", lambda name: "cuda:7")
    monkeypatch.setattr(module, "calibrated_for", lambda *asked: None)
    said = []
    calibrate_first("cuda:7", None, "auto", said.append)
    assert "offload-rt: error: device: 'cuda:7'" in said[-1]


def test_a_device_that_is_not_there_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="allowed: 'auto', 'cpu', 'cuda'"):
        calibrate_first("gpu", None, "auto", print)
