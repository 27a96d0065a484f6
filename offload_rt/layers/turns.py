"""Several calls of one model that take turns: each runs up to a point where it passes on, then the next one does.

So micro-batches go through a model layer by layer, and a weight that was fetched serves them all:

    micro-batch 1   embed  layer 1 |                |  layer 2 |               | ...
    micro-batch 2                  | embed  layer 1 |          |  layer 2      | ...

Each call is a thread, for its stack; only one runs at a time, so that nothing needs to be safe for threads but what is
left changed while others run (see `shown`). Every call is the one that it would have been alone: the same operations on
the same operands, in the same order, and sums over calls in their order. Random numbers are drawn in another order.

For a GPU, autograd runs backward passes on a thread of its own, where nobody could take turns. So each call tells it,
for its own thread alone, to stay where it was called; for the CPU, that changes nothing (`set_multithreading_enabled`).

The threads stay for the next calls: a library may keep for each what takes long to make, as cuDNN's attention does its
plans, and memory that is booked for so many (`cuda_memory`).
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Turns:
    """Runs calls in turns, again and again; `pass_on` does nothing outside of them."""

    def __init__(self, inside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext) -> None:
        """`inside` is entered by the thread of each call: it makes kernels go where the caller's do."""
        self._inside = inside
        self._condition = threading.Condition()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_size = 0
        self._threads_of_torch = 0
        """For an operation, as they were when the threads began."""
        self._threads: dict[int, int] = {}
        self._waiting: list[int] = []
        """Calls that are not over, in the order of their turns; the first one runs."""
        self._failed = False
        self.num_passed_on = 0
        """Since the start."""

    @property
    def active(self) -> bool:
        """Whether calls are running."""
        return bool(self._waiting)

    @property
    def is_last(self) -> bool:
        """Whether the running call is the last one of its round."""
        return len(self._waiting) < 2 or self._waiting[0] == max(self._waiting)

    def run(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of all calls, which run in turns. Blocks. Raises what the first one that failed raised."""
        results: dict[int, Result] = {}
        errors: list[BaseException] = []
        grad = torch.is_grad_enabled()
        casts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]

        def one(index: int, call: Callable[[], Result]) -> None:
            self._threads[threading.get_ident()] = index
            try:
                with contextlib.ExitStack() as as_the_caller:
                    as_the_caller.enter_context(torch.set_grad_enabled(grad))
                    as_the_caller.enter_context(torch.autograd.set_multithreading_enabled(False))
                    as_the_caller.enter_context(self._inside())
                    for kind, dtype in casts:
                        as_the_caller.enter_context(torch.autocast(kind, dtype=dtype))
                    self._wait(index)
                    results[index] = call()
            except _Cancelled:
                pass
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                errors.append(error)
                self._failed = True
            finally:
                with self._condition:
                    self._waiting.remove(index)
                    self._condition.notify_all()

        pool = self._pool_of(len(calls))
        self._failed = False
        self._waiting = list(range(len(calls)))
        self._threads.clear()
        under_way: list[Future[None]] = []
        try:
            for index, call in enumerate(calls):
                under_way.append(pool.submit(contextvars.copy_context().run, one, index, call))
            for future in under_way:
                future.result()
        except BaseException:  # the caller's own, which was interrupted or got no thread more
            self._end(pool, under_way)
            raise
        if errors:
            raise errors[0]
        return [results[index] for index in range(len(calls))]

    def close(self) -> None:
        """Ends the threads, which the next `run` makes anew. No call may be running."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._pool_size = None, 0

    def _pool_of(self, num_threads: int) -> ThreadPoolExecutor:
        """One that has a thread for each of so many calls, which wait for one another. For each of them torch divides
        an operation as for the caller: a thread goes on with the number that there was when it began.
        """
        threads_of_torch = torch.get_num_threads()
        if self._pool is None or self._pool_size < num_threads or self._threads_of_torch != threads_of_torch:
            self.close()
            self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="offload_rt-turn")
            self._pool_size, self._threads_of_torch = num_threads, threads_of_torch
        return self._pool

    def _end(self, pool: ThreadPoolExecutor, under_way: Sequence[Future[None]]) -> None:
        """Ends calls that nobody waits for any more, each where it passes on next. Blocks."""
        pool.shutdown(wait=False, cancel_futures=True)
        begun = [index for index, future in enumerate(under_way) if not future.cancelled()]
        with self._condition:
            self._failed = True
            self._waiting = [index for index in self._waiting if index in begun]
            self._condition.notify_all()
        self.close()

    def pass_on(self) -> None:
        """Lets the next call run, and blocks until it is this one's turn again."""
        index = self._threads.get(threading.get_ident())
        if index is None or not self._waiting or self._waiting[0] != index:
            return
        shown = _shown()
        for _, take_away in reversed(shown):
            take_away()
        try:
            with self._condition:
                self._waiting.append(self._waiting.pop(0))
                self.num_passed_on += 1
                self._condition.notify_all()
            self._wait(index)
        finally:
            for put, _ in shown:
                put()

    def _wait(self, index: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._waiting[0] == index)
        if self._failed:
            raise _Cancelled


class _Cancelled(BaseException):
    """Another call failed: this one is not worth going on with."""


_local = threading.local()


def _shown() -> list[tuple[Callable[[], None], Callable[[], None]]]:
    stack: list[tuple[Callable[[], None], Callable[[], None]]] | None = getattr(_local, "stack", None)
    if stack is None:
        stack = _local.stack = []
    return stack


@contextlib.contextmanager
def shown(put: Callable[[], None], take_away: Callable[[], None]) -> Iterator[None]:
    """Inside, what `put` has changed stays so for this call of the model, and is taken away while others run."""
    put()
    _shown().append((put, take_away))
    try:
        yield
    finally:
        _shown().pop()
        take_away()
