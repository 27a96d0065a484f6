"""The optimiser's question about micro-batches that go through each layer together.

What is fetched once serves all of them; what waits from a layer's forward to its backward waits for each: see
`Workload.layer_major`. Nothing is kept or put away besides, as by the fixed rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from offload_rt.tensor_spec import IO_ALIGNMENT_BYTES
from planners.optimiser.orders import layer_major
from planners.problems.measured import MeasuredSeconds
from planners.problems.problem import Problem
from planners.rule.streaming_problem import StreamingProblem
from planners.units import whole_pages


def orders(streaming: StreamingProblem) -> tuple[bool, ...]:
    """Whether micro-batches go through the layers together: what to ask about; one of them where the cuts say which."""
    if streaming.num_micro_batches < 2:
        return (False,)
    if streaming.cuts is not None and streaming.cuts.layer_major is not None:
        return (streaming.cuts.layer_major,)
    return (False, True)


def by_order(
    streaming: StreamingProblem,
    layers: dict[str, MeasuredSeconds],
    ask: Callable[[dict[str, MeasuredSeconds]], Problem],
) -> Iterator[Problem]:
    """The question for each of `orders`; `ask` makes it of one after the other, of what layers take by their names."""
    for is_layer_major in orders(streaming):
        if is_layer_major:
            again = {name: replace(taken, kept=None) for name, taken in layers.items()}
            yield together(ask(again), streaming)
        else:
            yield ask(layers)


def computing_again(problem: Problem) -> Problem:
    """The question where nothing is kept or put away of layers but their inputs, as `together` wants it."""
    classes = tuple(
        replace(
            entry, saved=tuple(saved for saved in entry.saved if not saved.recomputable),
            measured=None if entry.measured is None else replace(entry.measured, kept=None),
        )
        for entry in problem.workload.classes
    )  # fmt: skip
    return replace(problem, workload=replace(problem.workload, classes=classes))


def together(problem: Problem, streaming: StreamingProblem) -> Problem:
    """`problem`, which was asked about micro-batches one after the other that compute all again, about the same where
    they go through each layer together.
    """
    for entry in problem.workload.classes:
        if entry.measured is None or any(saved.recomputable for saved in entry.saved):
            raise ValueError(f"{entry.name!r}: micro-batches together were timed, and keep nothing but layer inputs")
    workload, device, host = problem.workload, problem.hardware.device, problem.hardware.host
    num = workload.micro_batches
    # As many inputs of a layer begin at an address of their own.
    pages = (num - 1) * len(streaming.layers) * IO_ALIGNMENT_BYTES
    waiting = 2 * num * whole_pages(streaming.layer_input_bytes)  # hidden states of micro-batches whose turn it is not
    reserve = device.reserve_bytes + pages + waiting + whole_pages((num - 1) * streaming.thread_bytes)
    device = replace(device, reserve_bytes=reserve, memory_bytes=max(device.memory_bytes, reserve + 1))
    host = replace(host, memory_bytes=max(0, host.memory_bytes - pages))
    return replace(layer_major(problem), hardware=replace(problem.hardware, device=device, host=host))
