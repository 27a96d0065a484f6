"""Which of a layer's arguments go by tokens, and in which dimension.

The hidden states are [batch, tokens, width]. Positions and rotary embeddings are known by name, masks and what belongs
to packed sequences as well: those stay whole, for the attention call. Any other tensor goes by tokens if it has two or
three dimensions of which the second has as many entries as there are tokens and the first one or as many as rows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils import _pytree as pytree

from offload_rt.errors import UnsupportedModule

_WHOLE = ("mask", "cu_seq", "alibi", "encoder_", "past_")
_POSITIONS = ("position_ids", "cache_position", "positions")
_ROTARY = ("position_embedding", "rotary", "freqs")


class NotTokenLocal(UnsupportedModule):
    """A layer cannot be run by chunks of tokens; the message says what shows it."""


def tensor_names(forward: Any, leaves: list[Any], structure: Any) -> list[str]:
    """The argument that each tensor among `leaves` came in, as in `position_embeddings.0`."""
    numbered = pytree.tree_unflatten(list(range(len(leaves))), structure)
    try:
        positional = list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        positional = []
    names = [""] * len(leaves)
    for path, index in pytree.tree_flatten_with_path(numbered)[0]:
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:]]
        is_positional = getattr(path[0], "idx", None) == 0
        if is_positional and keys[0].isdigit() and int(keys[0]) < len(positional):
            keys[0] = positional[int(keys[0])]
        names[index] = ".".join(keys)
    return [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)]


def check_gradients(names: list[str], tensors: list[torch.Tensor], hidden: int) -> None:
    """Raises `NotTokenLocal` where a tensor beside the hidden states wants a gradient, which no chunk would give it."""
    for index, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        if tensor.requires_grad and index != hidden:
            raise NotTokenLocal(f"its argument {name!r} requires a gradient beside the hidden states")


def token_dims(names: list[str], tensors: list[torch.Tensor], hidden: int) -> list[int | None]:
    """The dimension of each tensor that counts tokens; None for what stays whole. Raises `NotTokenLocal`."""
    if tensors[hidden].dim() != 3:
        raise NotTokenLocal(f"its hidden states have {tensors[hidden].dim()} dimensions, not batch, tokens and width")
    num_rows, num_tokens = tensors[hidden].shape[:2]
    dims: list[int | None] = []
    for index, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        if index == hidden:
            dims.append(1)
            continue
        dims.append(_token_dim(name, tensor, num_rows, num_tokens))
    return dims


def _token_dim(name: str, tensor: torch.Tensor, num_rows: int, num_tokens: int) -> int | None:
    if any(word in name for word in _WHOLE):
        return None
    if any(word in name for word in _POSITIONS):
        return tensor.dim() - 1 if tensor.dim() and tensor.shape[-1] == num_tokens else None
    if any(word in name for word in _ROTARY) or {"cos", "sin"} & set(name.split(".")):
        return tensor.dim() - 2 if tensor.dim() >= 2 and tensor.shape[-2] == num_tokens else None
    by_tokens = tensor.dim() in (2, 3) and tensor.shape[1] == num_tokens and tensor.shape[0] in (1, num_rows)
    return 1 if by_tokens else None


def cut(
    tensors: list[torch.Tensor], dims: list[int | None], start: int, end: int
) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """Tokens [start, end) of `tensors` as views; and, by the identity of a view, what it was cut from."""
    rows = [t if d is None else t.narrow(d, start, end - start) for t, d in zip(tensors, dims, strict=True)]
    whole = {id(row): t for row, t, d in zip(rows, tensors, dims, strict=True) if d is not None}
    return rows, whole


def first_tokens(
    names: list[str], tensors: list[torch.Tensor], dims: list[int | None], hidden: int, num_tokens: int
) -> list[torch.Tensor]:
    """The same arguments for the first `num_tokens` tokens only, masks as well. Raises `NotTokenLocal`."""
    all_tokens = tensors[hidden].shape[1]
    rows, _ = cut(tensors, dims, 0, num_tokens)
    for index, name in enumerate(names):
        if dims[index] is None and any(word in name for word in _WHOLE):
            if "mask" not in name:
                raise NotTokenLocal(f"its argument {name!r} cannot be cut, so that it cannot be tried on a few tokens")
            for dim in range(max(0, rows[index].dim() - 2), rows[index].dim()):
                if rows[index].shape[dim] == all_tokens:
                    rows[index] = rows[index].narrow(dim, 0, num_tokens)
    return rows
