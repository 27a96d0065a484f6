"""A causal language model cut where its backbone ends: who calls the backbone, and where its hidden states come from.

Nothing of the model is known here but how transformers builds such models: a module with a backbone under the name that
its class gives, whose output has a `last_hidden_state`, and a head behind it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from offload_rt.layers.access import put_forward_back
from offload_rt.layers.turns import shown


def find_causal_model(model: nn.Module) -> nn.Module | None:
    """The module inside `model` whose forward is backbone, head and transformers' causal loss; None where none is."""
    for module in model.modules():
        backbone = getattr(type(module), "base_model_prefix", "")
        if (
            isinstance(backbone, str)
            and isinstance(module._modules.get(backbone), nn.Module)
            and "labels" in inspect.signature(module.forward).parameters
            and getattr(getattr(module, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
        ):
            return module
    return None


class Backbone:
    """The backbone of a model that `find_causal_model` gave."""

    def __init__(self, causal: nn.Module) -> None:
        self.causal = causal
        self.norm: nn.Module | None = None
        """The module whose output the hidden states are, once a call of the backbone has shown it."""
        self._name = str(getattr(type(causal), "base_model_prefix", ""))

    @contextlib.contextmanager
    def replaced(self, run: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
        """Inside, the model's calls of its backbone, or of the decoder in it, go to `run`."""
        backbone = self.causal.get_submodule(self._name)
        places = [(self.causal, self._name)]
        if isinstance(getattr(backbone, "decoder", None), nn.Module):
            places.append((backbone, "decoder"))
        real = [(owner, name, owner.get_submodule(name)) for owner, name in places]

        def put() -> None:
            for owner, name, module in reversed(real):
                owner._modules[name] = _StandIn(module, run)

        def take_away() -> None:
            for owner, name, module in real:
                owner._modules[name] = module

        with shown(put, take_away):
            yield

    @contextlib.contextmanager
    def without_norm(self, backbone: nn.Module) -> Iterator[FinalNorm]:
        """Finds the module that the hidden states come from, at the first call; leaves it out at later ones. What is
        given knows it inside alone.
        """
        final = FinalNorm(self.norm)
        if self.norm is not None:
            norm: Any = self.norm
            forward, had_own = norm.forward, "forward" in norm.__dict__
            with shown(
                lambda: setattr(norm, "forward", lambda hidden: hidden),
                lambda: put_forward_back(norm, forward, had_own=had_own),
            ):
                yield final
            return
        weights = [(module, module._parameters.get("weight")) for module in backbone.modules()]
        norms = [module for module, weight in weights if isinstance(weight, torch.Tensor) and weight.dim() == 1]
        handles = [norm.register_forward_hook(final.saw) for norm in norms]
        try:
            yield final
        finally:
            for handle in handles:
                handle.remove()
            final.forget()

    def trainable_behind(self) -> list[nn.Parameter]:
        """What trains behind the backbone, its final norm included where that is known."""
        backbone = self.causal.get_submodule(self._name)
        behind = [child for child in self.causal.children() if child is not backbone]
        if self.norm is not None:
            behind.append(self.norm)
        own = list(self.causal.parameters(recurse=False))
        found = {id(p): p for p in own + [p for module in behind for p in module.parameters()] if p.requires_grad}
        return list(found.values())


class FinalNorm:
    """Sees which module gave the last hidden states, and what went into it."""

    def __init__(self, left_out: nn.Module | None) -> None:
        self._left_out = left_out
        self._seen: tuple[nn.Module, torch.Tensor, torch.Tensor] | None = None

    def saw(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            self._seen = (module, args[0], output)

    def forget(self) -> None:
        """Holds no tensor any more: who has kept the hooks, as layers do for a recompute, keeps this until then."""
        self._seen = None

    def before(self, last: torch.Tensor) -> tuple[torch.Tensor, nn.Module | None]:
        """The hidden states before the norm and that norm; `last` and None if they come from elsewhere."""
        if self._left_out is not None:
            return last, self._left_out
        if self._seen is not None:
            module, hidden, output = self._seen
            if output.data_ptr() == last.data_ptr() and output.numel() == last.numel() == hidden.numel():
                return hidden, module
        return last, None


class _StandIn(nn.Module):
    """Stands where the backbone stood; looks like it to code that only looks."""

    def __init__(self, real: nn.Module, run: Callable[[nn.Module, Any, Any], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_real", real)  # not a submodule
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._real, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_real"), name)


def with_hidden(outputs: Any, hidden: torch.Tensor) -> Any:
    """The backbone's output with other hidden states."""
    return type(outputs)(**{**outputs, "last_hidden_state": hidden})
