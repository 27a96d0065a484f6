"""The planner over its grid, and against published step times. Model results, no hardware: what is timed is planning.

    python -m benchmarks.planner grid  [--out FILE]    {8B, 70B, 175B, 405B} x {4k, 32k, 256k, 1M} x {QLoRA, full}
    python -m benchmarks.planner anchor [--out FILE]   GPT-3 13B on one RTX 4090, five batch sizes

Grid: at least 32k tokens a step; the RTX 4090 with 256 GiB, the H100 with 1500 GiB, 60 TB of drives that read 20 and
write 14 GB/s. Every plan is replayed by the checker. Planning is one thread, timed by its processor time.

Anchor: step times that the authors of LoHan publish beside their code (fp16 full fine-tuning, sequence 1024, CPU Adam,
two Xeon Gold 5320, 768 GB, twelve D7-P5510 in RAID-0). The profile below is set by hand, to these five and to nothing
else. Their policy is ours with weights and states on NVMe, updates on the CPU during backward, and activations as the
program likes.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from planners.errors import PlanInfeasible
from planners.optimiser.greedy import plan_greedy
from planners.optimiser.mip import plan_optimal
from planners.optimiser.rows import Freedoms
from planners.plans.placement import UpdateMode
from planners.problems.hardware import Drive, Hardware, Links, named_hardware
from planners.problems.model_workload import make_workload
from planners.problems.problem import Capabilities, Problem
from planners.shapes.models import find_model
from planners.simulator.validate import check

MODELS = ("llama3-8b", "llama3-70b", "gpt3-175b", "llama3-405b")
SHAPES = ((8, 4096), (1, 32768), (1, 262144), (1, 1048576))
HOSTS = {"rtx4090": 256 * 2**30, "h100": 1500 * 2**30}
ANCHOR = {8: 42.8, 16: 84.3, 32: 143.1, 64: 155.8, 128: 153.8}
"""TFLOP/s by batch size, as published; 6 FLOPs per parameter and token and full attention, nothing for recomputing."""


def grid_machine(name: str) -> Hardware:
    base = named_hardware(name)
    drive = Drive(capacity_bytes=60 * 10**12, read_bytes_per_second=20e9, write_bytes_per_second=14e9)
    return replace(base, host=replace(base.host, memory_bytes=HOSTS[name]), drives=(drive,))


def grid() -> dict:
    rows = []
    for machine, model, (batch, seq), full in itertools.product(HOSTS, MODELS, SHAPES, (False, True)):
        workload = make_workload(
            find_model(model), batch_size=batch, seq_len=seq, bits=None if full else 4, rank=None if full else 16
        )
        problem = Problem(hardware=grid_machine(machine), workload=workload)
        row = {"machine": machine, "model": model, "batch": batch, "seq": seq, "full": full}
        begin = time.process_time()
        try:
            plan = plan_optimal(problem)
        except PlanInfeasible as error:
            rows.append({**row, "infeasible": str(error), "plan_seconds": time.process_time() - begin})
            print(machine, model, seq, "full" if full else "qlora", "infeasible:", str(error)[:90])
            continue
        row["plan_seconds"] = time.process_time() - begin
        check(problem, plan)
        try:
            row["greedy_seconds"] = plan_greedy(problem).predicted["step_seconds"]
        except PlanInfeasible:
            row["greedy_seconds"] = None
        for key in ("step_seconds", "lower_bound_seconds", "gap", "tokens_per_second", "flops_per_second"):
            row[key] = plan.predicted[key]
        row |= {"mode": plan.update_mode.value, "chunk_tokens": plan.cuts.chunk_tokens}
        rows.append(row)
        print(
            f"{machine} {model} {seq} {'full' if full else 'qlora'}: {row['step_seconds']:.4g} s, bound "
            f"{row['lower_bound_seconds']:.4g} s, gap {row['gap']:.1%}, planned in {row['plan_seconds']:.2f} s",
            flush=True,
        )
    planned = [row for row in rows if "gap" in row]
    gaps, seconds = [r["gap"] for r in planned], [r["plan_seconds"] for r in planned]
    gains = [r["greedy_seconds"] / r["step_seconds"] for r in planned if r["greedy_seconds"]]
    summary = {
        "planned": len(planned), "infeasible": len(rows) - len(planned), "gap_median": statistics.median(gaps),
        "gap_max": max(gaps), "plan_seconds_median": statistics.median(seconds), "plan_seconds_max": max(seconds),
        "greedy_over_optimal": {"median": statistics.median(gains), "min": min(gains), "max": max(gains)},
    }  # fmt: skip
    return {"summary": summary, "rows": rows}


def anchor_machine() -> Hardware:
    base = named_hardware("rtx4090")
    return replace(
        base,
        device=replace(base.device, matmul_flops_per_second=176e12, attention_forward_efficiency=0.85,
                       attention_backward_efficiency=0.7, adamw_params_per_second=20e9),
        host=replace(base.host, memory_bytes=768 * 10**9, adamw_params_per_second=1.0e9),
        links=Links(host_to_device_bytes_per_second=20.5e9, device_to_host_bytes_per_second=20.5e9, duplex=0.8),
        drives=tuple(
            Drive(capacity_bytes=3840 * 10**9, read_bytes_per_second=6.4e9, write_bytes_per_second=3.6e9)
            for _ in range(12)
        ),
        drive_mix=0.3,
        max_drive_read_bytes_per_second=31e9,
        max_drive_write_bytes_per_second=28e9,
    )  # fmt: skip


def anchor() -> dict:
    rows = []
    shape = find_model("gpt3-13b")
    lohan = Freedoms(weights=(False, False, True), states=(False, False, True), device_updates=False)
    for batch, published in ANCHOR.items():
        problem = Problem(
            hardware=anchor_machine(),
            workload=make_workload(shape, batch_size=batch, seq_len=1024, rank=None),
            capabilities=Capabilities(update_modes=(UpdateMode.BACKWARD,)),
        )
        plan = plan_optimal(problem, freedoms=lohan)
        check(problem, plan)
        tokens = batch * 1024
        # As they seem to count: full attention, so four products of tokens by tokens, three times.
        flops = tokens * (6 * shape.params + 12 * len(shape.layers) * shape.hidden * 1024)
        predicted = flops / plan.predicted["step_seconds"] / 1e12
        error = predicted / published - 1
        rows.append({"batch": batch, "published_tflops": published, "predicted_tflops": predicted, "error": error,
                     "step_seconds": plan.predicted["step_seconds"]})  # fmt: skip
        print(f"batch {batch}: published {published}, predicted {predicted:.1f} TFLOP/s ({error:+.1%})")
    return {"summary": {"worst_error": max(abs(r["error"]) for r in rows)}, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grid", "anchor"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = grid() if arguments.what == "grid" else anchor()
    print(json.dumps(result["summary"], indent=1))
    if arguments.out:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        head = {
            "commit": asked.stdout.strip(), "command": " ".join(["python -m benchmarks.planner", *sys.argv[1:]]),
            "python": platform.python_version(), "what": "model results; plan_seconds are measured (processor)",
        }  # fmt: skip
        arguments.out.write_text(json.dumps({**head, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
