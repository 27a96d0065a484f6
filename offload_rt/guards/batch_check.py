"""Whether a call of the model is one that the engine was made for: no larger, and with outputs that can be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from offload_rt.config import EngineConfig
from offload_rt.errors import ConfigError, UnsupportedModule


def check_batch(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: EngineConfig, *, by_chunks: bool
) -> None:
    """Raises `ConfigError` for a batch that is larger than planned, `UnsupportedModule` for outputs that recomputing
    would take the gradient of, or that layers which run `by_chunks` of tokens do not have, and for a cache that layers
    would neither read nor fill.
    """
    configured = getattr(getattr(model, "config", None), "output_router_logits", False)
    if torch.is_grad_enabled() and kwargs.get("output_router_logits", configured):
        raise UnsupportedModule(
            "output_router_logits: the auxiliary loss would lose its gradient when layers are recomputed; set "
            "config.output_router_logits = False"
        )
    if torch.is_grad_enabled() and kwargs.get("past_key_values") is not None and _trains(model):
        raise UnsupportedModule(
            "past_key_values: where gradients are taken, layers are recomputed and fill no cache; generate under "
            "torch.no_grad()"
        )
    if by_chunks and kwargs.get("output_attentions"):
        raise UnsupportedModule("output_attentions: layers that run by chunks of tokens have no attention weights")
    candidates = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    tokens = next((value for value in candidates if value is not None), None)
    if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2:
        return
    rows, length = tokens.shape[0], tokens.shape[1]
    if length > config.seq_len:
        raise ConfigError(
            f"seq_len: a batch of {length} tokens a row came, the plan was made for {config.seq_len}; give "
            f"engine(seq_len={length}) or cut the rows"
        )
    if torch.is_grad_enabled() and rows * length > config.batch_size * config.seq_len:
        raise ConfigError(
            f"batch_size: a batch of {rows} x {length} tokens came, the plan was made for "
            f"{config.batch_size} x {config.seq_len}"
        )


def _trains(model: nn.Module) -> bool:
    return model.training or any(parameter.requires_grad for parameter in model.parameters())
