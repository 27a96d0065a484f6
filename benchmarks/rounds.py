"""Comparing things that share a noisy machine: interleaved rounds, and ratios taken within a round.

A drive or a neighbour that slows down for a minute slows all contenders of that round alike, so that their ratio
holds where their speeds do not. The order within a round rotates, so that nobody is always the one who goes first.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Speeds = dict[str, list[float]]


def interleave(contenders: dict[str, Callable[[], float]], num_rounds: int) -> Speeds:
    """Runs every contender once per round and returns their results, in the order of the rounds.

    One unrecorded round comes first: memory is touched, files are laid out, clocks rise.
    """
    names = list(contenders)
    results: Speeds = {name: [] for name in names}
    for round_index in range(-1, num_rounds):
        turn = round_index % len(names)
        for name in names[turn:] + names[:turn]:
            result = contenders[name]()
            if round_index >= 0:
                results[name].append(result)
    return results


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread (least and greatest), with the values themselves."""
    return {"median": median(values), "min": min(values), "max": max(values), "values": list(values)}


def ratio(results: Speeds, name: str, reference: str) -> dict[str, Any]:
    """`name` over `reference`, round by round."""
    return summary([a / b for a, b in zip(results[name], results[reference], strict=True)])


def words_for(**paths: Path | None) -> dict[str, str]:
    """By path, as it was given and as it is, the word that stands for it in what is published."""
    return {str(path): word for word, given in paths.items() if given is not None for path in (given, given.resolve())}


def command(hidden: dict[str, str]) -> str:
    """This process's command line, with words put in place of folders, which are this machine's own business."""
    return " ".join(["python benchmarks/" + Path(sys.argv[0]).name, *(hidden.get(word, word) for word in sys.argv[1:])])


def as_json(results: dict[str, Any], hidden: dict[str, str], *, indent: int | None = 1) -> str:
    """`results` as the text of a file, with words put in place of folders wherever they stand: in a report's, too."""
    text = json.dumps(results, indent=indent)
    for folder in sorted(hidden, key=len, reverse=True):
        text = text.replace(json.dumps(folder)[1:-1], hidden[folder])
    return text + "\n"


def circumstances() -> dict[str, Any]:
    """What a reader needs in order to repeat a measurement."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is none
        commit = ""
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        models = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "commit": commit or "unknown",
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": models[0] if models else platform.machine(),
        "num_cpus": len(models),
        "isa": instruction_sets(),
    }


def run_alone(
    section: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], dict[str, Any]],
) -> None:
    """A section of native.py as a command of its own, with a file for its results."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="recorded rounds (default 7, and at least)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    add_arguments(parser)
    arguments = parser.parse_args()
    results = {**circumstances(), section: run(arguments)}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def instruction_sets() -> list[str]:
    """Those that the native core's fast paths are chosen by and that this machine has; empty without the core."""
    try:
        import _offload_rt_native as native
    except ImportError:
        return []
    return [name for name, present in native.isa().items() if present]
