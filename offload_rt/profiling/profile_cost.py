"""What profiling a model's layers would take, before any of it is done: memory and seconds, by estimates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from offload_rt.memory.cuda_memory import REFUSED
from offload_rt.profiling.block_profile import ACTIVATIONS_HELD, MOST_PASSES
from offload_rt.profiling.block_profile import ARENA_HELD as LAYER_ARENA_HELD
from offload_rt.profiling.chunk_profile import ARENA_HELD, CHUNKS, SAVED_AND_GRADIENTS, passes
from offload_rt.profiling.drive_profile import MOST_BYTES
from offload_rt.profiling.profile import attention_width
from offload_rt.profiling.workbench import RUNS
from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from offload_rt.wiring.workload import Workload
from planners.errors import PlanInfeasible, format_bytes, format_bytes_up
from planners.plans.placement import Tier
from planners.problems.cost import FLASH_BACKWARD
from planners.problems.hardware import Hardware
from planners.rule.streaming_problem import StreamingProblem

T = TypeVar("T")
logger = logging.getLogger("offload_rt")

PRODUCTS = 4
"""Times forward's products that a profiled pass has at most: forward, again, gradients of inputs and weights."""
ATTENTIONS = 2
"""Times forward's attention that such a pass has at most, beside its backward: layers by chunks have it once."""


def profile_bytes(workload: Workload, streaming: StreamingProblem, chunk_tokens: int | None = None) -> int:
    """About what profiling holds of DEVICE memory: a stand-in of the largest layer as it came and as it is stored, its
    activations; or what a sequence by chunks takes, with its input, and what is put away of two chunks. Of a GPU's, the
    stand-in as it is stored and decoded, and nothing that is put away.
    """
    layers = [draft.spec for draft in workload.layers]
    on_gpu = workload.config.device != "cpu"
    stand_in = max(((1 if on_gpu else 2) * spec.compute_bytes + spec.stored_bytes for spec in layers), default=0)
    if chunk_tokens is None:
        held = ACTIVATIONS_HELD - (LAYER_ARENA_HELD if on_gpu else 0)
        return stand_in + held * streaming.activation_bytes
    share = min(1.0, CHUNKS * chunk_tokens / workload.config.seq_len)
    short = round(share * streaming.activation_bytes)
    runs = max(streaming.layer_bytes(chunk_tokens), SAVED_AND_GRADIENTS * short)
    return stand_in + (0 if on_gpu else ARENA_HELD * short) + runs + 2 * streaming.layer_input_bytes


def check_profile_fits(workload: Workload, streaming: StreamingProblem, chunk_tokens: int | None) -> None:
    """Raises PlanInfeasible where a GPU's budget has no room for profiling a layer. RAM may be more than a budget."""
    have = streaming.device_capacity_bytes
    if workload.config.device == "cpu" or have is None:
        return
    if (need := profile_bytes(workload, streaming, chunk_tokens)) > have:
        budget = need + streaming.beside_plan_bytes
        raise PlanInfeasible(
            tier=Tier.DEVICE.value, phase="profiling a layer", need_bytes=need, have_bytes=have,
            ways_out=[f"device_memory of {format_bytes_up(budget)}", 'plan="auto"'],
        )  # fmt: skip


def profiled(
    profile: Callable[[], T],
    workload: Workload,
    streaming: StreamingProblem,
    machine: Hardware,
    chunk_tokens: int | None = None,
) -> T:
    """What `profile` returns, which times one layer of each kind, after the log has said how long that may take.

    Raises PlanInfeasible where a GPU has no room for it, be it that the estimate was too low: as `check_profile_fits`.
    """
    check_profile_fits(workload, streaming, chunk_tokens)
    written = profile_drive_bytes(workload, streaming)
    logger.info(
        "plan: timing a layer of each kind%s, about %.0f s at the rates of %s%s",
        "" if chunk_tokens is None else f" by chunks of {chunk_tokens} tokens",
        profile_seconds(workload, machine, chunk_tokens) + profile_drive_seconds(workload, streaming, machine),
        machine.name, f", writing up to {format_bytes(written)} to the drive" if written else "",
    )  # fmt: skip
    try:
        return profile()
    except REFUSED as error:
        why = str(error)
    # Raised from here, the error holds no frames of the profile, nor with them memory that a shorter one needs.
    have = streaming.device_capacity_bytes or 0
    need = max(profile_bytes(workload, streaming, chunk_tokens), have + IO_ALIGNMENT_BYTES)
    logger.warning("plan: the GPU had no room for timing a layer: %s", why)
    raise PlanInfeasible(
        tier=Tier.DEVICE.value, phase="profiling a layer, refused by the GPU", need_bytes=need, have_bytes=have,
        ways_out=["an end of what else uses the GPU", "a smaller batch_size or seq_len", 'plan="auto"'],
    )  # fmt: skip


def profile_seconds(workload: Workload, machine: Hardware, chunk_tokens: int | None = None) -> float:
    """About what profiling takes: products and causal attention of one layer of each kind, at the calibrated rates."""
    config, of_kind = workload.config, _kinds(workload)
    flops = 2.0 * config.batch_size * config.seq_len * sum(of_kind.values())
    of_tokens = of_pairs = float(MOST_PASSES)
    if chunk_tokens is not None:
        of_tokens, of_pairs = (passes(config.seq_len, chunk_tokens, order=order) for order in (1, 2))
    device = machine.device
    attention = 2.0 * config.batch_size * config.seq_len**2 * attention_width(workload.model) * len(of_kind)
    attentions = (
        ATTENTIONS / device.attention_forward_efficiency + FLASH_BACKWARD / device.attention_backward_efficiency
    )
    return (of_tokens * PRODUCTS * flops + of_pairs * attentions * attention) / device.matmul_flops_per_second


def profile_drive_bytes(workload: Workload, streaming: StreamingProblem) -> int:
    """About the most that profiling writes to the drive, and reads from it: what layers save, a few times. Timing
    updates writes nothing: the state that is stepped then is in memory.
    """
    if not workload.config.nvme:
        return 0
    return (1 + RUNS) * min(MOST_BYTES, streaming.activation_bytes) * len(_kinds(workload))


def profile_drive_seconds(workload: Workload, streaming: StreamingProblem, machine: Hardware) -> float:
    """About what that takes, there and back."""
    if not machine.drives:
        return 0.0
    num_bytes = profile_drive_bytes(workload, streaming)
    return num_bytes / machine.write_bytes_per_second + num_bytes / machine.read_bytes_per_second


def _kinds(workload: Workload) -> dict[tuple[type, int], int]:
    """Parameters of a layer of each kind."""
    return {
        (type(draft.modules[0]), draft.spec.compute_bytes): sum(t.num_elements for t in draft.spec.tensors)
        for draft in workload.layers
    }
