"""What gpu.py asks before it measures: is everything here that it runs, and do the tests pass?"""

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from limited import Ended, run_limited

from offload_rt.native import why_not

HERE = Path(__file__).resolve().parent
STUCK_SECONDS = 60
"""A test that takes longer has all its threads' stacks printed."""
TEST_SECONDS = 100
"""One that takes as long is ended: with the 300 s that it has otherwise, it would be the last one of a gate."""
WHY_CHARACTERS = 2000
"""Of what a test has said at its end."""
MODULES = ("transformers", "peft", "accelerate", "triton", "safetensors", "psutil")
"""Without one of these nothing of use is measured."""
PARTS = {
    "highspy": "contenders that are planned by the optimiser are left out, and tests of its plans",
    "pytest": "no test runs", "hypothesis": "no test runs", "aiofiles": "tests without the native core fail",
    "rich": "tests of the command line fail",
}  # fmt: skip
"""Modules without which the rest is measured, and what is not then."""


def missing(modules: Sequence[str] = MODULES) -> list[str]:
    """What a run needs and has not. Without the native core steps would be measured that encode for minutes first."""
    found = [name for name in modules if importlib.util.find_spec(name) is None]
    if reason := why_not():
        found.append(f"the native core ({reason}): python setup.py build_ext --inplace")
    return found


def missing_parts() -> dict[str, str]:
    """Of `PARTS`, what is not installed."""
    return {name: why for name, why in PARTS.items() if importlib.util.find_spec(name) is None}


def tested(path: Path, seconds: float) -> dict[str, Any]:
    """Runs the tests of a file; see `verdict_of_tests`. What became of each stands under `tests`, passed or not."""
    # Twice verbose, since the project's own options are quiet: a line for each test, as it ends.
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--tb=short", "-rfEs", "--durations=10"]
    limits = ["-o", f"faulthandler_timeout={STUCK_SECONDS}", "-o", f"timeout={TEST_SECONDS}"]
    settings = ["-c", str(HERE.parent / "pyproject.toml"), *limits]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        ended = run_limited([*command, *settings, f"--junit-xml={report}", str(path)], seconds)
        return verdict_of_tests(ended, seconds) | {"tests": outcomes(report)}


def verdict_of_tests(ended: Ended, seconds: float) -> dict[str, Any]:
    """What pytest said at its end; which tests failed, and all that is left of its words, where it is not well."""
    lines = ended.tail.strip().splitlines() or ["nothing was written"]
    closing = [line.strip("= ") for line in lines if line.startswith("=") and " in " in line]
    result: dict[str, Any] = {"ok": ended.code == 0, "summary": closing[-1] if closing else lines[-1]}
    if ended.code is None:
        result["error"] = f"not done after {seconds:.0f} s"
    if ended.code != 0:
        result["failed"] = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        result["tail"] = lines
    return result


def outcomes(report: Path) -> dict[str, dict[str, Any]]:
    """What became of each test, the seconds that it took, and the end of what it said; none where pytest was killed.

    Of many failures the first says most, and is the first that is missing in the tail of what was printed.
    """
    if not report.exists():
        return {}
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ended = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        of = {"outcome": "passed" if ended is None else ended.tag, "seconds": float(case.get("time", 0.0))}
        if ended is not None:
            of["why"] = (ended.text or ended.get("message") or "")[-WHY_CHARACTERS:]
        found[str(case.get("name"))] = of
    return found
