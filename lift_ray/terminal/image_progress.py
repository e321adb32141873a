"""Progress of a conversion: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lift_ray.terminal.tables import console as console_of
from lift_ray.text import count

LINE_EVERY_S = 10.0


@contextmanager
def image_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total) images; it shows images/s and the remaining time on stderr.

    Images that are done at the first call count as finished by an earlier run, not for the speed.
    """
    console = console_of(error=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TimeRemainingColumn(),
    )
    began, first, said = 0.0, 0, 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def show(done: int, total: int) -> None:
            nonlocal began, first, said
            now = time.monotonic()
            if not bar.tasks:
                began = said = now
                first = done
                bar.add_task("images", total=total, completed=done, rate=0.0)
                if done:
                    console.print(f"continuing: {done:,} of {count(total, 'image')} already converted", soft_wrap=True)
                return
            rate = (done - first) / max(now - began, 1e-3)
            bar.update(bar.task_ids[0], completed=done, rate=rate)
            if not console.is_terminal and rate and now - said >= LINE_EVERY_S:
                said = now
                left_s = (total - done) / rate
                console.print(
                    f"{done:,} of {count(total, 'image')}, {rate:,.0f} images/s, {left_s:,.0f} s left", soft_wrap=True
                )

        yield show
