"""A linear program, built row by row and solved by HiGHS, with a certificate of its bound.

Rows are scaled by their largest coefficient: rows in raw bytes make HiGHS call feasible programs infeasible. Every
variable has finite bounds, so that any dual values give a valid lower bound by weak duality; `certified_bound` computes
it from the program alone, and trusts nothing that the solver says about optimality.

[Note: presolved whole numbers]
What HiGHS 1.14 presolves in whole numbers may come out as a worse solution, called optimal: its aggregator (rule 12)
takes a whole number and the share that is a multiple of it for one (github.com/ERGO-Code/HiGHS/issues/3073). Of 600
programs of tiny questions 39 were, by up to 21 %. Whole numbers are solved as they are, which takes twice the
milliseconds; relaxations are presolved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Terms = list[tuple[int, float]]

AGAIN = (("presolve", "off"), ("simplex_scale_strategy", 4))
"""Options of HiGHS with which a program is solved again, one after the other, where it ended without a status: what
presolve stumbled over is solved without it, and what is feasible in its own scaling alone with another one.
"""


class SolverMissing(RuntimeError):
    """HiGHS is not installed; the greedy planner needs no solver."""


class SolverFailed(RuntimeError):
    """HiGHS ended without a result: a time limit, or numbers that it cannot handle. Not the same as infeasible."""

    def __init__(self, status: str) -> None:
        self.status = status
        super().__init__(f"HiGHS ended with status {status!r}")


@dataclass(frozen=True)
class Solution:
    """An optimum."""

    values: list[float]
    duals: list[float]
    """Of the rows, unscaled: what the objective gains per unit of a row's bound."""


@dataclass
class Program:
    """Minimise cost * x, subject to low <= row * x <= high and 0 <= x <= high."""

    high: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    rows: list[dict[int, float]] = field(default_factory=list)
    row_low: list[float] = field(default_factory=list)
    row_high: list[float] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    """Rows that somebody asks about later."""
    whole: list[int] = field(default_factory=list)
    """Variables that take whole numbers, where that is asked for."""

    def variable(self, high: float, *, cost: float = 0.0) -> int:
        """A variable between 0 and `high`. Raises `ValueError` for a bound that is not finite."""
        if not math.isfinite(high):
            raise ValueError("program: every variable needs finite bounds, or its dual bound is worthless")
        self.high.append(high)
        self.cost.append(cost)
        return len(self.high) - 1

    def whole_number(self, high: int) -> int:
        """A variable between 0 and `high` that a solution may have to round (`solve`)."""
        self.whole.append(self.variable(float(high)))
        return self.whole[-1]

    def row(self, terms: Terms, low: float, high: float, name: str | None = None) -> None:
        coefficients: dict[int, float] = {}
        for variable, value in terms:
            if value:
                coefficients[variable] = coefficients.get(variable, 0.0) + value
        if name is not None:
            self.names[name] = len(self.rows)
        self.rows.append(coefficients)
        self.row_low.append(low)
        self.row_high.append(high)

    def at_most(self, terms: Terms, high: float, name: str | None = None) -> None:
        self.row(terms, -math.inf, high, name)

    def solve(self, *, time_limit_seconds: float = 10.0, in_whole_numbers: bool = False) -> Solution | None:
        """The optimum; None if the program is infeasible. Raises `SolverFailed` and `SolverMissing`.

        in_whole_numbers: what should be a whole number is one; there are no duals then (zeros). Otherwise a relaxation.
        """
        try:
            import highspy
        except ImportError as error:
            raise SolverMissing("highspy is not installed (pip install 'highspy<1.15')") from error
        import numpy as np

        scales = [1.0 / max((abs(v) for v in row.values()), default=1.0) for row in self.rows]
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.high), len(self.rows)
        lp.col_cost_ = np.array(self.cost)
        lp.col_lower_, lp.col_upper_ = np.zeros(len(self.high)), np.array(self.high)
        lp.row_lower_ = np.array([v * s for v, s in zip(self.row_low, scales, strict=True)])
        lp.row_upper_ = np.array([v * s for v, s in zip(self.row_high, scales, strict=True)])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0] + [len(row) for row in self.rows]).astype(np.int32)
        lp.a_matrix_.index_ = np.array([v for row in self.rows for v in row], dtype=np.int32)
        lp.a_matrix_.value_ = np.array([v * s for row, s in zip(self.rows, scales, strict=True) for v in row.values()])
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        if in_whole_numbers and self.whole:
            kinds = [highspy.HighsVarType.kContinuous] * len(self.high)
            for variable in self.whole:
                kinds[variable] = highspy.HighsVarType.kInteger
            lp.integrality_ = kinds
            highs.setOptionValue("presolve", "off")  # [Note: presolved whole numbers]
        highs.setOptionValue("threads", 1)
        highs.setOptionValue("random_seed", 0)
        highs.setOptionValue("time_limit", float(time_limit_seconds))
        highs.passModel(lp)
        highs.run()
        status = highs.getModelStatus()
        for option, value in AGAIN:
            if status not in (highspy.HighsModelStatus.kNotset, highspy.HighsModelStatus.kUnknown):
                break
            highs.setOptionValue(option, value)
            highs.clearSolver()
            highs.run()
            status = highs.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        if status != highspy.HighsModelStatus.kOptimal:
            raise SolverFailed(highs.modelStatusToString(status))
        found = highs.getSolution()
        return Solution(
            values=list(found.col_value),
            duals=[float(d) * s for d, s in zip(found.row_dual or [0.0] * len(scales), scales, strict=True)],
        )

    def certified_bound(self, duals: list[float]) -> float:
        """A lower bound on the objective from any row duals, by weak duality: no solver is trusted."""
        reduced = list(self.cost)
        bound = 0.0
        for dual, row, low, high in zip(duals, self.rows, self.row_low, self.row_high, strict=True):
            side = low if dual > 0 else high
            if dual == 0.0 or not math.isfinite(side):
                continue  # a dual of the wrong sign is rounding: zero is as valid
            bound += dual * side
            for variable, value in row.items():
                reduced[variable] -= dual * value
        return bound + sum(min(value, 0.0) * high for value, high in zip(reduced, self.high, strict=True))
