"""Streams of batches, compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lift_ray.data.batches import Batch


def assert_same(one: Iterable[Batch], other: Iterable[Batch], *, at_least: int = 2) -> None:
    pairs = list(zip(one, other, strict=True))
    assert len(pairs) >= at_least
    for a, b in pairs:
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert (a.patches is None and b.patches is None) or torch.equal(a.patches, b.patches)  # type: ignore[arg-type]
