"""Refuses to copy a model that an engine manages, and to load weights into it that the engine keeps elsewhere.

A copy would have placeholders where weights rest, and the engine's hooks. What is loaded would not reach the store, or
the masters that weights are rounded from: the next step would undo it. All else is loaded as ever: adapters, what stays
in memory, and weights that are what they are already.

A placeholder is in no state_dict, and no model that has one is saved as if it were whole: better missing than NaN. So
it is after the engine's end, too, and nobody copies the model, for as long as the weight is absent: torch would make
each placeholder a tensor of the weight's size, full of NaN.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload_rt.errors import ConfigError, OffloadError
from offload_rt.guards.conversions import Guard
from offload_rt.layers.discover import of_adapters


class CopyGuard(Guard):
    """Stands before copies of some modules, and of all within them, and before what loads and saves weights, until
    `remove`. kept: the ids of parameters that the engine keeps elsewhere.
    """

    def __init__(self, *modules: nn.Module, kept: frozenset[int]) -> None:
        super().__init__()
        self._models: list[nn.Module] = []
        self._hooks: list[tuple[nn.Module, RemovableHandle]] = []
        for module in {inner for outer in modules for inner in outer.modules()}:
            if isinstance(left := vars(module).get("forward"), _WithoutWeights):  # by an engine before
                left.undo()
            if module in modules or hasattr(type(module), "get_input_embeddings"):
                self._models.append(module)
            if isinstance(vars(module).get("__reduce_ex__"), _Copying):
                del vars(module)["__reduce_ex__"]
            self.guard(module, "__reduce_ex__", _Copying(module))
            self.guard(module, "load_state_dict", _loading(module, kept))
            if hasattr(type(module), "save_pretrained"):
                saving = _SavingAdapters if _is_peft(module) else _Saving
                self.guard(module, "save_pretrained", saving(module, module.save_pretrained))  # type: ignore[arg-type]
            if _leave_out_absent not in module._state_dict_hooks.values():  # an engine before may have left it
                hook = module.register_state_dict_post_hook(_leave_out_absent)  # type: ignore[no-untyped-call]
                self._hooks.append((module, hook))

    def remove(self) -> None:
        """As `Guard.remove`; but what keeps placeholders from being saved, or computed with, stays where there are
        some.
        """
        for _, _, function, _ in self._guarded:
            if isinstance(function, _Copying):
                function.is_managed = False
        stays, lacking = (_Copying, _Saving, _SavingAdapters), _Lacking()
        self._guarded = [each for each in self._guarded if not (isinstance(each[2], stays) and lacking[each[0]])]
        super().remove()
        while self._hooks:
            module, hook = self._hooks.pop()
            if not any(map(_is_absent, module.parameters(recurse=False))):
                hook.remove()
        for module in self._models:
            if lacking[module] and not isinstance(vars(module).get("forward"), _WithoutWeights):
                vars(module)["forward"] = _WithoutWeights(module, module.forward, vars(module).get("forward"))


def check_has_values(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises `ConfigError` where a model's own values are to be taken, and an engine before has left none."""
    absent = [name for name, parameter in parameters.items() if _is_absent(parameter)]
    if absent:
        raise ConfigError(
            f"model: {len(absent)} weights are not in memory (first: {absent[0]}); an engine that was closed had them "
            f"at rest. Make the model again, or give checkpoint="
        )


def _is_peft(module: nn.Module) -> bool:
    """Whether it is peft's own, which writes adapters alone."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def _is_absent(tensor: torch.Tensor) -> bool:
    """Whether it is a placeholder: of one element, whatever its shape. See `block.placeholder`."""
    if tensor.is_meta or not tensor.numel():
        return False
    return not any(tensor.stride()) if tensor.numel() > 1 else bool(tensor.isnan())


def _absent(module: nn.Module) -> list[str]:
    """Names of the parameters that are placeholders."""
    return [name for name, parameter in module.named_parameters() if _is_absent(parameter)]


class _Lacking(dict[nn.Module, bool]):
    """Whether a module has placeholders, in itself or within. Each is looked at once, however many have it inside."""

    def __missing__(self, module: nn.Module) -> bool:
        own = any(map(_is_absent, module.parameters(recurse=False)))
        self[module] = found = own or any(self[child] for child in module.children())
        return found


def _leave_out_absent(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state_dict has no entry for a weight that is at rest. Adapters are all there."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if _is_absent(parameter):
            state.pop(prefix + name, None)


class _Copying:
    """A module's `__reduce_ex__`, by which it is copied and pickled, unless weights would be missing. Where none are
    any more it goes, so that no copy has it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.is_managed = True

    def __call__(self, *protocol: Any) -> Any:
        kind = type(self.module).__name__
        if self.is_managed:
            raise ConfigError(
                f"copy: a {kind} that an engine manages cannot be copied or pickled, as weights of its model are not "
                f"in memory. Copy it before engine(...), or save what trains (engine.save_pretrained, "
                f"engine.save_checkpoint)"
            )
        if absent := _absent(self.module):
            raise ConfigError(
                f"copy: the engine that managed this {kind} is closed, and {len(absent)} of its weights are not in "
                f"memory (first: {absent[0]}): a copy would have NaN in their place. Copy it before engine(...), or "
                f"when it has got its weights back (load_state_dict with assign=True)"
            )
        if vars(self.module).get("__reduce_ex__") is self:
            del vars(self.module)["__reduce_ex__"]
        return self.module.__reduce_ex__(*protocol)


def _loading(module: nn.Module, kept: frozenset[int]) -> Callable[..., Any]:
    load = module.load_state_dict

    def loading(state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        ours = {name: p for name, p in module.named_parameters(remove_duplicate=False) if id(p) in kept}
        changed = [name for name, p in ours.items() if name in state_dict and not _is_same(p, state_dict[name])]
        if changed:
            raise ConfigError(
                f"load_state_dict: {len(changed)} weights that an engine keeps elsewhere would not change (first: "
                f"{changed[0]}); load before engine(...), or give checkpoint=. Parameters that train beside frozen "
                f"layers can be loaded by themselves (strict=False)"
            )
        if assign:
            raise ConfigError("load_state_dict: assign=True would put others in place of parameters that are trained")
        rest = OrderedDict((name, value) for name, value in state_dict.items() if name not in ours)
        vars(rest).update(getattr(state_dict, "__dict__", {}))  # torch's metadata
        found = load(rest, strict=False)
        missing = [name for name in found.missing_keys if name not in ours]
        if strict and (missing or found.unexpected_keys):
            raise ConfigError(
                f"load_state_dict: {len(missing)} entries are missing, {len(found.unexpected_keys)} are not the "
                f"model's, first: {[*missing, *found.unexpected_keys][0]}; all others were loaded"
            )
        return type(found)(missing, found.unexpected_keys)

    return loading


def _is_same(parameter: nn.Parameter, value: Any) -> bool:
    known = isinstance(value, torch.Tensor) and not _is_absent(parameter) and parameter.shape == value.shape
    return known and torch.equal(parameter.detach(), value.detach().to(parameter.device, parameter.dtype))


@dataclass(frozen=True)
class _WithoutWeights:
    """Stands before `forward` of a model whose engine is closed: placeholders would answer, with NaN."""

    module: nn.Module
    forward: Callable[..., Any]
    own: Callable[..., Any] | None
    """What the module itself had in place of its class's."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        absent = _absent(self.module)
        if absent:
            raise OffloadError(
                f"forward: the engine that managed this model is closed, and {len(absent)} of its weights are not in "
                f"memory (first: {absent[0]}). Call it before close(), or make an engine again with checkpoint="
            )
        return self.forward(*arguments, **options)

    def undo(self) -> None:
        if self.own is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.own


@dataclass(frozen=True)
class _Saving:
    """A module's `save_pretrained`, unless weights would be missing. No closure: a copy of the module, made when its
    engine is closed, saves itself.
    """

    module: nn.Module
    save: Callable[..., Any]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        absent = _absent(self.module)
        if absent and not getattr(self.module, "_hf_peft_config_loaded", False):  # then it writes adapters alone
            num_all = sum(1 for _ in self.module.parameters())
            raise ConfigError(
                f"save_pretrained: {len(absent)} of {num_all} weights are not in memory (first: {absent[0]}), and "
                f"would be missing in the file; engine.save_pretrained(folder), before close(), writes all of them"
            )
        return self.save(*arguments, **options)


@dataclass(frozen=True)
class _SavingAdapters:
    """peft's `save_pretrained`, unless parts of adapters would be missing: those that do not train, and are at rest."""

    module: Any
    save: Callable[..., Any]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        ours, given = of_adapters(self.module), options.get("state_dict") or {}
        chosen = options.get("selected_adapters") or self.module.peft_config
        missing = [
            name
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
            if id(parameter) in ours and _is_absent(parameter) and not set(chosen).isdisjoint(name.split("."))
            if name not in given
        ]  # fmt: skip
        if missing:
            raise ConfigError(
                f"save_pretrained: {len(missing)} tensors of adapters do not train and are at rest (first: "
                f"{missing[0]}); the files would be without them. Use engine.save_pretrained, or choose those that "
                f"train by selected_adapters="
            )
        return self.save(*arguments, **options)
