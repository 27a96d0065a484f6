"""Cross-entropy by tiles of the vocabulary: a streamed head is read twice a batch, however many tiles of tokens it has.

    tiles of the head    0   1   2   3          3   2   1   0
    inside each          all tokens, a chunk at a time
    pass 1               running maximum, sum of exponentials, the label's logit   ->  losses
    pass 2               the same logits, softmax - onehot, times the tile         ->  gradient of what the head gets

Only the logits of a chunk of tokens in one tile exist. They are computed twice: three products where tiles of tokens
take two, for reading the head twice and not twice for each of these. The second pass goes from the last tile to the
first, so it begins with those that the ring still holds.

[Note: two passes]
The sum over exponentials is known before a probability is rounded. In one pass, as flash attention goes over keys,
gradients in bf16 had up to 1.5 times plain's error against fp64; in two they have plain's (docs/log.md). Maximum and
sums are fp32, as logits are in transformers' loss; how they go on from tile to tile is in arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload_rt.memory.transients import Transients
from offload_rt.vocabulary.tiled_linear import TiledLinear
from planners.plans.schedule import Phase

Logits = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What the model makes of products [C, R] of its head: takes them, what the head got [C, D] and labels; [C, R]."""


@dataclass(frozen=True)
class Normalizers:
    """Of each token's softmax, fp32: exp(logit - maximum) / total."""

    maximum_N: torch.Tensor
    total_N: torch.Tensor


class VocabularyLoss:
    """The loss behind `linear`. chunk_tokens: most rows of logits at once. between: called before each visit."""

    def __init__(
        self,
        linear: TiledLinear,
        chunk_tokens: int,
        *,
        between: Callable[[], None] = lambda: None,
        transients: Transients | None = None,
    ) -> None:
        self.linear = linear
        self.chunk_tokens = chunk_tokens
        self._between = between
        self._transients = transients if transients is not None else Transients()

    def logits(self, inputs_ND: torch.Tensor, targets_N: torch.Tensor, logits: Logits) -> torch.Tensor:
        """All of them, put together from tiles: for a few tokens, to be held against those of a whole head."""
        found = []
        for index in range(len(self.linear.tiles)):
            with self.linear.tile(index, Phase.FORWARD, training=False) as tile:
                found.append(logits(inputs_ND @ tile.rows_RD(inputs_ND.dtype).t(), inputs_ND, targets_N))
        return torch.cat(found, dim=-1)

    @torch.no_grad()
    def losses(
        self, inputs_ND: torch.Tensor, targets_N: torch.Tensor, logits: Logits, *, training: bool
    ) -> tuple[torch.Tensor, Normalizers]:
        """The first pass: each token's loss [N], fp32. training: the second one will follow. Labels are in range."""
        lowest = torch.finfo(torch.float32).min  # and not -inf, whose difference with itself is no number
        maximum_N = inputs_ND.new_full(targets_N.shape, lowest, dtype=torch.float32)
        total_N, label_N = torch.zeros_like(maximum_N), torch.zeros_like(maximum_N)
        for index, (begin, end) in enumerate(self.linear.tiles):
            self._between()
            with self.linear.tile(index, Phase.FORWARD, training=training) as tile:
                for inputs_CD, targets_C, maximum_C, total_C, label_C in self._chunks(
                    inputs_ND, targets_N, maximum_N, total_N, label_N
                ):
                    with self._transients.placed():
                        logits_CR = logits(inputs_CD @ tile.rows_RD(inputs_CD.dtype).t(), inputs_CD, targets_C).float()
                        column_C1, is_here_C1 = _columns(targets_C, begin, end)
                        label_C += logits_CR.gather(1, column_C1).where(is_here_C1, 0.0).squeeze(1)
                        larger_C = torch.maximum(maximum_C, logits_CR.amax(1))
                        total_C.mul_((maximum_C - larger_C).exp_())
                        total_C.add_((logits_CR - larger_C.unsqueeze(1)).exp_().sum(1))
                        maximum_C.copy_(larger_C)
                        del logits_CR
        return total_N.log() - (label_N - maximum_N), Normalizers(maximum_N, total_N)

    @torch.no_grad()
    def input_gradient(
        self,
        inputs_ND: torch.Tensor,
        targets_N: torch.Tensor,
        logits: Logits,
        normalizers: Normalizers,
        scale: torch.Tensor | float,
    ) -> torch.Tensor:
        """The second pass: the gradient of `scale` times the sum of losses by `inputs_ND`, in fp32 or wider."""
        wide = torch.promote_types(inputs_ND.dtype, torch.float32)
        gradient_ND = torch.zeros_like(inputs_ND, dtype=wide)
        for index, (begin, end) in reversed(list(enumerate(self.linear.tiles))):
            self._between()
            with self.linear.tile(index, Phase.BACKWARD, training=True) as tile:
                for inputs_CD, targets_C, maximum_C, total_C, gradient_CD in self._chunks(
                    inputs_ND, targets_N, normalizers.maximum_N, normalizers.total_N, gradient_ND
                ):
                    with self._transients.placed():
                        product_CR = (inputs_CD @ tile.rows_RD(inputs_CD.dtype).t()).requires_grad_()
                        with torch.enable_grad():
                            logits_CR = logits(product_CR, inputs_CD, targets_C)
                        softmax_CR = logits_CR.detach().float() - maximum_C.unsqueeze(1)
                        softmax_CR.exp_().div_(total_C.unsqueeze(1))
                        column_C1, is_here_C1 = _columns(targets_C, begin, end)
                        softmax_CR.scatter_add_(1, column_C1, -is_here_C1.float()).mul_(scale)
                        (of_product_CR,) = torch.autograd.grad(logits_CR, product_CR, softmax_CR.to(logits_CR.dtype))
                        # See [Note: products by tiles] in tiled_linear.
                        gradient_CD.addmm_(of_product_CR.to(wide), tile.rows_RD(wide))
                        del product_CR, logits_CR, softmax_CR, of_product_CR
        return gradient_ND

    def _chunks(self, *by_token: torch.Tensor) -> zip[tuple[torch.Tensor, ...]]:
        """Views of `by_token`, a chunk of tokens at a time."""
        num_chunks = max(1, -(-by_token[0].shape[0] // self.chunk_tokens))
        return zip(*(tensor.tensor_split(num_chunks) for tensor in by_token), strict=True)


def _columns(targets_C: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The column of each label in a tile, any where it is in another one; and whether it is in this one."""
    is_here_C = (targets_C >= begin) & (targets_C < end)
    return (targets_C - begin).clamp(0, end - begin - 1).unsqueeze(1), is_here_C.unsqueeze(1)
