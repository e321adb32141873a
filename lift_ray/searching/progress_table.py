"""Display of a running search: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.live import Live

from lift_ray.epoch_metrics import SECONDS
from lift_ray.reporting.trial_rows import TrialRow, best_row, write_rows
from lift_ray.searching.final_comparison import comparison_seconds
from lift_ray.searching.jobs import EvaluationJob, IdleJob, Job, Pack, TrainJob
from lift_ray.searching.state import Search
from lift_ray.searching.tables import trial_table
from lift_ray.terminal.tables import console, describe, plain
from lift_ray.text import count, printable
from lift_ray.training.events import FeaturesDone, StepsDone

LINE_EVERY_S = 30.0  # longest time without a line, if there is no terminal
FEATURES_EVERY_S = 10.0  # the same while features are computed
SHOW_EVERY_S = 1.0
DRAW_EVERY_S = 0.25  # shortest time between two drawings of the live table, which look at all trials
WRITE_FRACTION = 0.05  # largest fraction of the time for writing the table of trials


@dataclass(frozen=True)
class _Spent:
    """Seconds that a trial took in its slot, and seconds of each of its evaluations."""

    slot_s: float
    evaluate_s: list[float]


class Monitor:
    """Watcher that shows a search, and rewrites the table of trials when trials have ended.

    Args:
        show: called once a second with a line of progress.
    """

    def __init__(self, search: Search, show: Callable[[str], None] = lambda text: None) -> None:
        self.search, self.space, self.rows, self.out = search, search.space, search.study.rows, search.out
        self.show = show
        self.began = time.monotonic()
        self.ended_before = search.num_ended
        self.first_step_s: float | None = None
        self.last_result_s = 0.0
        self.trials_over_s: float | None = None
        self.num_slots = 1
        self._changed, self._write_at = False, self.began
        self._num_told = 0  # number of jobs of the final comparison that were shown
        self._warned: set[str] = set()
        self._spent: dict[int, _Spent] = {}  # of the trials that have ended, by number
        self._said_at = self._shown_at = self.began
        self._drawn_at = float("-inf")
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
        """Show that a slot has started a trial."""
        self._show()

    def reported(self, row: TrialRow) -> None:
        """Show the metrics of an epoch."""
        now = self._seconds()
        if self.first_step_s is None:
            spent = row.last.seconds
            self.first_step_s = now - sum(spent.get(name, 0) for name in ("train_s", "evaluate_s", "features_s"))
        self.last_result_s = now
        self.out.publish()
        self._show()

    def ended(self, row: TrialRow) -> None:
        """Show that a trial has finished, was stopped early, or failed."""
        self._changed = True
        self._write_when_due()
        if self.search.trials_are_over and self.trials_over_s is None:
            self.trials_over_s = self._seconds()
        value = row.last.get(self.space.objective[0])
        self._say(
            f"trial {row.number:3d} {row.state:8s} epoch {len(row.history)}/{row.num_epochs}  "
            f"{'' if value is None else f'{value:.4f}'}  {describe(row.values)} {row.error}".rstrip()
        )
        self._show()

    def tick(self, num_slots: int) -> None:
        """Show the changes since the last call; called often. Without a terminal, print a line if there was none for a while."""
        self.num_slots = max(1, num_slots)
        for job in self.search.done[self._num_told :]:
            self._num_told += 1
            self._say(f"{self._compared()}{'' if isinstance(job, IdleJob) else f' ({job.title})'}")
        self._write_when_due()
        now = time.monotonic()
        if now - self._shown_at < SHOW_EVERY_S:
            return
        self._shown_at = now
        progress = self.search.progress.values()
        for warning in {at.warning for at in progress if at.warning} - self._warned:
            self._warned.add(warning)
            self.console.print(printable(warning), soft_wrap=True)
        line = "  |  ".join([*self._counts(), *self._jobs()])
        self.show(line)
        self._show()
        if now - self._said_at >= (FEATURES_EVERY_S if any(at.features for at in progress) else LINE_EVERY_S):
            self._say(line)

    def _say(self, text: str) -> None:
        self._said_at = time.monotonic()
        if not self.live:
            self.console.print(f"{self._seconds():5.0f} s  {printable(text)}", soft_wrap=True)

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _write_when_due(self) -> None:
        """Write the table of trials if it changed, but limit the time for it: the table grows with the search."""
        if self._changed and time.monotonic() >= self._write_at:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        write_rows(self.rows.values(), self.out.folder)
        self.out.publish()
        self._changed, self._write_at = False, time.monotonic() + (time.monotonic() - began) / WRITE_FRACTION

    def _show(self) -> None:
        if self.live and time.monotonic() - self._drawn_at >= DRAW_EVERY_S:
            table = self._table(limit=max(5, self.console.height - 10))
            self.live.update(Group(table, plain(self._status())), refresh=True)
            self._drawn_at = time.monotonic()

    def _table(self, limit: int) -> Any:
        rows = list(self.rows.values())
        return trial_table(rows, list(self.space.space), self.space.objective[0], self.space.name, limit)

    def _status(self) -> str:
        if not self.rows:
            return f"{self._seconds():.0f} s  |  starting Ray and loading the backbone ..."
        parts = [f"{self._seconds():.0f} s", *self._counts(), *self._jobs()]
        if best := best_row(self.rows.values(), *self.space.objective):
            parts.append(f"best {best.last[self.space.objective[0]]:.4f}: {describe(best.values)}")
        return "  |  ".join(parts)

    def _counts(self) -> list[str]:
        """Return the progress of the search and the estimated time left."""
        parts = [f"{self.search.num_ended} of {count(self.space.num_trials, 'trial')}"]
        if self.search.trials_are_over or self.search.done:
            parts.append(self._compared())
        if (left_s := self.seconds_left()) is not None:
            parts.append(f"about {left_s / 60:.1f} min left")
        return parts

    def _compared(self) -> str:
        known = len(self.search.done) + len(self.search.final_jobs())
        return f"final comparison: {len(self.search.done)} of {known} done"

    def _jobs(self) -> list[str]:
        """Return the progress of each slot; slots that compute the same features together have one text."""
        texts: list[str] = []
        together: dict[int, tuple[list[str], FeaturesDone]] = {}
        for key, job in self.search.running.items():
            done = self.search.progress[key].features if key in self.search.progress else None
            if done is None:
                texts.append(self._job(job))
                continue
            assert not isinstance(job, IdleJob)
            titles, most = together.get(done.total, ([], done))
            together[done.total] = [*titles, job.title], max(most, done, key=lambda done: done.images)
        return texts + [f"{' and '.join(titles)}: {features_line(done)}" for titles, done in together.values()]

    def _job(self, job: Job) -> str:
        """Return a slot's progress with a job: `trial 3 epoch 2/5 40% 210 images/s`."""
        at = self.search.progress.get(job.key, StepsDone(0, 0))
        if isinstance(job, EvaluationJob):
            return f"evaluating {job.title} {100 * at.evaluated:.0f}%"
        assert isinstance(job, TrainJob | Pack)
        name = job.title
        if (began := self.search.began.get(job.key)) is None:
            return f"{name} starting"
        if not at.step or at.evaluated:
            return f"{name} {f'evaluating {100 * at.evaluated:.0f}%' if at.evaluated else 'running'}"
        speed = f" {at.figures['images_per_s']:.0f} images/s" if at.figures else ""
        return f"{name} epoch {at.epoch + 1}/{began.epochs} {100 * at.step / max(1, began.steps_per_epoch):.0f}%{speed}"

    def seconds_left(self) -> float | None:
        """Estimate the time left from the trials so far, the final comparison included; None before the first has ended."""
        if not (ended := self._spent_by_ended()):
            return None
        mean_s = statistics.fmean(one.slot_s for one in ended)
        running = [row for row in self.rows.values() if not row.has_ended and row.history]
        left_s = mean_s * max(0, self.space.num_trials - self.search.num_ended)
        left_s -= sum(min(mean_s, _slot_seconds(row)) for row in running)
        return max(0.0, left_s + self._comparison_s(ended)) / self.num_slots

    def _spent_by_ended(self) -> list[_Spent]:
        """Return the time of each trial that has ended, added up once: this is asked every second."""
        for number, row in self.rows.items():
            if number not in self._spent and row.has_ended and row.history:
                seconds = [metrics.seconds for metrics in row.history]
                evaluate_s = [one["evaluate_s"] for one in seconds if "evaluate_s" in one]
                self._spent[number] = _Spent(_slot_seconds(row), evaluate_s)
        return list(self._spent.values())

    def _comparison_s(self, ended: list[_Spent]) -> float:
        """Estimate the seconds of slot time that are left of the final comparison."""
        epochs = [seconds for one in ended for seconds in one.evaluate_s]
        data = self.search.data
        if not epochs or "validation" not in data.num_images:
            return 0.0
        image_s, run_s = statistics.fmean(epochs) / data.num_images["validation"], max(one.slot_s for one in ended)
        jobs = self.search.final_jobs() if self.search.trials_are_over else None
        return comparison_seconds(self.space, jobs, data.num_images, image_s, run_s, retrains=data.retrains)


def features_line(done: FeaturesDone) -> str:
    """Return the progress of computing features as text."""
    line = f"computing features of the frozen blocks: {done.images:,} of {count(done.total, 'image')}"
    if not done.images_per_s:
        return line
    left_s = (done.total - done.images) / done.images_per_s
    return f"{line}, {done.images_per_s:,.0f} images/s, {left_s:,.0f} s left"


def _slot_seconds(row: TrialRow) -> float:
    """Return the seconds of a trial in its slot, without those of cached features, which no other trial computes again."""
    return sum(row.seconds(name) for name in ("begin_s", "train_s", "evaluate_s", "save_s"))


def time_breakdown(rows: list[TrialRow], monitor: Monitor, slots: int, total_s: float) -> dict[str, float]:
    """Return the seconds of wall time by activity; time inside slots is divided by their number."""
    search_s = max(0.0, monitor.last_result_s - (monitor.first_step_s or 0.0))
    per_slot = {name: sum(row.seconds(name) for row in rows) / slots for name in SECONDS}
    return {
        "start": monitor.first_step_s or 0.0,
        "of which loading": per_slot["load_s"],
        "cached features": per_slot["features_s"],
        "training steps": per_slot["train_s"] - per_slot["data_wait_s"],
        "waiting for data": per_slot["data_wait_s"],
        "evaluation": per_slot["evaluate_s"],
        "saving": per_slot["save_s"],
        "between trials and idle": max(
            0.0, search_s - sum(per_slot[name] for name in ("features_s", "train_s", "evaluate_s", "save_s"))
        ),
        "final comparison": total_s - (monitor.trials_over_s or 0.0),
        "total": total_s,
    }
