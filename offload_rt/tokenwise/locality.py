"""Whether a layer goes by tokens: its output and every gradient, whole and by chunks, on a few real tokens.

A convolution over tokens, a token shift or a capacity that tokens compete for gives wrong numbers by chunks and no
error. So before a class of layers is first cut, this tries it. Errors of the chunked pass are findings as well.

[Note: what counts as equal]
Chunks change the order of sums, and in 16 bits the rounding of products. A layer that mixes tokens outside attention is
wrong at the chunks' edges, by as much as it mixes. So activations are compared token by token, against the size of a
typical token; a parameter's gradient as a whole, against its own size, or a share of the largest one's where it is next
to nothing (the bias of keys, which softmax ignores).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from offload_rt.layers.access import without_hooks
from offload_rt.layers.autograd import RecomputedLayer
from offload_rt.layers.layer_call import Call
from offload_rt.random_state import kept_random_state
from offload_rt.tokenwise.graphs import Gradients
from offload_rt.tokenwise.slicing import NotTokenLocal, first_tokens
from offload_rt.tokenwise.tiled_pass import TiledPass
from offload_rt.tokenwise.tiles import PassState, Places, TileCounters
from planners.plans.activations import Action, Span

TRIED_TOKENS = 48
_SMALL_SHARE = 0.05
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_TOLERANCE_IN_16_BITS = 4e-2
"""Measured in bf16 over twenty tiny architectures: at most 0.010 in activations, 0.018 in a parameter's gradient."""


def check_locality(
    owner: RecomputedLayer,
    call: Call,
    names: list[str],
    tensors: list[torch.Tensor],
    dims: list[int | None],
    hidden: int,
    attention_groups: int = 1,
) -> None:
    """Raises `NotTokenLocal` unless the layer gives the same by chunks. Its block is open. Changes no state."""
    num_tokens = min(TRIED_TOKENS, tensors[hidden].shape[1])
    inputs = [t.detach() for t in first_tokens(names, tensors, dims, hidden, num_tokens)]
    inputs[hidden] = inputs[hidden].clone()
    edges = sorted({num_tokens * part // 3 for part in range(4)})
    actions = (Action.KEEP, Action.RECOMPUTE, Action.KEEP)
    spans = tuple(Span(start, end, action) for start, end, action in zip(edges, edges[1:], actions, strict=False))
    with _evaluating(owner.layer), without_hooks(call.trainable), kept_random_state(call.device):
        try:
            of_whole = _whole(owner, call, inputs, hidden)
            state = PassState(
                call, owner.block, spans, dims, hidden, Places(), TileCounters(), attention_groups=attention_groups
            )
            tiled = TiledPass(state)
            outputs = tiled.forward(inputs, needs_input=True)
            of_input, of_parameters = tiled.backward(inputs, _directions(outputs), keep_graph=False)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise NotTokenLocal(f"tried on a few tokens it fails: {type(error).__name__}: {error}") from None
    _compare([*outputs, of_input], of_parameters, of_whole, len(outputs), _tolerance(call, inputs[hidden].dtype))


_Whole = tuple[Gradients, Gradients]


def _whole(owner: RecomputedLayer, call: Call, inputs: list[torch.Tensor], hidden: int) -> _Whole:
    """Outputs and the input's gradient; the parameters' gradients."""
    given = inputs[hidden].detach().requires_grad_()
    enabled, dtype = call.autocast
    with (
        torch.autocast(call.device.type, enabled=enabled, dtype=dtype, cache_enabled=False),
        torch.enable_grad(),
        owner.saving(),
    ):
        outputs = call.run([given if index == hidden else t for index, t in enumerate(inputs)])
        pairs = [
            (o, d) for o, d in zip(outputs, _directions(outputs), strict=True) if d is not None and o.requires_grad
        ]
        found = torch.autograd.grad(
            [o for o, _ in pairs], [given, *call.trainable], [d for _, d in pairs], allow_unused=True
        )
    return [*[o.detach() for o in outputs], found[0]], list(found[1:])


def _directions(outputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Made-up gradients of the outputs, the same at every call, from no generator of the user's."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(o.shape, generator=generator).to(o) if o.is_floating_point() else None for o in outputs]


def _compare(
    by_token: list[torch.Tensor | None],
    of_parameters: list[torch.Tensor | None],
    whole: _Whole,
    num_outputs: int,
    tolerance: float,
) -> None:
    """See [Note: what counts as equal]."""
    for index, (found, expected) in enumerate(zip(by_token, whole[0], strict=True)):
        what = "output" if index < num_outputs else "gradient of its input"
        if found is None or expected is None:
            if found is not expected:
                raise NotTokenLocal(f"by chunks its {what} is missing, or there only then")
            continue
        typical = expected.double().square().sum(-1).mean().sqrt()
        error = (found.double() - expected.double()).square().sum(-1).sqrt().nan_to_num().max()
        _within(what, float(error / typical.clamp_min(1e-30)), tolerance)
    norms = [0.0 if g is None else float(g.double().norm()) for g in whole[1]]
    floor = _SMALL_SHARE * max(norms, default=0.0)
    for found, expected, norm in zip(of_parameters, whole[1], norms, strict=True):
        if (found is None) != (expected is None) and norm > floor:
            raise NotTokenLocal("by chunks the gradient of one of its parameters is missing")
        if found is not None and expected is not None:
            error = (found.double() - expected.double()).norm()
            _within("gradient of a parameter", float(error) / max(norm, floor, 1e-30), tolerance)


def _within(what: str, error: float, tolerance: float) -> None:
    if error > tolerance:
        raise NotTokenLocal(
            f"on {TRIED_TOKENS} tokens or fewer its {what} differs by {error:.1e} between whole and by chunks "
            f"(up to {tolerance:.0e} is rounding)"
        )


def _tolerance(call: Call, dtype: torch.dtype) -> float:
    enabled, autocast_dtype = call.autocast
    dtypes = [dtype, *(p.dtype for p in call.owner.layer.parameters()), *([autocast_dtype] if enabled else [])]
    return max(_TOLERANCES.get(one, _TOLERANCE_IN_16_BITS) for one in dtypes if one.is_floating_point)


@contextlib.contextmanager
def _evaluating(layer: nn.Module) -> Iterator[None]:
    """Without dropout, which draws other numbers by chunks."""
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
