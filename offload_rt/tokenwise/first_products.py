"""Leaves the products that lead to attention out of a replay that begins, in effect, at the attention's result.

A layer's forward is one Python function: nobody can enter it at its middle. But where queries, keys and values wait, or
their graph does, the way up to attention is run only for what else it leaves behind: the residual, and perhaps a norm
that a parallel MLP shares. The products on it are its cost, and nobody wants what they give:

    forward    norm -> q, k, v -> rotation -> attention -> output -> + residual -> norm -> MLP
    replay     norm -> (NaN)   -> (NaN)    -> its result -> output -> + residual -> norm -> MLP

[Note: nobody wants q, k and v]
That is looked at, in every such replay: each operation passes `_Watch`, which knows the storages that were made of a
left-out product. At attention their memory is given back; an operation that is given one after that (a gate that shares
a product with the queries) raises `ProductWanted`, and so does one before it that makes anything but real or
complex tensors of them. The chunk is then run again in full, and so are all others of that layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}
"""What a linear comes down to, and which argument is its first factor."""


class ProductWanted(Exception):
    """What follows attention needs a product that leads to it."""


class FirstProducts:
    """Those of one layer, and whether they were found to be wanted."""

    def __init__(self) -> None:
        self.wanted = False
        self._watch: _Watch | None = None

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, products give NaN until `at_attention`. Raises `ProductWanted` where one is used after that."""
        self._watch = _Watch()
        try:
            with self._watch:
                yield
        except ProductWanted:
            self.wanted = True
            raise
        finally:
            self._watch = None

    def at_attention(self) -> None:
        """The layer has come to its attention call: what was left out is let go of."""
        if self._watch is not None:
            self._watch.let_go()


class _Watch(TorchDispatchMode):
    """See [Note: nobody wants q, k and v]. Below autograd: the graph is that of the full replay."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._leaves_out = True
        self._made: dict[int, torch.UntypedStorage] = {}
        """What was made of left-out products; held, so that no other tensor gets their identity."""

    def let_go(self) -> None:
        self._leaves_out = False
        for storage in self._made.values():
            storage.resize_(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._leaves_out and func in _PRODUCTS:
            first, second = args[_PRODUCTS[func] :][:2]
            out = first.new_full((first.shape[0], second.shape[1]), float("nan"))
            self._hold(out, func)
            return out
        leaves = pytree.tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]
        made_of_it = any(_identity(tensor) in self._made for tensor in given)
        if made_of_it and not self._leaves_out and func is not _aten.detach.default:
            raise ProductWanted(str(func))
        out = func(*args, **(kwargs or {}))
        if made_of_it:
            for leaf in pytree.tree_leaves(out):
                self._hold(leaf, func)
        return out

    def _hold(self, made: Any, func: Any) -> None:
        is_number = isinstance(made, torch.Tensor) and (made.is_floating_point() or made.is_complex())
        if not is_number or made.layout is not torch.strided:
            raise ProductWanted(str(func))
        self._made[_identity(made)] = made.untyped_storage()


def _identity(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
