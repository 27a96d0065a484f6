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

Switches of `ours`, joined by "+": decode_scope=linear, num_slots=N, stream_edges=1, activations=recompute (fields of
RuntimeOptions; activations are one chunk's), device_memory=SIZE, decode_threads=N, fused=1 (torch's fused AdamW). Of
any contender: trim=1 gives the C library's free memory back to the system before the head; NAME=VALUE in capitals is
set in the environment of that process: `bf16+MALLOC_TOP_PAD_=67108864`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import rounds

HERE = Path(__file__).resolve().parent
QUIET = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore::FutureWarning", "KINETO_LOG_LEVEL": "99"}
SWITCHES = {
    "ours": {
        "decode_scope", "num_slots", "stream_edges", "activations", "device_memory", "decode_threads", "fused", "trim",
    },
    "bf16": {"trim"},
    "bnb": {"trim"},
}  # fmt: skip
MIB = 2**20
GIB = 2**30


class ContenderFailed(Exception):
    """A contender's process reported an error or ended; carries what it said."""


class Contender:
    """One process that holds one model and does one step at a time."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.replies: list[dict[str, Any]] = []
        kind, *switches = name.split("+")
        pairs = dict(switch.split("=", 1) for switch in switches)
        environment = {key: value for key, value in pairs.items() if key.isupper()}
        settings = settings | {
            "kind": kind,
            "switches": {key: value for key, value in pairs.items() if key not in environment},
            "store": str(Path(settings["store"]) / name),  # a store belongs to one run at a time
        }
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "qlora_contender.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment,
        )

    def send(self, request: str) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise ContenderFailed(f"{self.name}: no pipe")
        with contextlib.suppress(BrokenPipeError):  # `receive` says what happened
            stdin.write(request + "\n")
            stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next reply. Blocks; raises `ContenderFailed`."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise ContenderFailed(f"{self.name}: ended with code {self._process.wait()}; its own words are above")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ContenderFailed(f"{self.name}: {reply['error']}")
        return reply

    def ask(self, request: str) -> dict[str, Any]:
        self.send(request)
        return self.receive()

    def step(self) -> float:
        """Seconds of one step."""
        self.replies.append(self.ask("step"))
        return float(self.replies[-1]["seconds"])

    def close(self) -> None:
        with contextlib.suppress(ContenderFailed):
            self.send("close")
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def started(names: list[str], settings: dict[str, Any]) -> Iterator[list[Contender]]:
    """The contenders, ready for their first step. Imports run side by side, models are built one after the other."""
    contenders: list[Contender] = []
    try:
        for name in names:
            contenders.append(Contender(name, settings))
        for contender in contenders:
            contender.receive()
        for contender in contenders:
            contender.replies.append(contender.ask("build"))
        yield contenders
    finally:
        for contender in contenders:
            contender.close()


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
    with started(names, settings) as contenders:
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


def checkpoint_folder(arguments: argparse.Namespace) -> Path:
    """Random weights of the shape asked for, written once; a name that depends on the shape, so that runs share it."""
    shape = {
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "max_position_embeddings": max(2048, *arguments.tokens),
    }
    key = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(arguments.nvme) / f"llama-{key}"
    if not (folder / "model.safetensors.index.json").exists():
        print(f"writing random weights to {folder}", file=sys.stderr)
        command = [sys.executable, str(HERE / "qlora_checkpoint.py"), str(folder), json.dumps(shape)]
        subprocess.run(command, check=True, env=os.environ | QUIET)
    return folder


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
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--no-breakdown", dest="breakdown", action="store_false", help="leave out the profiled steps")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    for name in arguments.contenders:
        kind, *switches = name.split("+")
        if kind not in SWITCHES:
            parser.error(f"--contenders: {kind!r} unknown; allowed: {', '.join(SWITCHES)}")
        for switch in switches:
            key, equals, _ = switch.partition("=")
            if not equals or not (key.isupper() or key in SWITCHES[kind]):
                parser.error(f"--contenders: {kind} has no switch {switch!r}; allowed: {sorted(SWITCHES[kind])}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.nvme.mkdir(parents=True, exist_ok=True)
    results = rounds.circumstances()
    # Folders are this machine's own business.
    hidden = {str(arguments.nvme): "DIR", str(arguments.json): "FILE"}
    words = [Path(sys.argv[0]).name, *(hidden.get(word, word) for word in sys.argv[1:])]
    results["command"] = "python benchmarks/" + " ".join(words)
    results["configuration"] = {
        key: value for key, value in vars(arguments).items() if key not in ("nvme", "json", "breakdown")
    }
    folder = checkpoint_folder(arguments)
    results["lengths"] = []
    try:
        for num_tokens in arguments.tokens:
            found = measure(num_tokens, folder, arguments)
            results["lengths"].append(found)
            show(found)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except ContenderFailed as error:
        raise SystemExit(f"qlora.py: {error}") from None


if __name__ == "__main__":
    main()
