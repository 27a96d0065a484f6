"""What `--model` names: a well-known name, a config.json, a folder, or safetensors files.

A family that is known here is counted by its own function. Any other is taken from the headers of the safetensors files
beside its configuration, or built by transformers on the meta device; both say what its parameters are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planners.shapes.architectures import (
    FAMILIES,
    Config,
    known_shape,
    model_type,
    name_of,
    shape_from_config,
    unknown_type,
)
from planners.shapes.headers import read_headers
from planners.shapes.meta_model import NotThere, parameter_shapes
from planners.shapes.model import ModelShape
from planners.shapes.tensors import Hints, shape_from_tensors
from planners.shapes.well_known import NAMED
from planners.units import JsonFile, ProblemError, nearest

NOT_READ = "only bitsandbytes NF4 is read of the quantized formats"


def find_model(name_or_path: str) -> ModelShape:
    """The shape of what is named. `ProblemError` names the nearest match, or path, line and key."""
    name, path = name_or_path.lower(), Path(name_or_path)
    if name in NAMED:
        return shape_from_config(NAMED[name], name)
    if path.suffix == ".safetensors" and path.is_file():
        return shape_from_tensors(path.stem, read_headers(path), Hints())
    if path.is_dir() and not (path / "config.json").exists():
        return shape_from_tensors(name_of(path), read_headers(path), Hints())
    if path.exists():
        return read_config(path)
    if "/" in name_or_path or path.suffix in (".json", ".safetensors"):
        raise ProblemError(f"model: no file {name_or_path!r}, and no well-known name; {nearest(name, NAMED)}")
    raise ProblemError(f"model: unknown {name_or_path!r}; {nearest(name, NAMED)}")


def read_config(path: Path | str) -> ModelShape:
    """The shape in a `config.json`, or in the folder that holds one. `ProblemError` names path, line and key."""
    path = Path(path)
    file = JsonFile.load(path / "config.json" if path.is_dir() else path)
    if model_type(file) in FAMILIES:
        return known_shape(file)
    folder = path if path.is_dir() else path.parent
    if any(folder.glob("*.safetensors")):
        return shape_from_tensors(name_of(folder), read_headers(folder), _hints(file))
    try:
        return shape_from_tensors(model_type(file), parameter_shapes(file.data), _hints(file))
    except NotThere as error:
        raise ProblemError(f"{unknown_type(file)} (and {error})") from error


def unread_format(config: Any) -> str | None:
    """What the weights are quantized by, as the data of a `config.json` say, where that format is not read."""
    try:
        inner = config.get("text_config") or {}
        declared = config.get("quantization_config") or inner.get("quantization_config") or {}
        method, is_read = declared.get("quant_method"), declared.get("load_in_4bit")
    except AttributeError:
        return None
    return method if isinstance(method, str) and not (method == "bitsandbytes" and is_read) else None


def quantization_warning(name_or_path: str) -> str:
    """That training refuses the weights of what `find_model` has found; empty where it reads them."""
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if name_or_path.lower() in NAMED or path.suffix != ".json" or not path.is_file():
        return ""
    method = unread_format(JsonFile.load(path).data)
    if method is None:
        return ""
    return (
        f"{path}: says that the weights are quantized by {method!r}, and {NOT_READ}: this plan is for the checkpoint "
        "that is not quantized, training refuses this one"
    )


def _hints(file: JsonFile) -> Hints:
    config = Config(file)

    def size(*keys: str) -> int | None:
        return next((config.size(key) for key in keys if config.data.get(key) is not None), None)

    slides = config.data.get("sliding_window") and config.flag("use_sliding_window", True)
    return Hints(
        kv_heads=size("num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head"),
        active_experts=size("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
        window=config.window() if slides else None,
    )
