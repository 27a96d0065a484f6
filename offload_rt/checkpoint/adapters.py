"""peft's part: putting adapters on a model, and writing them so that plain peft reads them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from offload_rt.checkpoint.first_values import weights_as_nan
from offload_rt.checkpoint.materialise import begins_plainly
from offload_rt.checkpoint.saved_adapter import (
    ADAPTER_WEIGHTS,
    adapter_kind,
    fill,
    put_on,
    read_config,
    warn_of_another_base,
    without_peft_warning,
)
from offload_rt.checkpoint.whole_folder import replaced_whole
from offload_rt.errors import (
    CheckpointVerifyError,
    ConfigError,
    TargetNotMatched,
    UnsupportedModule,
    storage_error,
)
from offload_rt.storage.durable import sync_folder

_CARD = "README.md"
_MARGIN_BYTES = 1 << 20
"""Headers, configuration, card."""


def add_adapters(model: nn.Module, adapters: Any, base: Path | None = None) -> nn.Module:
    """New adapters by `peft.get_peft_model`, or those in a folder, with typed errors. The base model is frozen by it.

    `adapters` is a peft configuration, or a folder that peft saved; `base` the base model's checkpoint, if its weights
    are not in memory. Raises `ConfigError`, `CheckpointError`, `UnsupportedModule`, and leaves what it has put on the
    model to the caller (`checkpoint.original`).
    """
    try:
        import peft
    except ImportError:
        raise ConfigError("adapters: needs peft; install offload-rt[hf]") from None
    is_saved = isinstance(adapters, (str, Path))
    if not is_saved and not isinstance(adapters, peft.PeftConfig):
        raise ConfigError(
            f"adapters: expected a peft configuration such as LoraConfig, or a folder that peft saved, got "
            f"{type(adapters).__name__}"
        )
    if hasattr(model, "peft_config"):
        raise ConfigError("adapters: the model has adapters already; give one of the two")
    return _saved_adapter(model, Path(adapters), base) if is_saved else _new_adapter(model, adapters)


def _saved_adapter(model: nn.Module, folder: Path, base: Path | None) -> nn.Module:
    kind = adapter_kind(folder)
    config = read_config(folder)
    if config.is_prompt_learning:
        raise UnsupportedModule(f"{folder}: {kind} cannot go on training, in peft neither")
    try:
        tuned = put_on(model, config)
    except ValueError as error:
        raise TargetNotMatched(f"adapters: {folder} does not fit the model: {error}") from error
    fill(tuned, folder, base)
    warn_of_another_base(config, model, base)
    return tuned


def _new_adapter(model: nn.Module, config: Any) -> nn.Module:
    import peft

    is_on_meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        with without_peft_warning():
            if not is_on_meta or begins_plainly(config):
                return peft.get_peft_model(model, config)  # type: ignore[no-any-return]
            with weights_as_nan(model, config) as made:
                made.append(peft.get_peft_model(model, config))
            return made[0]
    except ValueError as error:
        targets = getattr(config, "target_modules", None)
        if "arget" in str(error):
            raise TargetNotMatched(
                f"adapters: target_modules={targets!r} matches nothing in the model: {error}"
            ) from None
        raise
    except RuntimeError as error:  # a way to begin that decomposes weights, such as PiSSA's, where there are none yet
        if is_on_meta:
            begun = getattr(config, "init_lora_weights", None)
            what = config.peft_type.value if begun is None else f"init_lora_weights={begun!r}"
            raise ConfigError(
                f"adapters: {what} cannot begin without the base model's weights, and the model is on the meta device "
                f"({error}); put them on a model in memory, or begin another way"
            ) from error
        raise


Values = Mapping[str, torch.Tensor]
"""By name."""


def save_adapters(model: Any, folder: Path, at_rest: Callable[[Mapping[str, nn.Parameter]], Values]) -> None:
    """peft's own files, read back: every tensor there, equal. What `folder` held of an adapter is whole until then, and
    other files stay. A folder that cannot be replaced (it holds folders, is a mount or the current one, or its parent
    is not ours to change) has its files replaced one by one.

    All adapters of the model are saved where peft puts them: "default" in `folder`, others in folders by their names.
    Of the weights of embedding and head themselves those that train; frozen ones are the base model's. `at_rest` reads
    what of adapters does not train, and is absent as weights of the base model are.
    """
    import peft

    weights = _edge_weights(model)
    frozen = {id(weight) for weight in weights if not weight.requires_grad}
    entries = model.state_dict(keep_vars=True)
    absent = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in entries}
    values = {
        name: getattr(entry, "data", entry) for name, entry in (entries | absent).items() if id(entry) not in frozen
    }
    what: dict[str, Any] = {
        # "auto" would look the base model up on a hub, and True takes both, with what an adapter on them stands on.
        "save_embedding_layers": len(frozen) < len(weights),
        "state_dict": values,
    }
    taken = {
        id(value)
        for name in model.peft_config
        for value in peft.get_peft_model_state_dict(model, adapter_name=name, **what).values()
    }
    values |= at_rest({name: p for name, p in absent.items() if name in values and id(values[name]) in taken})
    expected = {
        Path() if name == "default" else Path(name): peft.get_peft_model_state_dict(model, adapter_name=name, **what)
        for name in model.peft_config
    }
    tensors = [tensor for adapter in expected.values() for tensor in adapter.values()]
    need = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _MARGIN_BYTES
    with replaced_whole(folder, need, what="the adapter", one_by_one=True) as partial:
        if (folder / _CARD).is_file():  # peft adds to it
            shutil.copy2(folder / _CARD, partial / _CARD)
        try:
            model.save_pretrained(partial, **what)
        except (OSError, SafetensorError) as error:
            code = error.errno if isinstance(error, OSError) else None
            if code is None and "No space left" in str(error):
                code = errno.ENOSPC
            raise storage_error(f"the adapter could not be written: {error}", path=str(folder), errno=code) from None
        for place, adapter in expected.items():
            _verify(partial / place / ADAPTER_WEIGHTS, folder / place / ADAPTER_WEIGHTS, adapter)
        for path in partial.rglob("*"):
            if path.is_dir():
                sync_folder(path)
                continue
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _verify(path: Path, shown: Path, expected: Values) -> None:
    """Raises `CheckpointVerifyError`, which calls it `shown`, where `path` does not hold `expected`."""
    if not path.exists():
        raise CheckpointVerifyError(f"{shown}: peft wrote no such file")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if names != set(expected):
            odd = sorted(names ^ set(expected))
            raise CheckpointVerifyError(
                f"{shown}: {len(names)} tensors, expected {len(expected)}; first odd one: {odd[0]}"
            )
        for name, tensor in expected.items():
            if not torch.equal(file.get_tensor(name), tensor.detach().cpu()):
                raise CheckpointVerifyError(f"{shown}: {name} does not read back as it was written")


def _edge_weights(model: Any) -> list[nn.Parameter]:
    """Of embedding and head, without those of adapters on them; a tied one counts once."""
    found: dict[int, nn.Parameter] = {}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        edge = None
        with contextlib.suppress(NotImplementedError):  # transformers' word for a model that has none
            edge = getattr(model, get, lambda: None)()
        inner = getattr(edge, "base_layer", getattr(edge, "original_module", edge))
        if isinstance(inner, nn.Module):
            found |= {id(weight): weight for weight in inner.parameters(recurse=False)}
    return list(found.values())
