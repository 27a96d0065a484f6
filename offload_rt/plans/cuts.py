"""The cuts of a plan: what a run that goes on under other budgets has to keep, so that its bits are the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn

from offload_rt.dtypes import torch_dtype
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.plans.plan_options import chunk_tokens_of, policy_of
from offload_rt.quantized.nf4_products import Products, measured_products
from offload_rt.tensor_spec import Encoding
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import Workload
from planners.plans.plan import Plan
from planners.plans.products import products_from_json, shape_key
from planners.rule.streaming_problem import Cuts

logger = logging.getLogger("offload_rt")


def cuts_of(plan: Plan, workload: Workload) -> Cuts:
    """The cuts that `plan` has."""
    together = workload.config.accumulation_steps > 1 and draws_numbers(workload.model)
    return Cuts(
        head_chunk_tokens=plan.head_chunk_tokens, chunk_tokens=chunk_tokens_of(plan, workload),
        layer_major=plan.layer_major if together else None, packed_products=plan.packed_products,
        head_tile_rows=None if plan.head_tiles is None else plan.head_tiles.tile_rows,
    )  # fmt: skip


def same_cuts(plan: Plan, other: Plan, workload: Workload) -> bool:
    """Whether both give the same numbers, to the bit. Updates do, whenever and wherever the runtime makes them.

    More than `cuts_of` is held equal: each layer's chunks, of which that has the longest alone, and the order of
    micro-batches, whether numbers are drawn in it or not.
    """

    def cuts(of: Plan) -> tuple[Any, ...]:
        policies = {draft.name: policy_of(of, draft) for draft in workload.layers}
        ends = {
            name: tuple(span.end for span in policy.spans(workload.config.seq_len))
            for name, policy in policies.items()
            if policy is not None
        }
        chunked = {name: found for name, found in ends.items() if len(found) > 1}
        return cuts_of(of, workload), of.cuts, of.layer_major, chunked

    return cuts(plan) == cuts(other)


def check_cuts(plan: Plan, workload: Workload, wanted: Cuts | None) -> None:
    """Raises `ConfigError` where `plan` has others than those that are `wanted`; with None, none are."""
    found = cuts_of(plan, workload)
    if wanted is not None and found != wanted:
        raise ConfigError(
            f"plan: has other cuts ({found.describe()}) than the run that goes on ({wanted.describe()}), so that sums "
            f"would be taken in another order; give a plan with the same, or plan 'auto'"
        )


def with_products(options: RuntimeOptions, workload: Workload, given: Plan | None) -> RuntimeOptions:
    """`options` whose packed products are a table, or left to the plan: as a run that goes on has them, or measured.

    Measuring blocks for seconds a shape, once for a device. Raises `ConfigError` where nothing can be measured.
    """
    if given is None and options.cuts is not None:
        if options.packed_products == "measured" and not options.cuts.packed_products:
            raise ConfigError(
                "packed products: the run was begun without, and keeps its cuts unless --other-cuts says so"
            )
        return replace(options, packed_products=options.cuts.packed_products)
    if options.packed_products != "measured":
        return options
    device = torch.device(workload.config.device)
    if device.type == "cpu":
        raise ConfigError("packed products: on the CPU weights are decoded first; leave them out, or train on a GPU")
    shapes = packed_shapes(workload)
    tables = [measured_products(shapes[dtype], dtype, device) for dtype in shapes]
    return replace(options, packed_products={key: ranges for table in tables for key, ranges in table.items()})


def packed_shapes(workload: Workload) -> dict[torch.dtype, list[tuple[int, int]]]:
    """Of the NF4 weights of linears in layers: rows and columns, by the dtype that they compute in."""
    found: dict[torch.dtype, list[tuple[int, int]]] = {}
    for draft in workload.layers:
        for spec in draft.spec.tensors:
            if spec.encoding is Encoding.NF4 and len(spec.shape) == 2:
                found.setdefault(torch_dtype(spec.dtype), []).append((spec.shape[0], spec.shape[1]))
    return found


def products_of(plan: Plan, workload: Workload, options: RuntimeOptions) -> Products:
    """The ways of the plan's packed products. Raises `ConfigError` where they cannot be taken as it says."""
    table = plan.packed_products
    shapes = {shape_key(*shape): dtype for dtype, of_dtype in packed_shapes(workload).items() for shape in of_dtype}
    if odd := sorted(table.keys() - shapes.keys()):
        raise ConfigError(f"plan: packed_products: no layer has a linear in 4 bits of {odd[0]} ({len(odd)} are odd)")
    if table and plan.activations:
        raise ConfigError("plan: packed_products are for layers that run whole, and its activations are by chunks")
    return Products(table, shapes, torch.device(workload.config.device), options.product_ways)


def cuts_from_json(data: Mapping[str, Any], *, of: str) -> Cuts:
    """What `asdict` made of cuts. Raises `CheckpointError`, which names `of`, for anything else."""
    data = {"packed_products": {}, "head_tile_rows": None, **data}  # runs from before there were any
    names = {field.name for field in fields(Cuts)}
    if set(data) != names:
        raise CheckpointError(f"{of}: cuts have {', '.join(sorted(names))}, found {', '.join(sorted(data))}")
    try:
        return Cuts(**{**data, "packed_products": products_from_json(data["packed_products"])})
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{of}: {error}") from error


def cuts_to_json(cuts: Cuts) -> dict[str, Any]:
    """For `cuts_from_json`; equal to what that JSON is read as."""
    packed = {key: [list(pair) for pair in pairs] for key, pairs in cuts.packed_products.items()}
    return {**asdict(cuts), "packed_products": packed}


def warn_of_other_cuts(saved: Mapping[str, Any] | None, found: Cuts, *, of: str) -> None:
    """Says where what is loaded from `of` was made with other cuts than `found`; None as `saved` says nothing of them.

    Raises `CheckpointError` for what are no cuts.
    """
    if saved is None or (before := cuts_from_json(saved, of=of)) == found:
        return
    logger.warning(
        "%s: was made with other cuts (%s) than this plan has (%s), so that sums are taken in another order from here "
        "on, and results are no longer that run's to the bit; for its bits, give plan= the plan that it ran with",
        of, before.describe(), found.describe(),
    )  # fmt: skip


def draws_numbers(model: nn.Module) -> bool:
    """Whether a forward in training draws random numbers, as far as its modules' own values tell (dropout, jitter)."""
    return any(
        isinstance(value, float) and value > 0.0
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name or "jitter" in name or (name == "p" and "Dropout" in type(module).__name__)
    )
