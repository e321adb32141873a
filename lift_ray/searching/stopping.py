"""Early stopping: a trial that reaches a rung is compared with those that have reached it before.

All that it remembers follows from the epochs reported so far, so a search that is resumed after its driver was killed decides as it
would have without the interruption.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching.study import WORST
from lift_ray.settings.search import AshaConfig, HyperbandConfig, MedianConfig, num_brackets, rungs
from lift_ray.settings.space import SpaceFile

Decision = Literal["continue", "stop"]


class Stopping:
    """Decides which trials end early. A decision looks at the scores of one rung, which are kept sorted, and at no trial.

    Args:
        rows: the trials so far, in any order. A trial is only compared with those of its group.
    """

    def __init__(self, space: SpaceFile, rows: Iterable[TrialRow] = ()) -> None:
        self._scheduler, (self._metric, mode) = space.search.scheduler, space.objective
        self._sign = 1 if mode == "max" else -1
        self._rungs: list[set[int]] = []  # by bracket
        if isinstance(self._scheduler, AshaConfig | HyperbandConfig):
            most = space.most_epochs()
            brackets = range(num_brackets(self._scheduler, most))
            self._rungs = [set(rungs(self._scheduler, most, bracket)) for bracket in brackets]
        self._there: defaultdict[tuple[str, int, int], list[float]] = defaultdict(list)  # by group, bracket and epoch
        for row in rows:
            for epoch in range(1, len(row.history) + 1):
                self._add(row, epoch)

    def reported(self, row: TrialRow) -> None:
        """Take the trial's last epoch into account."""
        self._add(row, len(row.history))

    def decide(self, row: TrialRow) -> Decision:
        """Decide whether a trial continues after its last reported epoch. Baselines are never stopped early."""
        epoch = len(row.history)
        if not epoch or row.is_done or row.baseline is not None or not self._is_rung(row, epoch):
            return "continue"
        there = self._there[self._key(row, epoch)]
        own = bisect_left(there, self._compared(row, epoch))
        others = there[:own] + there[own + 1 :]
        if isinstance(self._scheduler, MedianConfig):
            best = max(self._score(row, e) for e in range(1, epoch + 1))
            is_worse = len(others) >= self._scheduler.min_trials and best < statistics.median(others)
        else:
            assert isinstance(self._scheduler, AshaConfig | HyperbandConfig)
            share = 1 - 1 / self._scheduler.reduction_factor
            is_worse = bool(others) and self._score(row, epoch) < quantile(others, share)
        return "stop" if is_worse else "continue"

    def _add(self, row: TrialRow, epoch: int) -> None:
        if self._is_rung(row, epoch):
            insort(self._there[self._key(row, epoch)], self._compared(row, epoch))

    def _is_rung(self, row: TrialRow, epoch: int) -> bool:
        """Return True if trials are compared after this epoch: for ASHA at the rungs of the trial's bracket."""
        if isinstance(self._scheduler, MedianConfig):
            return epoch >= self._scheduler.grace_epochs
        return bool(self._rungs) and epoch in self._rungs[row.number % len(self._rungs)]

    def _key(self, row: TrialRow, epoch: int) -> tuple[str, int, int]:
        return row.group, row.number % max(1, len(self._rungs)), epoch

    def _compared(self, row: TrialRow, epoch: int) -> float:
        """Return what others are compared with: the score, or with the median rule its mean up to the epoch."""
        if isinstance(self._scheduler, MedianConfig):
            return statistics.fmean(self._score(row, e) for e in range(1, epoch + 1))
        return self._score(row, epoch)

    def _score(self, row: TrialRow, epoch: int) -> float:
        """Return the first objective after an epoch, larger is better; the worst value if there is none."""
        value = row.history[epoch - 1].get(self._metric)
        return -WORST if value is None or math.isnan(value) else value * self._sign


def quantile(values: list[float], share: float) -> float:
    """Return the value that this share of sorted values is below, between two of them by linear interpolation, as numpy rounds it."""
    place = share * (len(values) - 1)
    index = min(math.floor(place), len(values) - 2)
    if index < 0:
        return values[0]
    (below, above), part = values[index : index + 2], place - index
    return below + (above - below) * part if part < 0.5 else above - (above - below) * (1 - part)
