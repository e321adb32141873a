"""Confirmation: the best trials and the baselines are trained on the other folds too, and out-of-fold predictions choose the winner.

Without folds, the winner is the best trial, and its predictions on the validation split choose the post-hoc tau.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lift_ray.epoch_metrics import MAIN, METRICS
from lift_ray.evaluation.resampling import ImageResults, all_metrics, metric_values, paired_difference
from lift_ray.reporting.trial_rows import TrialRow, best_of
from lift_ray.searching.jobs import EvaluationJob, Job, TrainJob, trial_checkpoint_path
from lift_ray.searching.predictions import OutOfFold, read_out_of_fold
from lift_ray.searching.search_data import SearchData
from lift_ray.settings.search import taus_of
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.output import Output

HALVINGS = 20  # random halves of the images that estimate the bias of choosing tau
Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class PosthocChoice:
    """The post-hoc tau that is best on out-of-fold predictions.

    Args:
        own: tau in the settings of the trial.
        best: the best tau.
        gain: value of the metric with it, minus the value with `own`; at least 0.
        bias: how much of a gain comes from choosing on the same images that measure it, estimated on halves of them.
    """

    own: float
    best: float
    gain: float
    bias: float

    @property
    def is_recommended(self) -> bool:
        """True if the gain is larger than its bias."""
        return self.gain > self.bias

    @property
    def tau(self) -> float:
        """The tau to use."""
        return self.best if self.is_recommended else self.own


@dataclass(frozen=True)
class Candidate:
    """A trial with its post-hoc tau, compared with the winner on the same out-of-fold images.

    Args:
        value: metric on all out-of-fold predictions.
        difference: value minus that of the winner.
        error: standard error of the difference (bootstrap over classes); 0 for the winner.
    """

    row: TrialRow
    posthoc: PosthocChoice
    value: float
    difference: float = 0.0
    error: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The winner of a search.

    Args:
        metric: metric of the validation split that decided, without its prefix.
        candidates: the winner first, then the others by their value.
        predictions: the winner's out-of-fold predictions.
        parts: number of files with them, for each fold.
        curve: metrics of the winner on them for each tau, with the tau.
    """

    metric: str
    mode: str
    candidates: list[Candidate]
    predictions: OutOfFold
    parts: list[int]
    curve: list[dict[str, float]]

    @property
    def figures(self) -> dict[str, float]:
        """Metrics of the winner with its tau."""
        place = self.predictions.taus.index(self.posthoc.tau)
        return {name: value for name, value in self.curve[place].items() if name != "tau"}

    @property
    def num_images(self) -> int:
        """Number of out-of-fold images."""
        return len(self.predictions.label)

    @property
    def row(self) -> TrialRow:
        """The winning trial."""
        return self.candidates[0].row

    @property
    def posthoc(self) -> PosthocChoice:
        """The post-hoc tau of the winner."""
        return self.candidates[0].posthoc


def decides_by(space: SpaceFile) -> tuple[str, str]:
    """Return the metric that out-of-fold predictions are compared by, and max or min: the first objective, if images measure it."""
    metric, mode = space.objective
    prefix, _, name = metric.partition("/")
    return (name, mode) if prefix == "validation" and name in METRICS else (MAIN, "max")


def candidates(space: SpaceFile, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the finished trials that are confirmed, best first: the best ones and the baselines, or only the best one."""
    best = best_of(rows, space.objectives)
    if best is None or space.search.confirm is None:
        return [] if best is None else [best]
    finished, number = ranked(space, rows, best), space.search.confirm.best
    baselines = {row.number for row in compared_baselines(space, rows, is_over=True)}
    return [*finished[:number], *(row for row in finished[number:] if row.number in baselines)]


def compared_baselines(space: SpaceFile, rows: Sequence[TrialRow], *, is_over: bool) -> list[TrialRow]:
    """Return the finished baselines: of several with one name the best, which is known when all of them have ended.

    Args:
        is_over: True once all trials have ended.
    """
    labels = space.baseline_labels()
    named: dict[str, list[TrialRow]] = {}
    for row in rows:
        if row.baseline is not None:
            named.setdefault(labels[row.baseline], []).append(row)
    found = [
        best_of(group, space.objectives)
        for label, group in named.items()
        if is_over or (len(group) == labels.count(label) and all(row.has_ended for row in group))
    ]
    return [row for row in found if row is not None]


def ranked(space: SpaceFile, rows: Sequence[TrialRow], best: TrialRow) -> list[TrialRow]:
    """Return the finished trials, the best or winning one first and the others sorted by the first objective."""
    metric, mode = space.objective
    sign = -1 if mode == "max" else 1
    finished = [row for row in rows if row.state == "finished" and metric in row.last]
    return sorted(finished, key=lambda row: (row is not best, sign * row.last[metric], row.number))


def fold_jobs(space: SpaceFile, row: TrialRow) -> list[Job]:
    """Return the jobs that give the out-of-fold predictions of a finished trial, one for each fold."""
    config = space.config(row.values)
    path, plain = trial_checkpoint_path(row.number, row.last.epoch), config.to_dict()
    name, taus = f"trial-{row.number:04d}", taus_of(config)
    searched = EvaluationJob(name, plain, path, "validation", taus, out_of_fold=row.number)
    further = range(2, space.search.folds + 1)
    return [searched, *(TrainJob(row.number, plain, fold, then="hold out") for fold in further)]


def choose(space: SpaceFile, rows: Sequence[TrialRow], results: Results, data: SearchData, out: Output) -> Choice:
    """Choose the winner and its post-hoc tau from the out-of-fold predictions of the candidates; all fold jobs must be done.

    A candidate that diverged on a fold is left out, unless all did: then the best trial wins with the predictions that there are.

    Raises RunFailed if the storage of the predictions cannot be read.
    """
    metric, mode = decides_by(space)
    found: list[tuple[Candidate, OutOfFold]] = []
    for row in _without_diverged(space, candidates(space, rows), results):
        config = space.config(row.values)
        predictions = read_out_of_fold(out, row.number, _parts(space, row, results), taus_of(config))
        posthoc = posthoc_choice(predictions, config.evaluation.posthoc_tau, metric, mode, data.groups.names)
        value = _value(predictions.at(posthoc.tau), metric, data.groups.names)
        found.append((Candidate(row, posthoc, value), predictions))
    sign = 1 if mode == "max" else -1
    found.sort(key=lambda pair: (not np.isfinite(pair[0].value), -sign * pair[0].value, pair[0].row.number))
    if space.search.confirm is not None and space.search.confirm.prefer == "smaller":
        found.insert(0, found.pop(_smallest(found, metric, data.groups.names)))
    winner, predictions = found[0]
    best = predictions.at(winner.posthoc.tau)
    others = []
    for candidate, theirs in found[1:]:
        difference, error = paired_difference(theirs.at(candidate.posthoc.tau), best, metric, data.groups.names)
        others.append(Candidate(candidate.row, candidate.posthoc, candidate.value, difference, error))
    curve = [{"tau": tau, **all_metrics(predictions.at(tau), data.groups.names)} for tau in predictions.taus]
    return Choice(metric, mode, [winner, *others], predictions, _parts(space, winner.row, results), curve)


def _parts(space: SpaceFile, row: TrialRow, results: Results) -> list[int]:
    return [int(results[job.key].get("parts", 0)) for job in fold_jobs(space, row)]


def _without_diverged(space: SpaceFile, rows: Sequence[TrialRow], results: Results) -> Sequence[TrialRow]:
    return [row for row in rows if all(results[job.key] for job in fold_jobs(space, row))] or rows[:1]


def _smallest(found: Sequence[tuple[Candidate, OutOfFold]], metric: str, groups: NDArray[np.str_]) -> int:
    """Return the number of the candidate with the fewest trained parameters of those within one standard error of the first."""
    best = found[0][1].at(found[0][0].posthoc.tau)
    near = [0]
    for number, (candidate, theirs) in enumerate(found[1:], 1):
        difference, error = paired_difference(theirs.at(candidate.posthoc.tau), best, metric, groups)
        if abs(difference) <= error:
            near.append(number)
    return min(near, key=lambda number: (found[number][0].row.last.trained_parameters or 0, number))


def posthoc_choice(
    predictions: OutOfFold, own: float, metric: str, mode: str, groups: NDArray[np.str_]
) -> PosthocChoice:
    """Return the best tau, its gain over `own`, and the bias of that gain.

    The bias is the mean, over random halves of each class, of (best value on a half) - (its value with the tau that is best on the
    other half).
    """
    sign = 1 if mode == "max" else -1
    at_tau = [predictions.at(tau) for tau in predictions.taus]

    def values(keep: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        parts = at_tau if keep is None else [one.take(keep) for one in at_tau]
        return sign * np.array([_value(one, metric, groups) for one in parts])

    whole = values()
    if not np.isfinite(whole).any():
        return PosthocChoice(own, own, 0.0, float("inf"))
    best, place = int(np.nanargmax(whole)), predictions.taus.index(own)
    random, biases = np.random.default_rng(0), []
    for _ in range(HALVINGS):
        first = _half(predictions.label, random)
        halves = values(first), values(~first)
        if all(np.isfinite(half).all() for half in halves):
            a, b = halves
            biases.append((a.max() - a[b.argmax()] + b.max() - b[a.argmax()]) / 2)
    return PosthocChoice(
        own,
        predictions.taus[best],
        float(whole[best] - whole[place]),
        float(np.mean(biases)) if biases else float("inf"),
    )


def _half(labels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask, (N,), of a random half of the images of each class."""
    shuffled = random.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    half = np.empty(len(labels), bool)
    half[order] = np.arange(len(order)) % 2 == 0
    return half


def _value(results: ImageResults, metric: str, groups: NDArray[np.str_]) -> float:
    return float(metric_values(results, metric, groups, np.ones((1, len(groups))))[0])
