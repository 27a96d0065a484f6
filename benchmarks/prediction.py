"""Predicted against measured: plans that differ in what binds, simulated, then run under emulated links.

    python benchmarks/prediction.py [--hidden 512] [--layers 8] [--tokens 512] [--steps 6] [--json FILE]

A Llama of random weights trains LoRA adapters, or all of it. What computes is this machine: before and after each run
one layer, the head and the optimizer are timed, and the mean of both is what the simulator is given. Links and drives
are emulated: in each case the rates are such that the named resources work so many times as long as the device
computes, all others a tenth of that. Nothing else is fitted. Beside the step's time, what each resource worked is
compared.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rounds import circumstances, summary
from transformers import LlamaConfig, LlamaForCausalLM

import offload_rt
from offload_rt.config import EngineConfig, NvmePath
from offload_rt.emulation import emulated_config
from offload_rt.plans.planning import lowered, measured_problem
from offload_rt.plans.planning_training import lowered_training, questions
from offload_rt.plans.training_seconds import measured_seconds
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.wiring.workload import Workload, find_workload
from planners.optimiser.expand import Fractions, expand, with_prediction
from planners.optimiser.greedy import state_slots
from planners.plans.placement import Buffers, Cuts, DecodeScope, Tier, UpdateMode, UpdatePlace
from planners.plans.plan import Plan
from planners.problems.cost import Knobs
from planners.problems.hardware import Device, Drive, Hardware, Host, Links
from planners.problems.problem import Problem
from planners.rule.streaming_problem import StreamingProblem
from planners.simulator.division import divided
from planners.simulator.simulate import simulate
from planners.simulator.step_work import busy_seconds

FAST = 0.1
"""Work of what does not bind, over compute."""
WARM_STEPS = 2
PLENTY = 4 << 30
BACKWARD = UpdateMode.BACKWARD
NO_CLIPPING = 1e9
"""A norm that is declared, and never reached."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan, and which resources work how many times as long as the device computes."""

    weights: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Of a layer, in DEVICE, HOST, NVME."""
    inputs: Tier = Tier.DEVICE
    activations: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    """What layers save beside their inputs, in shares of whole layers: computed again, on NVMe, in HOST, kept."""
    chunks: int = 1
    """Into how many a sequence is cut in layers; of more than one, the shares above are of chunks."""
    slots: int = 2
    scope: DecodeScope = DecodeScope.LINEAR
    bits: int | None = 4
    unified: bool = False
    state: float | None = None
    """Share of state in memory where all parameters train, the rest on NVME; None: adapters do."""
    mode: UpdateMode = UpdateMode.AFTER
    clips: bool = False
    tokens_share: float = 1.0
    """Of a sequence: with few tokens there is little to compute, and as much to step."""
    work: dict[str, float] = field(default_factory=dict)


CASES = {
    "compute, decoding linears": Case(),
    "compute, decoding layers": Case(scope=DecodeScope.LAYER),
    "compute, 16-bit weights": Case(bits=None),
    "weights from HOST": Case(weights=(0, 1, 0), work={"host_to_device": 0.8}),
    "link in": Case(weights=(0, 1, 0), work={"host_to_device": 1.5}),
    "link in, one slot": Case(weights=(0, 1, 0), slots=1, work={"host_to_device": 0.7}),
    "link in, 16-bit weights": Case(weights=(0, 1, 0), bits=None, slots=3, work={"host_to_device": 1.4}),
    "SSD read": Case(weights=(0, 0, 1), work={"ssd_read": 1.5}),
    "SSD read, three slots": Case(weights=(0, 0, 1), slots=3, work={"ssd_read": 1.0, "host_to_device": 0.8}),
    "SSD read, one tier": Case(weights=(0, 0, 1), unified=True, work={"ssd_read": 1.5}),
    "all tiers, SSD read": Case(weights=(0.3, 0.3, 0.4), work={"ssd_read": 1.4, "host_to_device": 0.7}),
    "all tiers, link in": Case(weights=(0.3, 0.3, 0.4), work={"ssd_read": 0.6, "host_to_device": 1.4}),
    "link out": Case(inputs=Tier.HOST, work={"device_to_host": 1.2}),
    "inputs in": Case(inputs=Tier.HOST, work={"host_to_device": 1.2}),
    "SSD write": Case(inputs=Tier.NVME, work={"ssd_write": 1.2}),
    "weights and inputs on NVMe": Case(
        weights=(0, 0, 1), inputs=Tier.NVME, work={"ssd_read": 1.2, "ssd_write": 0.4}
    ),
    "activations kept": Case(activations=(0, 0, 0, 1)),
    "activations kept, decoding layers": Case(activations=(0, 0, 0, 1), scope=DecodeScope.LAYER),
    "half kept": Case(activations=(0.5, 0, 0, 0.5)),
    "activations to HOST": Case(activations=(0, 0, 1, 0), work={"device_to_host": 0.3, "host_to_device": 0.4}),
    "activations to HOST, link out": Case(activations=(0, 0, 1, 0), work={"device_to_host": 1.2}),
    "activations to HOST, link in": Case(activations=(0, 0, 1, 0), work={"host_to_device": 1.2}),
    "half to HOST": Case(activations=(0.5, 0, 0.5, 0), work={"device_to_host": 0.2, "host_to_device": 0.5}),
    "activations to NVMe": Case(activations=(0, 1, 0, 0), work={"ssd_write": 0.3, "ssd_read": 0.4}),
    "activations to NVMe, SSD write": Case(activations=(0, 1, 0, 0), work={"ssd_write": 1.2}),
    "activations each way": Case(
        activations=(0.25, 0.25, 0.25, 0.25), weights=(0.3, 0.3, 0.4),
        work={"ssd_read": 0.8, "ssd_write": 0.3, "host_to_device": 0.6, "device_to_host": 0.3},
    ),
    "chunks": Case(chunks=4),
    "chunks, inputs to NVMe": Case(chunks=4, inputs=Tier.NVME, work={"ssd_write": 0.3, "ssd_read": 0.3}),
    "chunks kept": Case(chunks=4, activations=(0, 0, 0, 1)),
    "half of the chunks kept": Case(chunks=4, activations=(0.5, 0, 0, 0.5)),
    "half of the chunks to NVMe": Case(
        chunks=4, activations=(0.5, 0.5, 0, 0), work={"ssd_write": 0.3, "ssd_read": 0.4}
    ),
    "chunks each way": Case(
        chunks=4, activations=(0.25, 0.25, 0.25, 0.25), weights=(0, 0, 1),
        work={"ssd_read": 0.5, "ssd_write": 0.3, "host_to_device": 0.5, "device_to_host": 0.3},
    ),
    "full, compute": Case(bits=None, state=1.0),
    "full, CPU updates": Case(bits=None, state=1.0, tokens_share=0.125),
    "full, CPU updates from NVMe": Case(bits=None, state=0.0, mode=BACKWARD, tokens_share=0.125),
    "full, gradients out": Case(bits=None, weights=(0, 1, 0), state=1.0, work={"device_to_host": 1.3}),
    "full, weights in": Case(bits=None, weights=(0, 1, 0), state=1.0, work={"host_to_device": 1.3}),
    "full, state behind compute": Case(
        bits=None, state=0.0, mode=BACKWARD, work={"ssd_read": 0.3, "ssd_write": 0.3}
    ),
    "full, state, SSD": Case(bits=None, state=0.0, mode=BACKWARD, work={"ssd_read": 1.2, "ssd_write": 1.2}),
    "full, state before its norm": Case(
        bits=None, state=0.0, mode=UpdateMode.SPECULATIVE, clips=True, work={"ssd_read": 0.8, "ssd_write": 0.8}
    ),
    "full, half of state, SSD": Case(
        bits=None, weights=(0, 1, 0), state=0.5, mode=BACKWARD, work={"ssd_read": 0.5, "ssd_write": 1.2}
    ),
    "full, all on NVMe": Case(
        bits=None, weights=(0, 0, 1), state=0.0, mode=BACKWARD, work={"ssd_read": 1.0, "ssd_write": 0.8}
    ),
    "full, one tier, SSD": Case(
        bits=None, state=0.0, mode=BACKWARD, unified=True, work={"ssd_read": 1.2, "ssd_write": 1.2}
    ),
    "full, activations kept": Case(bits=None, state=1.0, activations=(0, 0, 0, 1)),
    "full, half kept, half to HOST": Case(
        bits=None, weights=(0, 1, 0), state=1.0, activations=(0, 0, 0.5, 0.5),
        work={"device_to_host": 0.8, "host_to_device": 0.6},
    ),
    "full, activations each way, state, SSD": Case(
        bits=None, state=0.0, mode=BACKWARD, activations=(0.25, 0.25, 0.25, 0.25),
        work={"ssd_read": 0.8, "ssd_write": 0.9},
    ),
}  # fmt: skip


def build(arguments: argparse.Namespace, case: Case) -> torch.nn.Module:
    """The model, with adapters where these train, equal at every call."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    hidden = arguments.hidden
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=arguments.layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    if case.state is not None:
        return model
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def machine(unified: bool, rates: dict[str, float]) -> Hardware:
    """Memory for everything, and these rates of links and drives, in bytes a second."""
    rate = {name: rates.get(name, 1e12) for name in ("host_to_device", "device_to_host", "ssd_read", "ssd_write")}
    return Hardware(
        name="emulated",
        device=Device(
            memory_bytes=PLENTY, reserve_bytes=0, matmul_flops_per_second=1e12, attention_forward_efficiency=1.0,
            attention_backward_efficiency=1.0, memory_bytes_per_second=1e12, nf4_decode_bytes_per_second=1e12,
            adamw_params_per_second=1e9, operation_seconds=0.0,
        ),
        host=Host(memory_bytes=0 if unified else PLENTY, adamw_params_per_second=1e9),
        links=Links(
            host_to_device_bytes_per_second=rate["host_to_device"],
            device_to_host_bytes_per_second=rate["device_to_host"],
            duplex=0.8,
        ),
        drives=(
            Drive(
                capacity_bytes=PLENTY, read_bytes_per_second=rate["ssd_read"], write_bytes_per_second=rate["ssd_write"]
            ),
        ),
        unified=unified,
    )  # fmt: skip


def plan_of(case: Case, problem: Problem) -> Plan:
    """The case's plan; blocks outside the layers stay in DEVICE memory."""
    kept = tuple(float(case.inputs is tier) for tier in (Tier.NVME, Tier.HOST, Tier.DEVICE))
    cuts = Cuts(chunk_tokens=problem.workload.measured_chunk_tokens or problem.workload.tokens)
    knobs = Knobs(
        update_mode=case.mode, slots=case.slots, cuts=cuts,
        decode_scope=case.scope, inputs=case.inputs, buffers=Buffers(state_slots=state_slots(problem)[0]),
    )  # fmt: skip
    updates = {(Tier.DEVICE, UpdatePlace.DEVICE, False): 1.0}
    if case.state is not None:
        memory, place = (Tier.DEVICE, UpdatePlace.DEVICE) if case.unified else (Tier.HOST, UpdatePlace.CPU)
        updates = {(memory, place, False): case.state, (Tier.NVME, place, False): 1 - case.state}
    fractions = [
        Fractions(
            weights=case.weights if entry.is_layer else (1.0, 0.0, 0.0),
            tokens=tuple(case.activations if saved.recomputable else (0.0, *kept) for saved in entry.saved),
            updates=updates,
        )
        for entry in problem.workload.classes
    ]
    return expand(problem, knobs, fractions, planner="by hand")


def rates_for(case: Case, problem: Problem) -> dict[str, float]:
    """Rates at which the case's resources work as long as it says."""
    plan = plan_of(case, problem)
    seconds = busy_seconds(divided(problem, plan), plan)
    compute = seconds["compute"]
    found = {}
    for name in ("host_to_device", "device_to_host", "ssd_read", "ssd_write"):
        num_bytes = seconds[name] * 1e12  # what `machine` gives each without rates
        if num_bytes:
            found[name] = num_bytes / (case.work.get(name, FAST) * compute)
    return found


def num_tokens(arguments: argparse.Namespace, case: Case) -> int:
    return int(arguments.tokens * case.tokens_share)


def asked(
    arguments: argparse.Namespace, case: Case, folder: Path, hardware: Hardware
) -> tuple[Workload, StreamingProblem]:
    """A fresh model taken apart, and the sizes that the runtime plans with."""
    config = EngineConfig(
        bits=case.bits, batch_size=1, seq_len=num_tokens(arguments, case), nvme=(NvmePath(path=folder),),
        max_grad_norm=NO_CLIPPING if case.clips else None,
    )  # fmt: skip
    model = build(arguments, case)
    workload = find_workload(model, None, emulated_config(config, hardware), optimizer_of(model))
    return workload, streaming_problem(workload)


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def measured(case: Case, workload: Workload, streaming: StreamingProblem, hardware: Hardware) -> Problem:
    """What the planner is asked, with what this machine takes now."""
    if case.state is None:
        chunk_tokens = -(-workload.config.seq_len // case.chunks) if case.chunks > 1 else None
        return measured_problem(workload, streaming, hardware, chunk_tokens=chunk_tokens)
    seconds = measured_seconds(workload, streaming, optimizer_of(workload.model))
    in_memory, with_drive = questions(workload, streaming, hardware, seconds)
    return (in_memory if case.state == 1.0 else with_drive)[0]


def run(arguments: argparse.Namespace, case: Case, folder: Path) -> dict[str, Any]:
    """Predicts and measures one case."""
    plain = machine(case.unified, {})
    workload, streaming = asked(arguments, case, folder, plain)
    first = measured(case, workload, streaming, plain)
    rates = rates_for(case, first)
    hardware = machine(case.unified, rates)
    plan = plan_of(case, first)
    if case.state is None:
        plan = lowered(plan, streaming, first)
    else:
        plan = lowered_training(plan, workload, streaming, first)
    steps, worked = trained(arguments, case, folder, hardware, plan)
    last = measured(case, workload, streaming, hardware)
    predictions = []
    for problem in (first, last):
        problem = replace(problem, hardware=replace(problem.hardware, links=hardware.links, drives=hardware.drives))
        drawn = plan_of(case, problem)
        predictions.append(with_prediction(problem, drawn, simulate(divided(problem, drawn), drawn)).predicted)
    predicted = mean(p["step_seconds"] for p in predictions)
    taken = median(steps)
    return {
        "predicted_seconds": predicted,
        "measured_seconds": summary(steps),
        "error": predicted / taken - 1,
        "compute_seconds": [p["busy_seconds"]["compute"] for p in predictions],
        "predicted_busy_seconds": predictions[0]["busy_seconds"],
        "measured_busy_seconds": worked,
        "bytes_per_second": rates,
    }


def trained(
    arguments: argparse.Namespace, case: Case, folder: Path, hardware: Hardware, plan: Plan
) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step, and what links and drives worked in one, on the emulated machine."""
    ids = torch.randint(4096, (1, num_tokens(arguments, case)))
    seconds = []
    with offload_rt.engine(
        build(arguments, case), bits=case.bits, batch_size=1, seq_len=num_tokens(arguments, case), nvme=folder,
        lr=1e-4, device="cpu", plan=plan, emulate=hardware, max_grad_norm=NO_CLIPPING if case.clips else None,
    ) as engine:  # fmt: skip
        before: dict[str, float] = {}
        for step in range(WARM_STEPS + arguments.steps):
            if step == WARM_STEPS:
                before = engine.report()["link_busy_seconds"]
            start = time.perf_counter()
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            seconds.append(time.perf_counter() - start)
        after = engine.report()["link_busy_seconds"]
    return seconds[WARM_STEPS:], {name: (after[name] - before[name]) / arguments.steps for name in after}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument("--folder", type=Path, help="for the store; faster than emulated drives: a tmpfs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    for name in arguments.cases:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            results[name] = found = run(arguments, CASES[name], Path(folder))
        step = found["measured_seconds"]
        print(
            f"{name:28} predicted {found['predicted_seconds']:6.3f} s   measured {step['median']:6.3f} "
            f"({step['min']:.3f} to {step['max']:.3f})   {found['error']:+6.1%}",
            flush=True,
        )
    errors = sorted(abs(found["error"]) for found in results.values())
    print(f"{len(errors)} plans: error {median(errors):.1%} in the median, {errors[-1]:.1%} at worst")
    if arguments.json is not None:
        shape = {key: getattr(arguments, key) for key in ("hidden", "layers", "tokens", "steps", "threads")}
        run_ = {**circumstances(), "torch": torch.__version__, "configuration": shape, "results": results}
        arguments.json.write_text(json.dumps({"runs": [run_]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
