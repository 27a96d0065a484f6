"""A class of equal blocks divided by what is done with what they save, where a runtime treats each chunk as a whole.

The optimiser says how many blocks of a class are kept, swapped to each tier and computed again. Here it is decided
which: the plan then has a class for each, and `divided` gives the problem that it answers. Frozen data only.

    forward order     again  HOST  again  again  HOST  again  kept  kept

What is kept is kept of the last blocks, whose backward comes first: nothing has to come back before it. What is swapped
is spread evenly over the others, so that computation lies between two transfers. The first block is computed again, if
any is.

[Note: dealt chunks]
Where a batch goes through blocks by chunks, it is chunks of all blocks that are counted, for each saved tensor by
itself. They are dealt like cards, those that are computed again first:

    3 blocks of 4 chunks, 5 again, 4 in HOST, 3 kept       block 0   again  again  HOST  kept
                                                           block 1   again  again  HOST  kept
                                                           block 2   again  HOST   HOST  kept

so that each block has its share of each, to less than a chunk, and neighbours the same but for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planners.plans.plan import Plan
from planners.problems.problem import BlockClass, Problem

HOMES = ("computed again", "on NVMe", "in HOST", "kept")
"""What is done with what a block saves, in the order of the shares that `expand.Fractions.tokens` says."""
_AGAIN, _NVME, _HOST, _KEPT = range(4)


def home_of_each(counts: Sequence[int]) -> list[int]:
    """For each block, in the order of forward, which of `HOMES` it gets; `counts` are of how many."""
    total = sum(counts)
    found = [_AGAIN] * total
    for index in range(total - counts[_KEPT], total):
        found[index] = _KEPT
    swapped = counts[_NVME] + counts[_HOST]
    first = 1 if counts[_AGAIN] else 0
    room = total - counts[_KEPT] - first
    done = 0
    for turn in range(swapped):
        # Tiers take turns, each as often as it is due.
        on_nvme = (turn + 1) * counts[_NVME] // swapped > done
        done += on_nvme
        found[first + (2 * turn + 1) * room // (2 * swapped)] = _NVME if on_nvme else _HOST
    return found


def divide(entry: BlockClass, counts: Sequence[int]) -> list[tuple[int, BlockClass]]:
    """The class by home: (which of `HOMES`, its blocks). The class itself where all have one."""
    if max(counts) == entry.count:
        return [(max(range(len(counts)), key=lambda home: counts[home]), entry)]
    order = sorted(range(entry.count), key=lambda index: entry.positions[index])
    homes = dict(zip(order, home_of_each(counts), strict=True))
    return [
        (home, _part(entry, f"{entry.name}, {name}", [i for i in range(entry.count) if homes[i] == home]))
        for home, name in enumerate(HOMES)
        if counts[home]
    ]


def deal(entry: BlockClass, counts: Sequence[Sequence[int]]) -> list[tuple[tuple[tuple[int, ...], ...], BlockClass]]:
    """The class by what its blocks do: (for each saved tensor, its chunks by home; the blocks). See [Note: dealt
    chunks].

    counts: for each saved tensor, chunks of all blocks by home, in the order of `HOMES`; they add up to as many each.
    """
    order = sorted(range(entry.count), key=lambda index: entry.positions[index])
    found: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for place, index in enumerate(order):
        found.setdefault(tuple(_dealt(own, place, entry.count) for own in counts), []).append(index)
    if len(found) == 1:
        return [(next(iter(found)), entry)]
    return [
        (homes, _part(entry, f"{entry.name}, {number}", sorted(indices)))
        for number, (homes, indices) in enumerate(found.items())
    ]


def _dealt(counts: Sequence[int], place: int, num_places: int) -> tuple[int, ...]:
    """How many of each kind come to `place` of those that are dealt to."""
    found, begin = [], 0
    for count in counts:
        end = begin + count
        found.append(len(range(begin + (place - begin) % num_places, end, num_places)))
        begin = end
    return tuple(found)


def _part(entry: BlockClass, name: str, indices: Sequence[int]) -> BlockClass:
    return replace(
        entry,
        name=name,
        blocks=tuple(entry.blocks[index] for index in indices),
        positions=tuple(entry.positions[index] for index in indices),
    )


def divided(problem: Problem, plan: Plan) -> Problem:
    """The problem with its classes as `plan` divides them; the problem itself where it does not.

    ValueError where a class of the plan has blocks of several classes of the problem, or of none.
    """
    classes = problem.workload.classes
    if [entry.name for entry in plan.classes] == [entry.name for entry in classes]:
        return problem
    place = {block: (entry, index) for entry in classes for index, block in enumerate(entry.blocks)}
    found = []
    for placed in plan.classes:
        owners = {id(place[block][0]) for block in placed.blocks if block in place}
        if len(owners) != 1 or any(block not in place for block in placed.blocks):
            raise ValueError(f"plan: class {placed.name!r} is no part of a class of the workload")
        entry = place[placed.blocks[0]][0]
        found.append(_part(entry, placed.name, [place[block][1] for block in placed.blocks]))
    if sum(entry.count for entry in found) != len(place):
        raise ValueError(f"plan: has classes of {sum(e.count for e in found)} blocks, the workload of {len(place)}")
    return replace(problem, workload=replace(problem.workload, classes=tuple(found)))
