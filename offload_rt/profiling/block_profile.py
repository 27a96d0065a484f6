"""What one layer, and the head with the loss, take on this machine: measured before anything is planned.

A stand-in of one layer runs with random weights on the device that will compute (`workbench`), as the runtime runs
layers, on what the model really hands to its layers, for the largest batch; nothing of the model is changed. It runs
three ways by turns, so that all see the same machine: computed again in backward, all that it saves kept, and all of
that put away in RAM. What it saves is counted on the way. NF4 decoding is timed by itself, through the code that
training runs. Each time is the median of a few runs. The machine is taken to have this much memory free: a decoded
layer, and its activations twice.

[Note: what putting away holds up]
Where DEVICE is RAM, whoever computes copies, and what that takes is the difference of two ways. A device copies beside
what it computes, and a plan counts its links by themselves: what is left is what the host takes to ask for the copies.
In forward nobody waits for them, so that it shows; a backward alone would wait for each, so that it is taken to be
asked for as fast.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from offload_rt.checkpoint.ingest import fill_slot, sources_in_memory
from offload_rt.checkpoint.materialise import make_absent, move_rest
from offload_rt.errors import ConfigError, OffloadError, UnsupportedModule
from offload_rt.layers.access import ResidentAccess
from offload_rt.layers.autograd import CHECKED_CALLS, RecomputedLayer
from offload_rt.layers.block import Binding, Block
from offload_rt.layers.discover import BlockDraft, find_blocks
from offload_rt.memory.cuda_memory import REFUSED
from offload_rt.profiling.drive_profile import NotedStash, drive_pair
from offload_rt.profiling.workbench import RUNS, Workbench, or_the_cpu
from offload_rt.quantized import codec
from offload_rt.quantized.decoder import Decoder
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES, align_up
from offload_rt.tiering.stash import Stash
from offload_rt.tokenwise.layer import Tokenwise, TokenwiseLayer
from offload_rt.tokenwise.tiles import Places
from planners.plans.activations import Action, whole_batch
from planners.plans.placement import Tier
from planners.problems.measured import KeptPass, MeasuredSeconds

logger = logging.getLogger("offload_rt")

WARM_RUNS = CHECKED_CALLS + 1
MOST_PASSES = 3 * (WARM_RUNS + RUNS)
"""Of one layer, forward and backward: computed again, kept and put away."""
ARENA_HELD = 2
"""Times a layer's activations that the arena holds to which they are put away: gaps, and what is not yet given back."""
ACTIVATIONS_HELD = 2 + ARENA_HELD
"""Times a layer's activations, as they are estimated, that profiling holds at most: in that arena, those that are made,
and their gradients. Of Llama's layers 3.1 were counted, 1.9 of them in the arena (hidden sizes 256 and 512, 512 and
1024 tokens, adapters, 16-bit and NF4 weights)."""
DECODED_ELEMENTS = 1 << 22
"""Weights decoded in one go; a layer takes as long in proportion."""


class _Reached(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args_given, self.kwargs_given = args, kwargs


@dataclass(frozen=True)
class LayerCall:
    """What a layer is called with."""

    hidden: torch.Tensor
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]


def profile_layer(
    model: nn.Module, draft: BlockDraft, *, batch_size: int, seq_len: int, bench: Workbench | None = None
) -> MeasuredSeconds:
    """Times the layer of `draft` with a batch of the largest size. Blocks for that.

    bench: the device that will compute; None is the CPU. ConfigError where `model` cannot be called with token ids
    alone, or the layer not be copied and called by itself.
    """
    with or_the_cpu(bench) as place, place.same_random_numbers():
        return _profile(model, draft, batch_size, seq_len, place)


def _profile(model: nn.Module, draft: BlockDraft, batch_size: int, seq_len: int, bench: Workbench) -> MeasuredSeconds:
    call = call_of(model, draft.modules[0], batch_size, seq_len, bench.device)
    with contextlib.closing(made_stand(draft, bench)) as stand:
        try:
            again = RecomputedLayer(stand.layer, stand.block, stand.access, deliver=stand.deliver)
            _warm(again, call, bench)
        except REFUSED:
            raise
        except Exception as error:
            raise _not_alone(draft, error) from error
        saving: _Saving | None = None
        try:
            saving = _saving(stand, call, bench)
        except REFUSED:
            raise
        except (OffloadError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            logger.warning(
                "%s: what layers like it save could not be measured, so that they are recomputed whole: %s: %s",
                draft.name, type(error).__name__, error,
            )  # fmt: skip
        ways = [again] if saving is None else [again, saving.kept, saving.swapped]
        timed = _timed(ways, call, bench)
        on_drive = (0.0, 0.0) if saving is None else drive_pair(saving.room, saving.sizes, bench)
    decode = decode_seconds(stand, bench)
    forward, backward = timed[0]
    kept: KeptPass | None = None
    if saving is not None:
        out, back = held_up(timed[1], timed[2], bench)
        kept = KeptPass(
            forward=max(0.0, timed[1][0] - decode), backward=max(0.0, timed[1][1] - decode),
            saved_bytes=saving.saved_bytes, small_bytes=saving.small_bytes, put_away=out, taken_back=back,
            put_on_drive=on_drive[0], taken_off_drive=on_drive[1],
        )  # fmt: skip
    # Computed again, each linear was decoded once in forward, and twice in backward.
    return MeasuredSeconds(
        forward=max(0.0, forward - decode), backward=max(0.0, backward - 2 * decode), decode=decode, kept=kept
    )


def held_up(kept: tuple[float, float], put_away: tuple[float, float], bench: Workbench) -> tuple[float, float]:
    """By how much forward and backward take longer where all that is saved is put away: [Note: what putting away holds
    up].
    """
    out, back = (max(0.0, swapped - plain) for plain, swapped in zip(kept, put_away, strict=True))
    return (out, out) if bench.copies_alone else (out, back)


@dataclass(frozen=True)
class Stand:
    """A layer's stand-in, whose weights are in memory as the runtime has them."""

    layer: nn.Module
    block: Block
    access: ResidentAccess
    num_quantized: int
    """Of its weights."""
    deliver: Callable[[Mapping[int, torch.Tensor]], None] | None
    """Takes the gradients of weights that train."""

    def close(self) -> None:
        """Lets go of its memory now: its hooks, which know the block, would hold that until the collector runs."""
        self.block.detach()
        self.block.close()


@dataclass(frozen=True)
class _Saving:
    """The stand-in run with a graph that stays, and with one whose saved tensors are put away."""

    kept: TokenwiseLayer
    swapped: TokenwiseLayer
    saved_bytes: int
    small_bytes: int
    room: Stash
    sizes: list[int]
    """Of what is put away, in bytes."""


def _saving(stand: Stand, call: LayerCall, bench: Workbench) -> _Saving:
    """Both ways, warm, and what was counted. UnsupportedModule where the layer does not run so."""

    def layer(action: Action, places: Places) -> tuple[TokenwiseLayer, Tokenwise]:
        tokenwise = Tokenwise(places)
        tier = Tier.HOST if action is Action.SWAP else None
        made = TokenwiseLayer(
            stand.layer, stand.block, stand.access, policy=whole_batch(action, tier), tokenwise=tokenwise,
            deliver=stand.deliver,
        )  # fmt: skip
        num_passes = _warm(made, call, bench)
        if tokenwise.num_whole or tokenwise.counters.num_passes != num_passes:
            raise UnsupportedModule(f"{stand.block.name}: {'; '.join(tokenwise.refused.values()) or 'not run once'}")
        return made, tokenwise

    kept, all_kept = layer(Action.KEEP, Places())
    num_bytes = all_kept.counters.kept_bytes // all_kept.counters.num_passes
    room = bench.stash("profile, swapped", ARENA_HELD * num_bytes + IO_ALIGNMENT_BYTES)
    noted = NotedStash(room)
    swapped, put_away = layer(Action.SWAP, Places(swapped={Tier.HOST: noted}))
    if put_away.counters.no_room_bytes:
        raise UnsupportedModule(f"{stand.block.name}: saves more at one time than at another")
    saved_bytes = put_away.counters.swapped_bytes // put_away.counters.num_passes
    # Of what was kept, the layer's input is not the graph's.
    small_bytes = max(0, num_bytes - saved_bytes - call.hidden.nbytes)
    sizes = noted.sizes_of_a_pass(put_away.counters.num_passes)
    return _Saving(kept, swapped, saved_bytes, small_bytes, room, sizes)


def made_stand(draft: BlockDraft, bench: Workbench) -> Stand:
    """A stand-in of the layer of `draft`. ConfigError where there can be none."""
    try:
        return _managed(_stand_in(draft.modules[0]), draft, bench)
    except REFUSED:
        raise
    except Exception as error:
        raise _not_alone(draft, error) from error


def _not_alone(draft: BlockDraft, error: Exception) -> ConfigError:
    return ConfigError(
        f"{draft.name}: a stand-in of this layer does not run by itself ({type(error).__name__}: {error})"
    )


def _managed(stand_in: nn.Module, draft: BlockDraft, bench: Workbench) -> Stand:
    """The stand-in as the runtime has layers whose weights are in DEVICE memory."""
    holder = nn.Module()
    holder.layers = nn.ModuleList([stand_in])
    bits = 4 if any(spec.is_quantized for spec in draft.spec.tensors) else None
    (alone,) = find_blocks(holder, bits=bits)
    slot = bench.arena("profile", alone.spec.stored_bytes).acquire(alone.spec.stored_bytes, "profile")
    fill_slot(alone, sources_in_memory([alone]), slot)
    quantized = [spec for spec in alone.spec.tensors if spec.is_quantized]
    scratch = 2 * align_up(max((spec.compute_bytes for spec in quantized), default=0), IO_ALIGNMENT_BYTES)
    bindings = []
    for spec, stored in zip(alone.spec.tensors, alone.parameters, strict=True):
        bindings.append(Binding(spec, stored.parameter, stored.owners))
        make_absent(stored.parameter, bench.device)
    move_rest(holder, {id(stored.parameter) for stored in alone.parameters}, bench.device)
    decoder = Decoder(bench.arena("profile, decoded", scratch), bench.device)
    block = Block(alone.name, alone.modules, alone.spec, tuple(bindings), decoder)
    block.open(slot)
    block.attach()
    deliver = _nowhere if alone.trains else None
    return Stand(stand_in, block, ResidentAccess(slot), sum(spec.num_elements for spec in quantized), deliver)


def _nowhere(gradients: Mapping[int, torch.Tensor]) -> None:
    """Takes gradients of a block, which nobody wants."""


def _warm(layer: RecomputedLayer, call: LayerCall, bench: Workbench) -> int:
    """Runs the layer until its calls are not checked any more; how often."""
    for _ in range(WARM_RUNS):
        one_pass(layer, call, bench)
    return WARM_RUNS


def _timed(ways: Sequence[RecomputedLayer], call: LayerCall, bench: Workbench) -> list[tuple[float, float]]:
    """Median seconds of forward and of backward, for each of several ways to run one layer, by turns."""
    bench.wake(lambda: one_pass(ways[0], call, bench))
    taken = [[one_pass(layer, call, bench) for layer in ways] for _ in range(RUNS)]
    return [
        (statistics.median(run[way][0] for run in taken), statistics.median(run[way][1] for run in taken))
        for way in range(len(ways))
    ]


def one_pass(layer: RecomputedLayer, call: LayerCall, bench: Workbench) -> tuple[float, float]:
    """Seconds of the layer's forward, and of its backward with what that computes again."""
    hidden_BTD = call.hidden.requires_grad_()
    wanted = [hidden_BTD, *layer.trainable()]
    layer.attach()
    try:
        start = bench.now()
        found = layer.layer(hidden_BTD, *call.rest, **call.kwargs)
        out = found[0] if isinstance(found, tuple) else found
        between = bench.now()
        torch.autograd.grad(out, wanted, torch.ones_like(out))
        return between - start, bench.now() - between
    finally:
        layer.detach()


def call_of(
    model: nn.Module, layer: nn.Module, batch_size: int, seq_len: int, device: torch.device | None = None
) -> LayerCall:
    """Calls the model, where it is, until it reaches `layer`; with that, on `device` (None: the CPU). What was on the
    meta device has values then.
    """
    device = torch.device("cpu") if device is None else device

    def reached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    places = [p.device for p in model.parameters()]
    given = next((place for place in places if place.type == "meta"), places[0] if places else torch.device("cpu"))
    ids_BT = torch.zeros(batch_size, seq_len, dtype=torch.long, device=given)
    handle = layer.register_forward_pre_hook(reached, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            model(input_ids=ids_BT)
    except _Reached as found:
        there = partial(_real, device=device)
        args, kwargs = pytree.tree_map_only(torch.Tensor, there, (found.args_given, found.kwargs_given))
    except REFUSED:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__}: cannot be called with input_ids alone ({type(error).__name__}: {error})"
        ) from error
    else:
        raise ConfigError(f"{type(model).__name__}: does not reach its first layer when it is called")
    finally:
        handle.remove()
    if not args and "hidden_states" in kwargs:
        args = (kwargs.pop("hidden_states"),)
    if not args or not isinstance(args[0], torch.Tensor):
        raise ConfigError(f"{type(layer).__name__}: is not called with hidden states first")
    hidden = args[0].detach().clone()
    if given.type == "meta" and hidden.is_floating_point():
        hidden.normal_()  # products of equal numbers take a GPU less power, which is what bounds its clock
    return LayerCall(hidden=hidden, rest=args[1:], kwargs={**kwargs, "past_key_values": None})


def _real(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor, or ones in its place where it is on the meta device: rotations and masks take as long with them."""
    return torch.ones(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)


def _stand_in(layer: nn.Module) -> nn.Module:
    """A copy of the layer with values of its own, which trains what the layer does."""
    with torch.no_grad():
        found = copy.deepcopy(layer).to_empty(device="cpu")
        for tensor in (*found.parameters(), *found.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            else:
                tensor.zero_()
    for module in found.train().modules():  # a model may come as it evaluates
        if getattr(module, "gradient_checkpointing", False):
            with contextlib.suppress(AttributeError):
                module.gradient_checkpointing = False  # type: ignore[assignment]  # a flag of transformers' layers
    return found


def decode_seconds(stand: Stand, bench: Workbench) -> float:
    """What decoding all of the stand-in's quantized weights takes, once. Blocks."""
    elements = stand.num_quantized
    if not elements:
        return 0.0
    size = min(elements, DECODED_ELEMENTS) // 64 * 64
    blob = codec.encode(torch.zeros(size, dtype=torch.bfloat16)).to(bench.device)
    out = torch.empty(size, dtype=torch.bfloat16, device=bench.device)
    return bench.median_seconds(lambda: codec.decode_into(blob, out)) * (elements / size)
