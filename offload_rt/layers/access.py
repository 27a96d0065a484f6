"""How whoever runs a block gets at its bytes, and hands them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from offload_rt.errors import OffloadError
from offload_rt.layers.block import Block
from offload_rt.layers.executor import RingExecutor
from offload_rt.memory.arena import Slot
from offload_rt.memory.parted import BlockBytes, PartedBytes
from offload_rt.tiering.tiers import Residence, TierAccount
from planners.plans.schedule import Phase


class Access(Protocol):
    """Gets at a block's bytes."""

    def acquire(self, phase: Phase, *, training: bool) -> BlockBytes:
        """What holds them; blocks until they are there."""

    def release(self) -> None:
        """Ends one `acquire`."""


class RingAccess:
    """Access to a block that streams through a ring."""

    def __init__(self, executor: RingExecutor, index: int) -> None:
        self._executor = executor
        self._index = index

    def acquire(self, phase: Phase, *, training: bool) -> BlockBytes:
        return self._executor.acquire(self._index, phase, training=training)

    def release(self) -> None:
        self._executor.release(self._index)


class PartedAccess:
    """Access to a block that streams but for its first bytes, which never leave DEVICE memory."""

    def __init__(self, resident: Slot, streamed: RingAccess, streamed_from_bytes: int) -> None:
        self._resident = resident
        self._streamed = streamed
        self._streamed_from_bytes = streamed_from_bytes

    def acquire(self, phase: Phase, *, training: bool) -> BlockBytes:
        return PartedBytes(self._resident, self._streamed.acquire(phase, training=training), self._streamed_from_bytes)

    def release(self) -> None:
        self._streamed.release()


class GoneAccess:
    """Access to a block of a runtime that is closed; graphs of it may still be around."""

    def __init__(self, why: str) -> None:
        self._why = why

    def acquire(self, phase: Phase, *, training: bool) -> BlockBytes:
        self.refuse()

    def refuse(self, *_: object) -> NoReturn:
        raise OffloadError(f"backward: its forward ran before {self._why}")

    def release(self) -> None:
        """Nothing was acquired."""


class ResidentAccess:
    """Access to a block that never leaves DEVICE memory."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def acquire(self, phase: Phase, *, training: bool) -> Slot:
        return self.slot

    def release(self) -> None:
        pass


class LookupAccess:
    """Access to a block that is read by rows or tiles and has no slot: whole only when a model is saved.

    From NVMe, in memory that is booked in HOST for that long; `BudgetExceeded` says by how much it does not fit. From
    HOST where it rests.
    """

    def __init__(self, residence: Residence, resting: Slot | None, account: TierAccount, name: str) -> None:
        self._residence = residence
        self._resting = resting
        self._account = account
        self._owner = f"{name}, whole"

    def acquire(self, phase: Phase, *, training: bool) -> Slot:
        if self._resting is not None:
            return self._resting
        num_bytes = self._residence.num_bytes
        arena = self._account.lend(self._owner, num_bytes)
        try:
            slot = arena.acquire(num_bytes, self._owner)
            self._residence.fetch(slot).wait()
        except BaseException:
            self.release()
            raise
        return slot

    def release(self) -> None:
        if self._resting is None:
            self._account.take_back(self._owner, self._residence.num_bytes)


class opened:
    """A context inside which the block's weights are in place. An exception leaves nothing open.

    No generator: it is entered twice a layer and step, and a class takes a third of the time.
    """

    __slots__ = ("_access", "_block", "_end", "_phase", "_training")

    def __init__(self, block: Block, access: Access, phase: Phase, *, training: bool) -> None:
        self._block, self._access, self._phase, self._training = block, access, phase, training

    def __enter__(self) -> None:
        slot = self._access.acquire(self._phase, training=self._training)
        try:
            self._block.open(slot)
        except BaseException:
            del slot
            self._access.release()
            raise
        spans = self._block.spans
        self._end = None if spans is None else spans.computing(f"{self._phase.value} {self._block.name}")

    def __exit__(self, *exception: object) -> None:
        if self._end is not None:
            self._end()
        try:
            self._block.close()
        finally:
            self._access.release()


def put_forward_back(module: nn.Module, forward: Callable[..., Any], *, had_own: bool) -> None:
    """Undoes `module.forward = ...`, if it was done: the class's method again, or what a user had put in its place."""
    if had_own:
        module.forward = forward
    else:
        vars(module).pop("forward", None)


class ReplacedForward:
    """Is called in place of a module's `forward` from `attach` to `detach`, which puts back what was there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._forward: Callable[..., Any] = module.forward
        self._had_own_forward = "forward" in module.__dict__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def attach(self) -> None:
        self.module.forward = self

    def detach(self) -> None:
        put_forward_back(self.module, self._forward, had_own=self._had_own_forward)


def without_hooks(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Tensor hooks of parameters fire in the graph outside; an inner pass must not fire them too."""
    hooked = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    return _without(hooked) if hooked else nullcontext()


@contextmanager
def _without(hooked: list[tuple[nn.Parameter, Any]]) -> Iterator[None]:
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def graph_is_kept() -> bool:
    """Whether the backward pass under way was asked to retain its graph. False where torch cannot say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return bool(ask()) if ask is not None else False
