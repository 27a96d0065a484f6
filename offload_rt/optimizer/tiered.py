"""The optimizer that users see where state is tiered: param groups as ever, the step is the engine's.

[Note: a state_dict without state]
Trainers and accelerate ask any optimizer for its state_dict, to have it on their device and load it again, and to save
it. So there is one, with param groups; of the state it says of which step it is, in the tiers. It is loaded only where
the engine's state is of that step, which whoever goes on has loaded before by `engine.load_checkpoint`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from offload_rt.errors import ConfigError, UnsupportedModule
from offload_rt.optim import run_closure

logger = logging.getLogger("offload_rt")

STEP_IN_TIERS = "step_of_state_in_tiers"
"""What a state_dict has in place of state: the step that its state was of, in the tiers."""


class TieredOptimizer(torch.optim.Optimizer):
    """Takes over the param groups of the optimizer that the user made; schedulers and per-group options work on them.

    Has no state of its own: masters and moments rest where the plan says, and are saved by `engine.save_checkpoint`.
    """

    def __init__(
        self,
        made: torch.optim.Optimizer,
        step: Callable[[], None],
        forget: Callable[[], None],
        step_number: Callable[[], int],
    ) -> None:
        self.kind = type(made)
        self._is_warned = False
        super().__init__(made.param_groups, made.defaults)
        self.serve(step, forget, step_number)

    def serve(self, step: Callable[[], None], forget: Callable[[], None], step_number: Callable[[], int]) -> None:
        """From now on, it steps and forgets by these; `step_number` is how many steps its state has taken."""
        self._step = step
        self._forget = forget
        self._step_number = step_number

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the engine. Blocks. A `closure` takes the gradients, once, before; its loss is returned."""
        loss = run_closure(closure)
        self._step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of this step, and what was updated with them."""
        self._forget()
        super().zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "_forget", None) is not None:
            raise UnsupportedModule("optimizer.add_param_group: what trains is laid out when the engine is made")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Param groups as torch has them, no state, and the step that this is of: [Note: a state_dict without state].
        Warns, once.
        """
        step = self._step_number()
        if step and not self._is_warned:
            self._is_warned = True
            logger.warning(
                "optimizer.state_dict: param groups alone; the state of step %d rests in the tiers, and "
                "engine.save_checkpoint saves it", step,
            )  # fmt: skip
        return {**super().state_dict(), STEP_IN_TIERS: step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over param groups, in place. Raises `UnsupportedModule` for what has state, `ConfigError` where the
        engine's is of another step, or the groups are others.
        """
        step, here = state_dict.get(STEP_IN_TIERS), self._step_number()
        if step is None:
            raise UnsupportedModule("optimizer.load_state_dict: engine.load_checkpoint loads state into the tiers")
        if step != here:
            raise ConfigError(
                f"optimizer.load_state_dict: saved at step {step}, without the state, which rested in tiers; the "
                f"engine's is of step {here}. First engine.load_checkpoint, from where engine.save_checkpoint has "
                f"saved step {step}"
            )
        saved = state_dict["param_groups"]
        if [group["params"] for group in saved] != [group["params"] for group in super().state_dict()["param_groups"]]:
            raise ConfigError("optimizer.load_state_dict: the saved parameter groups are not those of this optimizer")
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})
