"""One pass over a split for several models: each picture is read and decoded once, and cropped for each size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.augment import centre_crop, corners_and_centre
from lift_ray.data.batches import IMAGE_ERRORS, _ahead, _broken
from lift_ray.data.dataset import Split
from lift_ray.data.decode import Pixels, decode
from lift_ray.data.longtail import Int64s
from lift_ray.data.order import READ_AHEAD_SAMPLES, rank_slice
from lift_ray.data.reader import RowReader

Pictures = dict["View", Tensor]


@dataclass(frozen=True)
class View:
    """What a model looks at: the centre of a picture, or five crops of it, at a size."""

    size_px: int
    crops: bool = False

    def of(self, picture: Pixels) -> Pixels:
        """(H, W, 3) -> (size, size, 3) or (5, size, size, 3), as `evaluation_batches` makes them."""
        return (corners_and_centre if self.crops else centre_crop)(picture, self.size_px)


def view_batches(
    reader: RowReader,
    split: Split,
    views: Sequence[View],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 1,
) -> Iterator[tuple[Pictures, Tensor]]:
    """This rank's stretch of a split: for each view (b, 3, H, W) or (b, 5, 3, H, W) uint8, and labels (b,).

    Raises BadInput for a picture that cannot be read.
    """
    mine = np.arange(split.num_samples)[rank_slice(split.num_samples, rank, world_size)]

    def samples(step: int) -> Int64s:
        return mine[step * batch_size : (step + 1) * batch_size]

    def make(step: int) -> tuple[Pictures, Tensor]:
        rows: dict[View, list[Pixels]] = {view: [] for view in views}
        for sample, data in zip(samples(step), reader.read(samples(step)), strict=True):
            try:
                picture = decode(data)
                for view, made in rows.items():
                    made.append(np.moveaxis(view.of(picture), -1, -3))
            except IMAGE_ERRORS as error:
                raise _broken(split, sample, error) from None
        pictures = {view: torch.from_numpy(np.stack(made)) for view, made in rows.items()}
        return pictures, torch.from_numpy(split.labels[samples(step)])

    steps = range(-(-len(mine) // batch_size))
    return _ahead(
        make, steps, num_threads, lambda step: reader.prefetch(samples(step)), -(-READ_AHEAD_SAMPLES // batch_size)
    )
