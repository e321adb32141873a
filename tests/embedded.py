"""The embedded datasets, opened once, and not before a test needs them; and a small CLIP that knows something of them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from lift_ray.data.dataset import Split
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader

LIFT_TINY = f"local-dir:{Path(__file__).parent / 'lift-tiny'}"


@cache
def embedded(split: str, dataset: str = "caltech101-lt") -> Split:
    return open_dataset(f"embedded:{dataset}").split(split)


@cache
def jpegs(count: int = 12, split: str = "validation", dataset: str = "caltech101-lt", step: int = 1) -> list[bytes]:
    """Return the bytes of `count` images: every `step`-th of a split, from its first."""
    with RowReader(embedded(split, dataset)) as reader:
        return reader.read(np.arange(0, count * step, step))


@dataclass(frozen=True)
class OnePixel:
    """A source in which every image is the same PNG of one pixel, so that large ones are converted in seconds."""

    def __call__(self, reference: str) -> bytes:
        return _one_pixel()


@cache
def _one_pixel() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    return file.getvalue()
