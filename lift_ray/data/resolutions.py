"""Batches for several models in one pass over a split: each image is read and decoded once, then cropped for each size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.augment import View
from lift_ray.data.bad_image import BadImage
from lift_ray.data.batches import made_ahead
from lift_ray.data.dataset import Split
from lift_ray.data.decode import Pixels, decode
from lift_ray.data.decoder_process import broken_image
from lift_ray.data.longtail import Int64s
from lift_ray.data.order import READ_AHEAD_SAMPLES, rank_slice
from lift_ray.data.reader import RowReader

Images = dict[View, Tensor]


def view_batches(
    reader: RowReader,
    split: Split,
    views: Sequence[View],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 1,
) -> Iterator[tuple[Images, Tensor]]:
    """Yield this rank's slice of a split: for each view (b, *view.shape) uint8, and labels (b,).

    Threads decode, also where processes do for a single view: each image is decoded once, for inputs of several shapes.

    Raises BadInput for an image that cannot be read.
    """
    mine = np.arange(split.num_samples)[rank_slice(split.num_samples, rank, world_size)]

    def samples(step: int) -> Int64s:
        return mine[step * batch_size : (step + 1) * batch_size]

    def make(step: int) -> tuple[Images, Tensor]:
        rows: dict[View, list[Pixels]] = {view: [] for view in views}
        for sample, data in zip(samples(step), reader.read(samples(step)), strict=True):
            try:
                image = decode(data)
                for view, made in rows.items():
                    made.append(np.moveaxis(view.of(image), -1, -3))
            except BadImage as error:
                raise broken_image(split, int(split.rows[sample]), error) from None
        images = {view: torch.from_numpy(np.stack(made)) for view, made in rows.items()}
        return images, torch.from_numpy(split.labels[samples(step)])

    steps = range(-(-len(mine) // batch_size))
    return made_ahead(
        make, steps, num_threads, lambda step: reader.prefetch(samples(step)), -(-READ_AHEAD_SAMPLES // batch_size)
    )
