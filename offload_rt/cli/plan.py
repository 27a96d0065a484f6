"""`offload-rt plan`: the planners' own command, with this command line's errors. Never imports torch."""

from __future__ import annotations

import argparse

from offload_rt.errors import ConfigError
from planners.command import add_arguments as add_arguments
from planners.command import run as run_plan
from planners.units import ProblemError


def run(arguments: argparse.Namespace) -> int:
    """Plans; a malformed question is a wrong call."""
    try:
        return run_plan(arguments)
    except ProblemError as error:
        raise ConfigError(str(error)) from error
