"""The order of samples, and a stream of decoded batches that runs ahead of the training step.

The order is a pure function of (seed, epoch, rows of the split), and so is the augmentation of every sample: the global
batches are the same for any number of workers, and resuming at a step equals skipping the steps before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.data.augment import crop_flip_picture, evaluation_picture, five_crops, smallest_area, training_picture
from lift_ray.data.catalog import Split
from lift_ray.data.longtail import Int64s
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput

Pixels = NDArray[np.uint8]
SHUFFLE_BUFFER = 8192
AHEAD = 3


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Args:
        images: (b, 3, H, W) uint8.
        labels: (b,) int64.
        patches: (b, P) int64, the patches that are looked at; None for all.
    """

    images: Tensor
    labels: Tensor
    patches: Tensor | None = None


def epoch_order(split: Split, seed: int, epoch: int) -> Int64s:
    """Sample numbers of one epoch, (N,): row groups permuted, then samples shuffled inside a bounded buffer."""
    random = np.random.default_rng([seed, epoch])
    ends = np.cumsum([rows for shard in split.shards for rows in shard.row_groups])
    group = np.searchsorted(ends, split.rows, side="right")
    order = np.argsort(random.permutation(len(ends))[group], kind="stable")
    for start in range(0, len(order), SHUFFLE_BUFFER):
        random.shuffle(order[start : start + SHUFFLE_BUFFER])
    return order


def training_batches(
    reader: RowReader, split: Split, *, size_px: int, global_batch_size: int, seed: int, epoch: int, epochs: int,
    schedule: str, kind: str = "mda", num_patches: int = 0, patch_dropout: float = 0.0, start_step: int = 0, rank: int = 0,
    world_size: int = 1, num_threads: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's share of every global batch of an epoch; the incomplete last batch is left out.

    Args:
        size_px: side of the square pictures.
        epoch: from 0, of `epochs` in the run; sets the augmentation's schedule.
        schedule: a key of augment.GROWTH, for `mda`.
        kind: mda, crop_flip, or none for the evaluation crop.
        num_patches: patches in a picture; only patch_dropout needs it.
        patch_dropout: share of them to leave out, in [0, 1); at least one stays.
        start_step: steps of this epoch that are done already.
    """
    order = epoch_order(split, seed, epoch)
    smallest = smallest_area(schedule, epoch, epochs)

    def make(step: int) -> Batch:
        at = slice(step * global_batch_size + rank, (step + 1) * global_batch_size, world_size)
        samples = order[at]
        random = np.random.default_rng([seed, epoch, step])
        draws = random.random((global_batch_size, 3))[rank::world_size]
        pictures: dict[str, Callable[[bytes, int], Pixels]] = {
            "mda": lambda data, i: training_picture(data, size_px, smallest, draws[i]),
            "crop_flip": lambda data, i: crop_flip_picture(data, size_px, draws[i]),
            "none": lambda data, i: evaluation_picture(data, size_px),
        }
        batch = _batch(reader, split, samples, pictures[kind])
        if not patch_dropout:
            return batch
        kept = kept_patches(random, global_batch_size, num_patches, patch_dropout)[rank::world_size]
        return replace(batch, patches=torch.from_numpy(kept))

    return _ahead(make, range(start_step, steps_per_epoch(split, global_batch_size)), num_threads)


def evaluation_batches(
    reader: RowReader, split: Split, *, size_px: int, batch_size: int = 250, rank: int = 0, world_size: int = 1,
    num_threads: int = 1, crops: bool = False, samples: Int64s | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """This rank's share of a split, or of some of its samples; over all ranks every sample comes exactly once.

    Args:
        crops: five crops of each picture: images (b, 5, 3, H, W).
        samples: sample numbers; all when not given.
    """
    mine = (np.arange(split.num_samples) if samples is None else samples)[rank::world_size]
    picture = five_crops if crops else evaluation_picture

    def make(step: int) -> Batch:
        return _batch(
            reader, split, mine[step * batch_size : (step + 1) * batch_size], lambda data, i: picture(data, size_px)
        )

    return _ahead(make, range(-(-len(mine) // batch_size)), num_threads)


def steps_per_epoch(split: Split, global_batch_size: int) -> int:
    """Whole global batches in one epoch."""
    return split.num_samples // global_batch_size


def kept_patches(random: np.random.Generator, batch_size: int, num_patches: int, dropout: float) -> Int64s:
    """(B, P) patch numbers, for each picture another choice of the share that stays, in ascending order."""
    kept = max(1, int(num_patches * (1 - dropout)))
    order = np.argsort(random.random((batch_size, num_patches), dtype=np.float32), axis=1)
    return np.sort(order[:, :kept], axis=1)


def _batch(reader: RowReader, split: Split, samples: Int64s, picture: Callable[[bytes, int], Pixels]) -> Batch:
    pictures = []
    for index, data in enumerate(reader.read(samples)):
        try:
            pictures.append(picture(data, index))
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken images
            row = int(split.rows[samples[index]])
            raise BadInput(
                f"{split.shards[0].url.rsplit('/', 1)[0]}: row {row} of {split.name} must be a readable image, "
                f"but got {' '.join(str(error).split())}; convert again with --skip-bad"
            ) from None
    return Batch(torch.from_numpy(np.stack(pictures)), torch.from_numpy(split.labels[samples]))


def _ahead(make: Callable[[int], Batch], steps: range, num_threads: int) -> Iterator[Batch]:
    """Batches in order, a few made ahead by threads."""
    with ThreadPoolExecutor(num_threads, "lift-data") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                waiting.append(pool.submit(make, step))
                if len(waiting) > AHEAD + num_threads - 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
