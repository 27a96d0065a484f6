"""One contender of gpu.py: `gpu_step.py SETTINGS_JSON` makes it, does steps, and writes what they took as JSON."""

import json
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rounds
import torch
from limited import last_words

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_contenders import Batch, Contender, contender

from offload_rt.config import parse_bytes
from offload_rt.memory.cuda_memory import KERNELS_BYTES, bytes_beside_allocator, settle

WARM_UP = 2
COPIES = {"Memcpy HtoD": "to_device", "Memcpy DtoH": "to_host"}
"""What the profiler calls copies, and the streams that they are on; all else is kernels."""


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans of microseconds, in seconds."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e6


def busy(events: Iterable[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Of a profile: busy seconds of kernels, of copies to the device and back, and of all together; seconds by name.

    Names that the host gives to stretches of its code stand among the device's events, and are none.
    """
    spans: dict[str, list[tuple[float, float]]] = {"kernels": [], "to_device": [], "to_host": []}
    by_name: dict[str, float] = {}
    for event in events:
        if str(event.device_type) != "DeviceType.CUDA" or getattr(event, "is_user_annotation", False):
            continue
        kind = next((stream for name, stream in COPIES.items() if name in event.name), "kernels")
        spans[kind].append((event.time_range.start, event.time_range.end))
        by_name[event.name[:90]] = by_name.get(event.name[:90], 0.0) + event.time_range.elapsed_us() / 1e6
    found = {kind: busy_seconds(of_kind) for kind, of_kind in spans.items()}
    found["any"] = busy_seconds(span for of_kind in spans.values() for span in of_kind)
    return found, by_name


def profiled(one: Contender, batch: Batch, trace: str | None, step_seconds: float) -> dict[str, Any]:
    """One step under the profiler: busy time of kernels and of copies, and the kernels that take most.

    `hidden` is the share of the copies' time in which something else was busy too; None where no copy was seen. A trace
    that cannot be written is said under `trace_error`. Where the profiler sees no GPU, so does `sees_gpu`: times of the
    GPU are all 0 then.
    """
    from torch.profiler import ProfilerActivity, profile, supported_activities

    # Asked for a GPU that it does not see, it has every operator record two events, and says each time why it cannot.
    both = ProfilerActivity.CPU, ProfilerActivity.CUDA
    activities = [activity for activity in both if activity in supported_activities()]
    with profile(activities=activities) as profiler:  # starting it takes seconds
        start = time.perf_counter()
        one.step(batch)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    found, by_name = busy(profiler.events())
    copies = found["to_device"] + found["to_host"]
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    result = {
        "seconds_under_the_profiler": seconds,
        "sees_gpu": ProfilerActivity.CUDA in activities,
        "busy_seconds": found,
        "busy_over_step": {kind: took / step_seconds for kind, took in found.items()},
        "hidden": (found["kernels"] + copies - found["any"]) / copies if copies else None,
        "kernels": {name: round(took, 6) for name, took in largest},
    }
    if trace:
        try:
            profiler.export_chrome_trace(trace)
        except Exception:  # noqa: BLE001 - the numbers are there without it
            result["trace_error"] = last_words(traceback.format_exc())
    return result


def hold_budget(budget: str) -> tuple[int, int]:
    """Has torch's allocator itself hold what the process may take of the GPU. Returns that, and what is beside it."""
    whole, allowed = torch.cuda.get_device_properties(0).total_memory, parse_bytes(budget, field="device_memory")
    settle(torch.device("cuda", 0))
    beside = bytes_beside_allocator(torch.device("cuda", 0))
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(allowed - beside - KERNELS_BYTES, 0) / whole))
    return allowed, beside


def memory(budget_bytes: int | None, after: dict[str, Any]) -> dict[str, Any]:
    """The most that the process held of the GPU since its start, beside what it was allowed."""
    if not torch.cuda.is_available():
        return {"peak_bytes": after.get("peak_resident_bytes", 0)}
    # Whoever measures a peak, as an engine's rehearsal does, begins torch's anew: its report has what was before.
    reserved = max(torch.cuda.max_memory_reserved(), (after.get("gpu") or {}).get("reserved_peak_bytes", 0))
    beside = bytes_beside_allocator(torch.device("cuda", 0))
    return {
        "peak_bytes": reserved + beside, "reserved_bytes": reserved, "beside_allocator_bytes": beside,
        "allocated_bytes": torch.cuda.max_memory_allocated(), "budget_bytes": budget_bytes,
        "within_budget": None if budget_bytes is None else reserved + beside <= budget_bytes,
    }  # fmt: skip


def main() -> None:
    settings = json.loads(sys.argv[1])
    on_gpu = settings["device"] == "cuda"
    budget_bytes, beside_bytes = None, None
    if on_gpu and settings["device_memory"]:
        budget_bytes, beside_bytes = hold_budget(settings["device_memory"])
    torch.manual_seed(0)
    start = time.perf_counter()
    one = contender(settings)
    made = time.perf_counter() - start
    write(settings, {"making_seconds": made})
    tokens = torch.randint(0, settings["shape"][5], (1, settings["tokens"]), generator=torch.Generator().manual_seed(1))
    batch = {name: tokens.to(settings["device"]) for name in ("input_ids", "labels")}
    seconds, losses, host_seconds = [], [], []
    before: dict[str, Any] = {}
    allocations = 0
    for index in range(WARM_UP + settings["steps"]):
        if index == WARM_UP:
            before = one.report()
            allocations = torch.cuda.memory_stats()["num_device_alloc"] if on_gpu else 0
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = one.step(batch)
        given = time.perf_counter() - start
        if on_gpu:
            torch.cuda.synchronize()
        if index >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            host_seconds.append(given)
            losses.append(float(loss))
            write(settings, {"making_seconds": made, "seconds": rounds.summary(seconds), "losses": losses})
    after = one.report()
    took = rounds.summary(seconds)
    counted = ("bytes_copied", "bytes_read", "stall_seconds", "fetches", "prefetch_misses", "decodes")
    result = {
        "making_seconds": made,
        "seconds": took,
        "host_seconds": rounds.summary(host_seconds),
        "tokens_per_second": settings["tokens"] / took["median"],
        "losses": losses,
        **memory(budget_bytes, after),
        "beside_allocator_at_the_start_bytes": beside_bytes,
        "device_allocations_in_steps": torch.cuda.memory_stats()["num_device_alloc"] - allocations if on_gpu else 0,
        "a_step": {name: (after[name] - before[name]) / settings["steps"] for name in counted if name in after},
        "copied_bytes_a_step": (after.get("bytes_copied", 0) - before.get("bytes_copied", 0)) / settings["steps"],
        "gpu": after.get("gpu"),
        "training": after.get("training"),
        "tokenwise": after.get("tokenwise"),
        "predicted_step_seconds": (after.get("predicted") or {}).get("step_seconds"),
        "summary": one.summary(),
    }
    write(settings, result)  # before the profiler, which may fail
    if on_gpu and settings["profiled"]:
        write(settings, result | {"profile": profiled(one, batch, settings["trace"], took["median"])})
    one.close()


def write(settings: dict[str, Any], result: dict[str, Any]) -> None:
    """In place of what was written before. Whoever is ended in the middle leaves the one or the other."""
    out = Path(settings["out"])
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(out)


def written(settings: dict[str, Any]) -> dict[str, Any]:
    out = Path(settings["out"])
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return found


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        settings = json.loads(sys.argv[1])
        where = last_words(traceback.format_exc())
        write(settings, written(settings) | {"out_of_memory": str(error).splitlines()[0], "where": where})
