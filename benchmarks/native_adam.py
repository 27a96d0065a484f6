"""The adam section of native.py: one AdamW step against the speed of memory, torch's fused AdamW and DeepSpeed's.

In billions of elements per second. A step of ours moves 28 bytes for each element: it reads a bfloat16 gradient and
float32 master and moments, and writes these three and the bfloat16 weight. The triads move as many bytes; their
speed is given in elements of 28 bytes. torch and DeepSpeed step a float32 gradient and parameter (28 bytes as
well), alone and with the two conversions that training in bfloat16 needs around it. Smaller moments move 20 bytes in
bfloat16 and 16 in 8 bits. All lie in the same memory with
huge pages, contenders are interleaved, ratios are taken within a round.

Alone: python benchmarks/native_adam.py [--json FILE]
"""

import argparse
import ctypes
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import _offload_rt_native as native
import rounds
import torch

from offload_rt.adamw import cpu_adam
from offload_rt.adamw.blockwise import QUANT_BLOCK_SIZE, Quantized
from offload_rt.memory.arena import Arena

NUM_THREADS = (1, 2)
BYTES_PER_ELEMENT = 28
TRIADS = ("triad", "triad streaming", "triad in place")
Contenders = dict[str, Callable[[], float]]

try:
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam
except ImportError:  # optional: it compiles itself at its first start
    deepspeed = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adam-elements", type=int, default=32 << 20, help="default 32 Mi: a step moves 0.9 GB")


class Memory:
    """One parameter's tensors, and three arrays for the triads, which together have the bytes that a step moves."""

    def __init__(self, num_elements: int) -> None:
        length = num_elements * BYTES_PER_ELEMENT // 12 // 64 * 64
        sizes = [num_elements] * 7 + [length] * 3
        arena = Arena("benchmark", 4 * sum(sizes))
        tensors = arena.acquire(arena.num_bytes, "adam").tensor(torch.float32, (sum(sizes),)).zero_().split(sizes)
        self.master, self.exp_avg, self.exp_avg_sq, self.grad_fp32, halves, moments, codes, *self.triad = tensors
        self.grad, self.weight = halves.view(torch.bfloat16).split(num_elements)
        self.bfloat16_moments = moments.view(torch.bfloat16).split(num_elements)
        num_blocks = -(-num_elements // QUANT_BLOCK_SIZE)
        self.quantized_moments = [
            Quantized(part.view(torch.uint8)[:num_elements], part[-num_blocks:]) for part in codes.chunk(2)
        ]
        generator = torch.Generator().manual_seed(0)
        self.master.normal_(generator=generator)
        self.grad.normal_(generator=generator)
        self.grad_fp32.copy_(self.grad)


def compiled_triads(folder: Path) -> ctypes.CDLL | None:
    """triad.c as a library, or None where there is no compiler."""
    library = folder / "triad.so"
    source = Path(__file__).with_name("triad.c")
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no triad to compare with: {error}")
        return None
    return ctypes.CDLL(str(library))


def triad_of(library: ctypes.CDLL, name: str, memory: Memory, num_threads: int) -> Callable[[], None]:
    function = getattr(library, name.replace(" ", "_"))
    x, y, z = memory.triad
    arrays = (x, z) if name == "triad in place" else (x, y, z)
    cuts = [x.numel() * part // num_threads // 64 * 64 for part in range(num_threads + 1)]
    parts = [
        (*(ctypes.c_void_p(array[begin:].data_ptr()) for array in arrays), ctypes.c_size_t(end - begin))
        for begin, end in pairwise(cuts)
    ]

    def work() -> None:
        threads = [threading.Thread(target=function, args=part) for part in parts[1:]]
        for thread in threads:
            thread.start()
        function(*parts[0])
        for thread in threads:
            thread.join()

    return work


def giga_elements_per_second(num_elements: int, num_threads: int, work: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        torch.set_num_threads(before)
        return num_elements / seconds / 1e9

    return measure


def step_of(memory: Memory, num_threads: int, **options: Any) -> Callable[[], None]:
    """Through the binding, because the public function chooses the instruction set itself."""
    scalars = cpu_adam.AdamW(lr=1e-6).scalars(1000)
    grad, weight = (tensor.view(torch.uint16).numpy() for tensor in (memory.grad, memory.weight))
    state = [tensor.numpy() for tensor in (memory.master, memory.exp_avg, memory.exp_avg_sq)]
    return lambda: native.adamw_step(grad, *state, weight, scalars, num_threads=num_threads, **options)


def variants_of(memory: Memory, num_threads: int) -> dict[str, Callable[[], None]]:
    """The public function, with moments of fewer bits."""

    def work_of(moments: Sequence[Any]) -> Callable[[], None]:
        return lambda: cpu_adam.update(
            memory.grad, memory.master, *moments, memory.weight, step=1000, numbers=cpu_adam.AdamW(lr=1e-6),
            num_threads=num_threads, streaming_stores=True,
        )  # fmt: skip

    return {
        "bfloat16 moments": work_of(memory.bfloat16_moments),
        "8-bit moments": work_of(memory.quantized_moments),
    }


def others(memory: Memory) -> dict[str, Callable[[], None]]:
    """torch's and DeepSpeed's AdamW over the same memory, alone and with both conversions."""
    parameter = torch.nn.Parameter(memory.master)
    parameter.grad = memory.grad_fp32
    optimizers = {"torch fused": torch.optim.AdamW([parameter], lr=1e-6, fused=True)}
    if deepspeed is not None:
        optimizers["deepspeed"] = DeepSpeedCPUAdam([parameter], lr=1e-6, adamw_mode=True)
    works: dict[str, Callable[[], None]] = {}
    for name, optimizer in optimizers.items():
        optimizer.step()
        state = optimizer.state[parameter]
        state["exp_avg"], state["exp_avg_sq"] = memory.exp_avg, memory.exp_avg_sq

        def converted(optimizer: torch.optim.Optimizer = optimizer) -> None:
            memory.grad_fp32.copy_(memory.grad)
            optimizer.step()
            memory.weight.copy_(memory.master)

        works[name] = optimizer.step
        works[f"{name} + conversions"] = converted
    return works


def compare(contenders: Contenders, num_rounds: int) -> dict[str, Any]:
    """Speeds; and the ratios to the fastest triad of the round, torch and DeepSpeed on as many threads."""
    speeds = rounds.interleave(contenders, num_rounds)
    for threads in {name.split()[-1] for name in speeds}:
        triads = [speeds[f"{triad} {threads}"] for triad in TRIADS if f"{triad} {threads}" in speeds]
        if triads:
            speeds[f"fastest triad {threads}"] = [max(of_round) for of_round in zip(*triads, strict=True)]
    compared: dict[str, Any] = {name: rounds.summary(values) for name, values in speeds.items()}
    for name in speeds:
        threads = name.split()[-1]
        for reference in ("fastest triad", "torch fused", "deepspeed"):
            if f"{reference} {threads}" in speeds and name != f"{reference} {threads}":
                compared[name][f"over {reference}"] = rounds.ratio(speeds, name, f"{reference} {threads}")
    return compared


def print_rows(rows: dict[str, Any]) -> None:
    for name, row in rows.items():
        ratios = [
            f"{key} {v['median']:.2f} [{v['min']:.2f}, {v['max']:.2f}]" for key, v in row.items() if "over" in key
        ]
        print(f"  {name:30} {row['median']:6.3f} Gelem/s [{row['min']:.3f}, {row['max']:.3f}]  {'  '.join(ratios)}")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the adam section."""
    num_elements, num_rounds = arguments.adam_elements, max(arguments.rounds, 7)
    memory = Memory(num_elements)
    contenders: Contenders = {}
    with tempfile.TemporaryDirectory() as folder:
        library = compiled_triads(Path(folder))
        other_works = others(memory)
        for num_threads in NUM_THREADS:

            def add(name: str, work: Callable[[], None], num_threads: int = num_threads) -> None:
                measure = giga_elements_per_second(num_elements, num_threads, work)
                contenders[f"{name} x{num_threads}"] = measure

            for triad in TRIADS if library is not None else ():
                add(triad, triad_of(library, triad, memory, num_threads))
            for isa in native.kernel_isas():
                add(isa, step_of(memory, num_threads, isa=isa, streaming_stores=True))
            add("through the caches", step_of(memory, num_threads))
            for name, work in {**variants_of(memory, num_threads), **other_works}.items():
                add(name, work)
        print(f"adamw {num_elements} elements")
        results = compare(contenders, num_rounds)
    print_rows(results)
    if deepspeed is None:
        print("DeepSpeed is not installed: speeds without that comparison")
    configuration = {
        "rounds": num_rounds,
        "elements": num_elements,
        "torch": torch.__version__,
        "backend": cpu_adam.backend(),
        "deepspeed": None if deepspeed is None else version("deepspeed"),
    }
    return {"configuration": configuration, **results}


if __name__ == "__main__":
    rounds.run_alone("adam", __doc__, add_arguments, run)
