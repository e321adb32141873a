"""Cached outputs of frozen blocks, which a search would otherwise compute again in every run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lift_ray.data.longtail import Int64s


class FeatureCache:
    """Features of frozen blocks, and classifier weights made from them, kept for all runs of a process.

    Nothing is ever evicted: runs of a search return to the same backbone and split.
    """

    def __init__(self) -> None:
        self._tensors: dict[Hashable, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tensors

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        return self._tensors[key]

    def fits(self, key: Hashable, num_bytes: int, limit_bytes: float) -> bool:
        """Return True if the entry is cached, or if adding this many bytes keeps the whole cache within the limit."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        return key in self._tensors or num_bytes + held <= limit_bytes

    def get(self, key: Hashable, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the entry; it is computed the first time, and nothing is stored if that raises."""
        if key not in self._tensors:
            self._tensors[key] = compute()
        return self._tensors[key]


@dataclass(frozen=True)
class Part:
    """Cached features of a whole split, of which a split may use some.

    Args:
        features: (N, ...).
        stop: they are the output of the blocks below this one.
        samples: numbers of the samples to use; None for all.
    """

    features: torch.Tensor
    stop: int
    samples: Int64s | None = None

    def __len__(self) -> int:
        return len(self.features if self.samples is None else self.samples)


class Features:
    """Features of a split, indexed by sample numbers. Splits made from the same images share them without a copy.

    Args:
        parts: where they are cached, part after part.
        deepen: (features, first block to run) -> features, for parts that lack blocks.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        deepen: Callable[[torch.Tensor, int], torch.Tensor] = lambda features, start: features,
    ) -> None:
        self.parts, self.deepen, self.device = parts, deepen, parts[0].features.device
        self._ends = np.cumsum([len(part) for part in parts])

    def __getitem__(self, wanted: slice | Int64s) -> torch.Tensor:
        """Return the features of some samples, (n, ...). Taking a batch is as fast as from a copy of the split in memory."""
        first = self.parts[0]
        if isinstance(wanted, slice) and first.samples is None and len(self.parts) == 1:
            return self.deepen(first.features[wanted], first.stop)
        numbers = np.arange(self._ends[-1])[wanted]
        part_of = np.searchsorted(self._ends, numbers, side="right")
        taken = []
        for index, (part, end) in enumerate(zip(self.parts, self._ends, strict=True)):
            mine = numbers[part_of == index] - (end - len(part))
            mine = mine if part.samples is None else part.samples[mine]
            taken.append(self.deepen(self._rows(part.features, mine), part.stop))
        if len(taken) == 1:
            return taken[0]
        return self._rows(torch.cat(taken), np.argsort(np.argsort(part_of, kind="stable")))

    def _rows(self, features: torch.Tensor, numbers: Int64s) -> torch.Tensor:
        return features.index_select(0, torch.from_numpy(numbers).to(self.device))
