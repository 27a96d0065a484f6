"""Whether steps take what was expected of them, resource by resource.

Links and drives are expected to take so many seconds for a byte; computing and updates, so many seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from offload_rt.meter import COMPUTE, CPU, DEVICE_TO_HOST, DEVICE_UPDATE, HOST_TO_DEVICE, SSD_READ, SSD_WRITE
from offload_rt.running.steps import StepReading
from planners.problems.problem import Problem

MARGIN = 0.25
"""Other work on a machine makes single steps slower by more than that, but not every one of a window."""
LEAST_SHARE = 0.02
"""Of a step's seconds: what takes less, measured and expected, is no reason for anything."""
_RATES = (HOST_TO_DEVICE, DEVICE_TO_HOST, SSD_READ, SSD_WRITE)


def factors(
    window: Sequence[StepReading], question: Problem, busy_seconds: Mapping[str, float]
) -> dict[str, list[float]]:
    """By resource, how many times as long as expected it took in each step; what was not used is left out.

    `question` has the rates of links and drives, `busy_seconds` what a step is to take of the others.
    """
    rates, found, counts = _rates(question), dict[str, list[float]](), dict[str, float]()
    for name in _RATES:
        pairs = [(s.resources.busy_seconds.get(name, 0.0), s.resources.moved_bytes.get(name, 0)) for s in window]
        if rates[name] and all(busy > 0 and moved for busy, moved in pairs):
            found[name] = [busy * rates[name] / moved for busy, moved in pairs]
            counts[name] = max(max(busy, moved / rates[name]) for busy, moved in pairs)
    for name in (COMPUTE, CPU, DEVICE_UPDATE):
        busy = [step.resources.busy_seconds.get(name, 0.0) for step in window]
        if busy_seconds.get(name) and all(seconds > 0 for seconds in busy):
            found[name] = [seconds / busy_seconds[name] for seconds in busy]
            counts[name] = max(*busy, busy_seconds[name])
    least = LEAST_SHARE * median(step.seconds for step in window)
    return {name: each for name, each in found.items() if counts[name] >= least}


def has_drifted(factors: Sequence[float]) -> bool:
    """Whether each of them is off by more than `MARGIN`, all in the same direction."""
    return min(factors) > 1 + MARGIN or max(factors) < 1 / (1 + MARGIN)


def said(name: str, factors: Sequence[float]) -> str:
    """What is said of the resource `name`, which has drifted."""
    return f"{name} takes {median(factors):.2f} times as long as planned"


def _rates(question: Problem) -> dict[str, float]:
    hardware = question.hardware
    links = hardware.links
    return {
        HOST_TO_DEVICE: 0.0 if hardware.unified else links.host_to_device_bytes_per_second,
        DEVICE_TO_HOST: 0.0 if hardware.unified else links.device_to_host_bytes_per_second,
        SSD_READ: hardware.read_bytes_per_second,
        SSD_WRITE: hardware.write_bytes_per_second,
    }
