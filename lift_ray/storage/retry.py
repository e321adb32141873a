"""Retries with growing random pauses, for requests to storage that fails now and then."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

LONGEST_PAUSE_S = 8.0

Result = TypeVar("Result")


def retry(
    work: Callable[[float], Result],
    may_pass: Callable[[Exception], bool],
    patience_s: float,
    first_pause_s: float = 0.2,
) -> Result:
    """Return the result of `work`, called again after each failure that may pass.

    The pauses double, up to LONGEST_PAUSE_S, and are random: many workers that lost the same store must not all come
    back to it at the same moment.

    Args:
        work: may be repeated; gets the seconds left for it, at least 1.
        may_pass: tells whether the same call may succeed later.
        patience_s: no call begins later than this; 0 means a single call.

    Raises the error of the last call.
    """
    started = time.monotonic()
    for failures in count():
        try:
            return work(max(1.0, patience_s - (time.monotonic() - started)))
        except Exception as error:
            pause_s = random.uniform(0.5, 1.0) * min(LONGEST_PAUSE_S, first_pause_s * 2**failures)
            if not may_pass(error) or time.monotonic() - started + pause_s > patience_s:
                raise
        time.sleep(pause_s)
    raise AssertionError("unreachable")
