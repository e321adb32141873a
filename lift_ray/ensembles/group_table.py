"""What several models gain together: by data group and parameter group, and how often they differ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.evaluation.accumulator import MetricAccumulator
from lift_ray.evaluation.metrics import ANY, GROUPS, PerClass, class_groups


class GroupGainTable:
    """Counts beside the evaluation of several models together: each alone, and how often two of them differ.

    Args:
        names: of the M models.
        num_classes: K.
        device: where the logits are.
    """

    def __init__(self, names: Sequence[str], num_classes: int, device: torch.device) -> None:
        self.names = list(names)
        self._alone = [MetricAccumulator(num_classes, device) for _ in names]
        self._differ = torch.zeros(len(names), len(names), dtype=torch.int64, device=device)

    def add(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Count a batch: logits (B, K) of each model, labels (B,)."""
        for tally, mine in zip(self._alone, logits, strict=True):
            tally.add(mine, labels)
        found = torch.stack([mine.argmax(1) for mine in logits])
        self._differ += (found[:, None] != found[None]).sum(-1)

    def tensors(self) -> list[Tensor]:
        """What the caller must sum over the ranks, in place, before `result`."""
        return [self._differ, *(tensor for tally in self._alone for tensor in tally.tensors())]

    def result(
        self, split: str, together: PerClass, train_counts: NDArray[np.int64], p_groups: NDArray[np.str_] | None
    ) -> dict[str, Any]:
        """The report, JSON throughout.

        Args:
            together: counts by class of the models together.
            train_counts: (K,), what makes a class many, medium or few in the data (D).
            p_groups: (K,), the same by label prior of the foundation models (P); None where that is not known.

        Returns:
            members: {name: metrics as `split/name`}. best: the member with the best mean class accuracy on this very split, so
            that what is gained over it is rather too small. groups: {D: {P: cell}}, D and P many, medium, few or all, of
            the means of class accuracies: classes (their number), mean (of the members), best, together, gain (together -
            mean), gain_over_best; cells without classes are left out. disagreement: [name, name, share of images].
        """
        members = [tally.result(train_counts) for tally in self._alone]
        best = max(range(len(members)), key=lambda m: members[m][0]["mean_class_accuracy"])
        images = int(together.total.sum())
        differ = self._differ.cpu().numpy()
        return {
            "members": {
                name: {f"{split}/{metric}": value for metric, value in figures.items()}
                for name, (figures, _) in zip(self.names, members, strict=True)
            },
            "best": self.names[best],
            "groups": _groups([classes for _, classes in members], best, together, train_counts, p_groups),
            "disagreement": [
                [self.names[a], self.names[b], differ[a, b] / images] for a, b in combinations(range(len(members)), 2)
            ],
        }


def _groups(
    members: Sequence[PerClass],
    best: int,
    together: PerClass,
    train_counts: NDArray[np.int64],
    p_groups: NDArray[np.str_] | None,
) -> dict[str, dict[str, dict[str, float]]]:
    seen = together.total > 0
    d_groups = class_groups(train_counts)
    shares = [classes.correct[seen] / classes.total[seen] for classes in (*members, together)]
    out: dict[str, dict[str, dict[str, float]]] = {}
    for d in (*GROUPS, ANY):
        for p in (*GROUPS, ANY):
            here = ((d_groups == d) | (d == ANY))[seen] & (
                np.full(seen.sum(), p == ANY) if p_groups is None else ((p_groups == p) | (p == ANY))[seen]
            )
            if here.any():
                *alone, after = (float(share[here].mean()) for share in shares)
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
