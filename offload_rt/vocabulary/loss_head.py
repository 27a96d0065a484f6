"""The loss head by tiles: final norm, head and cross-entropy run for some tokens at a time; logits never exist whole.

For a causal language model of transformers that is called with labels. Only positions with a label are computed. The
gradients are taken in forward, chunk by chunk, so that no chunk's logits wait for backward and none is computed twice:

    forward     backbone -> hidden_ND | per chunk: norm, head, loss, and its gradient | sum of the losses
    backward    the stored gradient of hidden_ND, times the gradient of the loss

The model's own `forward` does the work: it is entered once with its backbone in place, and left by an exception when
that is done; then once a chunk with a stand-in that gives the chunk's hidden states (`model_tail`). So scaling,
softcapping and casts are the model's. A head that streams by tiles of its rows is gone through twice a batch and not
twice a chunk, where all that the model does with logits it does to each; they are computed twice then
(`vocabulary_loss`). Tiling the head is as in ALST (arXiv 2506.13996); taking gradients in forward as in Liger Kernel.

[Note: what tiling changes]
It is a cut (design, section 7): the sums of losses and of the head's own gradients run in another order, and the rows
of a bf16 product may depend on how many there are. A batch that is no longer than one chunk runs whole, bit for bit.
Whichever way the loss is taken, the output has no logits beside it: whoever wants them calls the model without labels.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from offload_rt.layers.access import ReplacedForward, graph_is_kept, without_hooks
from offload_rt.memory.transients import Transients
from offload_rt.vocabulary.backbone import Backbone, with_hidden
from offload_rt.vocabulary.model_tail import IGNORED, Tail, without_logits
from offload_rt.vocabulary.tiled_linear import TiledLinear
from offload_rt.vocabulary.vocabulary_loss import VocabularyLoss

logger = logging.getLogger("offload_rt")


@dataclass
class LossHeadCounters:
    """What the loss head did since the start."""

    num_tiles: int = 0
    num_tokens: int = 0
    """Hidden states that went through the head in tiles."""
    num_vocabulary_tiles: int = 0
    """Tiles of the head that the loss went through, each pass for itself."""
    num_whole: int = 0
    """Calls with labels that ran whole: short ones, and those that tiling does not serve."""


class LossHead(ReplacedForward):
    """Replaces the `forward` of a causal model while the engine lives.

    causal: what `find_causal_model` gave. chunk_tokens: most rows of a tile. held: makes the head's weights stay in
    memory inside; a streamed head is fetched once a call and not once a tile. linear: the head, where it streams by
    tiles of its rows. between: called before a tile, and before its gradients, as large as the vocabulary, are summed.
    """

    def __init__(
        self,
        causal: nn.Module,
        chunk_tokens: int,
        held: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        *,
        linear: TiledLinear | None = None,
        between: Callable[[], None] = lambda: None,
        transients: Transients | None = None,
    ) -> None:
        super().__init__(causal)
        self.chunk_tokens = chunk_tokens
        self.counters = LossHeadCounters()
        self.between = between
        self.transients = transients if transients is not None else Transients()
        self._held = held
        # transformers looks at the parameters of a model's forward
        self.__signature__ = inspect.signature(causal.forward)
        self.backbone = Backbone(causal)
        self.refusal: str | None = None
        """Why this model's loss is not taken by tiles after all; None where it is."""
        self.vocabulary: VocabularyLoss | None = None
        if linear is not None:
            self.vocabulary = VocabularyLoss(
                linear, chunk_tokens, between=self._before_tile, transients=self.transients
            )
        self.vocabulary_refusal: str | None = None
        """Why a head that streams by tiles is read for each tile of tokens after all; None where it is not."""
        self._is_checked = False
        self._is_detached = False

    def detach(self) -> None:
        super().detach()
        self._is_detached = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_detached:  # by a hook of the call that has found it: torch looks a forward up before them
            return self.module.forward(*args, **kwargs)
        arguments = self._named(args, kwargs)
        labels = arguments.get("labels")
        if labels is None:
            return self._forward(*args, **kwargs)
        if labels.numel() <= self.chunk_tokens or self.refusal is not None or not self._serves(arguments):
            return self._whole(arguments)
        reached = self._run_backbone(arguments)
        if isinstance(reached, _Refused):
            return without_logits(reached.output)
        return self._finish(reached, arguments)

    def report(self) -> dict[str, Any]:
        """What the engine's report says of it."""
        found = {"chunk_tokens": self.chunk_tokens, "runs_whole_because": self.refusal, **asdict(self.counters)}
        if self.vocabulary is not None:
            found["reads_head_per_tile_because"] = self.vocabulary_refusal
        return found

    def _before_tile(self) -> None:
        self.counters.num_vocabulary_tiles += 1
        self.between()

    def goes_by_vocabulary(self, rows_M: torch.Tensor) -> bool:
        """Whether the loss of these rows goes by tiles of the head; one tile of tokens reads it no more than that."""
        usable = self.vocabulary is not None and self.vocabulary_refusal is None
        return usable and rows_M.numel() > self.chunk_tokens

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self.__signature__.bind(*args, **kwargs).arguments
        for parameter in self.__signature__.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(parameter.name, {}))
        return dict(bound)

    def _serves(self, arguments: dict[str, Any]) -> bool:
        """Whether nothing is asked that needs all tokens at once."""
        config = getattr(self.module, "config", None)
        keep = arguments.get("logits_to_keep", 0)
        routers = arguments.get("output_router_logits", getattr(config, "output_router_logits", False))
        tuples = arguments.get("return_dict") is False
        kept = isinstance(keep, torch.Tensor) or keep != 0
        return not (routers or tuples or kept or arguments.get("output_hidden_states"))

    def _whole(self, arguments: dict[str, Any]) -> Any:
        self.counters.num_whole += 1
        return without_logits(self._forward(**arguments))

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
        tail = Tail(self.backbone, self._forward, reached.outputs, reached.hidden_ND, arguments)
        with self._held():
            if not self._is_checked:
                self._check(tail, targets_N)
                self._is_checked = True  # not before: an error in it must not stand for a check
            if self.refusal is not None:
                return self._finish_whole(reached, arguments)
            rows_M = (targets_N != tail.ignore_index).nonzero().flatten()
            if not rows_M.numel():  # the model's own loss of nothing
                rows_M = rows_M.new_zeros(1)
            parameters = self.backbone.trainable_behind()
            loss = _Tiles.apply(  # type: ignore[no-untyped-call]
                self, tail, reached.hidden_ND, targets_N, rows_M, torch.is_grad_enabled(), *parameters
            )
        return without_logits(tail.output, loss)

    def _check(self, tail: Tail, targets_N: torch.Tensor) -> None:
        difference = tail.difference(targets_N)
        if difference is not None:
            self._refuse(difference)
        elif self.vocabulary is not None:
            taken = self.vocabulary
            self.vocabulary_refusal = tail.difference_by_rows(targets_N, taken.linear, taken.logits)
            if self.vocabulary_refusal is not None:
                logger.warning("the head is read for each tile of the loss: %s", self.vocabulary_refusal)

    def _finish_whole(self, reached: _Reached, arguments: dict[str, Any]) -> Any:
        """The rest of the forward as it would have been."""
        last = reached.outputs.last_hidden_state
        if self.backbone.norm is not None:
            last = self.backbone.norm(reached.hidden_ND.view(last.shape))
        with self.backbone.replaced(lambda *_: with_hidden(reached.outputs, last)):
            return without_logits(self._forward(**arguments))


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


class _Tiles(torch.autograd.Function):
    """The loss of all tiles as one operation. Inputs that get gradients: hidden states and the head's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        head: LossHead,
        tail: Tail,
        hidden_ND: torch.Tensor,
        targets_N: torch.Tensor,
        rows_M: torch.Tensor,
        wants_grad: bool,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        wants_grad = wants_grad and any(ctx.needs_input_grad)
        hidden_grad_ND = torch.zeros_like(hidden_ND) if wants_grad and ctx.needs_input_grad[2] else None
        pieces = _Pieces(head, tail, hidden_ND, targets_N, hidden_grad_ND, parameters, wants_grad=wants_grad)
        loss = pieces.by_vocabulary(rows_M) if head.goes_by_vocabulary(rows_M) else pieces.by_tokens(rows_M)
        ctx.save_for_backward(hidden_grad_ND, *pieces.sums)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return loss

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
        of_hidden = None if hidden_grad_ND is None else hidden_grad_ND * grad_loss
        return (None, None, of_hidden, None, None, None, *of_parameters)


class _Pieces:
    """Takes the loss and the gradients of some tokens at a time. hidden_grad_ND is filled; sums are fp32."""

    def __init__(
        self,
        head: LossHead,
        tail: Tail,
        hidden_ND: torch.Tensor,
        targets_N: torch.Tensor,
        hidden_grad_ND: torch.Tensor | None,
        parameters: tuple[nn.Parameter, ...],
        *,
        wants_grad: bool,
    ) -> None:
        self.sums: list[torch.Tensor | None] = [None] * len(parameters)
        self._head = head
        self._tail = tail
        self._hidden_ND = hidden_ND
        self._targets_N = targets_N
        self._hidden_grad_ND = hidden_grad_ND
        self._parameters = list(parameters)
        self._wants_grad = wants_grad

    def by_tokens(self, rows_M: torch.Tensor) -> torch.Tensor:
        """The loss of these rows, each tile of tokens through all of the head."""
        num_items = self._tail.num_items(self._targets_N)
        losses: list[torch.Tensor] = []
        for rows_C in self._tiles(rows_M):
            self._head.between()
            hidden_CD = self._hidden_of(rows_C)
            with self._inside(wants_grad=self._wants_grad):
                loss = self._tail.loss(hidden_CD, self._targets_N[rows_C], num_items)
                found = self._gradients(loss, None, hidden_CD) if self._wants_grad else ()
            losses.append(loss.detach())
            del loss
            self._head.between()
            self._add(rows_C, found)
            del found
        return sum(losses[1:], losses[0])

    def by_vocabulary(self, rows_M: torch.Tensor) -> torch.Tensor:
        """The loss of these rows, each tile of the head through all tokens; see `vocabulary_loss`."""
        taken, tail = self._head.vocabulary, self._tail
        if taken is None:
            raise RuntimeError("no head that streams by tiles")
        linear, targets_M = taken.linear, self._targets_N[rows_M]
        num_rows = linear.tiles[-1][1]
        if ((targets_M < 0) | (targets_M >= num_rows)).any():
            raise IndexError(f"labels: {int(targets_M.min())} to {int(targets_M.max())}, for {num_rows} logits")
        inputs: list[torch.Tensor] = []
        for rows_C in self._tiles(rows_M):
            with self._inside(wants_grad=False):
                found_CD = tail.head_inputs(self._hidden_of(rows_C), self._targets_N[rows_C], linear)
            inputs.append(self._head.transients.kept(found_CD.detach()))
        inputs_MD = torch.cat(inputs)
        inputs.clear()

        def logits(product_CR: torch.Tensor, inputs_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
            return tail.logits(product_CR, inputs_CD, targets_C, linear)

        losses_M, normalizers = taken.losses(inputs_MD, targets_M, logits, training=self._wants_grad)
        num_items = tail.num_items(self._targets_N)
        if isinstance(num_items, torch.Tensor):
            num_items = num_items.to(losses_M.device)
        if self._wants_grad:
            gradient_MD = taken.input_gradient(inputs_MD, targets_M, logits, normalizers, 1 / num_items)
            gradients = gradient_MD.tensor_split(self._num_tiles(rows_M))
            for rows_C, gradient_CD in zip(rows_M.tensor_split(len(gradients)), gradients, strict=True):
                hidden_CD = self._hidden_of(rows_C)
                with self._inside(wants_grad=True):
                    inputs_CD = tail.head_inputs(hidden_CD, self._targets_N[rows_C], linear)
                    found = self._gradients(inputs_CD, gradient_CD.to(inputs_CD.dtype), hidden_CD)
                self._add(rows_C, found)
        return losses_M.sum().div(num_items)

    def _num_tiles(self, rows_M: torch.Tensor) -> int:
        return -(-rows_M.numel() // self._head.chunk_tokens)

    def _tiles(self, rows_M: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows of each tile of tokens, counted."""
        for rows_C in rows_M.tensor_split(self._num_tiles(rows_M)):
            yield rows_C
            self._head.counters.num_tiles += 1
            self._head.counters.num_tokens += rows_C.numel()

    def _hidden_of(self, rows_C: torch.Tensor) -> torch.Tensor:
        return self._hidden_ND.index_select(0, rows_C).requires_grad_(self._hidden_grad_ND is not None)

    @contextlib.contextmanager
    def _inside(self, *, wants_grad: bool) -> Iterator[None]:
        with torch.set_grad_enabled(wants_grad), without_hooks(self._parameters), self._head.transients.placed():
            yield

    def _gradients(
        self, result: torch.Tensor, gradient: torch.Tensor | None, hidden_CD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Of hidden states, if they want theirs, and of the parameters."""
        sources = ([hidden_CD] if self._hidden_grad_ND is not None else []) + self._parameters
        return torch.autograd.grad(result, sources, gradient, allow_unused=True)

    def _add(self, rows_C: torch.Tensor, found: tuple[torch.Tensor | None, ...]) -> None:
        """Takes what `_gradients` gave."""
        if self._hidden_grad_ND is not None and found and found[0] is not None:
            self._hidden_grad_ND.index_copy_(0, rows_C, found[0])
        for index, gradient in enumerate(found[len(found) - len(self._parameters) :]):
            if gradient is not None:
                so_far = self.sums[index]
                kept = self._head.transients.kept
                self.sums[index] = kept(gradient.float()) if so_far is None else so_far.add_(gradient)


def _targets(arguments: dict[str, Any]) -> torch.Tensor:
    """What each hidden state is to predict, flat: the next token's label, unless the caller has shifted them."""
    shifted = arguments.get("shift_labels")
    if shifted is None:
        ignore_index = int(arguments.get("ignore_index", IGNORED))
        shifted = nn.functional.pad(arguments["labels"], (0, 1), value=ignore_index)[..., 1:]
    return shifted.reshape(-1)
