"""What random lives have in common: an engine and a twin in plain PyTorch, compared operation by operation.

    seed ──► a configuration (what trains, by what, where it rests) and a program (operations, each with a number)
    each operation on the engine, then on the twin     results, random numbers, and what `check` looks at are equal

The engine may refuse an operation by an error of its own. Then nothing has changed, the twin does not do it, and the
life goes on.
"""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offload_rt.errors import OffloadError

Program = Sequence[tuple[str, int]]


class Refused(Exception):
    """The engine has refused something, by its cause."""


class Failed(Exception):
    """Something has failed on both sides, by its cause."""


class Lives(ABC):
    """One seed's run. `fired` counts what has happened, `history` has it in order."""

    of: Any
    """Its configuration."""

    def __init__(self) -> None:
        self.draw = random.Random()
        """Of the operation under way."""
        self.fired: Counter[str] = Counter()
        self.history: list[str] = []

    @abstractmethod
    def begin(self) -> None:
        """Makes both sides."""

    @abstractmethod
    def do(self, name: str, operation: Any) -> None:
        """Does one of a program's on both sides."""

    @abstractmethod
    def check(self) -> None:
        """Fails where the two are not equal."""

    @abstractmethod
    def after_refusal(self, name: str, error: BaseException | None) -> None:
        """Drops the gradients that there may be."""

    def after_failure(self, name: str, error: BaseException | None) -> None:
        raise AssertionError(f"{name} has failed") from error

    @abstractmethod
    def close(self) -> None:
        """Closes the engine as users do."""

    @abstractmethod
    def end(self) -> None:
        """Closes the engine if it is not, whatever it is in the middle of."""

    def live(self, program: Program, operations: Mapping[str, Any]) -> None:
        torch.manual_seed(11)
        try:
            self.begin()
            self.check()
            for number, (name, seed) in enumerate(program):
                self.draw = random.Random(seed)
                self.history.append(f"{number} {name}")
                torch.manual_seed(seed % 1000)
                try:
                    self.do(name, operations[name])
                except Refused as refused:
                    self.after_refusal(name, refused.__cause__)
                except Failed as failed:
                    self.after_failure(name, failed.__cause__)
                self.fired[name] += 1
                self.check()
            self.close()
        except Exception as error:
            error.add_note("\n".join(map(str, [self.of, *self.history])))
            raise
        finally:
            self.end()

    def both(self, what: str, of_engine: Callable[[], Any], of_twin: Callable[[], Any]) -> tuple[Any, Any]:
        """Does it on the engine, and then, unless that refuses, on the twin from the same random numbers. Raises
        `Refused`, or `Failed` where it fails on both by an error of the same type.
        """
        start = torch.get_rng_state()
        found, error = _result(of_engine)
        if isinstance(error, OffloadError):
            self.fired[f"refused {what}: {type(error).__name__}: {str(error)[:100]}"] += 1
            self.history.append(f"refused {what}: {error}")
            raise Refused(what) from error
        after = torch.get_rng_state()
        torch.set_rng_state(start)
        wanted, of_twins = _result(of_twin)
        if type(error) is not type(of_twins):
            raise AssertionError(f"{what}: {error!r} instead of {of_twins!r}") from (error or of_twins)
        if error is not None:
            self.fired[f"failed {what}"] += 1
            self.history.append(f"failed {what}: {error!r}")
            raise Failed(what) from error
        assert torch.equal(after, torch.get_rng_state()), f"{what}: other random numbers were drawn"
        same(what, found, wanted)
        return found, wanted


def _result(does: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return does(), None
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001 - held against the other side's
        return None, error


def same(what: str, found: Any, wanted: Any) -> None:
    """Fails unless both are equal to the bit; nan equals nan."""
    if isinstance(found, Tensor):
        assert isinstance(wanted, Tensor) and found.shape == wanted.shape and found.dtype == wanted.dtype, what
        assert torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)), f"{what}: {found} is not {wanted}"
    elif isinstance(found, dict):
        assert isinstance(wanted, dict), what
        assert found.keys() == wanted.keys(), f"{what}: {sorted(map(str, found.keys() ^ wanted.keys()))}"
        for key in found:
            same(f"{what}: {key}", found[key], wanted[key])
    else:
        assert found == wanted, f"{what}: {found} is not {wanted}"


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copies of what its groups have but parameters."""
    return [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


class Counted:
    """Something that a run tracks besides."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number = state["number"]
