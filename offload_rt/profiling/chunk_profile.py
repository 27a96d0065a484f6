"""What one layer takes that runs by chunks of tokens, measured before anything is planned; see `block_profile`.

Where a layer does not fit whole, it cannot be run with all that it saves kept. So two things are measured by turns. A
whole sequence, computed again chunk by chunk: what it takes in all, and the most that it holds. And its first two
chunks, in four ways, for what goes by tokens, as all but attention does: what is saved in each group, what computing it
again takes, and what putting it away does.

    whole sequence   all again
    two chunks       all again | again from attention's result on | all kept | all put away

[Note: prices of groups]
`before` and `qkv` each cost the way up to attention once more, `after` the way from there on
(`planners.plans.activations`). So the second way of four takes longer than the third by the price of `after`, and the
first longer than the second by twice that of the others.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from offload_rt.errors import ConfigError, UnsupportedModule
from offload_rt.layers.discover import BlockDraft
from offload_rt.memory.cuda_memory import REFUSED
from offload_rt.profiling.block_profile import LayerCall, Stand, call_of, decode_seconds, held_up, made_stand, one_pass
from offload_rt.profiling.drive_profile import NotedStash, drive_pair
from offload_rt.profiling.workbench import RUNS, Workbench, or_the_cpu
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.tokenwise.layer import Tokenwise, TokenwiseLayer
from offload_rt.tokenwise.tiles import Places
from planners.plans.activations import Action, ActivationPolicy, Chunk, Group, Treatment
from planners.plans.placement import Tier
from planners.problems.measured import KeptPass, MeasuredChunks, MeasuredSeconds, SavedGroup

CHUNKS = 2
"""Of a sequence, that run in all ways: with one, a layer would not be cut."""
WARM_RUNS = 2
ARENA_HELD, SAVED_AND_GRADIENTS = 1, 2
"""Times what the two chunks save: in the arena that it is put away to, and while they run."""
SHORT_WAYS = 4
SAVED = (Group.BEFORE, Group.QKV, Group.AFTER)
"""What is kept, put away or computed again by itself. Attention's result waits with the layer's input."""


@dataclass(frozen=True)
class _Way:
    """One way to run a layer, with what it was seen to store."""

    layer: TokenwiseLayer
    call: LayerCall
    tokenwise: Tokenwise

    def stored_bytes(self, group: str, tier: Tier) -> int:
        """In one pass."""
        counters = self.tokenwise.counters
        return counters.bytes_by_group[f"{group} in {tier.value}"] // counters.num_passes


def passes(batch_tokens: int, chunk_tokens: int, *, order: int = 1) -> float:
    """How many forward and backward passes over all of `batch_tokens` of a sequence profiling takes, chunks being so
    long: of what goes by tokens or, of order 2, by pairs of them.
    """
    return (WARM_RUNS + RUNS) * (1 + SHORT_WAYS * min(1.0, CHUNKS * chunk_tokens / batch_tokens) ** order)


def profile_chunked_layer(
    model: nn.Module,
    draft: BlockDraft,
    *,
    batch_size: int,
    seq_len: int,
    chunk_tokens: int,
    bench: Workbench | None = None,
) -> MeasuredSeconds:
    """Times the layer of `draft` by chunks of so many tokens, with a batch of the largest size. Blocks for that.

    bench: the device that will compute; None is the CPU. ConfigError where the layer cannot be called by itself, or
    not be cut.
    """
    if not chunk_tokens < seq_len:
        raise ConfigError(f"{draft.name}: {seq_len} tokens are one chunk of {chunk_tokens}")
    with or_the_cpu(bench) as place, place.same_random_numbers():
        whole = call_of(model, draft.modules[0], batch_size, seq_len, place.device)
        short_tokens = min(CHUNKS * chunk_tokens, seq_len)
        short = call_of(model, draft.modules[0], batch_size, short_tokens, place.device)
        with contextlib.closing(made_stand(draft, place)) as stand:
            try:
                return _measured(stand, whole, short, chunk_tokens, place)
            except REFUSED:
                raise
            except (UnsupportedModule, RuntimeError) as error:
                why = f"could not be measured by chunks of {chunk_tokens}: {error}"
                raise ConfigError(f"{draft.name}: {why}") from error


def _measured(stand: Stand, whole: LayerCall, short: LayerCall, chunk_tokens: int, bench: Workbench) -> MeasuredSeconds:
    scale = whole.hidden.shape[1] / short.hidden.shape[1]
    num_chunks = -(-whole.hidden.shape[1] // chunk_tokens)

    def way(call: LayerCall, places: Places, action: Action, tier: Tier | None = None, **groups: Treatment) -> _Way:
        chunk = Chunk(num_tokens=chunk_tokens, action=action, tier=tier, **groups)
        tokenwise = Tokenwise(places)
        policy = ActivationPolicy(chunks=(chunk,))
        layer = TokenwiseLayer(stand.layer, stand.block, stand.access, policy=policy, tokenwise=tokenwise)
        for _ in range(WARM_RUNS):
            one_pass(layer, call, bench)
        if tokenwise.num_whole:
            raise UnsupportedModule("; ".join(tokenwise.refused.values()))
        return _Way(layer, call, tokenwise)

    again = way(short, Places(), Action.RECOMPUTE)
    after_again = way(short, Places(), Action.KEEP, after=Treatment(action=Action.RECOMPUTE))
    kept = way(short, Places(), Action.KEEP)
    kept_bytes = kept.tokenwise.counters.kept_bytes // kept.tokenwise.counters.num_passes
    room = bench.stash("profile, put away", kept_bytes + IO_ALIGNMENT_BYTES)
    noted = NotedStash(room)
    put_away = way(short, Places(swapped={Tier.HOST: noted}), Action.SWAP, Tier.HOST)
    sizes = noted.sizes_of_a_pass(put_away.tokenwise.counters.num_passes)
    if put_away.tokenwise.counters.no_room_bytes:
        raise UnsupportedModule("it saves more at one time than at another")
    with_input = kept.stored_bytes(Group.RESULT.value, Tier.DEVICE) + kept.stored_bytes("attention", Tier.DEVICE)
    alone = way(whole, Places(), Action.RECOMPUTE)
    # Where the layer's input waits elsewhere, it comes back into memory of its own.
    peak_bytes = bench.peak_bytes(lambda: one_pass(alone.layer, alone.call, bench)) + whole.hidden.nbytes
    timed = _timed([alone, again, after_again, kept, put_away], bench)
    sequence, *ways = timed
    on_drive = drive_pair(room, sizes, bench)
    decode = decode_seconds(stand, bench)
    out, back = held_up(ways[2], ways[3], bench)
    price = [scale * (one - other) for one, other in zip(ways[0], ways[2], strict=True)]
    # Of forward each chunk decodes its weights once, of a backward that computes again twice, of another one once.
    forward, backward = sequence[0] - num_chunks * decode, sequence[1] - 2 * num_chunks * decode
    after = max(0.0, sum(ways[1]) - sum(ways[2]))
    others = max(0.0, sum(ways[0]) - sum(ways[1])) / 2
    groups = [
        SavedGroup(
            name=group.value,
            num_bytes=round(scale * put_away.stored_bytes(group.value, Tier.HOST)),
            again=scale * (after if group is Group.AFTER else others),
        )
        for group in SAVED
    ]
    saved_bytes = sum(group.num_bytes for group in groups)
    small = sum(put_away.stored_bytes(group.value, Tier.DEVICE) for group in SAVED)
    return MeasuredSeconds(
        forward=max(0.0, forward),
        backward=max(0.0, backward),
        decode=decode,
        kept=KeptPass(
            forward=max(0.0, forward - price[0]),
            backward=max(0.0, backward - price[1] + num_chunks * decode),
            saved_bytes=saved_bytes,
            small_bytes=round(scale * small),
            put_away=scale * out,
            taken_back=scale * back,
            put_on_drive=scale * on_drive[0],
            taken_off_drive=scale * on_drive[1],
            groups=tuple(group for group in groups if group.num_bytes),
        ),
        chunks=MeasuredChunks(
            num_tokens=chunk_tokens, with_input_bytes=round(scale * with_input), peak_bytes=peak_bytes
        ),
    )


def _timed(ways: Sequence[_Way], bench: Workbench) -> list[tuple[float, float]]:
    """Median seconds of forward and of backward, for each, by turns."""
    bench.wake(lambda: one_pass(ways[1].layer, ways[1].call, bench))
    taken = [[one_pass(way.layer, way.call, bench) for way in ways] for _ in range(RUNS)]
    return [
        (statistics.median(run[index][0] for run in taken), statistics.median(run[index][1] for run in taken))
        for index in range(len(ways))
    ]
