"""Ctrl-C and SIGTERM: the first asks the work to stop, the second ends the process."""

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
    """While it is entered, the two signals are heard here.

    Until `ask` the first one raises Interrupted, as there is nothing to stop in order. After it, the first one sets `signum`.
    A second one ends the process at once, with the exit code that shells expect: 130 or 143.

    Attributes:
        signum: of the signal that came; 0 before.
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
        """Take the signals; again after `ray.init`, which takes SIGTERM for itself."""
        for number in self._before:
            signal.signal(number, self._heard)

    def ask(self, say: Callable[[], None]) -> None:
        """From now on the first signal only asks: `say` tells the user that it was heard."""
        self._say = say

    @property
    def came(self) -> bool:
        """Whether the work is to stop."""
        return bool(self.signum)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + number)
        self.signum = number
        if self._say is None:
            raise Interrupted(number)
        self._say()
