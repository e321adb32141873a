"""A spinner for work of several seconds that has no progress to show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lift_ray.terminal.tables import console
from lift_ray.text import printable


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner with a text on stderr while the block runs; nothing if that is no terminal."""
    screen = console(error=True)
    if not screen.is_terminal:
        yield
        return
    with screen.status(printable(f"{text} ...")):
        yield
