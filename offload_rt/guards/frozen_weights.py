"""Finds what somebody else writes into frozen weights that an engine has in its tiers.

A weight that rests in 4 bits, in HOST or on NVMe is a placeholder in the model between its layer's passes: what is
written there is gone when the layer is called, and is refused by name. One that stays in DEVICE memory in its own dtype
is the weight itself: what is written is computed with, as in a model without an engine. But it is in no checkpoint, and
another plan would bring the weight anew: so it is warned of, and the plan stays.

Torch counts what is written to a tensor, and what is put in its place has another address; what is written by `.data`
nobody sees. Neither is looked for by reading a weight. What torch counts while an adapter on a parameter is called is
none (`Block.num_set`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch

from offload_rt.errors import ConfigError
from offload_rt.layers.block import Binding, Block

logger = logging.getLogger("offload_rt")

State = tuple[int, int]
"""Of a tensor: how often torch has seen it written to, and where it lies."""


class FrozenWeights:
    """Those of some blocks, each as it is when this is made. Used by one thread."""

    def __init__(self, blocks: Sequence[Block] = ()) -> None:
        """No block is open, but for those that stay in DEVICE memory."""
        bindings = [(block, binding) for block in blocks for binding in block.bindings]
        self._stay = {block.name for block in blocks if block.is_open}
        self._placeholders = [each for each in bindings if not each[0].is_open or each[1].spec.is_quantized]
        self._weights = [each for each in bindings if each[0].is_open and not each[1].spec.is_quantized]
        for _, binding in self._placeholders:
            Block.hide(binding)  # as a block does that is closed
        self._known_placeholders = _states(self._placeholders)
        self._known_weights = _states(self._weights)
        self._said: set[str] = set()
        """Names of weights that were warned of."""

    def check(self, asked: str) -> None:
        """Raises `ConfigError` where placeholders were written to, which are what they were again then. Warns, once, of
        weights that were. `asked` is what somebody has called.
        """
        states = _states(self._placeholders)
        if states != self._known_placeholders:
            self._refuse(asked, states)
        new = [binding.spec.name for binding in self.written if binding.spec.name not in self._said]
        if new and torch.is_grad_enabled():
            self._said.update(new)
            logger.warning(
                "%d frozen weights were written to (first: %s): the run computes with them, but no checkpoint has "
                "them, and a run that goes on has those of the model again; the plan does not change any more",
                len(new), new[0],
            )  # fmt: skip

    @property
    def written(self) -> list[Binding]:
        """Weights that were written to, or have another tensor in their place. None of a placeholder."""
        states = _states(self._weights)
        if states == self._known_weights:
            return []
        return [
            binding
            for (_, binding), now, known in zip(self._weights, states, self._known_weights, strict=True)
            if now != known
        ]

    def check_saved(self, asked: str) -> None:
        """As `check`, before weights are read from where they rest: a tensor in a weight's place would be missing."""
        self.check(asked)
        known = {id(each): state for (_, each), state in zip(self._weights, self._known_weights, strict=True)}
        replaced = [each.spec.name for each in self.written if each.parameter.data_ptr() != known[id(each)][1]]
        if replaced:
            raise ConfigError(
                f"{asked}: {len(replaced)} frozen weights have another tensor in their place, by `.data` (first: "
                f"{replaced[0]}), which would be missing; write into the weight (`copy_`) instead"
            )

    def _refuse(self, asked: str, states: Sequence[State]) -> None:
        lost = []
        for number, (block, binding) in enumerate(self._placeholders):
            in_a_pass = block.is_decoded or (block.is_open and block.name not in self._stay)
            if in_a_pass or states[number] == self._known_placeholders[number]:
                continue
            binding.absent.fill_(float("nan") if binding.absent.is_floating_point() else 0)
            Block.hide(binding)
            [self._known_placeholders[number]] = _states([(block, binding)])
            lost.append(binding.spec.name)
        if lost:
            raise ConfigError(
                f"{asked}: {len(lost)} frozen weights were written to (first: {lost[0]}), which would be lost: they "
                f"rest in 4 bits, in HOST or on NVMe, and the model has placeholders. They are what they were. "
                f"Change them before engine(...), or in the checkpoint"
            )


def states(tensors: Iterable[torch.Tensor]) -> list[State]:
    """Of each: others, as soon as somebody has written into it or put another tensor in its place."""
    return [(tensor._version, tensor.data_ptr()) for tensor in tensors]


def _states(bindings: Iterable[tuple[Block, Binding]]) -> list[State]:
    return [
        (binding.parameter._version - block.num_set.get(binding.spec.name, 0), binding.parameter.data_ptr())
        for block, binding in bindings
    ]
