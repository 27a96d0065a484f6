"""What a layer costs the host beyond plain PyTorch: its own time, in layers so small that kernels take next to none.

    python benchmarks/host_overhead.py [--layers 20] [--rounds 15] [--trains lora full] [--json FILE]

A GPU is fast where the host stays ahead of it: what Python does for a layer must be less than the layer's kernels take.
Here a Llama of hidden size 64 takes steps of 8 tokens, so that nearly all time is the host's. A round has one step of
each contender, one after the other. Every contender comes with few layers and with `--layers` more of them: the
difference, divided by the layers, is a layer's; what a step takes once is not in it.

    plain        PyTorch with torch's AdamW: adapters over bf16 weights; or all parameters, with fp32 masters
    recomputed   the same, every layer run again in backward by torch.utils.checkpoint: what the engine does too
    resident     the engine, everything in memory
    host         the engine on the CPU, layers copied from HOST to slots of DEVICE memory
    device       the engine on the tests' device, whose streams are threads (and never late): everything resident
    streamed     the same, layers streamed from HOST
    inputs       as `streamed`, and layer inputs wait in HOST
    swapped      as `streamed`, and what layers save waits in HOST: no recompute, a copy each way for every tensor

For the engine adapters are over NF4 weights, decoded for each use. By phase of a step and per layer:

    wall, thread, process    microseconds: by the clock, of the computing thread's processor time, of all threads'
    python, native           calls of Python functions and of C functions, by the computing thread; exact
    switches                 how often the computing thread gave its processor up (it waited), and had it taken

Of times there are median, spread, and the difference of the least of all rounds, which a busy machine disturbs least.

The tests' device does in Python what CUDA does in its driver: of `device`, `streamed`, `inputs` and `swapped` the calls
of the computing thread count, and how they compare with each other; not the other threads' time.
"""

import argparse
import contextlib
import gc
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from rounds import circumstances, command, summary

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_contenders import FullPlain, Plain, llama, with_adapters

from offload_rt._engine import Engine
from offload_rt.memory.heap import Base
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.placement import Tier
from tests.fake_device import FakeDevice

HIDDEN, TOKENS, VOCABULARY = 64, 8, 128
FEW_LAYERS = 4
WARM_UP = 4
PHASES = ("forward", "backward", "update")
CONTENDERS = ("plain", "recomputed", "resident", "host", "device", "streamed", "inputs", "swapped")
MEASURES = ("wall", "thread", "process", "switches")
Batch = dict[str, torch.Tensor]


class Steps(Protocol):
    """Who takes steps, phase by phase."""

    def forward(self, batch: Batch) -> torch.Tensor: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def update(self) -> None: ...

    def close(self) -> None: ...


class Theirs:
    """Plain PyTorch."""

    def __init__(self, trains: str, shape: list[int], *, recomputed: bool) -> None:
        made = FullPlain if trains == "full" else Plain
        self._made = made({"kind": "plain", "shape": shape, "device": "cpu"})
        if not recomputed:
            self._made.model.gradient_checkpointing_disable()
        self.update = self._made.update

    def forward(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self._made.model(**batch).loss
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def close(self) -> None:
        pass


class Ours:
    """The engine."""

    def __init__(self, trains: str, shape: list[int], name: str) -> None:
        model = llama(shape)
        options: dict[str, Any] = {"placed_bytes": 0, "replan": False, "fill": False}
        memory: dict[str, Any] = {}
        self._device = None
        if name not in ("resident", "host"):
            self._device = options["device"] = FakeDevice(kernels_are_late=False, reports_late_seconds=0.0)
        if name not in ("resident", "device"):
            memory = {"host_memory": "256MiB"}
        if name not in ("resident", "device"):
            options |= {"rest": Tier.HOST, "num_slots": 3, "layer_inputs": Tier.DEVICE}
        if name == "inputs":
            options["layer_inputs"] = Tier.HOST
        if name == "swapped":
            chunk = Chunk(num_tokens=TOKENS, action=Action.SWAP, tier=Tier.HOST)
            options["activations"] = ActivationPolicy(chunks=(chunk,))
        self._engine = Engine(
            with_adapters(model) if trains == "lora" else model, bits=4 if trains == "lora" else None, device="cpu",
            batch_size=1, seq_len=TOKENS, device_memory="256MiB", lr=1e-4, options=RuntimeOptions(**options), **memory,
        )  # fmt: skip
        self.backward, self.update = self._engine.backward, self._engine.step

    def forward(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self._engine(**batch).loss
        return loss

    def alone(self) -> None:
        """What the process holds now is not this engine's: it would take the other contenders' memory for holes in the
        heap, and look for them behind every layer.
        """
        self._engine._runtime.heap._base = Base.now()

    def report(self) -> dict[str, Any]:
        """What shows that it did what it is here for."""
        report = self._engine.report()
        return {name: report[name] for name in ("fetches", "bytes_copied", "decodes", "prefetch_misses")}

    def close(self) -> None:
        self._engine.close()
        if self._device is not None:
            self._device.close()


def contender(name: str, trains: str, num_layers: int) -> Steps:
    shape = [HIDDEN, 2 * HIDDEN, num_layers, 4, 2, VOCABULARY]
    torch.manual_seed(0)
    if name in ("plain", "recomputed"):
        return Theirs(trains, shape, recomputed=name == "recomputed")
    return Ours(trains, shape, name)


def phases(steps: Steps, batch: Batch) -> Iterator[tuple[str, Callable[[], None]]]:
    """The parts of one step, in order."""
    loss: list[torch.Tensor] = []
    yield "forward", lambda: loss.append(steps.forward(batch))
    yield "backward", lambda: steps.backward(loss.pop())
    yield "update", steps.update


def measured(action: Callable[[], None]) -> dict[str, float]:
    """Microseconds, and switches of this thread."""

    def read() -> tuple[float, float, float, int]:
        used = resource.getrusage(resource.RUSAGE_THREAD)
        switches = used.ru_nvcsw + used.ru_nivcsw
        return time.perf_counter() * 1e6, time.thread_time() * 1e6, time.process_time() * 1e6, switches

    before = read()
    action()
    return {name: after - of for name, after, of in zip(MEASURES, read(), before, strict=True)}


def counted(action: Callable[[], None]) -> dict[str, int]:
    """Calls that this thread makes of Python's functions, and of C's."""
    calls: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, argument: calls.update((event,)))
    try:
        action()
    finally:
        sys.setprofile(None)
    return {"python": calls["call"], "native": calls["c_call"]}


Found = dict[str, dict[str, float]]
"""Of one step: by phase, by measure."""


def one_step(steps: Steps, batch: Batch, measure: Callable[[Callable[[], None]], dict[str, Any]]) -> Found:
    return {phase: measure(action) for phase, action in phases(steps, batch)}


def per_layer(many: Found, few: Found, num_layers: int) -> Found:
    """What each of the `num_layers` that the first has more than the second adds to a step."""
    found = {
        phase: {name: (many[phase][name] - few[phase][name]) / num_layers for name in many[phase]} for phase in many
    }
    names = found["forward"]
    return found | {"step": {name: sum(found[phase][name] for phase in PHASES) for name in names}}


def least(found: list[Found]) -> Found:
    """Of several steps, the least of each phase and measure: what others on the machine had least part in."""
    return {phase: {name: min(one[phase][name] for one in found) for name in found[0][phase]} for phase in PHASES}


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Reference cycles are looked for between rounds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def compare(trains: str, names: list[str], num_layers: int, num_rounds: int) -> dict[str, Any]:
    """Every contender's layer: by phase and measure."""
    batch = {key: torch.arange(TOKENS)[None] % VOCABULARY for key in ("input_ids", "labels")}
    made = {
        (name, depth): contender(name, trains, depth)
        for name in names
        for depth in (FEW_LAYERS, FEW_LAYERS + num_layers)
    }
    for steps in made.values():
        for _ in range(WARM_UP):
            one_step(steps, batch, measured)
    for steps in made.values():
        if isinstance(steps, Ours):
            steps.alone()
    rounds: dict[str, list[tuple[Found, Found]]] = {name: [] for name in names}
    for number in range(num_rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            with no_collection():
                few, many = (
                    one_step(made[name, depth], batch, measured) for depth in (FEW_LAYERS, FEW_LAYERS + num_layers)
                )
            rounds[name].append((few, many))
    results: dict[str, Any] = {}
    for name in names:
        few, many = (one_step(made[name, depth], batch, counted) for depth in (FEW_LAYERS, FEW_LAYERS + num_layers))
        by_round = [per_layer(many, few, num_layers) for few, many in rounds[name]]
        of_least = per_layer(
            least([many for _, many in rounds[name]]), least([few for few, _ in rounds[name]]), num_layers
        )
        results[name] = {
            phase: {
                **{
                    measure: {
                        **summary([round(found[phase][measure], 1) for found in by_round]),
                        "of_least": round(of_least[phase][measure], 1),
                    }
                    for measure in MEASURES
                },
                **calls,
            }
            for phase, calls in per_layer(many, few, num_layers).items()
        }
        if isinstance(steps := made[name, FEW_LAYERS + num_layers], Ours):
            results[name]["did"] = steps.report()
    for steps in made.values():
        steps.close()
    return results


def line(name: str, of: dict[str, dict[str, Any]]) -> str:
    """A contender in the terminal: the computing thread's time, the median of a step and its range, and by phase that
    of the quickest.
    """
    thread = of["step"]["thread"]
    parts = [f"{name:11} {thread['median']:6.0f} us ({thread['min']:.0f} to {thread['max']:.0f})"]
    for phase in (*PHASES, "step"):
        one = of[phase]
        parts.append(
            f"{phase} {one['thread']['of_least']:.0f} us, {one['python']:.0f}+{one['native']:.0f} calls, "
            f"{one['switches']['median']:.1f} switches"
        )
    return "  |  ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20, help=f"beyond the {FEW_LAYERS} of the shallow model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trains", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for trains in arguments.trains:
        names = [name for name in arguments.contenders if (trains, name) != ("full", "swapped")]
        results[trains] = compare(trains, names, arguments.layers, arguments.rounds)
        print(trains)
        for name, of in results[trains].items():
            print(line(name, of))
    if arguments.json is not None:
        shape = {"hidden": HIDDEN, "tokens": TOKENS, "layers": arguments.layers, "rounds": arguments.rounds}
        said = command({str(arguments.json): "FILE"})
        run = {
            **circumstances(),
            "command": said,
            "torch": torch.__version__,
            "configuration": shape,
            "per_layer": results,
        }
        arguments.json.write_text(json.dumps({"runs": [run]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
