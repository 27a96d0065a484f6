"""Before `offload-rt train` runs on a GPU for the first time: `offload-rt calibrate`, in a process of its own.

The optimiser fills the memory that there is, and needs this machine's rates for that; the fixed rule streams what would
fit. Whoever trains for hours waits for it once. What it took of memory is gone with its process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

from offload_rt.arguments import AUTO, OPTIMISE, calibrated_for, calibration_words
from offload_rt.config import EngineConfig, parse_nvme
from offload_rt.transfers.device_cuda import find_device


def calibrate_first(device: str, nvme: Sequence[str] | None, plan: str, say: Callable[[str], None]) -> None:
    """Measures this machine where `plan` is to be made for a GPU that was not measured, and blocks for less than a
    minute. Where that fails it says why and goes on: the rule's plan needs no rates. Raises `ConfigError` as the engine
    would.
    """
    config = EngineConfig(device=find_device(device), nvme=parse_nvme(nvme))
    are_there = all(drive.path.is_dir() for drive in config.nvme)  # otherwise the engine says so
    if plan not in (AUTO, OPTIMISE) or config.device == "cpu" or not are_there or calibrated_for(config) is not None:
        return
    say("measuring this GPU and these drives, once, in less than a minute: their rates decide the plan")
    command = [sys.executable, "-m", "offload_rt.cli.main", *calibration_words(config)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        said = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        say(f"warning: not measured: {said[-1]}; plans are made without these rates")
