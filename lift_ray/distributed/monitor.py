"""A search as it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from lift_ray.results.output import Output
from lift_ray.results.rows import TrialRow, best_row, describe, write_rows
from lift_ray.results.tables import console, trial_table
from lift_ray.settings.space import SpaceFile


class Monitor:
    """Shows the rows of a search, and rewrites the trials table whenever a trial ends.

    Args:
        rows: by number; the search fills them.
        out: for trials.parquet and trials.csv.
    """

    def __init__(self, space: SpaceFile, rows: dict[int, TrialRow], out: Output) -> None:
        self.space, self.rows, self.out = space, rows, out
        self.began = time.monotonic()
        self.ended_before = sum(row.has_ended for row in rows.values())
        self.first_step_s: float | None = None
        self.last_result_s = 0.0
        self.console = console()
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None

    def __enter__(self) -> Monitor:
        if self.live:
            self.live.start()
            self._show()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            self.live = None
            self.console.print(self._table(limit=10_000))
        if self.rows:
            self._write()

    def started(self, row: TrialRow) -> None:
        """A trial was handed to a slot."""
        self._show()

    def reported(self, row: TrialRow) -> None:
        """An epoch is done."""
        now = time.monotonic() - self.began
        if self.first_step_s is None:
            self.first_step_s = now - row.last.get("time/train_s", 0) - row.last.get("time/evaluate_s", 0)
        self.last_result_s = now
        self.out.publish()
        self._show()

    def ended(self, row: TrialRow) -> None:
        """A trial ran to its end, was stopped early, or failed."""
        self._write()
        if not self.live:
            value = row.last.get(self.space.objective[0])
            self.console.print(
                f"{time.monotonic() - self.began:5.0f} s  trial {row.number:3d} {row.state:8s} "
                f"epoch {len(row.history)}/{row.num_epochs}  "
                f"{'' if value is None else f'{value:.4f}'}  {describe(row.values)} {row.error}".rstrip(),
                soft_wrap=True,
            )
        self._show()

    def _write(self) -> None:
        write_rows(self.rows.values(), self.out.folder)
        self.out.publish()

    def _show(self) -> None:
        if self.live:
            self.live.update(
                Group(self._table(limit=max(5, self.console.height - 10)), Text(self._status())), refresh=True
            )

    def _table(self, limit: int) -> Any:
        return trial_table(
            list(self.rows.values()), list(self.space.space), self.space.objective[0], self.space.name, limit
        )

    def _status(self) -> str:
        rows, seconds = list(self.rows.values()), time.monotonic() - self.began
        ended, total = sum(row.has_ended for row in rows), self.space.num_trials
        here = ended - self.ended_before
        best = best_row(rows, *self.space.objective)
        parts = [f"{ended} of {total} trials", f"{seconds:.0f} s"]
        if here:
            left = seconds / here * (total - ended)
            parts += [f"{3600 * here / seconds:.0f} trials/h", f"about {left / 60:.1f} min left"]
        if best:
            parts.append(f"best {best.last[self.space.objective[0]]:.4f}: {describe(best.values)}")
        return "  |  ".join(parts) if rows else "starting Ray and loading the tower ..."
