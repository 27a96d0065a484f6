"""A call on a thread of its own, that is to wait until somebody has done something."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Waiting:
    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._found: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def still(self) -> bool:
        """Whether it goes on waiting: true after a tenth of a second if it does, however slow the machine is."""
        self._thread.join(0.1)
        return self._thread.is_alive()

    def result(self) -> Any:
        """What the call returned, or raises what it raised. Blocks."""
        self._thread.join(30)
        if self._thread.is_alive():
            raise TimeoutError("nobody has done what the call waits for")
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._call()
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            self._error = error
