"""Shapes of a model that only transformers knows: built on the meta device, where parameters have no bytes.

The one place where this package uses torch, and only if it is there. No code of a repository is run.
"""

from __future__ import annotations

from typing import Any


class NotThere(Exception):
    """Torch or transformers is missing, or transformers does not know the model; the message says which."""


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the causal model that `config` describes; shared ones once. Takes seconds.

    Raises `NotThere`.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise NotThere(f"{error.name or 'transformers'} is not installed") from error
    settings = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    try:
        made = AutoConfig.for_model(config["model_type"], **settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made)
    except Exception as error:  # whatever a model's constructor raises for a configuration that it does not like
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise NotThere(f"transformers cannot build it ({reason})") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
