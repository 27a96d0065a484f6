"""A module outside the layers (embedding, head) whose block streams: plain autograd, but its weight is not kept.

Where autograd would save the weight, it is given a reference to the block; when backward asks, the block is fetched
again, and the tensor handed out holds the slot's lease for as long as backward needs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload_rt.layers.access import Access, GoneAccess, ReplacedForward, opened
from offload_rt.layers.block import Block, WeightView, weight_in
from planners.plans.schedule import Phase


@dataclass(frozen=True)
class BlockReference:
    """What autograd keeps instead of a weight of a streamed block: the block, and the view of it that was saved."""

    owner: StreamedModule
    view: WeightView


class StreamedModule(ReplacedForward):
    """Replaces the `forward` of a module outside the layers whose block streams. Its weights are not quantized."""

    def __init__(self, module: nn.Module, block: Block, access: Access) -> None:
        super().__init__(module)
        self.block = block
        self._access = access

    def let_go(self, gone: GoneAccess) -> None:
        """Has no memory of its runtime's any more, whoever still holds it."""
        self._access = gone

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the weight is in memory: calls neither fetch it nor let go of it, and backward passes find it."""
        with opened(self.block, self._access, Phase.FORWARD, training=torch.is_grad_enabled()):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.block.is_open:
            return self._forward(*args, **kwargs)
        training = torch.is_grad_enabled()
        with opened(self.block, self._access, Phase.FORWARD, training=training):
            if not training:
                return self._forward(*args, **kwargs)

            def pack(tensor: torch.Tensor) -> torch.Tensor | BlockReference:
                view = self.block.view_of(tensor)
                return tensor if view is None else BlockReference(self, view)

            with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
                return self._forward(*args, **kwargs)

    def view(self, reference: BlockReference) -> torch.Tensor:
        """The saved view again. The tensor holds the slot's lease, so the access ends here."""
        slot = self._access.acquire(Phase.BACKWARD, training=True)
        try:
            return weight_in(slot, reference.view)
        finally:
            del slot
            self._access.release()


def keep_head_input_contiguous(model: nn.Module) -> RemovableHandle | None:
    """Makes generation take no more memory than its activations; returns how to undo it, None without a head.

    When it generates, transformers gives the head the last position's hidden states, a slice of a batch. torch
    multiplies a slice row by row, with a copy of the weight for each: gigabytes with a large vocabulary.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Module):
        return None

    def contiguous(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if torch.is_grad_enabled() or not inputs or not isinstance(inputs[0], torch.Tensor):
            return None
        return (inputs[0].contiguous(), *inputs[1:])

    return head.register_forward_pre_hook(contiguous)


def _unpack(saved: torch.Tensor | BlockReference) -> torch.Tensor:
    return saved if isinstance(saved, torch.Tensor) else saved.owner.view(saved)
