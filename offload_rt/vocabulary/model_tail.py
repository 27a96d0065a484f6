"""What a causal model of transformers does behind its backbone, for any of a call's hidden states.

The model's own forward does it, entered with a stand-in that gives the hidden states: final norm, head, what the model
makes of logits, and loss. It is run to its end, or up to its head, or from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from offload_rt.vocabulary.backbone import Backbone, with_hidden
from offload_rt.vocabulary.tiled_linear import TiledLinear

IGNORED = -100
"""The label that transformers' loss leaves out, unless the call says otherwise."""

_CHECKED_TOKENS = 16
"""Of the first tiled batch, on which tiles are held against the whole."""


class Mismatch(Exception):
    """The model's forward behind its backbone is not what tiles can do."""


class _Stop(Exception):
    """The head is reached: leaves a forward of which the rest is not wanted."""


class Tail:
    """The rest of one call. forward: the model's own; outputs: what its backbone gave, before the final norm."""

    def __init__(
        self,
        backbone: Backbone,
        forward: Callable[..., Any],
        outputs: Any,
        hidden_ND: torch.Tensor,
        arguments: dict[str, Any],
    ) -> None:
        self._backbone = backbone
        self._causal_forward = forward
        self._outputs = outputs
        self._hidden_ND = hidden_ND
        self._arguments = arguments
        self.ignore_index = int(arguments.get("ignore_index", IGNORED))
        self.output: Any = None
        """Of the last tile, without loss and logits."""

    def num_items(self, targets_N: torch.Tensor) -> Any:
        """What the sum of losses is divided by."""
        given = self._arguments.get("num_items_in_batch")
        return given if given is not None else (targets_N != self.ignore_index).sum()

    def loss(self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, num_items: Any) -> torch.Tensor:
        """The sum of the losses of these tokens, over `num_items`. A scalar; with a graph if gradients are on."""
        return self._run(hidden_CD, targets_C, num_items)[0]

    def head_inputs(self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, linear: TiledLinear) -> torch.Tensor:
        """What the head is given for these hidden states, [C, D]; with a graph if gradients are on."""
        reached: list[torch.Tensor] = []

        def stop(inputs: torch.Tensor) -> torch.Tensor:
            reached.append(inputs)
            raise _Stop

        try:
            with linear.answered(stop):
                self._enter(self._normed(hidden_CD), targets_C, lambda logits, *_, **__: logits.sum())
        except _Stop:
            inputs = reached.pop()
            if inputs.numel() == targets_C.numel() * inputs.shape[-1]:
                return inputs.reshape(-1, inputs.shape[-1])
            raise Mismatch("the model does not give its head one row for each hidden state") from None
        raise Mismatch("the model's forward does not call its head")

    def logits(
        self, product_CR: torch.Tensor, inputs_CD: torch.Tensor, targets_C: torch.Tensor, linear: TiledLinear
    ) -> torch.Tensor:
        """What the model makes of these products of its head, [C, R]; with a graph if gradients are on."""
        seen: list[torch.Tensor] = []

        def loss_function(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(logits)
            return logits.new_zeros(())

        with linear.answered(lambda _: product_CR.unsqueeze(0)):
            output = self._enter(inputs_CD.unsqueeze(0), targets_C, loss_function)
        if len(seen) != 1 or seen[0].shape[-1] != product_CR.shape[-1] or seen[0].numel() != product_CR.numel():
            raise Mismatch("logits of the head's rows are not one for each row")
        self.output = without_logits(output)
        return seen[0].reshape(product_CR.shape)

    def difference(self, targets_N: torch.Tensor) -> str | None:
        """Holds tiles of tokens against the whole on a few tokens of the call; says what differs."""
        hidden_CD, targets_C = self._checked(targets_N)
        num_tokens = targets_C.numel()
        half = num_tokens // 2
        try:
            with torch.no_grad():
                whole = self._run(hidden_CD, targets_C, num_tokens)[1]
                tiles = [self._run(hidden_CD[half:], targets_C[half:], num_tokens)[1]] if half else []
                tiles.insert(0, self._run(hidden_CD[: half or None], targets_C[: half or None], num_tokens)[1])
        except Mismatch as mismatch:
            return str(mismatch)
        if not _agree(torch.cat([tile.flatten(0, -2) for tile in tiles]), whole):
            return "the logits of some tokens depend on other tokens"
        return None

    def difference_by_rows(
        self, targets_N: torch.Tensor, linear: TiledLinear, together: Callable[..., torch.Tensor]
    ) -> str | None:
        """Holds tiles of the head's rows against the whole on a few tokens of the call; says what differs.

        together: the logits of all tiles, from what the head gets, labels, and what makes logits of products.
        """
        hidden_CD, targets_C = self._checked(targets_N)
        trains: list[bool] = []

        def logits(product_CR: torch.Tensor, inputs_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
            try:
                with torch.enable_grad():
                    found = self.logits(product_CR, inputs_CD, targets_C, linear)
            except RuntimeError as error:  # of shapes, most likely
                raise Mismatch(f"the model's forward cannot go on with some of its logits: {error}") from error
            trains.append(found.requires_grad)
            return found.detach()

        try:
            with torch.no_grad():
                whole = self._run(hidden_CD, targets_C, targets_C.numel())[1]
                tiles = together(self.head_inputs(hidden_CD, targets_C, linear), targets_C, logits)
        except Mismatch as mismatch:
            return str(mismatch)
        if any(trains):
            return "something between head and loss trains"
        if tiles.shape[-1] != whole.shape[-1] or not _agree(tiles, whole):
            return "some logits depend on other logits of their token"
        return None

    def _checked(self, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens on which tiles are held against the whole: from the first that has a label."""
        num_tokens = min(_CHECKED_TOKENS, targets_N.numel())
        learned = (targets_N != self.ignore_index).nonzero().flatten()
        start = min(int(learned[0]) if learned.numel() else 0, targets_N.numel() - num_tokens)
        return self._hidden_ND[start : start + num_tokens], targets_N[start : start + num_tokens]

    def _run(
        self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, num_items: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits of these tokens, by the model's own forward."""
        inner: Callable[..., torch.Tensor] = self._backbone.causal.loss_function  # type: ignore[assignment]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def loss_function(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs.update(shift_labels=targets_C.unsqueeze(0), num_items_in_batch=num_items)
            loss = inner(logits, *args, **kwargs)
            seen.append((loss, logits))
            return loss

        output = self._enter(self._normed(hidden_CD), targets_C, loss_function)
        if len(seen) != 1 or output.loss is not seen[0][0]:
            raise Mismatch("the model's loss is more than the cross-entropy of its logits")
        self.output = without_logits(output, seen[0][0].detach())
        if seen[0][1].numel() // seen[0][1].shape[-1] != targets_C.numel():
            raise Mismatch("the model does not give one row of logits for each hidden state")
        return seen[0]

    def _normed(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        norm, hidden_1CD = self._backbone.norm, hidden_CD.unsqueeze(0)
        return hidden_1CD if norm is None else norm(hidden_1CD)

    def _enter(
        self, hidden_1CD: torch.Tensor, targets_C: torch.Tensor, loss_function: Callable[..., torch.Tensor]
    ) -> Any:
        """The model's forward with these hidden states, behind the final norm, and this loss."""
        causal: Any = self._backbone.causal
        own = causal.__dict__.get("_loss_function")
        causal._loss_function = loss_function
        outputs = with_hidden(self._outputs, hidden_1CD)
        arguments = {**self._arguments, "labels": targets_C.unsqueeze(0), "return_dict": True}
        try:
            with self._backbone.replaced(lambda *_: outputs):
                return self._causal_forward(**arguments)
        finally:
            if own is None:
                del causal._loss_function
            else:
                causal._loss_function = own


def without_logits(output: Any, loss: torch.Tensor | None = None) -> Any:
    """The output without its logits, with `loss` if one is given. See [Note: what tiling changes] in loss_head."""
    if not isinstance(output, dict):
        return output
    entries = {name: value for name, value in output.items() if name != "logits"}
    if loss is not None:
        entries["loss"] = loss
    return type(output)(**entries)


def _agree(found: torch.Tensor, whole: torch.Tensor) -> bool:
    tolerance = 1e-4 if whole.dtype == torch.float32 else 2e-2
    return torch.allclose(found, whole.flatten(0, -2), rtol=tolerance, atol=tolerance, equal_nan=True)
