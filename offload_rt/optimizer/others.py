"""Steps that a loop takes by an optimizer of its own: trainers make one over all that trains where none is given.

Such an optimizer knows nothing of the engine, and the engine was not given it. Torch calls hooks of all optimizers
before each step, so its first one is seen before it changes anything, and the engine follows it from then on, or says
what to pass. Whose parameters are not the engine's, goes on unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from offload_rt.errors import ConfigError

_WHAT_TO_PASS = (
    "Give the loop engine.optimizer (a Trainer: optimizers=(engine.optimizer, None)), and choose its kind by "
    "engine(optimizer=)"
)


class OtherOptimizers:
    """Looks at the steps of optimizers that an engine does not know, until `remove`, or until nobody holds it."""

    def __init__(
        self,
        trainable: Iterable[nn.Parameter],
        known: Callable[[], Optimizer | None],
        follow: Callable[[Optimizer], None],
    ) -> None:
        """`known` gives the engine's optimizer. `follow` takes one that holds all of `trainable` and nothing else, or
        raises.
        """
        self._trainable = frozenset(map(id, trainable))
        self._known = known
        self._follow = follow
        self._handle = _weakly_hooked(self)

    def remove(self) -> None:
        self._handle.remove()

    def step_begins(self, optimizer: Optimizer) -> None:
        """Raises `ConfigError`, before anything is updated."""
        known = self._known()
        if optimizer is known or known is None:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        ours = len(held & self._trainable)
        if not ours or _is_part(optimizer, known) or _is_part(known, optimizer):
            return
        if held != self._trainable:
            others = f" and {len(held) - ours} others" if len(held) > ours else ""
            raise refusal(
                optimizer, f"it holds {ours} of the {len(self._trainable)} tensors that train{others}, and an engine "
                f"counts and saves steps of one optimizer over all of them and no others"
            )  # fmt: skip
        self._follow(optimizer)


def refusal(optimizer: Optimizer, why: str) -> ConfigError:
    """What is said of an optimizer that the engine cannot follow."""
    return ConfigError(
        f"{type(optimizer).__name__}.step: this optimizer is not the engine's, and {why}. {_WHAT_TO_PASS}"
    )


def _is_part(one: Optimizer, of: Optimizer) -> bool:
    """Whether `of` steps by `one`: a wrapper, whose steps are those of what it wraps."""
    return any(value is one for value in vars(of).values())


def _weakly_hooked(others: OtherOptimizers) -> RemovableHandle:
    """Torch would hold an engine that nobody closes: of that, a hook stays that does nothing."""
    held = weakref.ref(others)

    def step_begins(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (living := held()) is not None:
            living.step_begins(optimizer)

    return register_optimizer_step_pre_hook(step_begins)
