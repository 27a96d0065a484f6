"""What was measured beside what was planned, and how that is said: a steady step by resource, which one binds, and the
most that there was in each tier. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offload_rt.meter import RESOURCES, Reading
from planners.errors import format_bytes
from planners.plans.plan import Tier

PHASES = ("ingest", "step", "save", "resume")
"""Of an engine's life, see `peaks`."""
MANAGED_FILES = ("weights", "state", "scratch")
"""What a capacity of NVME is for."""


def compared(
    seconds: float, outside_seconds: float, resources: Reading, num_steps: int, predicted: Mapping[str, Any]
) -> dict[str, Any]:
    """The medians of `num_steps` steps beside a plan's `predicted`, which is empty where its planner predicts nothing.

    A resource that was not measured has busy seconds of None, one that nobody predicted has predicted seconds of None.
    """
    expected: Mapping[str, float] = predicted.get("busy_seconds", {})
    busy, moved, stalls = resources.busy_seconds, resources.moved_bytes, resources.stall_seconds
    names = [name for name in RESOURCES if any(of.get(name) for of in (busy, moved, stalls, expected))]
    return {
        "num_steps": num_steps,
        "seconds": seconds,
        "predicted_seconds": predicted.get("step_seconds"),
        "outside_seconds": outside_seconds,
        "binding": binding(busy),
        "predicted_binding": binding(expected),
        "resources": {
            name: {
                "busy_seconds": busy.get(name),
                "predicted_seconds": expected.get(name),
                "stall_seconds": stalls.get(name, 0.0),
                "bytes": moved.get(name, 0),
            }
            for name in names
        },
    }


def binding(busy_seconds: Mapping[str, float]) -> str | None:
    """The resource that works longest: a step cannot take less. None where none works."""
    return max((name for name, seconds in busy_seconds.items() if seconds), key=busy_seconds.__getitem__, default=None)


def lines(steady: Mapping[str, Any]) -> list[str]:
    """`compared` for people: the step, then a line for each resource, the longest at work first."""
    text = f"a steady step takes {_seconds(steady['seconds'])} in the median of {steady['num_steps']}"
    if steady["predicted_seconds"] is not None:
        text += f", {_seconds(steady['predicted_seconds'])} predicted"
    if steady["binding"] is not None:
        text += f"; {steady['binding']} binds"
        if steady["predicted_binding"] not in (None, steady["binding"]):
            text += f", {steady['predicted_binding']} was to"
    found = [text]
    resources: Mapping[str, Mapping[str, Any]] = steady["resources"]
    for name in sorted(resources, key=lambda name: -(resources[name]["busy_seconds"] or 0.0)):
        found.append(f"  {name:<15}{', '.join(_parts(resources[name]))}")
    return found


def in_short(steady: Mapping[str, Any]) -> str:
    """`compared` in a sentence: what binds, and how far reality is from the prediction, where there is one."""
    name, resources = steady["binding"], steady["resources"]
    text = f"a step takes {_seconds(steady['seconds'])}{_off(steady['seconds'], steady['predicted_seconds'])}"
    if name is None:
        return text
    busy = resources[name]["busy_seconds"]
    text += f"; {name} binds, {_seconds(busy)} busy{_off(busy, resources[name]['predicted_seconds'])}"
    others = {
        other: each["busy_seconds"] - each["predicted_seconds"]
        for other, each in resources.items()
        if other != name and each["busy_seconds"] is not None and each["predicted_seconds"] is not None
    }
    if others:
        far = max(others, key=lambda other: abs(others[other]))
        busy = resources[far]["busy_seconds"]
        text += f"; furthest off besides: {far}, {_seconds(busy)}{_off(busy, resources[far]['predicted_seconds'])}"
    return text


def peak_lines(peaks: Mapping[str, Any]) -> list[str]:
    """`peaks.Peaks.report` for people: a line for each tier, and what exceeds the plan."""
    found = []
    for tier in (Tier.DEVICE, Tier.HOST, Tier.NVME):
        if tier.value not in peaks:
            continue
        of = peaks[tier.value]
        phases = {
            name: sum(one.get(part, 0) for part in MANAGED_FILES) if tier is Tier.NVME else one["bytes"]
            for name, one in of["phases"].items()
        }
        passing = of.get("passing_bytes")  # not in records of earlier versions
        beside = f", beside {format_bytes(passing)} for a moment of ingest" if passing else ""
        found.append(f"{tier.value}: {_most(phases)}; {format_bytes(of['planned_bytes'])} planned{beside}")
    allocator = peaks.get("allocator")
    if allocator is not None and allocator["phases"]:
        planned = format_bytes(allocator["planned_bytes"])
        rehearsed = allocator.get("rehearsed_bytes")
        counted = "" if rehearsed is None else f", the longest step's tensors {format_bytes(rehearsed)}"
        found.append(f"process, beside arenas: {_most(allocator['phases'])}{counted}; {planned} planned for steps")
    for one in peaks.get("over", ()):
        found.append(f"over the plan: {one['tier']} by {format_bytes(one['bytes'])} in {one['phase']}")
    return found


def _most(phases: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(phases[name])}" for name in PHASES if name in phases)


def _off(seconds: float, predicted: float | None) -> str:
    if predicted is None:
        return ""
    if not predicted:
        return " (none predicted)"
    return f" ({seconds / predicted - 1:+.0%} of the {_seconds(predicted)} predicted)"


def _parts(resource: Mapping[str, Any]) -> Sequence[str]:
    busy, predicted = resource["busy_seconds"], resource["predicted_seconds"]
    parts = ["not timed" if busy is None else f"{_seconds(busy)} busy"]
    if predicted is not None:
        parts.append(f"{_seconds(predicted)} predicted")
    if resource["bytes"]:
        parts.append(format_bytes(resource["bytes"]))
    if resource["stall_seconds"]:
        parts.append(f"computing waited {_seconds(resource['stall_seconds'])} for it")
    return parts


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 9.9995 else f"{seconds:.1f} s"
