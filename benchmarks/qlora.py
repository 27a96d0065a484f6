"""One fine-tuning step with 4-bit weights on NVMe, beside two runs that hold their model in memory.

    python benchmarks/qlora.py --nvme DIR [--layers 22] [--tokens 512 2048] [--rounds 5] [--json FILE]

A Llama of TinyLlama's shape with random weights gets LoRA on every linear. A step is forward, backward and AdamW.

    ours    NF4, layers streamed from NVMe (offload_rt as it comes; `ours+KEY=VALUE` turns a switch, see below)
    bf16    transformers + peft, bf16 weights in memory, every layer recomputed
    bnb     transformers + bitsandbytes + peft, NF4 weights in memory, every layer recomputed

Each contender lives in a process of its own (qlora_contender.py) that does one step when told to, so that a round holds
one step of each and a slow minute of the machine hits all alike. Ratios are taken within a round. Processor seconds
(user and system, all threads) stand beside the clock's: others on the machine disturb them less; "others" is the share
of the machine's processors that went to them in the median step. Peak memory is VmHWM above what was resident after the
imports, for the steps and, apart, for everything before the first step.

Switches of `ours`, joined by "+": decode_scope=linear, num_slots=N, stream_edges=1, activations=recompute,
placed_bytes=0 (fields of RuntimeOptions; activations are one chunk's), device_memory=SIZE, decode_threads=N, fused=1
(torch's fused AdamW). Of any contender: trim=1 gives the C library's free memory back to the system before the head;
NAME=VALUE in capitals is set in the environment of that process: `bf16+MALLOC_TOP_PAD_=67108864`.
"""

import argparse
import os
from pathlib import Path
from statistics import median
from typing import Any

import random_llama
import rounds
from contenders import ContenderFailed, check_names, started

SCRIPT = "qlora_contender.py"
SWITCHES = {
    "ours": {
        "decode_scope", "num_slots", "stream_edges", "activations", "device_memory", "decode_threads", "fused", "trim",
        "placed_bytes",
    },
    "bf16": {"trim"},
    "bnb": {"trim"},
}  # fmt: skip
MIB = 2**20
GIB = 2**30


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Who is compared with whom: every switched contender with the plain one, and ours with the rest."""
    found = []
    for name in names:
        kind = name.split("+")[0]
        found += [(name, kind)] if name != kind and kind in names else []
        found += [(name, other) for other in names if kind == "ours" and not other.startswith("ours")]
    return found + ([("bnb", "bf16")] if {"bnb", "bf16"} <= set(names) else [])


def measure(num_tokens: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, memory, losses and breakdown of every contender at one length."""
    settings = {
        "checkpoint": str(folder),
        "store": str(arguments.nvme / "stores"),
        "tokens": num_tokens,
        "rank": arguments.rank,
        "threads": arguments.threads,
    }
    names = arguments.contenders
    load = [os.getloadavg()[0]]
    with started(SCRIPT, names, settings) as contenders:
        built = {c.name: c.replies.pop() for c in contenders}
        seconds = rounds.interleave({c.name: c.step for c in contenders}, arguments.rounds)
        processor = {c.name: [r["user_seconds"] + r["system_seconds"] for r in c.replies[1:]] for c in contenders}
        load.append(os.getloadavg()[0])
        found: dict[str, Any] = {"tokens": num_tokens, "load_average": load, "contenders": {}, "ratios": {}}
        for contender in contenders:
            state = contender.ask("memory")
            found["contenders"][contender.name] = {
                "seconds": rounds.summary(seconds[contender.name]),
                "tokens_per_second": num_tokens / median(seconds[contender.name]),
                "processor_seconds": rounds.summary(processor[contender.name]),
                **{
                    key: [reply[key] for reply in contender.replies[1:]]
                    for key in ("others_share", "user_seconds", "system_seconds", "page_faults", "preemptions")
                },
                "losses": [reply["loss"] for reply in contender.replies],
                "build": built[contender.name],
                **state,
                "breakdown": contender.ask("breakdown") if arguments.breakdown else None,
            }
    for name, reference in pairs(names):
        ours, theirs = found["contenders"][name], found["contenders"][reference]
        found["ratios"][f"{name} / {reference}"] = {
            "seconds": rounds.ratio(seconds, name, reference),
            "processor_seconds": rounds.ratio(processor, name, reference),
            "peak_bytes": ours["peak_bytes"] / max(1, theirs["peak_bytes"]),
        }
    return found


def show(found: dict[str, Any]) -> None:
    """The table of one length."""
    first, last = found["load_average"]
    print(f"\n{found['tokens']} tokens (load average {first:.1f} before, {last:.1f} after)")
    width = max(map(len, found["contenders"]))
    print(f"  {'':{width}}  s/step   (min    max)  cpu s/step   tok/s    peak  before step 1     base     loss  others")
    for name, row in found["contenders"].items():
        s = row["seconds"]
        print(
            f"  {name:{width}}  {s['median']:6.2f}  ({s['min']:5.2f}  {s['max']:5.2f})"
            f"  {row['processor_seconds']['median']:10.2f}  {row['tokens_per_second']:6.0f}"
            f"  {row['peak_bytes'] / GIB:5.2f}G  {row['build']['peak_bytes'] / GIB:12.2f}G"
            f"  {row['base_bytes'] / GIB:6.2f}G  {row['losses'][-1]:7.3f}  {median(row['others_share']):6.0%}"
        )
    for name, ratio in found["ratios"].items():
        s = ratio["seconds"]
        p = ratio["processor_seconds"]
        print(
            f"  {name}: {s['median']:.3f}x seconds ({s['min']:.3f} to {s['max']:.3f}), {p['median']:.3f}x processor "
            f"seconds ({p['min']:.3f} to {p['max']:.3f}), {ratio['peak_bytes']:.3f}x peak"
        )
    for name, row in found["contenders"].items():
        if row["breakdown"]:
            show_breakdown(name, row["breakdown"])


def show_breakdown(name: str, breakdown: dict[str, Any]) -> None:
    total = breakdown["timed"]["seconds"]
    print(f"\n  {name}, where one step of {total:.2f} s goes (timers):")
    for part, seconds in breakdown["timed"]["parts"].items():
        print(f"    {part:34} {seconds:7.3f} s  {seconds / total:6.1%}")
    profiled = breakdown["profiled"]
    print(f"  {name}, operators of one step of {profiled['seconds']:.2f} s (torch.profiler):")
    for part, seconds in profiled["parts"].items():
        print(f"    {part:34} {seconds:7.3f} s  {seconds / profiled['seconds']:6.1%}")
    memory = breakdown["memory"]
    print(f"  {name}, torch's allocator at its peak in a step, {memory['peak_bytes'] / MIB:.0f} MiB, of which")
    for item in memory["largest"]:
        print(f"    {item['bytes'] / MIB:7.1f} MiB in {item['count']:4} by {item['by']}")
    for line in breakdown["timeline"]:
        print("    " + line)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvme", type=Path, required=True, help="folder on the drive; checkpoint and store stay there")
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=["ours", "bf16", "bnb"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="lengths of the one row (512 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="recorded steps, after one that is not (default 5)")
    parser.add_argument("--threads", type=int, help="torch threads of each contender (default torch's own)")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (default 16)")
    random_llama.add_arguments(parser)
    parser.add_argument("--no-breakdown", dest="breakdown", action="store_false", help="leave out the profiled steps")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    wrong = check_names(arguments.contenders, SWITCHES)
    if wrong is not None:
        parser.error(wrong)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.nvme.mkdir(parents=True, exist_ok=True)
    results = rounds.circumstances()
    hidden = rounds.words_for(DIR=arguments.nvme, FILE=arguments.json)
    results["command"] = rounds.command(hidden)
    results["configuration"] = {
        key: value for key, value in vars(arguments).items() if key not in ("nvme", "json", "breakdown")
    }
    folder = random_llama.folder(arguments, max_tokens=max(2048, *arguments.tokens))
    results["lengths"] = []
    try:
        for num_tokens in arguments.tokens:
            found = measure(num_tokens, folder, arguments)
            results["lengths"].append(found)
            show(found)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(rounds.as_json(results, hidden), encoding="utf-8")
    except ContenderFailed as error:
        raise SystemExit(f"qlora.py: {error}") from None


if __name__ == "__main__":
    main()
