"""Early stopping, as pure functions of the metrics reported so far.

They keep no state, so a search that is resumed after its driver was killed decides as it would have without the interruption.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching.study import WORST
from lift_ray.settings.search import AshaConfig, HyperbandConfig, MedianConfig, NoSchedulerConfig, num_brackets, rungs
from lift_ray.settings.space import SpaceFile

Decision = Literal["continue", "stop"]


def decide(space: SpaceFile, row: TrialRow, rows: Sequence[TrialRow]) -> Decision:
    """Decide whether a trial continues after its last reported epoch. Baselines are never stopped early.

    Args:
        rows: all trials, in any order; a trial is only compared with those of its group.
    """
    if not row.history or row.is_done or row.baseline is not None:
        return "continue"
    others = [other for other in rows if other.number != row.number and other.group == row.group]
    return RULES[type(space.search.scheduler)](space, row, others)


def _never(space: SpaceFile, row: TrialRow, others: Sequence[TrialRow]) -> Decision:
    return "continue"


def _asha(space: SpaceFile, row: TrialRow, others: Sequence[TrialRow]) -> Decision:
    """Stop a trial at a rung if it is worse than the best 1 / reduction_factor of the trials that have reached the rung."""
    scheduler = space.search.scheduler
    assert isinstance(scheduler, AshaConfig | HyperbandConfig)
    most, epoch = space.most_epochs(), len(row.history)
    number = num_brackets(scheduler, most)
    if epoch not in rungs(scheduler, most, row.number % number):
        return "continue"
    there = [
        _score(space, o, epoch) for o in others if o.number % number == row.number % number and len(o.history) >= epoch
    ]
    if not there:
        return "continue"
    cutoff = np.percentile(there, 100 * (1 - 1 / scheduler.reduction_factor))
    return "stop" if _score(space, row, epoch) < cutoff else "continue"


def _median(space: SpaceFile, row: TrialRow, others: Sequence[TrialRow]) -> Decision:
    """Stop a trial whose best score so far is worse than the median of the other trials' mean scores up to the same epoch."""
    scheduler = space.search.scheduler
    assert isinstance(scheduler, MedianConfig)
    epoch = len(row.history)
    there = [
        statistics.fmean(_score(space, o, e) for e in range(1, epoch + 1)) for o in others if len(o.history) >= epoch
    ]
    if epoch < scheduler.grace_epochs or len(there) < scheduler.min_trials:
        return "continue"
    best = max(_score(space, row, e) for e in range(1, epoch + 1))
    return "stop" if best < statistics.median(there) else "continue"


def _score(space: SpaceFile, row: TrialRow, epoch: int) -> float:
    """Return the first objective after an epoch, with its sign set so that larger is better; the worst value if it is missing."""
    metric, mode = space.objective
    value = row.history[epoch - 1].get(metric)
    return -WORST if value is None else value * (1 if mode == "max" else -1)


Rule = Callable[[SpaceFile, TrialRow, Sequence[TrialRow]], Decision]
RULES: dict[type, Rule] = {NoSchedulerConfig: _never, AshaConfig: _asha, HyperbandConfig: _asha, MedianConfig: _median}
