"""A plan for readers: a page for the terminal, a self-contained HTML page, a trace for Perfetto."""

from __future__ import annotations

import html
from collections.abc import Sequence

from planners.errors import format_bytes
from planners.optimiser.explain import Advice, binding
from planners.perfetto import ROWS, Slice, chrome_trace
from planners.plans.placement import Tier
from planners.plans.plan import Plan
from planners.problems.problem import Problem
from planners.simulator.simulate import Simulation
from planners.simulator.static_memory import capacities
from planners.simulator.timeline import RESOURCES
from planners.units import seconds

BAR = 40


def bar(parts: Sequence[float], whole: float) -> str:
    """`parts` of `whole` as a bar."""
    text = ""
    for part, mark in zip(parts, "█▓▒", strict=False):
        text += mark * round(BAR * part / whole if whole else 0)
    return (text + "·" * BAR)[:BAR]


def headline(problem: Problem) -> str:
    """What is asked, in one line; needs no plan."""
    workload, hardware = problem.workload, problem.hardware
    have = capacities(problem)
    tiers = ", ".join(f"{format_bytes(size)} {tier}" for tier, size in have.items() if size)
    what = "full fine-tuning" if workload.mutable else "adapters"
    size = f"{workload.batch_size} x {workload.seq_len} tokens a step"
    if workload.micro_batches > 1:
        size = f"{workload.micro_batches} micro-batches of {size}"
    return f"{workload.name}, {what}, {size}, on {hardware.name}: {tiers}"


def page(problem: Problem, plan: Plan, advice: Sequence[Advice] = ()) -> str:
    """The page that `offload-rt plan` prints."""
    p = plan.predicted
    step = p["step_seconds"]
    lines = [
        f"step {seconds(step)}   {p['tokens_per_second']:.4g} tokens/s   {p['flops_per_second'] / 1e12:.4g} TFLOP/s",
    ]
    if p["lower_bound_seconds"] is not None:
        lines.append(f"lower bound {seconds(p['lower_bound_seconds'])}, gap {p['gap']:.1%}   ({plan.planner})")
    else:
        lines.append(f"no lower bound   ({plan.planner})")
    lines += [f"what binds: {binding(problem, plan)}", "", "memory at its peak"]
    for tier, capacity in capacities(problem).items():
        need = p["peak_bytes"][tier]
        if capacity:
            lines.append(f"  {tier:<7}{bar([need], capacity)} {format_bytes(need):>10} of {format_bytes(capacity)}")
            items = sorted(plan.peak_bytes.get(tier, {}).items(), key=lambda item: -item[1])
            lines += [f"      {format_bytes(size):>10}  {name}" for name, size in items[:4] if size]
    lines += ["", "where things rest                (█ device  ▓ host  ▒ NVMe)"]
    for name, shares in rest_shares(problem, plan):
        lines.append(f"  {name:<22} {bar(shares, sum(shares))}")
    lines += ["", "busy in a step"]
    for resource, busy in p["busy_seconds"].items():
        lines.append(f"  {ROWS[resource]:<16} {bar([busy], step)} {seconds(busy):>10}  {busy / step:.0%}")
    lines += ["", f"how: {choices(plan)}"]
    if p["expected_redo_seconds"]:
        lines.append(
            f"a step that must be clipped is done again: {seconds(p['expected_redo_seconds'])} a step on average"
        )
    written = p["ssd_bytes_written_per_step"]
    wear = f"{format_bytes(written)} written to the drives a step"
    if p["days_to_endurance"] is not None:
        wear += f"; rated endurance after {p['days_to_endurance']:.3g} days of training"
    lines.append(wear)
    if (spared := p.get("spared_drives")) is not None:
        lines.append(
            f"without the limit of {format_bytes(spared['limit_bytes'])} a step, for the drives' sake (--max-written): "
            f"step {seconds(spared['step_seconds_without'])}, "
            f"{format_bytes(spared['ssd_bytes_written_without'])} written, "
            f"rated endurance after {spared['days_to_endurance_without']:.3g} days"
        )
    phases = p["phase_peak_bytes"]
    lines += ["", "peak by phase   " + "".join(f"{phase:>11}" for phase in phases["device"])]
    for tier, sizes in phases.items():
        if capacities(problem)[tier]:
            lines.append(f"  {tier:<14}" + "".join(f"{format_bytes(size):>11}" for size in sizes.values()))
    if advice:
        lines += ["", "what would help (each planned again)"]
        lines += [
            f"  {a.change:<34} step {seconds(a.step_seconds):>8}, {a.gain:+.0%} tokens/s, writes "
            f"{format_bytes(a.ssd_bytes_written_per_step)}"
            for a in advice
        ]
    return "\n".join(lines) + "\n"


def rest_shares(problem: Problem, plan: Plan) -> list[tuple[str, list[float]]]:
    """Bytes by tier of weights, optimizer state and swapped activations."""
    workload = problem.workload
    weights, states, saved = [0.0] * 3, [0.0] * 3, [0.0] * 3
    again = everything = 0.0
    for entry, placed in zip(workload.classes, plan.classes, strict=True):
        split = placed.weights
        for i, size in enumerate((split.device_bytes, split.host_bytes, split.nvme_bytes)):
            weights[i] += entry.count * size
        for update in placed.updates:
            states[list(Tier).index(update.tier)] += entry.count * update.params * workload.state_bytes_per_param
        for tensor, tokens in zip(entry.saved, placed.tokens, strict=True):
            each = entry.count * tensor.bytes_per_token * workload.pass_rows
            for i, count in enumerate((tokens.device_tokens, tokens.host_tokens, tokens.nvme_tokens)):
                saved[i] += each * count
            again += each * tokens.recompute_tokens
            everything += each * workload.seq_len
    redone = again / everything if everything else 0.0
    shares = [(f"weights {format_bytes(sum(weights))}", weights)]
    if sum(states):
        shares.append((f"state {format_bytes(sum(states))}", states))
    shares.append((f"activations {format_bytes(sum(saved))}", saved))
    shares.append((f"({redone:.0%} recomputed)", [0.0, 0.0, 0.0]))
    return shares


def choices(plan: Plan) -> str:
    """The discrete choices in one line."""
    cuts = plan.cuts
    slots = next((ring.num_slots for ring in plan.rings if ring.name == "layers"), 0)
    parts = [f"updates {plan.update_mode.value}", f"{slots} ring slots" if slots else "all layers resident"]
    if cuts is not None:
        parts.append(f"chunks of {cuts.chunk_tokens} tokens")
        if cuts.attention_groups > 1:
            parts.append(f"attention in {cuts.attention_groups} groups of heads")
    if plan.layer_major:
        parts.append("micro-batches through each layer together")
    parts.append(f"decodes a {plan.decode_scope.value} at a time")
    if plan.lookups is not None:
        parts.append(f"{' and '.join(plan.lookups.blocks)} by rows from {plan.lookups.rest.name}")
    if (tiles := plan.head_tiles) is not None:
        parts.append(f"{tiles.block} by tiles of {tiles.tile_rows} rows from {tiles.rest.name}")
    if plan.boundary is Tier.HOST:
        parts.append("activations between layers in HOST")
    return ", ".join(parts)


def trace(simulation: Simulation) -> str:
    """The planned step in Chrome's trace format, which Perfetto reads; one row for each resource."""
    slices = [
        Slice(
            event.resource.name.lower(), f"{kind} {position}", kind, event.start_seconds, event.finish_seconds,
            {"block": position, "part": part},
        )
        for event in simulation.events
        if event.resource in RESOURCES
        for kind, position, part in [event.label]
    ]  # fmt: skip
    memory = {f"{tier} memory": points for tier, points in simulation.memory.items()}
    return chrome_trace("planned step", 1, ROWS, slices, memory)


_COLOURS = {
    "forward": "#4878a8", "backward": "#2a4f7a", "update": "#b5763a", "fetch": "#5a9367", "read": "#5a9367",
    "read rows": "#5a9367", "read tiles": "#5a9367",
    "load": "#8ab17d", "swap": "#c9a227", "save": "#c9a227", "read state": "#d08c60", "write state": "#a44a3f",
    "write back": "#a44a3f", "arrive": "#b5763a",
}  # fmt: skip
WIDTH, LANE = 1200, 26


def html_page(problem: Problem, plan: Plan, simulation: Simulation, advice: Sequence[Advice] = ()) -> str:
    """One page that needs nothing else: the text, the timeline of a steady step, memory over time, what would help."""
    span = simulation.step_seconds
    rows = []
    for lane, resource in enumerate(RESOURCES):
        y = lane * LANE
        rows.append(f'<text x="0" y="{y + 17}">{ROWS[resource.name.lower()]}</text>')
        for event in simulation.events:
            if event.resource is not resource or event.finish_seconds < 0:
                continue
            x = 130 + (WIDTH - 130) * max(0.0, event.start_seconds) / span
            wide = (WIDTH - 130) * (event.finish_seconds - max(0.0, event.start_seconds)) / span
            if wide < 0.05:
                continue
            kind, position, part = event.label
            title = html.escape(
                f"{kind}, block {position}, part {part}: {seconds(event.finish_seconds - event.start_seconds)}"
            )
            rows.append(
                f'<rect x="{x:.2f}" y="{y + 3}" width="{wide:.2f}" height="{LANE - 6}" '
                f'fill="{_COLOURS.get(kind, "#777")}"><title>{title}</title></rect>'
            )
    plots = "".join(
        f"<h3>{tier}</h3>{_plot(points, span, capacities(problem)[tier])}"
        for tier, points in simulation.memory.items()
        if capacities(problem)[tier] and points
    )
    table = "".join(
        f"<tr><td>{html.escape(a.change)}</td><td>{seconds(a.step_seconds)}</td><td>{a.gain:+.0%}</td></tr>"
        for a in advice
    )
    what_if = f"<h2>What would help</h2><table><tr><th>change<th>step<th>tokens/s</tr>{table}</table>" if advice else ""
    return (
        "<!doctype html><meta charset=utf-8><title>offload-rt plan</title><style>body{font:14px sans-serif;margin:2em}"
        "pre{font:13px monospace}svg text{font:12px sans-serif}td,th{padding:2px 1em;text-align:left}</style>"
        f"<h1>{html.escape(headline(problem))}</h1><pre>{html.escape(page(problem, plan))}</pre>"
        f"<h2>A steady step, {seconds(span)} (simulated)</h2>"
        f'<svg width="{WIDTH}" height="{LANE * len(RESOURCES)}">{"".join(rows)}</svg>'
        f"<h2>Memory over a step</h2>{plots}{what_if}\n"
    )


def _plot(points: Sequence[tuple[float, float]], span: float, capacity: int) -> str:
    """Bytes over time as steps, with the capacity as a line."""
    tall = 120
    top = max(capacity, max(size for _, size in points))
    path: list[str] = []
    for at, size in points:
        if 0 <= at <= span:
            path.append(f"{'L' if path else 'M'}{130 + (WIDTH - 130) * at / span:.1f} {tall - tall * size / top:.1f}")
    line = tall - tall * capacity / top
    return (
        f'<svg width="{WIDTH}" height="{tall + 4}"><path d="{" ".join(path)}" fill="none" stroke="#2a4f7a"/>'
        f'<line x1="130" x2="{WIDTH}" y1="{line + 1:.1f}" y2="{line + 1:.1f}" stroke="#a44a3f"/>'
        f'<text x="0" y="14">{format_bytes(capacity)}</text></svg>'
    )
