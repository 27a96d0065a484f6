"""`offload-rt train` in processes that get signals at chosen operations. For test_killed_command.

As a program it waits for lines of JSON, `{"words": [...], "signals": [[operation, signal], ...], "shown": file,
"pieces": elements}`, and forks a run for each, so that a kill costs no import of torch. It answers with a run's exit
code, negative where a signal ended it, and whether all its signals came. An operation is a read or write of the store,
a name that changes, a folder that is made or removed, an fsync, or a line of metrics.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - once, and not in every run

from offload_rt.cli import main as command
from offload_rt.cli import train_run
from offload_rt.training.run_folder import RunFolder
from offload_rt.transfers import links
from offload_rt.wiring.runtime_options import RuntimeOptions

NAMES = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "ftruncate")


class Signals:
    """Gives the process its signals, each in place of the operation of its number."""

    def __init__(self, at: list[tuple[int, int]]) -> None:
        self._at = sorted(at)
        self._done = 0

    def count(self) -> None:
        while self._at and self._at[0][0] <= self._done:
            os.kill(os.getpid(), self._at.pop(0)[1])
        self._done += 1

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def counting(*arguments: Any, **named: Any) -> Any:
            self.count()
            return call(*arguments, **named)

        return counting

    def watch(self) -> None:
        for name in NAMES:
            setattr(os, name, self.counted(getattr(os, name)))
        RunFolder.append_metrics = self.counted(RunFolder.append_metrics)  # type: ignore[method-assign]
        make = links.file_io

        def made() -> Any:
            io = make()
            io.start = self.counted(io.start)  # type: ignore[method-assign]
            return io

        links.file_io = made


def run(words: list[str], signals: list[tuple[int, int]], shown: str, pieces: int | None) -> int:
    output = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    if pieces is not None:
        train_run.RuntimeOptions = partial(RuntimeOptions, piece_elements=pieces)  # type: ignore[misc, assignment]
    Signals(signals).watch()
    try:
        return command.main(words)
    except BaseException:
        logging.exception("the command raised")
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run(**asked))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
