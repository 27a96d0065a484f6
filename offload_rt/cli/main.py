"""`offload-rt`: finds the command, runs it, and turns errors into one line and an exit code.

    0   done                            1   the world failed: a disk, a budget, a broken file
    2   the call was wrong              128 + n   ended by signal n (Ctrl-C, SIGTERM), with its state saved where it
                                                  says so

A command is a module with `add_arguments` and `run`; it is imported only when it is called, and imports torch
only when it runs. `OFFLOAD_RT_TRACEBACK=1` shows the whole traceback of our own errors.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn, Protocol, cast

from offload_rt.errors import ConfigError, DataError, OffloadError, PlanInfeasible, nearest

COMMANDS = {
    "plan": "what would happen, before anything does: no GPU, no weights, no torch",
    "calibrate": "measure this machine, in less than a minute, for plan --hardware",
    "train": "fine-tune a model on your data",
    "report": "what a training run has come to, while it runs or later",
    "doctor": "what this machine offers, tried out; paste it into an issue",
    "clean": "list, and with --yes remove, weight stores that no run uses",
}
TRACEBACK_VARIABLE = "OFFLOAD_RT_TRACEBACK"


class Command(Protocol):
    """What a module in this folder offers."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...
    def run(self, arguments: argparse.Namespace, /) -> int: ...


class Parser(argparse.ArgumentParser):
    """argparse that raises `ConfigError` and names the nearest option. Abbreviations would hide mistakes."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        # Unknown options first: "--modle x" would otherwise be reported as a missing --model.
        options = [name for action in self._actions for name in action.option_strings]
        for word in argv:
            name = word.partition("=")[0]
            if name.startswith("--") and len(name) > 2 and name not in options:
                raise ConfigError(f"unknown option {name}; {nearest(name, [o for o in options if o.startswith('--')])}")
        arguments, rest = self.parse_known_args(argv)
        if rest:
            raise ConfigError(f"unexpected argument {rest[0]!r} (see {self.prog} --help)")
        return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with _terminable():
            return _run(words)
    except (OffloadError, PlanInfeasible) as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        sys.stderr.write(f"offload-rt: error: {' '.join(str(error).split())}\n")
        return 2 if isinstance(error, (ConfigError, DataError)) else 1
    except _Terminated:
        sys.stderr.write("offload-rt: terminated\n")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        sys.stderr.write("offload-rt: aborted\n")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has gone (`offload-rt doctor | head`); nothing more can be written there.
        _show_no_more()
        return 1
    except OSError as error:  # what no part of ours has an error for: an output on a full drive
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        sys.stderr.write(f"offload-rt: error: {error}\n")
        try:
            sys.stdout.flush()
        except OSError:
            _show_no_more()
        return 1


def _show_no_more() -> None:
    """What waits to be written to our output goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is answered as Ctrl-C is."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM unwinds what is under way, so that files are closed, and threads ended; as the first process of a
    container, nothing would happen otherwise. Who has handlers of his own keeps them.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    process = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        if os.getpid() != process:  # a forked child, which inherits this, has nothing of ours to unwind
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(words: Sequence[str]) -> int:
    """Runs one command; returns the exit code. Raises what the command raises."""
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if words[0] in ("-V", "--version", "version"):
        from offload_rt import __version__

        sys.stdout.write(f"offload-rt {__version__}\n")
        return 0
    name = words[0]
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise ConfigError(f"unknown {kind} {name!r}; {nearest(name, COMMANDS)}")
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"offload-rt runs on Linux, including WSL2, not on {sys.platform}")
    command = cast(Command, importlib.import_module(f"offload_rt.cli.{name}"))
    parser = Parser(f"offload-rt {name}", COMMANDS[name][0].upper() + COMMANDS[name][1:] + ".")
    command.add_arguments(parser)
    return command.run(parser.parse(words[1:]))


def usage() -> str:
    commands = "".join(f"  {name:<10} {text}\n" for name, text in COMMANDS.items())
    return (
        textwrap.dedent(
            """\
        usage: offload-rt COMMAND [OPTIONS]     (offload-rt COMMAND --help; offload-rt --version)

        Train models that are far larger than the memory they train in, on one machine.

        """
        )
        + commands
    )


if __name__ == "__main__":
    sys.exit(main())
