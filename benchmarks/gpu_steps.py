"""The section `steps` of gpu.py: every contender in a process of its own, one after the other, and what to make of it.

A contender is named by its kind and, joined by "@", its budget of device memory: `host@8GiB`.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limited import last_words, run_limited

from offload_rt.memory.process_memory import free_memory_bytes

HERE = Path(__file__).resolve().parent
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (128, 256, 5, 4, 2, 512),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "13b": (5120, 13824, 40, 40, 40, 32000),
}
STEP_SECONDS = {"tiny": 20.0, "1b": 25.0, "3b": 40.0, "8b": 60.0, "13b": 90.0}
"""Left on the clock, or a contender is not begun: starting, filling, encoding, warming up and five steps."""
PATIENCE = 2.0
"""So many times that, and a contender is ended: one that hangs must not take the time of all others."""
KINDS = (
    "plain", "unoffloaded", "resident", "host", "full", "fsdp2", "full_plain", "full_fsdp2", "swap", "full_device",
    "bnb", "optimised",
)  # fmt: skip
OURS = ("unoffloaded", "resident", "host", "swap", "full", "full_device", "nvme", "optimised")
DEFAULT = ("plain", "host", "resident", "unoffloaded", "optimised@8GiB", "host@8GiB", "full", "full_plain", "fsdp2",
           "full_fsdp2", "full_device", "swap", "optimised", "host@12GiB", "bnb")  # fmt: skip
"""In the order in which they are wanted, should time be short."""
PROFILED = ("host", "full", "full_device")
BYTES_PER_PARAMETER = 24
"""Of HOST memory, where all train: the model as it is made, weights, gradients, master, two moments, and some room."""
OTHERS = ("bitsandbytes", "accelerate", "deepspeed", "torchao")


def check_names(names: list[str]) -> str | None:
    """What is wrong with `names`; None if nothing."""
    for name in names:
        kind, _, budget = name.partition("@")
        if kind not in (*KINDS, "nvme") or (budget and kind not in OURS):
            return f"--contenders: {name!r}; allowed: {', '.join(KINDS)}; with a budget as {', '.join(OURS)}@8GiB"
    return None


def installed() -> dict[str, str | None]:
    """Versions of others that could be compared with. accelerate's `cpu_offload` lets go of weights that backward
    needs, and takes part in no comparison of training.
    """
    found: dict[str, str | None] = {}
    for name in OTHERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def steps(options: Namespace, device: str, deadline: float, link: Any, done: Callable[[Any], None]) -> dict[str, Any]:
    """Each contender of each shape, until the clock says `deadline`. `done` is given what there is after each.

    link: bytes per second from HOST to the device, as `rounds.summary` has them; None if they were not measured.
    """
    names = [*options.contenders, *(["nvme"] if options.nvme else [])]
    rows: dict[str, dict[str, Any]] = {shape: {} for shape in options.shapes}

    def results() -> dict[str, Any]:
        return {shape: {"contenders": of_shape} | verdict(of_shape, link) for shape, of_shape in rows.items()}

    for name in names:
        for shape in options.shapes:
            try:
                rows[shape][name] = row(options, device, shape, name, deadline)
            except Exception:  # noqa: BLE001 - the next one may still tell something
                rows[shape][name] = {"error": last_words(traceback.format_exc())}
            done(results())
    return results()


def row(options: Namespace, device: str, shape: str, name: str, deadline: float) -> dict[str, Any]:
    """What became of one contender: its numbers, or `skipped`, `out_of_memory` or `error`."""
    kind, _, budget = name.partition("@")
    needed, left = BYTES_PER_PARAMETER * parameters_of(SHAPES[shape]), deadline - time.monotonic()
    if kind == "bnb" and installed()["bitsandbytes"] is None:
        return {"skipped": "bitsandbytes is not installed"}
    if kind.startswith("full") and needed > free_memory_bytes():
        return {"skipped": f"{needed / 2**30:.0f} GiB of RAM are needed"}
    if left < STEP_SECONDS[shape]:
        return {"skipped": f"{left:.0f} s were left"}
    if kind == "optimised" and importlib.util.find_spec("highspy") is None:
        return {"skipped": "highspy is not installed"}
    budget = budget or (options.device_memory if kind in OURS and kind != "unoffloaded" else "")
    settings = {
        "kind": kind, "shape": SHAPES[shape], "tokens": options.tokens, "steps": 2 if options.smoke else 5,
        "device": device, "device_memory": budget or None,
        "nvme": options.nvme, "profiled": name in PROFILED, "smoke": options.smoke,
        "trace": options.trace if (name, shape) == (options.traced, options.shapes[0]) else None,
    }  # fmt: skip
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    patience = 10.0 if options.smoke else PATIENCE
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(HERE / "gpu_step.py"), json.dumps(settings | {"out": str(out)})]
        ended = run_limited(command, min(left, patience * STEP_SECONDS[shape]), environment)
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        if ended.code != 0:
            said = last_words(ended.tail)
            found["error"] = ["its time was over", *said] if ended.code is None else said
        return found


def parameters_of(shape: tuple[int, ...]) -> int:
    """Parameters of a Llama, norms left out."""
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = shape
    attention = 2 * hidden * hidden + 2 * hidden * hidden * key_value_heads // heads
    return layers * (attention + 3 * hidden * intermediate) + 2 * vocabulary * hidden


def verdict(rows: dict[str, Any], link: Any) -> dict[str, Any]:
    """Ratios of medians, and the prediction: these processes did not share a round, so spreads stand beside them."""
    took = {name: of["seconds"]["median"] for name, of in rows.items() if "peak_bytes" in of}  # to their end
    found: dict[str, Any] = {
        "time_over_plain": {
            name: took[name] / took["plain"]
            for name in took
            if "plain" in took and not name.startswith(("plain", "full"))
        },
        "time_over_full_plain": {
            name: took[name] / took["full_plain"]
            for name in took
            if "full_plain" in took and name.startswith("full") and name != "full_plain"
        },
        "beyond_their_budget": [name for name, of in rows.items() if of.get("within_budget") is False],
        "out_of_their_budget": [  # of ours: a plan that the allocator, which holds the budget, had no room for
            name for name, of in rows.items() if "out_of_memory" in of and name.partition("@")[0] in OURS
        ],
    }
    for name in (name for name in took if name.startswith("optimised")):
        if predicted := rows[name].get("predicted_step_seconds"):
            found.setdefault("optimised_over_predicted", {})[name] = took[name] / predicted
        if (rule := name.replace("optimised", "host")) in took:
            found.setdefault("optimised_over_rule", {})[name] = took[name] / took[rule]
    if {"plain", "unoffloaded"} <= took.keys():
        found |= {"unoffloaded_over_plain": took["unoffloaded"] / took["plain"], "aim_over_plain": 1.02}
    if {"full", "full_device"} <= took.keys():
        found["full_device_over_full"] = took["full_device"] / took["full"]
    if {"host", "fsdp2"} <= took.keys():
        found["time_over_fsdp2"] = took["host"] / took["fsdp2"]
    if {"full", "full_fsdp2"} <= took.keys():
        found["full_time_over_fsdp2"] = took["full"] / took["full_fsdp2"]
    if "host" in took and "resident" in took and link:
        moving = rows["host"]["copied_bytes_a_step"] / link["median"]
        predicted = max(took["resident"], moving)
        found |= {
            "speed_over_resident": took["resident"] / took["host"],
            "aim_over_resident": 0.95,
            "predicted_seconds": predicted,
            "moving_seconds": moving,
            "measured_over_predicted": took["host"] / predicted,
        }
    return found
