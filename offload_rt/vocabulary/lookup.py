"""An embedding that streams by rows: a lookup fetches the rows of its distinct ids, and nothing else of the table.

The module's own forward runs, on the ids that it was given. What it asks torch to look up in its weight is answered
from the rows; so scales, offsets and extra tables stay the model's code. The weight itself is nowhere: a forward that
does anything else with it is an error. Frozen weights only: a lookup of them has no backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from offload_rt.errors import UnsupportedModule
from offload_rt.layers.access import GoneAccess, ReplacedForward
from offload_rt.layers.block import Block
from offload_rt.tiering.rows import RowReader, RowSource


class LookupModule(ReplacedForward):
    """Replaces the `forward` of an embedding. `ahead` is called first: it may start what comes behind the lookup."""

    def __init__(
        self,
        module: nn.Module,
        block: Block,
        source: RowSource,
        reader: RowReader,
        ahead: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(module)
        self.block = block
        self._weight = block.bindings[0].parameter
        self._source: RowSource | GoneAccess = source
        self._reader = reader
        self._ahead = ahead

    def let_go(self, gone: GoneAccess) -> None:
        """Has no memory of its runtime's any more, whoever still holds it."""
        self._source = gone
        self._ahead = lambda: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._ahead()
        with _Answering(self):
            return self._forward(*args, **kwargs)

    def is_weight(self, value: Any) -> bool:
        return value is self._weight

    def look_up(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        """Rows `ids` of the weight, as `torch.nn.functional.embedding` gives them. Waits for a device to know the ids.

        Raises torch's `IndexError` for an id that is no row, and what `RowReader.tables` raises.
        """
        source = self._source
        if isinstance(source, GoneAccess):
            source.refuse()
        num_rows, width = source.spec.shape
        if ids.dtype not in (torch.int64, torch.int32):
            return nn.functional.embedding(ids, self._weight.new_empty(1, width))  # torch's own words for it
        ids_N = ids.detach().reshape(-1).cpu().long()
        found_NM = torch.empty(ids_N.numel(), width, dtype=self._weight.dtype, device=ids.device)
        rows_U, places_N = torch.unique(ids_N, return_inverse=True)
        if rows_U.numel() and not 0 <= int(rows_U[0]) <= int(rows_U[-1]) < num_rows:
            odd = rows_U[0] if int(rows_U[0]) < 0 else rows_U[-1]
            raise IndexError(f"index out of range in self: {source.spec.name} has {num_rows} rows, not row {int(odd)}")
        places_N, order_N = places_N.sort()
        with contextlib.closing(self._reader.tables(source, rows_U)) as tables:
            for begin, end, rows_MD in tables:
                first, last = torch.searchsorted(places_N, torch.tensor([begin, end])).tolist()
                chosen = (places_N[first:last] - begin).to(ids.device)
                found_NM.index_copy_(0, order_N[first:last].to(ids.device), nn.functional.embedding(chosen, rows_MD))
                del rows_MD
        return found_NM.view(*ids.shape, width)


class _Answering(TorchFunctionMode):
    """Inside, what torch is asked to look up in the module's weight is answered from its rows."""

    def __init__(self, lookup: LookupModule) -> None:
        super().__init__()
        self._lookup = lookup

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {} if kwargs is None else kwargs
        if not any(self._lookup.is_weight(value) for value in (*args, *given.values())):
            return func(*args, **given)
        if func is nn.functional.embedding:
            return self._embedding(*args, **given)
        found = func(*args, **given)
        if isinstance(found, torch.Tensor):
            raise UnsupportedModule(
                f"block {self._lookup.block.name}: {type(self._lookup.module).__name__} does more with its weight than "
                f"look up rows ({getattr(func, '__name__', func)}), and the plan reads it by rows. Give device_memory= "
                f"that holds it"
            )
        return found  # its dtype, its device

    def _embedding(
        self, input: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """As torch's. Where no gradient is wanted, only `max_norm` of its options means anything: it changes rows."""
        if max_norm is not None:
            raise UnsupportedModule(f"block {self._lookup.block.name}: max_norm changes the rows of a frozen embedding")
        return self._lookup.look_up(input)
