"""An adapter merged into its base model without either's weights in memory: safetensors in, safetensors out.

    python -m offload_rt.checkpoint.merge BASE ADAPTER OUT

What it is: peft's `merge_and_unload`, and transformers' `save_pretrained` of what that gives, to the bit, a module at a
time. The model is made on the meta device, peft puts the adapter on it, and each module that is tuned gets its base
weights for as long as peft's own code merges and they are written. So whatever peft merges is merged: LoRA, rsLoRA,
DoRA, stacks of experts, modules that were trained in full. What it is not: a conversion. Each weight keeps
the dtype that it has in the base model's files; a base in 4 bits is refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload_rt.checkpoint.base_names import base_module, model_tensors
from offload_rt.checkpoint.export import MAX_SHARD_BYTES, save_model
from offload_rt.checkpoint.mapping import map_checkpoint
from offload_rt.checkpoint.materialise import make_absent, make_real
from offload_rt.checkpoint.safetensors_reader import Checkpoint, open_checkpoint
from offload_rt.checkpoint.saved_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_base_is_kept, matched
from offload_rt.checkpoint.sources import EntrySource, TensorSource, materialise
from offload_rt.checkpoint.tensor_groups import TensorGroup, saved_tensors
from offload_rt.config import parse_bytes
from offload_rt.errors import CheckpointError, ConfigError, OffloadError, UnsupportedModule

NOT_COPIED = (
    "README.md",
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
)
"""How names of weights end, and of a card that is the base model's; what else lies beside it is copied."""
QUANTIZATION = "quantization_config"
EPILOG = """
A model that was trained with --bits 4 is merged into the 16-bit base model, whose weights differ from the 4-bit ones by
what quantizing changed: the adapter was trained to go with those, so that the merged model's outputs are close to those
of training, and not equal. Evaluate it before it replaces the adapter.
"""


def merge_adapter(base: Path, adapter: Path, out: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[str]:
    """Writes the model of folder `base` with the adapter of folder `adapter` merged into it to the folder `out`.

    Returns keys of the base checkpoint that the model has no tensor for, which `out` lacks. Blocks. Until the end, what
    `out` held is whole; what was written is read back. Peak memory: the weights of the largest module that is tuned, a
    few times, or those of the largest other tensor. Raises ConfigError for folders that are none, or not such,
    `CheckpointError` for weights that do not fit, `UnsupportedModule` for what cannot be merged, `StorageFull` before
    the first byte, and `CheckpointVerifyError`.
    """
    for name, folder, file in (("BASE", base, "config.json"), ("ADAPTER", adapter, ADAPTER_CONFIG)):
        if not (folder / file).is_file():
            raise ConfigError(f"{name}: {folder} has no {file}")
    if out.exists() and any(out.samefile(folder) for folder in (base, adapter)):
        raise ConfigError(f"OUT: {out} is what would be read; give another folder")
    with open_checkpoint(base) as checkpoint, open_checkpoint(adapter / ADAPTER_WEIGHTS) as saved:
        model, tuned_model = _on_meta(base), _on_meta(base)
        mapping = map_checkpoint(model, checkpoint)
        if mapping.prequantized:
            raise CheckpointError(f"{base}: holds weights in 4 bits; merge into the 16-bit model that it was made from")
        _check_configuration(base, model.config)
        if mapping.missing:
            raise CheckpointError(
                f"{base}: lacks {len(mapping.missing)} tensors of the model, first: {mapping.missing[0]}"
            )
        for each in (model, tuned_model):
            _have_dtypes_of(each, mapping.casts)
        groups = Tuned(tuned_model, adapter, mapping.sources, saved).groups(model)
        beside = partial(_copy_what_is_beside, base)
        save_model(model, groups, out, max_shard_bytes=max_shard_bytes, configuration=beside)
    return mapping.unused


class Tuned:
    """A base model with an adapter on it, all of it on the meta device, and where the values of both are."""

    def __init__(self, model: Any, folder: Path, sources: Mapping[str, TensorSource], saved: Checkpoint) -> None:
        """`sources` has the base model's tensors by their names in it, `saved` is the adapter's file."""
        self._folder = folder
        self._model = _with_adapter(model, folder)
        self._inner = base_module(self._model)
        tensors = [item for item in model_tensors(self._model) if not item.is_copy]
        self._base_names = {item.base_name: item.tensor for item in tensors if item.base_name is not None}
        of_base = {id(tensor): sources[name] for name, tensor in self._base_names.items() if name in sources}
        self._source_of = of_base | self._of_adapter(saved)

    def _of_adapter(self, saved: Checkpoint) -> dict[int, TensorSource]:
        """By the id of a tensor of the model: its source in the adapter's file, which may have some of the base's."""
        found = matched(self._model, saved)
        return {id(tensor): EntrySource(saved, saved.tensors[name]) for name, tensor in found.items()}

    def groups(self, model: nn.Module) -> list[TensorGroup]:
        """All tensors of the base model `model`, on meta: those of a module that is tuned together, others alone."""
        paths = self._paths()
        names: dict[str, list[str]] = {}
        for name in saved_tensors(model):
            names.setdefault(next((path for path in paths if name.startswith(f"{path}.")), name), []).append(name)
        self._check_ties(model, paths)
        for path in paths:
            self._check_sources(path)
        dtypes = {name: tensor.dtype for name, tensor in saved_tensors(model).items()}
        return [
            TensorGroup(
                names=tuple(group),
                shown=partial(self._merged, path, {name: dtypes[name] for name in group})
                if path in paths
                else partial(self._alone, path, dtypes[path]),
            )
            for path, group in names.items()
        ]

    def _paths(self) -> list[str]:
        """The outermost modules of the base model that peft has put something around."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        found: list[str] = []
        for path, module in self._inner.named_modules():
            is_inside = any(path.startswith(f"{outer}.") for outer in found)
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not is_inside:
                found.append(path)
        return found

    def _check_ties(self, model: nn.Module, paths: list[str]) -> None:
        """Raises `UnsupportedModule` where one of several tied weights is tuned: merged, they are tied no more."""
        tied: dict[int, list[str]] = {}
        for item in model_tensors(model):
            tied.setdefault(id(item.tensor), []).append(item.name)
        for names in tied.values():
            if len(names) > 1 and any(name.startswith(f"{path}.") for name in names for path in paths):
                raise UnsupportedModule(
                    f"{self._folder}: changes one of {' and '.join(names)}, which are one tensor in the base model; "
                    f"what is merged into one of them would change the other"
                )

    def _check_sources(self, path: str) -> None:
        """Raises `UnsupportedModule` where nobody says what is in a part of the module."""
        module = self._inner.get_submodule(path)
        state = module.state_dict(keep_vars=True)
        lost = [name for name, tensor in state.items() if id(tensor) not in self._source_of]
        if lost:
            raise UnsupportedModule(
                f"{self._folder}: {path}.{lost[0]} is neither in it nor in the base model: such an adapter "
                f"({type(module).__name__}) cannot be merged from its files"
            )

    def _value(self, tensor: Tensor) -> Tensor:
        source = self._source_of[id(tensor)]
        return materialise(source).to(tensor.dtype).view(tensor.shape)

    @contextmanager
    def _alone(self, name: str, dtype: torch.dtype) -> Iterator[Mapping[str, Tensor]]:
        yield {name: self._value(self._base_names[name]).to(dtype)}

    @contextmanager
    def _merged(self, path: str, dtypes: Mapping[str, torch.dtype]) -> Iterator[Mapping[str, Tensor]]:
        """The tensors of the module at `path`, whose values are gone afterwards."""
        parent, _, key = path.rpartition(".")
        owner, target = self._inner.get_submodule(parent), self._inner.get_submodule(path)
        parameters = list(target.parameters())
        for parameter in parameters:
            make_real(parameter, self._value(parameter))
        for module in target.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = self._value(buffer)
        try:
            with torch.no_grad(), OnlyValues():  # type: ignore[no-untyped-call]
                merged = _unloaded(target)
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise UnsupportedModule(f"{path}: peft cannot merge it ({type(target).__name__}): {error}") from error
        found = {f"{path}.{name}": tensor.detach() for name, tensor in merged.state_dict().items()}
        for name, dtype in dtypes.items():
            found[name] = found[name].to(dtype)
            if not found[name].isfinite().all():
                raise CheckpointError(f"{path}: merged, {name} has values that are not finite")
        yield {name: found[name] for name in dtypes}
        del found, merged
        owner._modules[key] = None
        for parameter in parameters:
            make_absent(parameter)


class OnlyValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises RuntimeError where an operation reads a tensor without values: it would change nothing, in silence."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{func} reads something that no file has the values of")
        return func(*args, **(kwargs or {}))


def _unloaded(target: Any) -> nn.Module:
    """As `merge_and_unload` does with each module."""
    if hasattr(target, "unload_and_optionally_merge_module"):
        module: nn.Module = target.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return module
    target.merge(safe_merge=False, adapter_names=None)
    module = target.get_base_layer()
    return module


def _on_meta(base: Path) -> Any:
    """The base model."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"merging needs transformers and peft ({error}); pip install 'offload-rt[hf]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ConfigError(f"BASE: {base}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _check_configuration(base: Path, config: Any) -> None:
    """Raises `CheckpointError` where it says that the weights are quantized: they are not, as their files say, but
    whoever loads the merged model, which has this configuration, would take them for that. An empty entry says nothing.
    """
    for part in (config, config.get_text_config()):
        said = getattr(part, QUANTIZATION, None)
        if said:
            method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
            raise CheckpointError(
                f"{base / 'config.json'}: quantization_config says that the weights are quantized ({method}), the "
                f"files have plain ones; merge into the model that it was made from, or take the entry out"
            )


def _have_dtypes_of(model: nn.Module, casts: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> None:
    """Gives tensors of `model`, on meta, the dtypes that they are stored in: nothing is rounded but what is merged."""
    for item in model_tensors(model):
        if item.name not in casts or item.tensor.dtype == casts[item.name][0]:
            continue
        stored = torch.empty_like(item.tensor, dtype=casts[item.name][0])
        if isinstance(item.tensor, nn.Parameter):
            make_real(item.tensor, stored)
        else:
            path, _, key = item.name.rpartition(".")
            model.get_submodule(path)._buffers[key] = stored


def _with_adapter(model: Any, folder: Path) -> Any:
    """`model` with the adapter on it, as `PeftModel.from_pretrained` would put it there, without values."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"merging needs peft ({error}); pip install 'offload-rt[hf]'") from error
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        check_base_is_kept(config, folder)
        if config.is_prompt_learning:
            raise ValueError(f"{config.peft_type.value} changes what the model reads, not its weights")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what concerns training
            tuned: Any = peft.PeftModel(model, config)
        tuned.base_model._check_merge_allowed()
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModule(f"{folder}: cannot be merged into this base model: {error}") from error
    return tuned


def _copy_what_is_beside(base: Path, folder: Path) -> None:
    """Configuration, without empty entries on quantization (`_check_configuration`), tokenizer and whatever else is no
    weights.
    """
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith(NOT_COPIED) and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    said: dict[str, Any] = json.loads((base / "config.json").read_bytes())
    parts = [part for part in (said, said.get("text_config")) if isinstance(part, dict)]
    empty = [part for part in parts if QUANTIZATION in part and not part[QUANTIZATION]]
    if empty:  # transformers loads no model whose configuration has an entry without a method
        for part in empty:
            del part[QUANTIZATION]
        (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m offload_rt.checkpoint.merge", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("base", type=Path, metavar="BASE", help="folder with config.json and safetensors, in 16 bits")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder with adapter_model.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the merged model")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")
    given = parser.parse_args(arguments)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it: kernels that nobody here calls
    try:
        left = merge_adapter(
            given.base, given.adapter, given.out,
            max_shard_bytes=parse_bytes(given.max_shard_size, field="max_shard_size"),
        )  # fmt: skip
    except OffloadError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    if left:
        sys.stderr.write(f"warning: {len(left)} tensors of BASE are none of the model's, first: {left[0]}\n")
    sys.stdout.write(f"{given.out}: {given.base} with {given.adapter} merged into it\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
