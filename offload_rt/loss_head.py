"""The loss head by tiles: final norm, head and cross-entropy run for some tokens at a time; logits never exist whole.

For a causal language model of transformers that is called with labels. Only positions with a label are computed. The
gradients are taken in forward, chunk by chunk, so that no chunk's logits wait for backward and none is computed twice:

    forward     backbone -> hidden_ND | per chunk: norm, head, loss, and its gradient | sum of the losses
    backward    the stored gradient of hidden_ND, times the gradient of the loss

The model's own `forward` does the work: it is entered once with its backbone in place, and left by an exception when
that is done; then once a chunk with a stand-in that gives the chunk's hidden states. So scaling, softcapping and casts
are the model's. Tiling the head is as in ALST (arXiv 2506.13996); taking gradients in forward as in Liger Kernel.

[Note: what tiling changes]
It is a cut (design, section 7): the sums of losses and of the head's own gradients run in another order, and the rows
of a bf16 product may depend on how many there are. A batch that is no longer than one chunk runs whole, bit for bit.
Whichever way the loss is taken, the output has no logits beside it: whoever wants them calls the model without labels.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from offload_rt.access import graph_is_kept, put_forward_back, without_hooks
from offload_rt.backbone import Backbone, with_hidden
from offload_rt.transients import Transients

logger = logging.getLogger("offload_rt")

IGNORED = -100
"""The label that transformers' loss leaves out, unless the call says otherwise."""

_CHECKED_TOKENS = 16
"""Of the first tiled batch, on which tiles are held against the whole."""


@dataclass
class LossHeadCounters:
    """What the loss head did since the start."""

    num_tiles: int = 0
    num_tokens: int = 0
    """Hidden states that went through the head in tiles."""
    num_whole: int = 0
    """Calls with labels that ran whole: short ones, and those that tiling does not serve."""


class LossHead:
    """Replaces the `forward` of a causal model while the engine lives.

    causal: what `find_causal_model` gave. chunk_tokens: most rows of a tile. held: makes the head's weights stay in
    memory inside; a streamed head is fetched once a call and not once a tile. between: called before a tile, and before
    its gradients, which are as large as the vocabulary, are added up.
    """

    def __init__(
        self,
        causal: nn.Module,
        chunk_tokens: int,
        held: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        *,
        between: Callable[[], None] = lambda: None,
        transients: Transients | None = None,
    ) -> None:
        self.causal = causal
        self.chunk_tokens = chunk_tokens
        self.counters = LossHeadCounters()
        self.between = between
        self.transients = transients if transients is not None else Transients()
        self._held = held
        self._forward: Callable[..., Any] = causal.forward
        self._had_own_forward = "forward" in causal.__dict__
        # transformers looks at the parameters of a model's forward
        self.__signature__ = inspect.signature(causal.forward)
        self.backbone = Backbone(causal)
        self.refusal: str | None = None
        """Why this model's loss is not taken by tiles after all; None where it is."""
        self._is_checked = False

    def attach(self) -> None:
        self.causal.forward = self

    def detach(self) -> None:
        put_forward_back(self.causal, self._forward, had_own=self._had_own_forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._named(args, kwargs)
        labels = arguments.get("labels")
        if labels is None:
            return self._forward(*args, **kwargs)
        if labels.numel() <= self.chunk_tokens or self.refusal is not None or not self._serves(arguments):
            return self._whole(arguments)
        reached = self._run_backbone(arguments)
        if isinstance(reached, _Refused):
            return self._without_logits(reached.output)
        return self._finish(reached, arguments)

    def report(self) -> dict[str, Any]:
        """What the engine's report says of it."""
        return {"chunk_tokens": self.chunk_tokens, "runs_whole_because": self.refusal, **asdict(self.counters)}

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self.__signature__.bind(*args, **kwargs).arguments
        for parameter in self.__signature__.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(parameter.name, {}))
        return dict(bound)

    def _serves(self, arguments: dict[str, Any]) -> bool:
        """Whether nothing is asked that needs all tokens at once."""
        config = getattr(self.causal, "config", None)
        keep = arguments.get("logits_to_keep", 0)
        routers = arguments.get("output_router_logits", getattr(config, "output_router_logits", False))
        tuples = arguments.get("return_dict") is False
        kept = isinstance(keep, torch.Tensor) or keep != 0
        return not (routers or tuples or kept or arguments.get("output_hidden_states"))

    def _whole(self, arguments: dict[str, Any]) -> Any:
        self.counters.num_whole += 1
        return self._without_logits(self._forward(**arguments))

    def _refuse(self, why: str) -> None:
        self.refusal = why
        logger.warning("the loss head runs whole, its logits are not bounded: %s", why)

    def _run_backbone(self, arguments: dict[str, Any]) -> _Reached | _Refused:
        """Runs the model up to its hidden states; the whole of it where it does not call its backbone as expected."""
        reached: list[_Reached] = []

        def run(backbone: nn.Module, args: Any, kwargs: Any) -> Any:
            with self.backbone.without_norm(backbone) as final:
                outputs = backbone(*args, **kwargs)
            last = getattr(outputs, "last_hidden_state", None)
            if last is None or last.dim() < 2 or last.numel() // last.shape[-1] != arguments["labels"].numel():
                self._refuse("the backbone does not give one hidden state for each label")
                return outputs
            hidden, self.backbone.norm = final.before(last)
            reached.append(_Reached(with_hidden(outputs, hidden), hidden.reshape(-1, hidden.shape[-1])))
            raise _Stop

        try:
            with self.backbone.replaced(run):
                output = self._forward(**arguments)
        except _Stop:
            return reached.pop()
        if self.refusal is None:
            self._refuse("the model's forward does not call its backbone")
        return _Refused(output)

    def _finish(self, reached: _Reached, arguments: dict[str, Any]) -> Any:
        targets_N = _targets(arguments)
        tail = _Tail(self, reached, arguments)
        with self._held():
            if not self._is_checked:
                difference = tail.difference(targets_N)
                self._is_checked = True  # not before: an error in it must not stand for a check
                if difference is not None:
                    self._refuse(difference)
            if self.refusal is not None:
                return self._finish_whole(reached, arguments)
            rows_M = (targets_N != tail.ignore_index).nonzero().flatten()
            if not rows_M.numel():  # the model's own loss of nothing
                rows_M = rows_M.new_zeros(1)
            parameters = self.backbone.trainable_behind()
            loss = _Tiles.apply(tail, reached.hidden_ND, targets_N, rows_M, *parameters)  # type: ignore[no-untyped-call]
        return self._without_logits(tail.output, loss)

    def _finish_whole(self, reached: _Reached, arguments: dict[str, Any]) -> Any:
        """The rest of the forward as it would have been."""
        last = reached.outputs.last_hidden_state
        if self.backbone.norm is not None:
            last = self.backbone.norm(reached.hidden_ND.view(last.shape))
        with self.backbone.replaced(lambda *_: with_hidden(reached.outputs, last)):
            return self._without_logits(self._forward(**arguments))

    @staticmethod
    def _without_logits(output: Any, loss: torch.Tensor | None = None) -> Any:
        """The output without its logits, with `loss` if one is given. See [Note: what tiling changes]."""
        if not isinstance(output, dict):
            return output
        entries = {name: value for name, value in output.items() if name != "logits"}
        if loss is not None:
            entries["loss"] = loss
        return type(output)(**entries)


class _Stop(Exception):
    """The backbone has run: leaves a forward whose first half is done."""


@dataclass
class _Reached:
    """Where a forward was left: what the backbone gave, and the hidden states before the final norm."""

    outputs: Any
    hidden_ND: torch.Tensor


@dataclass
class _Refused:
    """A forward that ran to its end."""

    output: Any


class _Tail:
    """What a model does behind its backbone, for any of the call's hidden states."""

    def __init__(self, head: LossHead, reached: _Reached, arguments: dict[str, Any]) -> None:
        self._head = head
        self._outputs = reached.outputs
        self._hidden_ND = reached.hidden_ND
        self._arguments = arguments
        self._arguments_of_loss: dict[str, Any] = {}
        self.ignore_index = int(arguments.get("ignore_index", IGNORED))
        self.chunk_tokens = head.chunk_tokens
        self.counters = head.counters
        self.between = head.between
        self.transients = head.transients
        self.wants_grad = torch.is_grad_enabled()
        self.output: Any = None
        """Of the last tile, without loss and logits."""

    def num_items(self, targets_N: torch.Tensor) -> Any:
        """What the sum of losses is divided by."""
        given = self._arguments.get("num_items_in_batch")
        return given if given is not None else (targets_N != self.ignore_index).sum()

    def loss(self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, num_items: Any) -> torch.Tensor:
        """The sum of the losses of these tokens, over `num_items`. A scalar; with a graph if gradients are on."""
        return self._run(hidden_CD, targets_C, num_items)[0]

    def difference(self, targets_N: torch.Tensor) -> str | None:
        """Holds tiles against the whole on a few tokens of the call; says what differs."""
        num_tokens = min(_CHECKED_TOKENS, targets_N.numel())
        learned = (targets_N != self.ignore_index).nonzero().flatten()
        start = min(int(learned[0]) if learned.numel() else 0, targets_N.numel() - num_tokens)
        hidden_CD, targets_C = self._hidden_ND[start : start + num_tokens], targets_N[start : start + num_tokens]
        half = num_tokens // 2
        try:
            with torch.no_grad():
                whole = self._run(hidden_CD, targets_C, num_tokens)[1]
                tiles = [self._run(hidden_CD[half:], targets_C[half:], num_tokens)[1]] if half else []
                tiles.insert(0, self._run(hidden_CD[: half or None], targets_C[: half or None], num_tokens)[1])
        except _Mismatch as mismatch:
            return str(mismatch)
        tolerance = 1e-4 if whole.dtype == torch.float32 else 2e-2
        together = torch.cat([tile.flatten(0, -2) for tile in tiles])
        if not torch.allclose(together, whole.flatten(0, -2), rtol=tolerance, atol=tolerance, equal_nan=True):
            return "the logits of some tokens depend on other tokens"
        return None

    def _run(
        self, hidden_CD: torch.Tensor, targets_C: torch.Tensor, num_items: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits of these tokens, by the model's own forward."""
        causal, norm = self._head.causal, self._head.backbone.norm
        hidden_1CD = hidden_CD.unsqueeze(0)
        if norm is not None:
            hidden_1CD = norm(hidden_1CD)
        inner: Callable[..., torch.Tensor] = causal.loss_function  # type: ignore[assignment]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def loss_function(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs.update(shift_labels=targets_C.unsqueeze(0), num_items_in_batch=num_items)
            loss = inner(logits, *args, **kwargs)
            seen.append((loss, logits))
            return loss

        own = causal.__dict__.get("_loss_function")
        causal._loss_function = loss_function  # type: ignore[assignment]
        outputs = with_hidden(self._outputs, hidden_1CD)
        arguments = {**self._arguments, "labels": targets_C.unsqueeze(0), "return_dict": True}
        try:
            with self._head.backbone.replaced(lambda *_: outputs):
                output = self._head._forward(**arguments)
        finally:
            if own is None:
                del causal._loss_function
            else:
                causal._loss_function = own
        if len(seen) != 1 or output.loss is not seen[0][0]:
            raise _Mismatch("the model's loss is more than the cross-entropy of its logits")
        self.output = LossHead._without_logits(output, seen[0][0].detach())
        if seen[0][1].numel() // seen[0][1].shape[-1] != targets_C.numel():
            raise _Mismatch("the model does not give one row of logits for each hidden state")
        return seen[0]


class _Mismatch(Exception):
    """The model's forward behind its backbone is not what tiles can do."""


class _Tiles(torch.autograd.Function):
    """The loss of all tiles as one operation. Inputs that get gradients: hidden states and the head's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        tail: _Tail,
        hidden_ND: torch.Tensor,
        targets_N: torch.Tensor,
        rows_M: torch.Tensor,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        wants_grad = tail.wants_grad and any(ctx.needs_input_grad)
        hidden_grad_ND = torch.zeros_like(hidden_ND) if wants_grad and ctx.needs_input_grad[1] else None
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        num_items = tail.num_items(targets_N)
        losses: list[torch.Tensor] = []
        num_tiles = -(-rows_M.numel() // tail.chunk_tokens)
        for rows_C in rows_M.tensor_split(num_tiles):
            tail.between()
            hidden_CD = hidden_ND.index_select(0, rows_C).requires_grad_(hidden_grad_ND is not None)
            with torch.set_grad_enabled(wants_grad), without_hooks(list(parameters)), tail.transients.placed():
                loss = tail.loss(hidden_CD, targets_N[rows_C], num_items)
                sources = ([hidden_CD] if hidden_grad_ND is not None else []) + list(parameters)
                found = torch.autograd.grad(loss, sources, allow_unused=True) if wants_grad else ()
            losses.append(loss.detach())
            del loss
            tail.between()
            if hidden_grad_ND is not None and found[0] is not None:
                hidden_grad_ND.index_copy_(0, rows_C, found[0])
            for index, gradient in enumerate(found[len(found) - len(parameters) :] if wants_grad else ()):
                if gradient is not None:
                    so_far = sums[index]
                    sums[index] = tail.transients.kept(gradient.float()) if so_far is None else so_far.add_(gradient)
            del found
            tail.counters.num_tiles += 1
            tail.counters.num_tokens += rows_C.numel()
        ctx.save_for_backward(hidden_grad_ND, *sums)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return sum(losses[1:], losses[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad_ND, *sums = ctx.saved_tensors
        # In place, where nobody comes back: the gradient of a head is as large as its vocabulary.
        scale = torch.mul if graph_is_kept() else torch.Tensor.mul_
        of_parameters = [
            None if gradient is None else scale(gradient, grad_loss).to(dtype)
            for gradient, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return (None, None if hidden_grad_ND is None else hidden_grad_ND * grad_loss, None, None, *of_parameters)


def _targets(arguments: dict[str, Any]) -> torch.Tensor:
    """What each hidden state is to predict, flat: the next token's label, unless the caller has shifted them."""
    shifted = arguments.get("shift_labels")
    if shifted is None:
        ignore_index = int(arguments.get("ignore_index", IGNORED))
        shifted = nn.functional.pad(arguments["labels"], (0, 1), value=ignore_index)[..., 1:]
    return shifted.reshape(-1)
