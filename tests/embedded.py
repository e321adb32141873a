"""The embedded datasets, opened once, and not before a test needs them."""

from __future__ import annotations

from functools import cache

import numpy as np

from lift_ray.data.dataset import Split
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader


@cache
def embedded(split: str, dataset: str = "caltech101") -> Split:
    return open_dataset(f"embedded:{dataset}").split(split)


@cache
def jpegs(count: int = 12, split: str = "validation", dataset: str = "caltech101", step: int = 1) -> list[bytes]:
    """Return the bytes of `count` images: every `step`-th of a split, from its first."""
    with RowReader(embedded(split, dataset)) as reader:
        return reader.read(np.arange(0, count * step, step))
