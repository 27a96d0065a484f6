"""`offload-rt calibrate`: measures this machine and writes the profile that `plan --hardware FILE` reads.

    calibrate --nvme DIR --out FILE     this machine and the drive under DIR, to FILE
    calibrate                           what was measured here within a month, or a new measurement

A measurement is kept in the user's cache folder under the machine's identity. Torch is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from offload_rt.config import parse_nvme
from offload_rt.errors import ConfigError

EXAMPLES = """
example:
  offload-rt calibrate --nvme /mnt/ssd --out machine.json
  offload-rt plan --model llama3-8b --hardware machine.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--nvme", action="append", metavar="DIR", help="a folder on a drive to measure; once per drive")
    parser.add_argument(
        "--device",
        default="auto",
        help='where blocks compute: "cpu", "cuda:N" or "auto" (default): a GPU, if any',
    )
    parser.add_argument("--out", metavar="FILE", help="the profile as JSON; - is standard output")
    parser.add_argument("--again", action="store_true", help="measure, even if this machine was measured before")


def run(arguments: argparse.Namespace) -> int:
    drives = parse_nvme(arguments.nvme)
    for drive in drives:
        if not drive.path.is_dir():
            raise ConfigError(f"nvme: {drive.path} is not a folder")
    folders = tuple(drive.path.resolve() for drive in drives)
    from offload_rt.profiling import calibrate

    device = calibrate.device_named(arguments.device).name
    known = calibrate.identity(device, folders)
    name = calibrate.cache_name(known)
    say = sys.stderr.write if arguments.out == "-" else sys.stdout.write
    profile = None if arguments.again else calibrate.remembered(name, known)
    if profile is not None:
        say("measured before on this machine (--again measures anew)\n")
    else:
        say("measuring, less than a minute; other work on this machine shows in the numbers\n")
        sys.stdout.flush()
        measurement = calibrate.measure(device, folders)
        calibrate.keep(name, known, measurement)
        profile = json.loads(measurement.to_json())
        say(f"measured in {measurement.seconds:.0f} s\n")
    say(page(profile))
    if arguments.out == "-":
        sys.stdout.write(json.dumps(profile, indent=1) + "\n")
    elif arguments.out:
        try:
            Path(arguments.out).write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"out: {arguments.out}: {error.strerror}") from error
        say(f"written to {arguments.out}; offload-rt plan --hardware {arguments.out} uses it\n")
    return 0


def page(profile: dict[str, Any]) -> str:
    """The measured numbers in a table: median, quartiles, passes."""
    lines = [f"{profile['name']}", f"{'':<52}{'median':>10}{'quartiles':>24}{'passes':>8}"]
    for name, spread in profile["measured"].items():
        what, unit = scaled(spread["median"])
        low, high = (value / unit for value in (spread["low"], spread["high"]))
        lines.append(f"{name:<52.52}{what:>10}{f'{low:.3g} .. {high:.3g}':>24}{spread['passes']:>8}")
    return "\n".join(lines) + "\n"


def scaled(value: float) -> tuple[str, float]:
    """A rate with its prefix, and what that stands for."""
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}", unit
    return f"{value:.3g} ", 1.0
