"""Small problems and plans for the planner's tests: a six-layer model on machines where something always binds."""

import itertools
from dataclasses import replace

from planners.optimiser.expand import Fractions, expand
from planners.plans.placement import Buffers, Cuts, DecodeScope, Tier, UpdateMode, UpdatePlace
from planners.problems.cost import Knobs
from planners.problems.hardware import Drive, named_hardware
from planners.problems.model_workload import make_workload
from planners.problems.problem import Problem
from planners.shapes.architectures import shape_from_config

TINY = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000,
}  # fmt: skip
MIB = 2**20


def machine(*, device=64 * MIB, host=64 * MIB, nvme=1 << 30, name="rtx4090"):
    """A card shrunk with its memory, so that a tiny model overflows it."""
    hardware = named_hardware(name)
    drive = Drive(
        capacity_bytes=nvme or 1, read_bytes_per_second=7e9, write_bytes_per_second=5e9, endurance_bytes=1 << 50
    )
    return replace(
        hardware,
        device=replace(hardware.device, memory_bytes=device, reserve_bytes=0),
        host=replace(hardware.host, memory_bytes=0 if hardware.unified else host),
        drives=(drive,) if nvme else (),
    )


def problem(*, full=False, batch_size=4, seq_len=256, machine_=None, bits=None, **options):
    rank = None if full else 8
    workload = make_workload(
        shape_from_config(TINY, "tiny"), batch_size=batch_size, seq_len=seq_len, bits=bits, rank=rank, **options
    )
    return Problem(hardware=machine_ or machine(), workload=workload)


def fractions(problem_, *, weights=(0.25, 0.25, 0.5), tokens=(0.25, 0.25, 0.25, 0.25), updates=None):
    """The same fractions for every class; what cannot be recomputed is spread over the tiers."""
    rest = tuple(t / (1 - tokens[0]) if tokens[0] < 1 else float(i == 1) for i, t in enumerate(tokens[1:]))
    updates = updates or {(Tier.NVME, UpdatePlace.CPU, False): 1.0}
    return [
        Fractions(
            weights=weights,
            tokens=tuple(tokens if saved.recomputable else (0.0, *rest) for saved in entry.saved),
            updates=updates,
        )
        for entry in problem_.workload.classes
    ]


EVERYWHERE = {
    (Tier.DEVICE, UpdatePlace.DEVICE): 0.2,
    (Tier.HOST, UpdatePlace.DEVICE): 0.2,
    (Tier.HOST, UpdatePlace.CPU): 0.2,
    (Tier.NVME, UpdatePlace.DEVICE): 0.2,
    (Tier.NVME, UpdatePlace.CPU): 0.2,
}


def matrix():
    """Plans that use every place for everything, in every mode. None has to fit."""
    return list(
        itertools.product(
            (False, True), UpdateMode, (Tier.DEVICE, Tier.HOST), ((0.25, 0.25, 0.5), (0, 0, 1), (1, 0, 0)), (None, 5)
        )
    )


def plan_of(problem_, *, mode=UpdateMode.BACKWARD, boundary=Tier.DEVICE, weights=(0.25, 0.25, 0.5), tokens=None,
            updates=None, chunk=128, groups=1, slots=2, scope=DecodeScope.LINEAR, buffers=None):  # fmt: skip
    """A plan by hand. `updates` maps tier and place to a share; in DEFERRED, CPU updates are deferred."""
    deferred = mode is UpdateMode.DEFERRED
    shares = updates or EVERYWHERE
    placed = {(t, p, deferred and p is UpdatePlace.CPU): share for (t, p), share in shares.items()}
    knobs = Knobs(
        update_mode=mode, slots=slots, cuts=Cuts(chunk_tokens=chunk, attention_groups=groups), boundary=boundary,
        decode_scope=scope, buffers=buffers or Buffers(),
    )  # fmt: skip
    given = fractions(problem_, weights=weights, tokens=tokens or (0.25, 0.25, 0.25, 0.25), updates=placed)
    return expand(problem_, knobs, given, planner="by hand")
