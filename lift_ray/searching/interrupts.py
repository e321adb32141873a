"""Handlers of Ctrl-C and SIGTERM: the first signal asks the search to stop, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lift_ray.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context manager that handles both signals while it is entered.

    Before `ask` is called, the first signal raises Interrupted, because there is nothing to stop in order yet. Afterwards it sets
    `signum`. A second signal ends the process at once, with the exit code that shells expect: 130 or 143.

    Attributes:
        signum: number of the signal that arrived; 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._say: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Install the handlers. Call it again after `ray.init`, which installs its own for SIGTERM."""
        for number in self._before:
            signal.signal(number, self._heard)

    def ask(self, say: Callable[[], None]) -> None:
        """Let the first signal only ask for a stop from now on; `say` then tells the user."""
        self._say = say

    @property
    def came(self) -> bool:
        """True once a signal has arrived."""
        return bool(self.signum)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + number)
        self.signum = number
        if self._say is None:
            raise Interrupted(number)
        self._say()
