"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # musl and macOS lack it, and Windows has no global namespace
        return None


def return_freed_memory() -> None:
    """Return freed memory to the system.

    The activations of a training step are larger than what glibc maps by itself, so they are parts of its heap. A job that frees them
    leaves holes between smaller allocations, which the next job fills only partly.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)
