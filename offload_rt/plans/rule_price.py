"""What a step of the fixed rule's plan takes, by the simulator and at the prices that the optimiser's plans have.

The rule says of each block where it rests. Where layers train that is said again in the words of a question: a class
for all blocks with which the same is done, with their own pieces of state. So nothing is spread that lies in one place,
and links and drives move in a simulated step what they move in a real one, to the byte. For adapters, whose weights
alone move, a class has the share of each tier.

    Ring.rest, resident     ──► ClassPlan.weights        activations       ──► ClassPlan.tokens
    StatePlacement          ──► ClassPlan.updates        slots, all kinds  ──► Buffers
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from offload_rt.tiering.resting import all_in
from planners.optimiser.expand import Fractions, UpdateKey, expand
from planners.plans.activations import Action
from planners.plans.placement import (
    Buffers,
    ClassPlan,
    Cuts,
    DecodeScope,
    Tier,
    TokenSplit,
    Update,
    UpdateMode,
    UpdatePlace,
)
from planners.plans.plan import Plan, StatePlacement
from planners.problems.cost import Knobs
from planners.problems.problem import BlockClass, Problem, Training
from planners.rule.filling import LAYERS
from planners.simulator.arenas import with_arenas
from planners.simulator.division import divided
from planners.simulator.simulate import Simulation, simulate


def rule_seconds(problem: Problem, rule: Plan) -> float:
    """What a step of the rule's plan takes at the prices of `problem`, which was measured by the same chunks.

    ValueError for a plan with other cuts, or of which no question can say all.
    """
    return float(rule_simulation(problem, rule).step_seconds)


def rule_simulation(problem: Problem, rule: Plan) -> Simulation:
    """As `rule_seconds`, with what links, drives and processors do in it."""
    trains = problem.workload.training is Training.FULL
    asked, plan = in_classes(problem, rule) if trains else _for_adapters(problem, rule)
    return simulate(asked, plan)


def why_no_question_says(rule: Plan, seq_len: int, micro_batches: int = 1) -> str:
    """What of a plan for layers that train no question can say, so that it has no price; empty where all has one.

    micro_batches: of a step.
    """
    if rule.layer_major and rule.activations:
        return "kept activations of several micro-batches together"
    spans = [policy.spans(seq_len) for policy in (rule.activations or {}).values()]
    if any(len(own) > 1 for own in spans):
        return "layers by chunks of tokens"
    if any(span.action is Action.SWAP for own in spans for span in own):
        return "swapped activations"
    if rule.lookups is not None or rule.head_tiles is not None or rule.classes:
        return "blocks outside the layers by rows or tiles, or blocks in parts"
    state = rule.state
    if state is None or state.gradients is not Tier.NVME:
        return ""
    gone_at_once = rule.update_mode is UpdateMode.BACKWARD and not state.in_memory and micro_batches == 1
    return "" if gone_at_once else "gradients that wait on NVMe"


def in_classes(problem: Problem, rule: Plan) -> tuple[Problem, Plan]:
    """The rule's plan where layers train, with classes of equal blocks that are treated alike, laid out; and `problem`
    with its classes divided so.

    A layer that stays in DEVICE memory is in no ring, as in the rule's plan. ValueError where no question can say it.
    """
    workload, state, unified = problem.workload, rule.state, problem.hardware.unified
    if rule.layer_major is not workload.layer_major and workload.micro_batches > 1:
        raise ValueError("a plan with micro-batches in another order than those of the question is not simulated")
    if why := why_no_question_says(rule, workload.seq_len, workload.micro_batches):
        raise ValueError(f"a plan with {why} is not simulated")
    if state is None:
        raise ValueError("a plan without state is not simulated where layers train")
    rests = {name: ring.rest for ring in rule.rings for name in ring.blocks}
    policies = rule.activations or {}
    kept = {name for name, own in policies.items() if own.spans(workload.seq_len)[0].action is Action.KEEP}
    classes = []
    for entry in workload.classes:
        alike: dict[_Treated, list[str]] = {}
        for name in entry.blocks:
            treated = _Treated(
                rest=rests.get(name, Tier.DEVICE), kept=name in kept, in_memory=state.in_memory.get(name, 0),
                on_device=state.on_device.get(name, 0),
            )  # fmt: skip
            alike.setdefault(treated, []).append(name)
        for number, (treated, names) in enumerate(alike.items()):
            tokens = _tokens(entry, workload.seq_len, rule.layer_inputs, kept=treated.kept)
            classes.append(
                ClassPlan(
                    name=entry.name if len(alike) == 1 else f"{entry.name}, {number}", blocks=tuple(names),
                    weights=all_in(treated.rest, entry.stored_bytes), tokens=tokens,
                    updates=_in_tiers(entry, treated, unified=unified),
                )
            )  # fmt: skip
    layers = next((ring for ring in rule.rings if ring.name == LAYERS), None)
    # Where gradients of all blocks have room in HOST, none waits for a slot.
    gradient_slots = state.gradient_slots if state.gradients is Tier.NVME else workload.num_blocks
    plan = replace(
        rule,
        classes=tuple(classes),
        cuts=Cuts(chunk_tokens=workload.tokens),
        buffers=replace(
            rule.buffers, host_slots=1 if layers is None else layers.num_slots, host_gradient_slots=gradient_slots,
            state_slots=state.state_slots or rule.buffers.state_slots,
            weight_slots=state.weight_slots or rule.buffers.weight_slots,
        ),
    )  # fmt: skip
    asked = divided(problem, plan)
    staying = tuple(
        replace(entry, weights_stay=entry.weights_stay or entry.blocks[0] not in rests)
        for entry in asked.workload.classes
    )
    asked = replace(asked, workload=replace(asked.workload, classes=staying))
    return asked, with_arenas(asked, plan)


@dataclass(frozen=True, kw_only=True)
class _Treated:
    """What the rule does with a block."""

    rest: Tier
    """Of its weights."""
    kept: bool
    """What it saves is."""
    in_memory: int
    """Pieces of its state, the first ones."""
    on_device: int
    """Pieces that the device steps, the last ones."""


def _tokens(entry: BlockClass, seq_len: int, inputs: Tier, *, kept: bool) -> tuple[TokenSplit, ...]:
    """What becomes of all tokens of what a block saves. ValueError where what is kept was not measured."""
    if kept and not any(saved.recomputable for saved in entry.saved):
        raise ValueError(f"what {entry.name!r} takes where it keeps its activations was not measured")
    found = []
    for saved in entry.saved:
        home = inputs if not saved.recomputable else Tier.DEVICE if kept else None
        found.append(
            TokenSplit(
                name=saved.name, bytes_per_token=saved.bytes_per_token,
                recompute_tokens=seq_len if home is None else 0, nvme_tokens=seq_len if home is Tier.NVME else 0,
                host_tokens=seq_len if home is Tier.HOST else 0, device_tokens=seq_len if home is Tier.DEVICE else 0,
            )
        )  # fmt: skip
    return tuple(found)


def _in_tiers(entry: BlockClass, treated: _Treated, *, unified: bool) -> tuple[Update, ...]:
    """The updates of a block: its first pieces in memory, its last ones on the device."""
    if not entry.state_cuts:
        return ()
    ends = [params for params, _ in entry.state_cuts]
    in_memory, there = ends[treated.in_memory], ends[len(ends) - 1 - treated.on_device]
    memory = Tier.DEVICE if unified else Tier.HOST
    return tuple(
        Update(
            params=end - begin, tier=memory if end <= in_memory else Tier.NVME,
            place=UpdatePlace.DEVICE if unified or begin >= there else UpdatePlace.CPU,
        )
        for begin, end in itertools.pairwise(sorted({0, in_memory, there, ends[-1]}))
    )  # fmt: skip


def _for_adapters(problem: Problem, rule: Plan) -> tuple[Problem, Plan]:
    """As `in_classes`, with shares of the classes that the question has."""
    chunk_tokens = problem.workload.measured_chunk_tokens
    tiled = any(entry.in_tiles for entry in problem.workload.classes)
    kept_layers, seq_len = rule.activations or {}, problem.workload.seq_len
    chunked = any(len(policy.spans(seq_len)) > 1 for policy in kept_layers.values())
    cut_otherwise = chunked != (chunk_tokens is not None) or (rule.head_tiles is not None) != tiled
    if rule.layer_major is not problem.workload.layer_major or cut_otherwise:
        raise ValueError("a plan with other cuts than those of the question is not simulated")
    unified = problem.hardware.unified
    rings = {name: ring.rest for ring in rule.rings for name in ring.blocks}
    rings |= {name: Tier.HOST for entry in rule.classes if entry.weights.host_bytes for name in entry.blocks}
    if rule.lookups is not None:
        rings |= dict.fromkeys(rule.lookups.blocks, rule.lookups.rest)
    if rule.head_tiles is not None:
        rings[rule.head_tiles.block] = rule.head_tiles.rest
    layers = next((ring for ring in rule.rings if ring.name == LAYERS), None)
    inputs = Tier.DEVICE if unified and rule.layer_inputs is Tier.HOST else rule.layer_inputs
    put_away = (0.0, float(inputs is Tier.NVME), float(inputs is Tier.HOST), float(inputs is Tier.DEVICE))
    fractions = []
    for entry in problem.workload.classes:
        rests = [rings.get(name, Tier.DEVICE) for name in entry.blocks]
        device, host, nvme = (sum(rest is tier for rest in rests) / len(rests) for tier in Tier)
        kept = 0.0 if chunked else sum(name in kept_layers for name in entry.blocks) / len(rests)
        fractions.append(
            Fractions(
                weights=(device + host, 0.0, nvme) if unified else (device, host, nvme),
                tokens=tuple((1 - kept, 0.0, 0.0, kept) if s.recomputable else put_away for s in entry.saved),
                updates=_updates(entry, rule.state, unified=unified),
            )
        )
    knobs = Knobs(
        update_mode=UpdateMode.AFTER, slots=layers.num_slots if layers else 2,
        cuts=Cuts(chunk_tokens=chunk_tokens or problem.workload.tokens),
        decode_scope=rule.decode_scope or DecodeScope.LINEAR, inputs=inputs,
        buffers=Buffers() if rule.state is None else Buffers(state_slots=max(1, rule.state.state_slots)),
    )  # fmt: skip
    plan = expand(problem, knobs, fractions, planner=rule.planner)
    return divided(problem, plan), plan


def _updates(entry: BlockClass, state: StatePlacement | None, *, unified: bool) -> dict[UpdateKey, float]:
    """Shares of a class's parameters by where their state rests, and who steps them."""
    if state is None or not entry.state_cuts:
        return {(Tier.DEVICE, UpdatePlace.DEVICE, False): 1.0}
    memory, place = (Tier.DEVICE, UpdatePlace.DEVICE) if unified else (Tier.HOST, UpdatePlace.CPU)
    share = entry.state_cuts[state.in_memory.get(entry.name, 0)][0] / entry.trainable_params
    return {(tier, place, False): part for tier, part in ((memory, share), (Tier.NVME, 1 - share)) if part}
