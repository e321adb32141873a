"""Which trials go on: pure functions of the figures reported so far.

Nothing is remembered here, so a search that goes on after its driver was killed decides as it would have.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lift_ray.results.rows import TrialRow
from lift_ray.settings.search import Asha, Hyperband, Median, NoScheduler, Pbt, num_brackets, rungs
from lift_ray.settings.space import SpaceFile

Decision = Literal["go on", "stop", "pause"]
PERTURBED = ("optim.lr", "loss.tau")


@dataclass(frozen=True)
class Takeover:
    """What a paused trial goes on with: the weights of trial `source` (its own when None), under these settings."""

    source: int | None
    values: dict[str, Any]


def decide(space: SpaceFile, row: TrialRow, rows: Sequence[TrialRow]) -> Decision:
    """What becomes of a trial after its last reported epoch. Start points are never stopped early.

    Args:
        rows: all trials, in any order; those of other groups are left out.
    """
    if not row.history or row.is_done:
        return "go on"
    if isinstance(space.search.scheduler, Pbt):
        return "pause" if row.paused_at(space.search.scheduler.interval_epochs) else "go on"
    if row.start is not None:
        return "go on"
    others = [other for other in rows if other.number != row.number and other.group == row.group]
    return RULES[type(space.search.scheduler)](space, row, others)


def _never(space: SpaceFile, row: TrialRow, others: Sequence[TrialRow]) -> Decision:
    return "go on"


def _asha(space: SpaceFile, row: TrialRow, others: Sequence[TrialRow]) -> Decision:
    """Stop at a rung when worse than the best 1 / reduction_factor of those that were there before."""
    scheduler = space.search.scheduler
    assert isinstance(scheduler, Asha | Hyperband)
    most, epoch = space.most_epochs(), len(row.history)
    number = num_brackets(scheduler, most)
    if epoch not in rungs(scheduler, most, row.number % number):
        return "go on"
    there = [
        _score(space, o, epoch) for o in others if o.number % number == row.number % number and len(o.history) >= epoch
    ]
    if not there:
        return "go on"
    cutoff = np.percentile(there, 100 * (1 - 1 / scheduler.reduction_factor))
    return "stop" if _score(space, row, epoch) < cutoff else "go on"


def _median(space: SpaceFile, row: TrialRow, others: Sequence[TrialRow]) -> Decision:
    scheduler = space.search.scheduler
    assert isinstance(scheduler, Median)
    epoch = len(row.history)
    there = [
        statistics.fmean(_score(space, o, e) for e in range(1, epoch + 1)) for o in others if len(o.history) >= epoch
    ]
    if epoch < scheduler.grace_epochs or len(there) < scheduler.min_trials:
        return "go on"
    best = max(_score(space, row, e) for e in range(1, epoch + 1))
    return "stop" if best < statistics.median(there) else "go on"


def _score(space: SpaceFile, row: TrialRow, epoch: int) -> float:
    """The first objective after an epoch; larger is better."""
    metric, mode = space.objective
    return row.history[epoch - 1][metric] * (1 if mode == "max" else -1)


def takeovers(space: SpaceFile, rows: Sequence[TrialRow]) -> dict[int, Takeover]:
    """What every paused trial of population based training goes on with, by number; the same whenever it is asked."""
    scheduler = space.search.scheduler
    assert isinstance(scheduler, Pbt)
    paused = [row for row in rows if row.state == "paused"]
    epoch = min((len(row.history) for row in paused), default=0)
    paused = [row for row in paused if len(row.history) == epoch]
    ranked = sorted(paused, key=lambda row: (-_score(space, row, epoch), row.number))
    number = int(len(ranked) * scheduler.quantile)
    best, worst = ranked[:number], ranked[len(ranked) - number :]
    out = {row.number: Takeover(None, row.values) for row in paused}
    for row in worst:
        if row.start is not None:
            continue
        chance = random.Random(f"{space.search.seed} {row.number} {epoch}")
        source = chance.choice(best)
        out[row.number] = Takeover(source.number, _perturbed(space, source.values, scheduler.factor, chance))
    return out


def _perturbed(space: SpaceFile, values: Mapping[str, Any], factor: float, chance: random.Random) -> dict[str, Any]:
    """Other learning rate and tau, within the space."""
    out = dict(values)
    for name in PERTURBED:
        if name in out and (bounds := space.space[name].bounds) and not space.space[name].step:
            out[name] = min(bounds[1], max(bounds[0], out[name] * chance.choice((factor, 1 / factor))))
    return out


Rule = Callable[[SpaceFile, TrialRow, Sequence[TrialRow]], Decision]
RULES: dict[type, Rule] = {NoScheduler: _never, Asha: _asha, Hyperband: _asha, Median: _median}
