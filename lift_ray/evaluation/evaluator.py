"""Evaluation of a model on a split: one pass over the images, in which everything is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.data.dataset import Split
from lift_ray.data.order import rank_slice
from lift_ray.epoch_metrics import ACCURACIES, Metrics
from lift_ray.evaluation.accumulator import MetricAccumulator, PredictionCollector, TauGrid, halves_of, shift_of
from lift_ray.evaluation.metrics import ClassGroups, PerClass
from lift_ray.methods.world import Ranks
from lift_ray.model.device import counting_device


@dataclass(frozen=True)
class LogitBatch:
    """Logits of consecutive images of a split.

    Args:
        logits: (b, K), raw.
        labels: (b,).
        branches: (b, K) each, logits of the branches of the classifier by name, if it has several (ULFine).
        members: (b, K) each, logits of the members of an ensemble.
    """

    logits: Tensor
    labels: Tensor
    branches: Mapping[str, Tensor] = field(default_factory=dict)
    members: Sequence[Tensor] = ()

    def on(self, device: torch.device) -> LogitBatch:
        """Return the batch on a device; the same batch if it is already on a device of this kind."""
        if self.logits.device.type == device.type:
            return self
        return LogitBatch(
            self.logits.to(device),
            self.labels.to(device),
            {name: logits.to(device) for name, logits in self.branches.items()},
            [logits.to(device) for logits in self.members],
        )


class LogitSource(Protocol):
    """A single model or an ensemble that can be evaluated.

    Attributes:
        ranks: this process among those that evaluate together.
        class_counts: (K,), training images of each class; they define the prior.
        groups: many, medium and few, by the labeled training images of the dataset.
        branches: names of `LogitBatch.branches`.
    """

    ranks: Ranks
    class_counts: NDArray[np.int64]
    groups: ClassGroups
    branches: Sequence[str]

    def logits(self, split: Split) -> Iterator[LogitBatch]:
        """Yield the logits of this rank's part of a split, in storage order."""


class Counter(Protocol):
    """Counts over the images of a split."""

    def add(self, batch: LogitBatch) -> None:
        """Count a batch."""

    def tensors(self) -> list[Tensor]:
        """Return the counts, which are summed over the ranks in place."""


@dataclass(frozen=True)
class AtTau:
    """Result of an evaluation with one strength of the post-hoc adjustment.

    Args:
        metrics: by name (epoch_metrics.METRICS); accuracies of the classifier's branches without adjustment as `few_linear`.
        per_class: counts of each class.
        predictions: predicted class and its probability for each image of the split, (N,) each, if requested.
    """

    metrics: Metrics
    per_class: PerClass
    predictions: tuple[NDArray[np.int64], NDArray[np.float64]] | None


@dataclass(frozen=True)
class Evaluation:
    """Everything that one pass over a split has found, the same on every rank.

    Args:
        at_tau: one result for each strength of the post-hoc adjustment.
        posthoc: the best strength and its effect (TauGrid.result), if requested.
        seconds: duration.
    """

    at_tau: Sequence[AtTau]
    posthoc: Metrics
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics with the first strength, and `posthoc`."""
        return {**self.at_tau[0].metrics, **self.posthoc}


def evaluate(
    model: LogitSource,
    split: Split,
    taus: Sequence[float] = (0.0,),
    *,
    predictions: bool = False,
    tau_grid: Sequence[float] = (),
    counters: Sequence[Counter] = (),
    callback: Callable[[float], None] = lambda fraction: None,
) -> Evaluation:
    """Evaluate a model over all ranks; each image is read and counted once. All ranks must call it together.

    Args:
        taus: strengths of the post-hoc adjustment z - tau * log prior, one result for each; logits are computed once.
        predictions: also return the prediction of each image.
        tau_grid: strengths to choose the best one from.
        counters: further counts.
        callback: called before each batch is counted, with the fraction of the split that is computed. It may raise.
    """
    began, ranks = time.monotonic(), model.ranks
    device = counting_device(ranks.device)
    num_classes, mine = len(model.class_counts), rank_slice(split.num_samples, ranks.rank, ranks.world_size)

    def collector() -> PredictionCollector | None:
        return PredictionCollector(split.num_samples, mine.start, device) if predictions else None

    shifts = [shift_of(tau, model.class_counts).to(device) for tau in taus]
    adjusted = [_Adjusted(shift, MetricAccumulator(num_classes, device), collector()) for shift in shifts]
    branches = _Branches({name: MetricAccumulator(num_classes, device) for name in model.branches})
    grids = []
    if tau_grid:
        halves = torch.from_numpy(halves_of(split.labels)[mine]).to(device)
        grids = [_Grid(TauGrid(tau_grid, model.class_counts, device), halves)]
    every: list[Counter] = [*adjusted, branches, *grids, *counters]
    done = 0
    with torch.inference_mode():
        for batch in model.logits(split):
            done += len(batch.labels)
            callback(min(1.0, done * ranks.world_size / split.num_samples))
            counted = batch.on(device)
            for counter in every:
                counter.add(counted)
    for counter in every:
        for tensor in counter.tensors():
            ranks.sum(tensor)
    of_branches = branches.result(model.groups.names)
    results = [counts.result(model.groups.names, of_branches) for counts in adjusted]
    return Evaluation(results, grids[0].grid.result() if grids else {}, time.monotonic() - began)


@dataclass
class _Adjusted:
    """Counts of the logits after `shift` (K,) is subtracted."""

    shift: Tensor
    accumulator: MetricAccumulator
    collector: PredictionCollector | None

    def add(self, batch: LogitBatch) -> None:
        logits = batch.logits.float() - self.shift
        self.accumulator.add(logits, batch.labels)
        if self.collector is not None:
            self.collector.add(logits)

    def tensors(self) -> list[Tensor]:
        return [*self.accumulator.tensors(), *(self.collector.tensors() if self.collector else [])]

    def result(self, groups: NDArray[np.str_], further: Metrics) -> AtTau:
        metrics, per_class = self.accumulator.result(groups)
        return AtTau({**metrics, **further}, per_class, self.collector.result() if self.collector else None)


@dataclass
class _Branches:
    """Counts of the logits of each branch, by its name."""

    accumulators: dict[str, MetricAccumulator]

    def add(self, batch: LogitBatch) -> None:
        for name, logits in batch.branches.items():
            self.accumulators[name].add(logits, batch.labels)

    def tensors(self) -> list[Tensor]:
        return [tensor for accumulator in self.accumulators.values() for tensor in accumulator.tensors()]

    def result(self, groups: NDArray[np.str_]) -> dict[str, float]:
        return {
            f"{metric}_{name}": value
            for name, accumulator in self.accumulators.items()
            for metric, value in accumulator.result(groups)[0].items()
            if metric in ACCURACIES
        }


@dataclass
class _Grid:
    """Counts of a TauGrid over this rank's images, whose halves (n,) are given."""

    grid: TauGrid
    halves: Tensor
    at: int = 0

    def add(self, batch: LogitBatch) -> None:
        self.grid.add(batch.logits, batch.labels, self.halves[self.at : self.at + len(batch.labels)])
        self.at += len(batch.labels)

    def tensors(self) -> list[Tensor]:
        return self.grid.tensors()
