"""Gain of an ensemble by data group and parameter group, and disagreement between its members."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.epoch_metrics import GROUPS, MAIN
from lift_ray.evaluation.accumulator import MetricAccumulator
from lift_ray.evaluation.evaluator import LogitBatch
from lift_ray.evaluation.metrics import ANY, PerClass


class GroupGainTable:
    """Counts during the evaluation of an ensemble: metrics of each member, and disagreement between two members.

    Args:
        names: names of the M members.
        shift: (K,), subtracted from the logits of each member.
    """

    def __init__(self, names: Sequence[str], shift: Tensor) -> None:
        self.names, self.shift = list(names), shift
        self._alone = [MetricAccumulator(len(shift), shift.device) for _ in names]
        self._differ = torch.zeros(len(names), len(names), dtype=torch.int64, device=shift.device)

    def add(self, batch: LogitBatch) -> None:
        """Count a batch with the logits of each member."""
        logits = [mine - self.shift for mine in batch.members]
        for tally, mine in zip(self._alone, logits, strict=True):
            tally.add(mine, batch.labels)
        found = torch.stack([mine.argmax(1) for mine in logits])
        self._differ += (found[:, None] != found[None]).sum(-1)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the caller must sum over the ranks, in place, before `result`."""
        return [self._differ, *(tensor for tally in self._alone for tensor in tally.tensors())]

    def result(
        self, split: str, together: PerClass, d_groups: NDArray[np.str_], p_groups: NDArray[np.str_] | None
    ) -> dict[str, Any]:
        """Return the report, for JSON.

        Args:
            split: name of the split.
            together: counts by class of the ensemble.
            d_groups: (K,), data group D of each class, by its training images.
            p_groups: (K,), its parameter group P, by the label prior of the foundation models; None if unknown.

        Returns:
            members: {name: metrics as `split/name`}.
            best: the member with the best mean class accuracy. It is chosen on this split, so the gain over it is underestimated.
            groups: {D: {P: cell}}, D and P being many, medium, few or all. A cell has classes (their number) and means of class
            accuracies: mean (of the members), best, together (the ensemble), gain (together - mean) and gain_over_best. Cells
            without classes are left out.
            disagreement: [name, name, fraction of images].
        """
        members = [tally.result(d_groups) for tally in self._alone]
        best = max(range(len(members)), key=lambda m: members[m][0][MAIN])
        images = int(together.total.sum())
        differ = self._differ.cpu().numpy()
        return {
            "members": {
                name: {f"{split}/{metric}": value for metric, value in figures.items()}
                for name, (figures, _) in zip(self.names, members, strict=True)
            },
            "best": self.names[best],
            "groups": _groups([classes for _, classes in members], best, together, d_groups, p_groups),
            "disagreement": [
                [self.names[a], self.names[b], differ[a, b] / images] for a, b in combinations(range(len(members)), 2)
            ],
        }


def _groups(
    members: Sequence[PerClass],
    best: int,
    together: PerClass,
    d_groups: NDArray[np.str_],
    p_groups: NDArray[np.str_] | None,
) -> dict[str, dict[str, dict[str, float]]]:
    seen = together.total > 0
    accuracies = [classes.correct[seen] / classes.total[seen] for classes in (*members, together)]
    out: dict[str, dict[str, dict[str, float]]] = {}
    for d in (*GROUPS, ANY):
        for p in (*GROUPS, ANY):
            here = ((d_groups == d) | (d == ANY))[seen] & (
                np.full(seen.sum(), p == ANY) if p_groups is None else ((p_groups == p) | (p == ANY))[seen]
            )
            if here.any():
                *alone, after = (float(accuracy[here].mean()) for accuracy in accuracies)
                mean = sum(alone) / len(alone)
                out.setdefault(d, {})[p] = {
                    "classes": int(here.sum()),
                    "mean": mean,
                    "best": alone[best],
                    "together": after,
                    "gain": after - mean,
                    "gain_over_best": after - alone[best],
                }
    return out
