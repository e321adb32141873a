"""A spinner for work of several seconds that has no progress to show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from lift_ray.terminal.tables import console
from lift_ray.text import printable


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner with a text on stderr while the block runs; nothing if that is no terminal."""
    screen = console(error=True)
    if not screen.is_terminal:
        yield
        return
    spinner = Spinner("dots", Text(printable(f"{text} ...")))
    # What the block prints goes where it would go without the spinner: stdout may be a file.
    with Live(
        spinner, console=screen, transient=True, refresh_per_second=12.5, redirect_stdout=False, redirect_stderr=False
    ):
        yield
