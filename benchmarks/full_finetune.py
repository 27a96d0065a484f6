"""One full fine-tuning step with all state on NVMe, beside plain torch, DeepSpeed ZeRO-3, and what the machine allows.

    python benchmarks/full_finetune.py --nvme DIR [--size 117m | 1b] [--rounds 5] [--apart] [--json FILE] [--trace FILE]

A Llama with random bf16 weights trains all its parameters: fp32 masters, AdamW on fp32 moments, one row of tokens, the
norm of all gradients declared and not reached (`clipped` says whether it was). A step is forward, backward and update.

    torch       transformers and torch's fused AdamW, everything in memory
    ours        offload_rt, everything in memory
    ours_nvme   offload_rt, weights, masters and moments on NVMe, committed each step
    ours_tiers  offload_rt with the same drive, and as much of it in memory as the budget holds
    zero3_cpu   DeepSpeed ZeRO-3, parameters and optimizer offloaded to CPU memory
    zero3_nvme  the same, offloaded to NVMe

All compute every layer again in backward, as ours does; `recompute=0` keeps activations, and zero3_nvme always does: it
fails where backward uses a parameter twice. Each lives in a process of its own (full_finetune_contender.py) and does
one step a round, so that a slow minute of the machine hits all alike; with --apart one is started at a time, for
machines whose memory holds one, and a round is a build, steps that are not recorded, and one that is. Ratios are taken
within a round. Peak memory is VmHWM above what was resident after the imports, during the steps.

What the machine allows, "limit", is the larger of compute (the step of `torch`) and the bytes that our step moves, over
the drive's mixed bandwidth: half reads and half writes, by fio in the same round (by our ring where fio is missing).

Switches, joined by "+": recompute=0 (all but zero3_nvme); sub_group_size=N (zero3); pipeline=1, buffer_count=N
(zero3_nvme); device_memory=SIZE, host_memory=SIZE, num_slots=N, piece_elements=N, head_chunk_tokens=N, stream_edges=1,
serial_updates=1, commit_every=N, update_mode=speculative|backward|after (ours). SIZE may be the measured peak of
another contender, the first of its kind, or a part of it: device_memory=zero3_nvme/4. A switch in capitals is set in
the environment.

DeepSpeed is optional, and left out with a sentence where it is not installed (`pip install deepspeed`). Its NVMe path
needs libaio with its header (libaio-dev); its first start compiles for minutes.
"""

import argparse
import contextlib
import os
import shutil
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import native_io
import random_llama
import rounds
from contenders import Contender, ContenderFailed, ContenderMissing, check_names, parse, started

SCRIPT = "full_finetune_contender.py"
GIB = 2**30
OF_OURS = {
    "recompute",
    "head_chunk_tokens",
    "num_slots",
    "piece_elements",
    "stream_edges",
    "serial_updates",
    "update_mode",
    "commit_every",
}
SWITCHES = {
    "torch": {"recompute"},
    "ours": {"device_memory", "host_memory"} | OF_OURS,
    "ours_nvme": {"device_memory", "host_memory"} | OF_OURS,
    "ours_tiers": {"device_memory", "host_memory"} | OF_OURS,
    "zero3_cpu": {"recompute", "sub_group_size"},
    "zero3_nvme": {"sub_group_size", "pipeline", "buffer_count"},
}
DEFAULT = (
    "torch", "torch+recompute=0", "ours", "zero3_cpu", "zero3_nvme", "ours_nvme", "ours_nvme+update_mode=after",
    "ours_tiers+device_memory=zero3_nvme", "ours_tiers+device_memory=zero3_nvme/4",
)  # fmt: skip
SIZES = {
    "117m": {"hidden": 768, "layers": 12, "intermediate": 2048, "heads": 12, "kv_heads": 12},
    "1b": {"hidden": 2048, "layers": 16, "intermediate": 5632, "heads": 32, "kv_heads": 32},
    "smoke": {"hidden": 128, "layers": 2, "intermediate": 256, "heads": 4, "kv_heads": 2, "vocabulary": 256},
}
SMOKE = ("torch", "ours", "ours_nvme+device_memory=torch*4", "ours_tiers+device_memory=torch*4")
COUNTERS = (
    "num_steps", "num_ahead_of_norm", "num_clipped", "num_redone", "num_skipped", "num_pieces", "num_read_ahead",
    "num_read_on_demand", "num_read_in_vain", "num_commits", "commit_seconds", "mode", "waits_because", "grad_norm",
)  # fmt: skip


class Seat:
    """A contender's place in the rounds: its process, and all that it answered."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.replies: list[dict[str, Any]] = []
        """Of the recorded steps."""
        self.losses: list[float] = []
        """Of all its steps, from the first one on."""
        self.built: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        self.trace: dict[str, Any] | None = None
        self._settings = settings

    def asked_for(self, contender: Contender) -> float:
        """Seconds of one step, and notes what it answered."""
        seconds = contender.step()
        self.replies.append(contender.replies[-1])
        return seconds

    def finish(self, contender: Contender, *, trace: bool) -> None:
        self.losses = [reply["loss"] for reply in contender.replies if "loss" in reply]
        self.memory = contender.ask("memory")
        if trace and self.name.startswith("ours") and self.trace is None:
            self.trace = contender.ask("trace")

    def visit(self, name: str, arguments: Namespace) -> float:
        """Starts the contender, under its name with budgets in bytes, for one recorded step. Blocks; seconds of it."""
        with started(SCRIPT, [name], self._settings) as (contender,):
            self.built = contender.replies[-1]
            for _ in range(arguments.unrecorded):
                contender.step()
            seconds = self.asked_for(contender)
            self.finish(contender, trace=arguments.breakdown)
            return seconds


def resolved(name: str, peaks: dict[str, int]) -> str:
    """`name` with budgets in bytes, where they were given as a contender's peak."""
    kind, switches = parse(name)
    for key in ("device_memory", "host_memory"):
        reference, factor = reference_of(switches.get(key, ""))
        if reference is not None:
            switches[key] = str(int(peaks[reference] * factor))
    return "+".join([kind, *(f"{key}={value}" for key, value in switches.items())])


def reference_of(size: str) -> tuple[str | None, float]:
    """The contender whose peak `size` means, and the factor; None where it is a size."""
    for sign in "/*":
        reference, found, number = size.partition(sign)
        if found and reference in SWITCHES:
            return reference, 1 / float(number) if sign == "/" else float(number)
    return (size, 1.0) if size in SWITCHES else (None, 1.0)


def kind_of(name: str) -> str:
    """The contender's kind, without its switches."""
    return parse(name)[0]


def first_of(kind: str, names: list[str]) -> str:
    """The contender that a budget means by `kind`."""
    return next(name for name in names if kind_of(name) == kind)


def references(name: str) -> set[str]:
    """The kinds of contenders whose peaks must be known before `name` can be started."""
    _, switches = parse(name)
    found = {reference_of(switches.get(key, ""))[0] for key in ("device_memory", "host_memory")}
    return {reference for reference in found if reference is not None}


def drive_speed(arguments: Namespace) -> tuple[str, Any]:
    """Who measures the drive, and a function that gives its bytes a second, half reads and half writes."""
    paths = [arguments.nvme / f"full_finetune_{os.getpid()}.bin"]
    settings = Namespace(file_bytes=arguments.drive_bytes, depth=64, io_bytes=1 << 20, fio_engine="io_uring")
    native_io.lay_out(paths[0], arguments.drive_bytes)
    profile = native_io.DriveProfile()

    def measure() -> float:
        if shutil.which("fio"):
            return 1e9 * native_io.measure_fio([], "mix", paths, settings).gigabytes_per_second
        best = native_io.CONTENDERS["io_uring, huge pages, registered"]
        return 1e9 * native_io.measure_ring(best, "mix", paths, profile, settings).gigabytes_per_second

    return ("fio" if shutil.which("fio") else "ring"), measure


def measure(folder: Path, arguments: Namespace) -> tuple[dict[str, Any], list[Any]]:
    """Runs all rounds; seconds, memory, bytes, losses of every contender, and the traced step's events."""
    settings = {
        "checkpoint": str(folder), "store": str(arguments.nvme / "stores"), "tokens": arguments.tokens,
        "batch_size": arguments.batch_size, "threads": arguments.threads, "max_grad_norm": arguments.max_grad_norm,
    }  # fmt: skip
    load = [os.getloadavg()[0]]
    who, speed = drive_speed(arguments)
    try:
        run = together if not arguments.apart else apart
        seats, seconds, left_out = run(settings, speed, arguments)
    finally:
        (arguments.nvme / f"full_finetune_{os.getpid()}.bin").unlink(missing_ok=True)
    bandwidth = seconds.pop("drive")
    found: dict[str, Any] = {
        "load_average": [*load, os.getloadavg()[0]], "left_out": left_out,
        "drive": {"measured_by": who, "bytes_per_second": rounds.summary(bandwidth)}, "contenders": {}, "ratios": {},
    }  # fmt: skip
    for seat in seats:
        found["contenders"][seat.name] = row_of(seat, seconds[seat.name], arguments)
    found["ratios"] = ratios(found["contenders"], seconds, bandwidth)
    traced = [seat.trace for seat in seats if seat.name.startswith("ours_nvme") and seat.trace is not None]
    return found, traced[0]["events"] if traced else []


def together(settings: dict[str, Any], speed: Any, arguments: Namespace) -> tuple[list[Seat], Any, dict[str, str]]:
    """All contenders live at the same time and take turns, one step each."""
    left_out: dict[str, str] = {}
    seats: list[Seat] = []
    living: list[tuple[Seat, Contender]] = []
    peaks: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for name in in_order(arguments.contenders):
            if (why := lacks(name, left_out)) is not None:
                left_out[name] = why
                continue
            for reference in references(name) - peaks.keys():
                seat, contender = next((s, c) for s, c in living if kind_of(s.name) == reference)
                for _ in range(arguments.unrecorded):
                    contender.step()
                peaks[reference] = contender.ask("memory")["peak_bytes"]
            seat = Seat(name, settings)
            try:
                (contender,) = stack.enter_context(started(SCRIPT, [resolved(name, peaks)], settings))
            except ContenderMissing as missing:
                left_out[name] = str(missing)
                continue
            seat.built = contender.replies[-1]
            seats.append(seat)
            living.append((seat, contender))
        for _, contender in living:
            for _ in range(arguments.unrecorded - 1):  # `interleave` does one more
                contender.step()
        turns: dict[str, Any] = {seat.name: lambda s=seat, c=contender: s.asked_for(c) for seat, contender in living}
        seconds = rounds.interleave({**turns, "drive": speed}, arguments.rounds)
        for seat, contender in living:
            del seat.replies[0]
            seat.finish(contender, trace=arguments.breakdown)
    return seats, seconds, left_out


def apart(settings: dict[str, Any], speed: Any, arguments: Namespace) -> tuple[list[Seat], Any, dict[str, str]]:
    """One contender lives at a time; in each round, each is started, built and stepped."""
    left_out: dict[str, str] = {}
    seats: dict[str, Seat] = {}
    peaks: dict[str, int] = {}
    seconds: dict[str, list[float]] = {"drive": []}
    names = in_order(arguments.contenders)
    for number in range(arguments.rounds):
        seconds["drive"].append(speed())
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name not in left_out and (why := lacks(name, left_out)) is not None:
                left_out[name] = why
            if name in left_out:
                continue
            if name not in seats:
                seats[name] = Seat(name, settings)
            try:
                seconds.setdefault(name, []).append(seats[name].visit(resolved(name, peaks), arguments))
            except ContenderFailed as failed:
                if name.startswith("ours") and not isinstance(failed, ContenderMissing):
                    raise
                left_out[name] = str(failed)  # others may need more memory than there is
                del seats[name]
                seconds.pop(name, None)
                continue
            kind = kind_of(name)
            if name == first_of(kind, names):
                peaks[kind] = max(peaks.get(kind, 0), seats[name].memory["peak_bytes"])
    return list(seats.values()), seconds, left_out


def in_order(names: list[str]) -> list[str]:
    """The same, those last whose budgets are others' peaks."""
    return sorted(names, key=lambda name: bool(references(name)))


def lacks(name: str, left_out: dict[str, str]) -> str | None:
    """Why `name` cannot be started, if a contender that its budget refers to was left out."""
    missing = sorted(references(name) & {kind_of(other) for other in left_out})
    return f"its budget is the peak of {missing[0]}, which was left out" if missing else None


def row_of(seat: Seat, seconds: list[float], arguments: Namespace) -> dict[str, Any]:
    training = seat.memory.get("report", {}).get("training") or {}
    row = {
        "seconds": rounds.summary(seconds),
        "tokens_per_second": arguments.tokens * arguments.batch_size / median(seconds),
        "processor_seconds": rounds.summary([r["user_seconds"] + r["system_seconds"] for r in seat.replies]),
        "phases": {phase: median(r["phases"][phase] for r in seat.replies) for phase in seat.replies[0]["phases"]},
        "others_share": median(r["others_share"] for r in seat.replies),
        "bytes_read": median(r["read_bytes"] for r in seat.replies),
        "bytes_written": median(r["write_bytes"] for r in seat.replies),
        "losses": seat.losses,
        "build": seat.built,
        "training": {key: training[key] for key in COUNTERS if key in training},
        **seat.memory,
    }
    if seat.trace is not None:
        row["breakdown"] = {key: value for key, value in seat.trace.items() if key != "events"}
    return row


def ratios(rows: dict[str, Any], seconds: rounds.Speeds, bandwidth: list[float]) -> dict[str, Any]:
    """Ours over everybody else, and over what the machine allows, round by round."""
    found: dict[str, Any] = {}
    for name in (name for name in rows if name.startswith("ours")):
        for other in (other for other in rows if not other.startswith("ours")):
            found[f"{name} / {other}"] = {
                "seconds": rounds.ratio(seconds, name, other),
                "peak_bytes": rows[name]["peak_bytes"] / max(1, rows[other]["peak_bytes"]),
            }
        moved = rows[name]["bytes_read"] + rows[name]["bytes_written"]
        for compute in (other for other in ("torch", "torch+recompute=0") if other in rows):
            limits = [max(c, moved / b) for c, b in zip(seconds[compute], bandwidth, strict=True)]
            found[f"{name} / limit by {compute}"] = {
                "seconds": rounds.summary([s / limit for s, limit in zip(seconds[name], limits, strict=True)]),
                "limit_seconds": rounds.summary(limits),
                "drive_seconds": moved / median(bandwidth),
            }
    return found


def show(found: dict[str, Any]) -> None:
    first, last = found["load_average"]
    drive = found["drive"]["bytes_per_second"]
    print(f"\nload average {first:.1f} before, {last:.1f} after; drive, half reads and half writes, by", end=" ")
    print(f"{found['drive']['measured_by']}: {drive['median'] / 1e9:.2f} GB/s ({drive['min'] / 1e9:.2f} to", end=" ")
    print(f"{drive['max'] / 1e9:.2f})")
    width = max(map(len, found["contenders"]), default=0)
    print(f"  {'':{width}}  s/step   (min    max)  forward  backward  update  cpu s    peak  read GB  written  others")
    for name, row in found["contenders"].items():
        s, phases = row["seconds"], row["phases"]
        print(
            f"  {name:{width}}  {s['median']:6.2f}  ({s['min']:5.2f}  {s['max']:5.2f})  {phases['forward']:7.2f}"
            f"  {phases['backward']:8.2f}  {phases['update']:6.2f}  {row['processor_seconds']['median']:5.2f}"
            f"  {row['peak_bytes'] / GIB:5.2f}G  {row['bytes_read'] / 1e9:7.2f}  {row['bytes_written'] / 1e9:7.2f}"
            f"  {row['others_share']:6.0%}"
        )
    for name, why in found["left_out"].items():
        print(f"  {name}: left out: {why}")
    for name, ratio in found["ratios"].items():
        s = ratio["seconds"]
        text = f"  {name}: {s['median']:.3f}x seconds ({s['min']:.3f} to {s['max']:.3f})"
        if "peak_bytes" in ratio:
            text += f", {ratio['peak_bytes']:.3f}x peak"
        else:
            text += f"; limit {ratio['limit_seconds']['median']:.2f} s, drive alone {ratio['drive_seconds']:.2f} s"
        print(text)
    for name, row in found["contenders"].items():
        if row["training"]:
            print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in row["training"].items()))
        if "breakdown" in row:
            show_breakdown(name, row["breakdown"])


def show_breakdown(name: str, breakdown: dict[str, Any]) -> None:
    total = breakdown["seconds"]
    print(f"\n  {name}, where one step of {total:.2f} s goes, by thread (a part's time is its own):")
    for thread, parts in breakdown["threads"].items():
        print(f"    {thread}")
        for part, seconds in parts.items():
            print(f"      {part:36} {seconds:7.3f} s  {seconds / total:6.1%}")
    for part, seconds in breakdown["overlap"].items():
        print(f"    {part:38} {seconds:7.3f} s  {seconds / total:6.1%}")


def parse_arguments() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvme", type=Path, required=True, help="folder on the drive; checkpoint and stores lie there")
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(DEFAULT))
    parser.add_argument("--size", choices=SIZES, default="117m", help="shape; the options below change it")
    parser.add_argument("--tokens", type=int, default=512, help="of a row (default 512)")
    parser.add_argument("--batch-size", type=int, default=1, help="rows (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="recorded steps (default 5)")
    parser.add_argument("--unrecorded", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--max-grad-norm", type=float, default=100.0, help="declared (default 100: not reached)")
    parser.add_argument("--threads", type=int, help="torch threads of each contender (default torch's own)")
    parser.add_argument("--drive-bytes", type=int, default=1 << 30, help="of the file that the drive is measured with")
    parser.add_argument("--apart", action="store_true", help="one contender at a time, for want of memory")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, one round: does it run?")
    parser.add_argument("--no-breakdown", dest="breakdown", action="store_false", help="leave out the traced steps")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--trace", type=Path, help="write one step of the first ours_nvme for Perfetto to this file")
    random_llama.add_arguments(parser)
    known = parser.parse_args()
    if known.smoke:
        parser.set_defaults(
            size="smoke", contenders=list(SMOKE), tokens=64, rounds=1, unrecorded=2, threads=1, drive_bytes=16 << 20
        )
        known = parser.parse_args()
    parser.set_defaults(**SIZES[known.size])
    arguments = parser.parse_args()
    wrong = check_names(arguments.contenders, SWITCHES)
    odd = sorted(
        {ref for name in arguments.contenders for ref in references(name)} - set(map(kind_of, arguments.contenders))
    )
    if odd and wrong is None:
        wrong = f"--contenders: a budget is the peak of {odd[0]}, which does not take part"
    if wrong is not None:
        parser.error(wrong)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.nvme.mkdir(parents=True, exist_ok=True)
    results = rounds.circumstances()
    hidden = rounds.words_for(DIR=arguments.nvme, FILE=arguments.json, TRACE=arguments.trace)
    results["command"] = rounds.command(hidden)
    results["configuration"] = {
        key: value for key, value in vars(arguments).items() if key not in ("nvme", "json", "trace", "breakdown")
    }
    folder = random_llama.folder(arguments, max_tokens=max(2048, arguments.tokens))
    try:
        found, events = measure(folder, arguments)
    except ContenderFailed as error:
        raise SystemExit(f"full_finetune.py: {error}") from None
    results |= found
    show(found)
    for path, what in ((arguments.json, results), (arguments.trace, {"traceEvents": events})):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            indent = 1 if path == arguments.json else None
            path.write_text(rounds.as_json(what, hidden, indent=indent), encoding="utf-8")


if __name__ == "__main__":
    main()
