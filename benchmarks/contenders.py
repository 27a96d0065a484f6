"""Contenders of a comparison: each holds its model in a process of its own and does one step when it is told to.

A contender is named by its kind and, joined by "+", its switches: `ours+num_slots=1`. A switch in capitals is set in
the environment of the process. What a process answers to: `contender_process`.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore::FutureWarning", "KINETO_LOG_LEVEL": "99"}


class ContenderFailed(Exception):
    """A contender's process reported an error or ended; carries what it said."""


class ContenderMissing(ContenderFailed):
    """A contender cannot take part here; says why."""


def parse(name: str) -> tuple[str, dict[str, str]]:
    """Kind and switches of a contender's name."""
    kind, *switches = name.split("+")
    return kind, dict(switch.split("=", 1) for switch in switches)


def check_names(names: Sequence[str], allowed: Mapping[str, set[str]]) -> str | None:
    """What is wrong with `names`; None where each is a kind of `allowed` with switches of its own."""
    for name in names:
        kind, *switches = name.split("+")
        if kind not in allowed:
            return f"--contenders: {kind!r} unknown; allowed: {', '.join(allowed)}"
        for switch in switches:
            key, equals, _ = switch.partition("=")
            if not equals or not (key.isupper() or key in allowed[kind]):
                return f"--contenders: {kind} has no switch {switch!r}; allowed: {sorted(allowed[kind])}"
    return None


class Contender:
    """One process that holds one model and does one step at a time."""

    def __init__(self, script: str, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.replies: list[dict[str, Any]] = []
        kind, switches = parse(name)
        environment = {key: value for key, value in switches.items() if key.isupper()}
        settings = settings | {
            "kind": kind,
            "switches": {key: value for key, value in switches.items() if key not in environment},
            "store": str(Path(settings["store"]) / name.replace("/", "_")),  # a store belongs to one run at a time
        }
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment,
        )

    def send(self, request: str) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise ContenderFailed(f"{self.name}: no pipe")
        with contextlib.suppress(BrokenPipeError):  # `receive` says what happened
            stdin.write(request + "\n")
            stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next reply. Blocks; raises `ContenderFailed`."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise ContenderFailed(f"{self.name}: ended with code {self._process.wait()}; its own words are above")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ContenderFailed(f"{self.name}: {reply['error']}")
        if "missing" in reply:
            raise ContenderMissing(reply["missing"])
        return reply

    def ask(self, request: str) -> dict[str, Any]:
        self.send(request)
        return self.receive()

    def step(self) -> float:
        """Seconds of one step."""
        self.replies.append(self.ask("step"))
        return float(self.replies[-1]["seconds"])

    def close(self) -> None:
        with contextlib.suppress(ContenderFailed):
            self.send("close")
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def started(script: str, names: Sequence[str], settings: dict[str, Any]) -> Iterator[list[Contender]]:
    """The contenders, ready for their first step. Imports run side by side, models are built one after the other."""
    contenders: list[Contender] = []
    try:
        for name in names:
            contenders.append(Contender(script, name, settings))
        for contender in contenders:
            contender.receive()
        for contender in contenders:
            contender.replies.append(contender.ask("build"))
        yield contenders
    finally:
        for contender in contenders:
            contender.close()
