"""What the GPU path is worth on this machine, in one command and under 8 minutes.

    python benchmarks/gpu.py [--json FILE] [--trace FILE] [--minutes 7.5] [--shapes 1b 8b] [--sections ...] [--smoke]

The sections, in this order:

    parity   tests/test_gpu.py: bits of the kernels, leases, real streams, training against plain PyTorch. If it fails,
             so does the command: the other numbers are then those of something that is wrong.
    links    bytes per second HOST -> DEVICE and back, locked and pageable, alone and both ways at once; a copy on the
             device
    decode   NF4 to bf16, against a copy that moves as many bytes, for several shapes and cuts of the kernel, and
             bitsandbytes' where it is installed
    products few tokens times a packed weight, for shapes of 7B and 70B: decoding first, our fused kernel, bitsandbytes'
             own, and FP8; errors against fp64 over decoding's, seconds, and what the engine would choose of it
    adam     AdamW, against a copy that moves as many bytes, and torch's fused one
    steps    a step of Llamas, 4096 tokens (gpu_steps.py). Ours are held to --device-memory of the GPU, or to what
             stands behind an @, by torch's allocator itself; others have all of it:
                 plain      bf16 in device memory, transformers + peft, every layer recomputed
                 unoffloaded  ours, bf16, all layers in device memory: the same work as plain's, and no budget
                 resident   ours, NF4, all layers in device memory after the first step
                 host       ours, NF4, layers stream from HOST; with 24, 12 and 8 GiB
                 swap       the same, of whose activations half are swapped to HOST, by chunks of tokens
                 optimised  the same as the optimiser plans it, for rates that are measured before; with 24 and 8 GiB;
                            where highspy is installed
                 fsdp2      FSDP2 with `CPUOffloadPolicy`, adapters on bf16
                 full       ours, bf16, all parameters train; masters, moments and weights rest in HOST
                 full_device  the same, half of whose updates are the GPU's (on a CPU: none)
                 full_plain, full_fsdp2  the same training, all in device memory, and under FSDP2
                 bnb        bitsandbytes' NF4 in device memory, where it is installed
                 nvme       ours, NF4, layers stream from NVMe (--nvme DIR; not by default)
             with what the optimiser predicted, the streams' busy time in a profiled step, and what `host` should take:
             the larger of `resident`'s time and the bytes that it moves at the bandwidth of `links`

Every section and every contender is a process of its own with a time limit, and the JSON is written after each: what
fails or hangs takes nothing with it. Ratios are taken within a round. --smoke is the same with small shapes, and runs
on a CPU too, where there are no streams: a test of the script, no measurement.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rounds
import torch
from limited import last_words, run_limited

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import gpu_steps  # noqa: E402
from gpu_gate import missing, missing_parts, tested  # noqa: E402

from offload_rt.adamw import cpu_adam  # noqa: E402
from offload_rt.adamw.cpu_adam import AdamW  # noqa: E402
from offload_rt.memory.arena import Arena  # noqa: E402
from offload_rt.quantized import codec, nf4_products  # noqa: E402
from offload_rt.quantized.nf4_layout import NESTED_BLOCK_SIZE, QUANT_BLOCK_SIZE, nf4_layout  # noqa: E402
from offload_rt.quantized.nf4_torch import sections_of, tables  # noqa: E402
from planners.plans.products import shape_key  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SECTIONS = ("parity", "links", "decode", "products", "adam", "steps")
LIMITS = {"parity": 500.0, "links": 40.0, "decode": 80.0, "products": 80.0, "adam": 40.0}
"""Seconds; a section that is not done by then is ended."""
FOR_STEPS = 0.4
"""Of all the time: what the other sections leave to the steps, however long they take."""
FOR_PARITY = 0.45
"""Of all the time: what it may take of it at most, where others come behind."""
RATE = "bytes_per_second"
SETTINGS = (
    "CUDA_MODULE_LOADING", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_CUBLASLT_UNIFIED_WORKSPACE", "TORCH_CUDNN_SDPA_DEPRIORITIZED",
    "TORCH_CUDNN_SDPA_PREFERRED", "TRITON_DEFAULT_FP_FUSION",
)  # fmt: skip
"""Of the environment: what changes numbers or memory without a line of ours."""


def seconds_of(work: Callable[[], object], repeat: int = 1) -> float:
    """Seconds of one call, by the GPU's own clock."""
    if not GPU:
        start = time.perf_counter()
        for _ in range(repeat):
            work()
        return (time.perf_counter() - start) / repeat
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeat):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeat


def noise(num_bytes: int, device: str = "cpu") -> torch.Tensor:
    """Random bytes that repeat every MiB. RAM that nobody has written reads as one page of zeros, which caches hold: a
    copy of that is faster than any of real data (docs/log.md).
    """
    pattern = torch.randint(256, (1 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    return pattern.repeat(-(-num_bytes // pattern.numel()))[:num_bytes]


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"name": rounds.circumstances()["cpu"], "torch": torch.__version__}
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name, "device_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version(),
            "capability": [properties.major, properties.minor], "cuda": torch.version.cuda,
            "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        }  # fmt: skip
        query = "driver_version,pcie.link.gen.current,pcie.link.width.current,clocks.max.sm,power.limit"
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # not everywhere
            asked = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True, text=True, check=False, timeout=30,
            )  # fmt: skip
            found["nvidia_smi"] = dict(zip(query.split(","), asked.stdout.strip().split(", "), strict=False))
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError:
            found["triton"] = None
    return found


def parity(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The gate, in a process of its own, with the kernels compiled, not interpreted."""
    return tested(HERE.parent / "tests" / ("test_streams.py" if options.smoke else "test_gpu.py"), seconds)


def links(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    num_bytes = 1 << 20 if options.smoke else 256 << 20
    pageable = noise(num_bytes)
    arenas = [Arena("locked", num_bytes), Arena("locked too", num_bytes)]
    seen: dict[str, Any] = {}
    if GPU:
        from offload_rt.memory.cuda_memory import seen_of
        from offload_rt.transfers.device_cuda import CudaDevice, find_device

        device = CudaDevice(find_device("cuda"))
        start = time.perf_counter()
        for arena in arenas:
            device.lock(arena.name, arena.region)
        seen["locking_seconds"] = time.perf_counter() - start
        seen |= {"locked_bytes": device.locked_bytes, "pageable_bytes": device.pageable_bytes}
        seen["memory"] = seen_of(device.device)
        streams = [device.to_device.stream, device.to_host.stream]
    locked, locked_too = (arena.acquire(num_bytes, "benchmark").tensor(torch.uint8, (num_bytes,)) for arena in arenas)
    there, there_too = (noise(num_bytes, DEVICE) for _ in range(2))
    for memory in (locked, locked_too):
        memory.copy_(pageable)

    def both() -> None:
        if not GPU:
            there.copy_(locked)
            locked_too.copy_(there_too)
            return
        current = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(current)
        with torch.cuda.stream(streams[0]):
            there.copy_(locked, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            locked_too.copy_(there_too, non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)

    work: dict[str, tuple[float, Callable[[], object]]] = {
        "to_device": (1, lambda: there.copy_(locked, non_blocking=True)),
        "to_host": (1, lambda: locked.copy_(there, non_blocking=True)),
        "both_ways": (2, both),
        "to_device_pageable": (1, lambda: there.copy_(pageable)),
        "on_device_read_and_written": (2, lambda: there.copy_(there_too)),
    }
    contenders = {
        name: lambda parts=parts, call=call: parts * num_bytes / seconds_of(call, 3)
        for name, (parts, call) in work.items()
    }
    speeds = rounds.interleave(contenders, options.rounds)
    yield seen | {"bytes": num_bytes, RATE: {name: rounds.summary(values) for name, values in speeds.items()}}


def decode(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shapes = [(96, 128)] if options.smoke else [(4096, 4096), (4096, 14336), (8192, 28672)]
    launches = {"": None}
    if GPU:
        from offload_rt.quantized import nf4_triton

        cuts = [(256, 4), (512, 4), (1024, 4), (1024, 8), (2048, 8), (4096, 8)]
        launches |= {f"words={w} warps={n}": nf4_triton.Launch(words=w, num_warps=n) for w, n in cuts}
    results = {}
    for shape in shapes:
        num_elements = shape[0] * shape[1]
        layout = nf4_layout(num_elements)
        copies = 1 if options.smoke else max(1, (256 << 20) // (2 * num_elements))  # more than the caches hold
        blob = codec.encode(torch.randn(num_elements)).to(DEVICE)
        blobs = [blob.clone() for _ in range(copies)]
        outs = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]
        moved = layout.total_bytes + 2 * num_elements
        source = noise(moved // 2 * copies, DEVICE)
        target = torch.empty_like(source)

        def run(launch: Any, blobs: Any = blobs, outs: Any = outs, layout: Any = layout) -> None:
            for one, out in zip(blobs, outs, strict=True):
                if launch is None:
                    codec.decode_into(one, out)
                else:
                    nf4_triton.decode(one, layout, out.view(-1), launch)

        total = moved * copies
        contenders: dict[str, Callable[[], float]] = {
            "copy": lambda source=source, target=target, total=total: (
                total / seconds_of(lambda: target.copy_(source), 3)
            )
        }
        contenders |= {
            name or "decode": lambda launch=launch, run=run, total=total: total / seconds_of(lambda: run(launch), 3)
            for name, launch in launches.items()
        }
        left_out: dict[str, str] = {}
        if GPU and "bitsandbytes" in nf4_products.find_ways():
            try:  # it can be installed without kernels for this GPU
                decoded_by_bitsandbytes(blobs[0], shape)
            except Exception as error:  # noqa: BLE001 - the others are measured
                left_out["bitsandbytes"] = repr(error)
            else:
                contenders["bitsandbytes"] = lambda shape=shape, blobs=blobs, total=total: (
                    total / seconds_of(lambda: [decoded_by_bitsandbytes(one, shape) for one in blobs], 3)
                )
        speeds = rounds.interleave(contenders, options.rounds)
        results["x".join(map(str, shape))] = {
            "bytes_moved": moved,
            RATE: {name: rounds.summary(values) for name, values in speeds.items()},
            "over_copy": {name: rounds.ratio(speeds, name, "copy") for name in speeds if name != "copy"},
            "left_out": left_out,
        }
        yield {"backend": codec.backend(device=DEVICE), "shapes": results, "aim_over_copy": 0.85}


def decoded_by_bitsandbytes(blob: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    from bitsandbytes import functional

    codes, absmax, nested_absmax, nested_offset, nested_map = sections_of(blob, nf4_layout(shape[0] * shape[1]))
    of_scales = functional.QuantState(nested_absmax, code=nested_map, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
    state = functional.QuantState(
        absmax,
        shape,
        tables(blob.device).nf4,
        QUANT_BLOCK_SIZE,
        "nf4",
        torch.bfloat16,
        nested_offset.view(()),
        of_scales,
    )
    decoded: torch.Tensor = functional.dequantize_4bit(codes.view(-1, 1), state)
    return decoded


def products(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the engine measures before it takes a way, with the ways that it does not offer beside."""
    shapes = [(32, 64)] if options.smoke else [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (8192, 28672)]
    ways: dict[str, nf4_products.Way] = nf4_products.find_ways() if GPU else {}
    ways["fp8"] = Fp8()
    ways["decoded first, again"] = nf4_products.Decoded()  # how far two equals are apart
    device = torch.device(DEVICE)
    results = {}
    for rows, columns in shapes:
        found = nf4_products.measure(
            rows, columns, torch.bfloat16, device, ways, most_error=float("inf"), rounds=options.rounds
        )
        decoded = found.seconds["decoded"]
        results[shape_key(rows, columns)] = {
            "seconds": found.seconds, "error_over_decoding": found.errors, "left_out": found.left_out,
            "time_over_decoding": {
                name: [own / other for own, other in zip(seconds, decoded, strict=True)]
                for name, seconds in found.seconds.items()
            },
        }  # fmt: skip
        if GPU:
            torch.cuda.empty_cache()
        yield {"tokens": nf4_products.TOKENS, "most_error": nf4_products.MOST_ERROR, "shapes": results}


class Fp8:
    """Decode, round weight and tokens to e4m3 by scales of each row and token, and multiply on the FP8 units. No way of
    the engine's: docs/log.md says why.
    """

    name = "fp8"

    def why_not(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            return "FP8 needs Ada or Hopper"
        return "" if rows % 16 == columns % 16 == 0 else "FP8 needs multiples of 16"

    def product(self, x: torch.Tensor, blob: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        weight, of_rows = rounded(codec.decode(blob, (rows, x.shape[-1]), x.dtype))
        given, of_tokens = rounded(x)
        out = torch._scaled_mm(given, weight.t(), scale_a=of_tokens, scale_b=of_rows.t(), out_dtype=x.dtype)
        return out if bias is None else out + bias


def rounded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as float8_e4m3fn, and what to multiply it by."""
    scales = values.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (values / scales).to(torch.float8_e4m3fn), scales


def adam(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    num_elements = 4096 if options.smoke else 64 << 20
    grad = torch.randn(num_elements, device=DEVICE) * 1e-3
    master, exp_avg, exp_avg_sq = (torch.rand(num_elements, device=DEVICE) for _ in range(3))
    weight = torch.empty(num_elements, dtype=torch.bfloat16, device=DEVICE)
    moved = num_elements * (4 + 12 + 12 + 2)
    source = noise(moved // 2, DEVICE)
    target = torch.empty_like(source)
    numbers = AdamW(lr=1e-4)
    contenders: dict[str, Callable[[], float]] = {"copy": lambda: moved / seconds_of(lambda: target.copy_(source), 3)}

    def ours(launch: Any = None) -> None:
        state = (grad, master, exp_avg, exp_avg_sq, weight)
        if GPU:
            adam_triton.step(numbers.scalars(10), *state, launch or adam_triton.DEFAULT)
        else:
            cpu_adam.update(*state, step=10, numbers=numbers)

    contenders["ours"] = lambda: moved / seconds_of(ours, 3)
    if GPU:
        from offload_rt.adamw import adam_triton

        for elements, warps in ((512, 4), (1024, 8), (2048, 8)):
            launch = adam_triton.Launch(elements=elements, num_warps=warps)
            contenders[f"elements={elements} warps={warps}"] = lambda launch=launch: (
                moved / seconds_of(lambda: ours(launch), 3)
            )
    parameter = torch.nn.Parameter(master.clone())
    parameter.grad = grad
    fused = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    contenders["torch fused, no bf16 weight"] = lambda: (moved - 2 * num_elements) / seconds_of(fused.step, 3)
    speeds = rounds.interleave(contenders, options.rounds)
    yield {
        "elements": num_elements,
        RATE: {name: rounds.summary(values) for name, values in speeds.items()},
        "over_copy": {name: rounds.ratio(speeds, name, "copy") for name in speeds if name != "copy"},
    }


def seconds_for(section: str, later: Sequence[str], seconds: float, left: float, *, patience: float = 1.0) -> float:
    """How long a section may take, `patience` times its limit at most: of all `seconds`, `left` are."""
    limit = patience * LIMITS.get(section, 0.0)
    if section == "parity" and later:
        limit = min(limit, FOR_PARITY * seconds)
    return min(limit, left - FOR_STEPS * seconds * ("steps" in later))


def measured(section: str, options: argparse.Namespace, words: list[str], seconds: float) -> dict[str, Any]:
    """A section in a process of its own, which ends with its time; what it has taken of the GPU goes with it. What it
    had found by then stays, beside what became of it.
    """
    if section == "parity":
        return parity(options, seconds)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        ended = run_limited([sys.executable, __file__, *words, "--only", section, "--out", str(out)], seconds)
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        if ended.code == 0 and found:
            return found
        why = f"not done after {seconds:.0f} s" if ended.code is None else f"ended with {ended.code}"
        return found | {"error": why, "tail": last_words(ended.tail)}


def write(path: Path, found: dict[str, Any]) -> None:
    """In place of what was written before. Whoever is ended in the middle leaves the one or the other."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


RUN = {"links": links, "decode": decode, "products": products, "adam": adam}


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", help="where a profiled step of the first shape goes (Perfetto, .json.gz)")
    parser.add_argument("--traced", choices=gpu_steps.PROFILED, default="host", help="whose step that is")
    parser.add_argument("--minutes", type=float, default=7.5, help="what is not done by then is left out or ended")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=list(gpu_steps.SHAPES), default=None)
    parser.add_argument("--contenders", nargs="+", default=list(gpu_steps.DEFAULT))
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--device-memory", default="24GiB")
    parser.add_argument("--nvme", help="a folder on an SSD: adds the contender that streams from it")
    parser.add_argument("--smoke", action="store_true", help="small shapes; runs without a GPU")
    parser.add_argument("--anyway", action="store_true", help="also where something is missing that is measured")
    parser.add_argument("--only", choices=list(RUN), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = parser_of()
    options = parser.parse_args()
    if not GPU and not options.smoke:
        parser.error("torch finds no GPU; --smoke runs without one")
    if not options.smoke and not options.anyway and (needed := missing()):
        parser.error(f"missing here: {'; '.join(needed)}. --anyway measures without")
    if (wrong := gpu_steps.check_names(options.contenders)) is not None:
        parser.error(wrong)
    options.shapes = options.shapes or (["tiny"] if options.smoke else ["8b", "1b"])
    options.tokens = options.tokens or (64 if options.smoke else 4096)
    if options.smoke:
        options.rounds = 2
    if options.only:
        for found in RUN[options.only](options):
            write(options.out, found)
        return 0
    begun, seconds = time.monotonic(), 60 * options.minutes
    deadline = begun + seconds
    result: dict[str, Any] = {
        "machine": machine(), "smoke": options.smoke, "circumstances": rounds.circumstances(),
        "installed": gpu_steps.installed(), "missing": missing_parts(),
    }  # fmt: skip

    def save() -> None:
        """So that a run that is cut off leaves what it has."""
        result["seconds"] = round(time.monotonic() - begun, 1)
        if options.json:
            write(options.json, result)

    def steps() -> dict[str, Any]:
        def done(found: dict[str, Any]) -> None:
            result["steps"] = found
            save()

        link = result.get("links", {}).get(RATE, {}).get("to_device")
        return gpu_steps.steps(options, DEVICE, deadline, link, done)

    for index, section in enumerate(options.sections):
        start = time.monotonic()
        later, patience = options.sections[index + 1 :], 5.0 if options.smoke else 1.0
        limit = seconds_for(section, later, seconds, deadline - start, patience=patience)
        try:
            if section == "steps":
                result[section] = steps()
            elif limit < 10:
                result[section] = {"error": f"{max(limit, 0.0):.0f} s were left"}
            else:
                result[section] = measured(section, options, sys.argv[1:], limit)
        except Exception as error:  # noqa: BLE001 - the next section may still tell something
            said = {"error": f"{type(error).__name__}: {error}", "tail": last_words(traceback.format_exc())}
            result[section] = result.get(section, {}) | said
        result[section]["section_seconds"] = round(time.monotonic() - start, 1)
        print(f"{section}: {result[section]['section_seconds']} s", file=sys.stderr, flush=True)
        save()
    print(summary_of(result))
    failed = [name for name in options.sections if "error" in result[name] or result[name].get("ok") is False]
    for shape in options.shapes:
        found = result.get("steps", {}).get(shape, {})
        failed += [f"{shape} {name}" for name, of in found.get("contenders", {}).items() if "error" in of]
        failed += [f"{shape} {name}: more than its budget" for name in found.get("beyond_their_budget", [])]
        failed += [f"{shape} {name}: no room in its budget" for name in found.get("out_of_their_budget", [])]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def summary_of(result: dict[str, Any]) -> str:
    """A few lines for whoever watches."""
    lines = [f"{result['machine']['name']}, {result['seconds']:.0f} s" + (" (smoke)" if result["smoke"] else "")]
    lines += [f"{name} is missing: {why}" for name, why in result["missing"].items()]
    if "summary" in result.get("parity", {}):
        lines.append(f"parity: {result['parity']['summary']}")
        lines += [line[:200] for line in result["parity"].get("failed", [])[:12]]
    for name in ("links", "decode", "products", "adam"):
        if "error" in result.get(name, {}):
            lines.append(f"{name}: {result[name]['error']}")
    for name, speed in result.get("links", {}).get(RATE, {}).items():
        lines.append(f"{name}: {speed['median'] / 1e9:.1f} GB/s")
    for shape, row in result.get("decode", {}).get("shapes", {}).items():
        best = max(row["over_copy"].items(), key=lambda item: item[1]["median"])
        default = row["over_copy"]["decode"]["median"]
        lines.append(f"decode {shape}: {default:.2f} of a copy; best cut {best[0]}: {best[1]['median']:.2f}")
    for shape, row in result.get("products", {}).get("shapes", {}).items():
        for name, shares in row["time_over_decoding"].items():
            if name in row["error_over_decoding"]:
                at = ", ".join(
                    f"{n}: {share:.2f}" for n, share in zip(result["products"]["tokens"], shares, strict=True)
                )
                lines.append(f"product {shape} {name}: error {row['error_over_decoding'][name]:.3g}, time at {at}")
    for name, share in result.get("adam", {}).get("over_copy", {}).items():
        lines.append(f"adam {name}: {share['median']:.2f} of a copy")
    for shape, found in result.get("steps", {}).items():
        if not isinstance(found, dict):
            continue
        lines += [f"{shape} {kind}: {told(row)}" for kind, row in found["contenders"].items()]
        for name, value in found.items():
            each = {f"{name} {of}": ratio for of, ratio in value.items()} if isinstance(value, dict) else {name: value}
            lines += [f"{shape}: {what} {ratio:.3f}" for what, ratio in each.items() if isinstance(ratio, float)]
    return "\n".join(lines)


def told(row: dict[str, Any]) -> str:
    """A contender, in a line: its numbers as far as it came, and why it came no further. All of that is in the JSON."""
    words = []
    if "seconds" in row:
        words.append(f"{row['seconds']['median']:.3f} s")
    if "host_seconds" in row:
        words.append(f"given in {row['host_seconds']['median']:.3f} s")
    if "peak_bytes" in row:
        words.append(f"peak {row['peak_bytes'] / 2**30:.1f} GiB")
    if (hidden := row.get("profile", {}).get("hidden")) is not None:
        words.append(f"{hidden:.0%} of its copies hidden")
    words += [f"{name}: {row[name]}" for name in ("skipped", "out_of_memory") if name in row]
    if row.get("error"):
        words.append(f"failed: {row['error'][-1]}")
    return ", ".join(words)[:400] or "nothing"


if __name__ == "__main__":
    sys.exit(main())
