"""Cached outputs of frozen blocks, which a search would otherwise compute again in every run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch


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

    def fits(self, key: Hashable, num_bytes: int, limit_bytes: float) -> bool:
        """Return True if the entry is cached, or if adding this many bytes keeps the whole cache within the limit."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        return key in self._tensors or num_bytes + held <= limit_bytes

    def get(self, key: Hashable, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the entry; it is computed the first time, and nothing is stored if that raises."""
        if key not in self._tensors:
            self._tensors[key] = compute()
        return self._tensors[key]
