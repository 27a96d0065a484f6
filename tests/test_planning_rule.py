"""Where the fixed rule's plan fits, the optimiser finds one that is no slower; where it has none, the rule's runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from offload_rt._engine import Engine
from offload_rt.config import EngineConfig, NvmePath
from offload_rt.plans import planning, planning_tokens
from offload_rt.plans.plan_choice import RULE
from offload_rt.plans.planning import SLACK_DIVISOR, optimised_adapters
from offload_rt.plans.planning_tokens import rounding_of
from offload_rt.plans.rule_price import rule_seconds
from offload_rt.plans.workload_sizes import streaming_problem
from offload_rt.wiring.workload import Workload, find_workload
from planners.errors import PlanInfeasible
from planners.optimiser.trial import GOOD_ENOUGH
from planners.plans.plan import Plan, Tier
from planners.problems.hardware import Hardware
from planners.problems.measured import KeptPass, MeasuredChunks, MeasuredSeconds, SavedGroup
from planners.rule import attempts
from planners.rule.streaming import plan_streaming
from planners.rule.streaming_problem import StreamingProblem
from tests.conftest import SHARES_FIXTURES, build_lora
from tests.test_planning import SECONDS, UPDATES_PER_SECOND, machine

PLENTY, PAGE = 1 << 40, 4096
PIECE_BYTES = 16 << 10
"""Of what passes to NVMe, smaller than a layer's input here, as it is smaller than one of a large model."""


def measured_as_the_rule_estimates(streaming: StreamingProblem, chunk_tokens: int | None) -> MeasuredSeconds:
    """Seconds that nobody measured, of layers that hold what the rule takes them to."""
    saved = streaming.activation_bytes // 2
    kept = KeptPass(forward=0.001, backward=0.002, saved_bytes=saved, put_away=1e-5, taken_back=1e-5)
    seconds = MeasuredSeconds(forward=0.001, backward=0.003, decode=1e-4, kept=kept)
    if chunk_tokens is None:
        return seconds
    groups = tuple(SavedGroup(name=name, num_bytes=saved // 3, again=0.3) for name in ("before", "qkv", "after"))
    chunks = MeasuredChunks(
        num_tokens=chunk_tokens, with_input_bytes=streaming.layer_input_bytes,
        peak_bytes=streaming.layer_bytes(chunk_tokens),
    )  # fmt: skip
    return replace(seconds, kept=replace(kept, saved_bytes=saved // 3 * 3, groups=groups), chunks=chunks)


def least_bytes(streaming: StreamingProblem, tier: str) -> int:
    """The least capacity of a tier for which the rule has a plan."""
    low, high = 0, 1 << 34
    while high - low > PAGE // 8:
        middle = (low + high) // 2
        try:
            plan_streaming(replace(streaming, **{tier: middle}))
            high = middle
        except PlanInfeasible:
            low = middle
    return high


def asked(folder: Path, *, host: bool, nvme: bool, bits: int | None, **model: Any) -> tuple[Workload, StreamingProblem]:
    """A tiny model with all memory that there is."""
    size = {"batch_size": model.pop("batch_size", 1), "seq_len": model.pop("seq_len", 512)}
    config = EngineConfig(
        bits=bits, nvme=(NvmePath(path=folder),) if nvme else (), device_memory_bytes=PLENTY,
        host_memory_bytes=PLENTY if host else None, **size,
    )  # fmt: skip
    workload = find_workload(build_lora("llama", torch.bfloat16, **model), None, config)
    return workload, streaming_problem(workload)


def compare(
    monkeypatch: pytest.MonkeyPatch, workload: Workload, streaming: StreamingProblem, *, device: float, host: float
) -> tuple[Plan, Plan]:
    """The rule's plan with so many times the least memory that it needs, and the optimiser's with some pages more, no
    slower. `streaming` has all memory.
    """

    def profiled(*_: Any, chunk_tokens: int | None = None, **__: Any) -> MeasuredSeconds:
        return measured_as_the_rule_estimates(streaming, chunk_tokens)

    with monkeypatch.context() as patched:
        patched.setattr(planning, "profile_layer", profiled)
        patched.setattr(planning, "profile_chunked_layer", profiled)
        patched.setattr(planning, "profile_head", lambda **_: replace(SECONDS, forward=1e-4, backward=0.0))
        patched.setattr(planning, "updates_per_second", lambda *_: UPDATES_PER_SECOND)
        patched.setattr(attempts, "STAGING_PIECE_BYTES", PIECE_BYTES)
        patched.setattr(planning_tokens, "STAGING_PIECE_BYTES", PIECE_BYTES)
        pages = (4 * len(workload.drafts) + 4) * PAGE
        least = int(device * least_bytes(streaming, "device_capacity_bytes"))
        tight = replace(streaming, device_capacity_bytes=least)
        roomy = replace(tight, device_capacity_bytes=least + pages * (2 if tight.unified else 1))
        if not tight.unified:
            least = int(host * least_bytes(tight, "host_capacity_bytes"))
            tight = replace(tight, host_capacity_bytes=least)
            shortest = [measured_as_the_rule_estimates(streaming, min(attempts.CHUNK_TOKENS))] * len(workload.layers)
            seq_len, each = workload.config.seq_len, streaming.layer_input_bytes
            rounding = rounding_of(shortest, input_bytes=each, seq_len=seq_len, unified=False)
            roomy = replace(roomy, host_capacity_bytes=least + 2 * pages + rounding.host_bytes)
        ruled = plan_streaming(tight)
        hardware: Hardware = machine(PLENTY, 0 if tight.unified else PLENTY)
        if tight.nvme_capacity_bytes is None:
            hardware = replace(hardware, drives=())
        plan, problem = optimised_adapters(workload, roomy, hardware)
    for tier, capacity in ((Tier.DEVICE, roomy.device_capacity_bytes), (Tier.HOST, roomy.host_capacity_bytes)):
        assert capacity is None or plan.predicted_bytes(tier) <= capacity
    same_cuts = (problem.workload.measured_chunk_tokens is None) == (ruled.activations is None)
    if same_cuts and (plan.head_tiles is None) == (ruled.head_tiles is None):
        seconds = rule_seconds(problem, ruled)
        assert plan.predicted["step_seconds"] <= seconds * (1 + GOOD_ENOUGH)
    return ruled, plan


@pytest.mark.parametrize("host", [False, True], ids=["one tier", "HOST"])
def test_the_least_memory_of_the_rule_serves_the_optimiser(
    host: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, streaming = asked(tmp_path, host=host, nvme=True, bits=4, num_layers=2)
    ruled, plan = compare(monkeypatch, workload, streaming, device=1.0, host=1.0)
    assert ruled.rings[0].num_slots == 1
    if host:
        assert plan.buffers.host_slots == 1, "more would have nothing to hold"


def test_attentions_backward_and_a_chunk_that_is_computed_again_are_not_charged_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's tiles are the larger of the two where, in the least memory, the rule has chunks of 256 tokens."""
    sizes: dict[str, Any] = {"num_layers": 2, "seq_len": 1024, "vocab_size": 64, "tie_word_embeddings": True}
    workload, streaming = asked(tmp_path, host=True, nvme=False, bits=4, **sizes)
    assert streaming.layer_bytes(256) == streaming.attention_bytes
    ruled, _ = compare(monkeypatch, workload, streaming, device=1.0, host=1.3)
    assert ruled.activations is not None


def test_where_a_quarter_of_the_slack_does_not_fit_as_little_is_granted_as_by_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, streaming = asked(tmp_path, host=False, nvme=True, bits=None, num_layers=2, seq_len=16)
    streaming = replace(streaming, allocator_slack_bytes=1 << 30)
    ruled, plan = compare(monkeypatch, workload, streaming, device=1.0, host=1.0)
    assert ruled.allocator_slack_bytes == attempts.TIGHT_SLACK_BYTES
    assert attempts.TIGHT_SLACK_BYTES <= plan.allocator_slack_bytes < (1 << 30) // SLACK_DIVISOR
    _, plan = compare(monkeypatch, workload, streaming, device=8.0, host=1.0)
    assert plan.allocator_slack_bytes >= (1 << 30) // SLACK_DIVISOR


@pytest.mark.full
@settings(
    max_examples=12, phases=[Phase.generate], suppress_health_check=SHARES_FIXTURES
)  # fmt: skip
@given(data=st.data())
def test_where_the_rule_fits_the_optimiser_does_and_is_no_slower(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = data.draw(st.booleans(), "host")
    workload, streaming = asked(
        tmp_path, host=host, nvme=not host or data.draw(st.booleans(), "nvme"),
        bits=data.draw(st.sampled_from([None, 4]), "bits"), num_layers=data.draw(st.integers(2, 5), "layers"),
        batch_size=data.draw(st.integers(1, 2), "batch"), seq_len=data.draw(st.sampled_from([16, 512, 1024]), "tokens"),
        vocab_size=data.draw(st.sampled_from([64, 4096]), "vocabulary"),
        tie_word_embeddings=data.draw(st.booleans(), "tied"),
    )  # fmt: skip
    slack = data.draw(st.sampled_from([1, 30]), "slack") * streaming.allocator_slack_bytes
    shares = st.sampled_from([1.0, 1.05, 1.3, 2.0])
    compare(
        monkeypatch, workload, replace(streaming, allocator_slack_bytes=slack), device=data.draw(shares, "device"),
        host=data.draw(shares, "host"),
    )  # fmt: skip


def test_where_the_optimiser_has_none_the_rules_plan_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(planning, "profile_layer", lambda *_, **__: SECONDS)
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    monkeypatch.setattr(planning, "updates_per_second", lambda *_: UPDATES_PER_SECOND)
    _, streaming = asked(tmp_path, host=True, nvme=True, bits=4, num_layers=2, seq_len=16)
    device = least_bytes(streaming, "device_capacity_bytes")
    given: dict[str, Any] = {"bits": 4, "batch_size": 1, "seq_len": 16, "nvme": tmp_path, "plan": "optimise"}
    with Engine(build_lora("llama", torch.bfloat16, 2), **given, emulate=machine(device, PLENTY)) as engine:
        assert engine.plan.planner == "fixed streaming rule"
        assert engine.report()["plan_choice"]["chosen"] == RULE
        assert "no plan of the optimiser's fits" in engine.report()["plan_choice"]["why"]
    assert "the fixed rule's runs" in caplog.text
    less = machine(device - 24 * PAGE, PLENTY)
    with Engine(build_lora("llama", torch.bfloat16, 2), **given, emulate=less) as engine:
        assert engine.plan.planner == "fixed streaming rule" and engine.plan.state is not None, "state in tiers"
    with pytest.raises(PlanInfeasible):
        Engine(build_lora("llama", torch.bfloat16, 2), **given, emulate=machine(device - 32 * PAGE, PLENTY))
