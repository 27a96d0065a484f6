"""`python -m planners`: the plan command, where only this package is installed."""

from __future__ import annotations

import argparse
import sys

from planners.command import DESCRIPTION, add_arguments, run
from planners.errors import PlanInfeasible
from planners.units import ProblemError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m planners",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except ProblemError as error:
        sys.stderr.write(f"planners: error: {error}\n")
        return 2
    except PlanInfeasible as error:
        sys.stderr.write(f"planners: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
