"""The optimizer that users see where state is tiered: param groups as ever, the step is the engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from offload_rt.errors import UnsupportedModule


class TieredOptimizer(torch.optim.Optimizer):
    """Takes over the param groups of the optimizer that the user made; schedulers and per-group options work on them.

    Has no state of its own: masters and moments rest where the plan says, and are saved by `engine.save_checkpoint`.
    """

    def __init__(self, made: torch.optim.Optimizer, step: Callable[[], None], forget: Callable[[], None]) -> None:
        self.kind = type(made)
        super().__init__(made.param_groups, made.defaults)
        self.serve(step, forget)

    def serve(self, step: Callable[[], None], forget: Callable[[], None]) -> None:
        """From now on, it steps and forgets by these."""
        self._step = step
        self._forget = forget

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of the engine. Blocks."""
        if closure is not None:
            raise UnsupportedModule("optimizer.step: a closure would run the model again; tiered state steps once")
        self._step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of this step, and what was updated with them."""
        self._forget()
        super().zero_grad(set_to_none=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "_forget", None) is not None:
            raise UnsupportedModule("optimizer.add_param_group: what trains is laid out when the engine is made")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Refused: the state is larger than memory."""
        raise UnsupportedModule("optimizer.state_dict: state rests in the tiers; engine.save_checkpoint saves it")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused, as `state_dict` is."""
        raise UnsupportedModule("optimizer.load_state_dict: engine.load_checkpoint loads state into the tiers")
