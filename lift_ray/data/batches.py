"""Streams of decoded batches that are prepared ahead of the training step.

The order of samples and their augmentation are pure functions of (seed, epoch, layout of the split). The global batches are
therefore the same for any number of workers, and resuming at a step is the same as skipping the steps before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.augment import (
    CROP_DRAWS,
    Augmentation,
    FindCrop,
    Preprocessing,
    View,
    evaluation_image,
    training_images_on,
)
from lift_ray.data.bad_image import BadImage, NeedsWindow, RequiresExtra
from lift_ray.data.bit_depth import WINDOWS
from lift_ray.data.dataset import Split
from lift_ray.data.decode import Pixels, decode
from lift_ray.data.longtail import Int64s
from lift_ray.data.order import READ_AHEAD_SAMPLES, Sampling, rank_slice, steps_per_epoch
from lift_ray.data.reader import RowReader
from lift_ray.data.views import NUM_DRAWS, two_views
from lift_ray.errors import BadInput, one_line

AHEAD = 3
PIECE = 8  # images that a thread decodes at a time
MOST_DECODERS = 4  # more threads wait for each other in one interpreter, and delay the training thread

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Args:
        images: (b, 3, H, W) uint8.
        labels: (b,) int64.
        patches: (b, P) int64, the patches that the model sees; None for all.
    """

    images: Tensor
    labels: Tensor
    patches: Tensor | None = None


def training_batches(
    reader: RowReader,
    split: Split,
    sampling: Sampling,
    augmentation: Augmentation,
    *,
    epoch: int,
    start_step: int = 0,
    num_threads: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's part of every global batch of an epoch; an incomplete last batch is dropped.

    Args:
        start_step: number of steps of this epoch already done.
    """
    batch_size, decoders = sampling.global_batch_size, _decoders(num_threads)
    rank_samples = sampling.of_epoch(split, epoch)

    def make(step: int) -> Batch:
        positions, samples = rank_samples(step)
        random = np.random.default_rng([sampling.seed, epoch, step])
        draws = random.random((batch_size, CROP_DRAWS))[positions]
        if augmentation.device is not None and augmentation.crop is not None:
            finds: list[FindCrop] = [partial(augmentation.crop, draw=draw) for draw in draws]
            batch = _batch_on(augmentation.device, reader, split, samples, augmentation.preprocessing, finds)
        else:
            batch = _batch(reader, split, samples, lambda data, i: augmentation.image(data, draws[i]), decoders)
        return replace(batch, patches=augmentation.patches(random, positions, batch_size))

    steps = range(start_step, steps_per_epoch(split, batch_size))
    read_ahead = -(-READ_AHEAD_SAMPLES // batch_size)
    return made_ahead(
        make, steps, num_threads, lambda step: reader.prefetch(rank_samples(step)[1]), read_ahead, decoders
    )


def unlabelled_batches(
    reader: RowReader,
    split: Split,
    sampling: Sampling,
    augmentation: Augmentation,
    *,
    cutout_frac: float,
    start_step: int,
    num_steps: int,
    num_threads: int = 1,
) -> Iterator[Batch]:
    """Yield this rank's part of the batches of a split whose labels are not used for training; passes follow each other.

    Each image has a weak and a strong view: images (b, 2, 3, H, W), patches (b, 2, P). The labels are for evaluation only.

    Args:
        augmentation: preprocessing and patch dropout; the views replace its crop, and are decoded exactly on the CPU.
        cutout_frac: side of the gray square of the strong view, as a fraction of the image's side.
        start_step: number of steps since the run began, over all epochs; the batches of the next `num_steps` follow.
    """
    batch_size, decoders = sampling.global_batch_size, _decoders(num_threads)
    rank_samples = sampling.of_passes(split)

    def make(step: int) -> Batch:
        positions, samples = rank_samples(step)
        random = np.random.default_rng([sampling.seed, step, 0, 1])
        draws = random.random((batch_size, NUM_DRAWS))[positions]
        batch = _batch(
            reader,
            split,
            samples,
            lambda data, i: two_views(data, augmentation.preprocessing, draws[i], cutout_frac),
            decoders,
        )
        return replace(batch, patches=augmentation.patches(random, positions, batch_size, 2))

    steps = range(start_step, start_step + num_steps)
    read_ahead = -(-READ_AHEAD_SAMPLES // batch_size)
    return made_ahead(
        make, steps, num_threads, lambda step: reader.prefetch(rank_samples(step)[1]), read_ahead, decoders
    )


def evaluation_batches(
    reader: RowReader,
    split: Split,
    view: View,
    *,
    batch_size: int = 250,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 1,
    samples: Int64s | None = None,
) -> Iterator[Batch]:
    """Yield this rank's slice of a split, or of some of its samples; over all ranks, every sample comes exactly once.

    Args:
        view: what the model gets of an image: images are (b, *view.shape).
        samples: sample numbers; None for all.
    """
    wanted = np.arange(split.num_samples) if samples is None else samples
    mine = wanted[rank_slice(len(wanted), rank, world_size)]
    decoders = _decoders(num_threads)

    def samples_of(step: int) -> Int64s:
        return mine[step * batch_size : (step + 1) * batch_size]

    def make(step: int) -> Batch:
        return _batch(reader, split, samples_of(step), lambda data, i: view.of(decode(data)), decoders)

    steps, read_ahead = range(-(-len(mine) // batch_size)), -(-READ_AHEAD_SAMPLES // batch_size)
    return made_ahead(make, steps, num_threads, lambda step: reader.prefetch(samples_of(step)), read_ahead, decoders)


def _decoders(num_threads: int) -> ThreadPoolExecutor | None:
    """Return threads that share the images of a batch, so that the first batch is ready soon; None for a single thread."""
    return ThreadPoolExecutor(min(num_threads, MOST_DECODERS), "lift-decode") if num_threads > 1 else None


def _batch(
    reader: RowReader,
    split: Split,
    samples: Int64s,
    image: Callable[[bytes, int], Pixels],
    decoders: ThreadPoolExecutor | None,
) -> Batch:
    encoded = reader.read(samples)

    def planar(place: int) -> Pixels:
        try:
            return np.moveaxis(image(encoded[place], place), -1, -3)
        except BadImage as error:
            raise broken_image(split, samples[place], error) from None

    def fill(places: range) -> None:
        for place in places:
            images[place] = planar(place)

    first = planar(0)  # its shape is that of the batch, whose rows several threads then fill in place
    images = np.empty((len(samples), *first.shape), np.uint8)
    images[0] = first
    pieces = [range(start, min(start + PIECE, len(samples))) for start in range(1, len(samples), PIECE)]
    deque((decoders.map if decoders else map)(fill, pieces), maxlen=0)
    return Batch(torch.from_numpy(images), torch.from_numpy(split.labels[samples]))


def _batch_on(
    device: torch.device,
    reader: RowReader,
    split: Split,
    samples: Int64s,
    preprocessing: Preprocessing,
    finds: list[FindCrop],
) -> Batch:
    encoded = reader.read(samples)
    try:
        images = training_images_on(device, encoded, preprocessing, finds)
    except BadImage:
        for sample, data in zip(samples, encoded, strict=True):
            try:
                evaluation_image(data, preprocessing)
            except BadImage as error:
                raise broken_image(split, sample, error) from None
        raise
    return Batch(images, torch.from_numpy(split.labels[samples]))


def broken_image(split: Split, sample: int, error: BadImage) -> BadInput:
    """Return the error for a sample that cannot be decoded. `convert` decodes with the same code and would refuse it too."""
    where, row = split.shards[0].url.rsplit("/", 1)[0], f"row {split.rows[sample]} of {split.name}"
    if isinstance(error, NeedsWindow):
        return BadInput(where, f"{row} must be an 8-bit image", error.seen, f"convert it with --window {WINDOWS}")
    remedy = "install it" if isinstance(error, RequiresExtra) else "convert again with --skip-bad"
    return BadInput(where, f"{row} must be a readable image", one_line(error), remedy)


def made_ahead(
    make: Callable[[int], Made],
    steps: Iterable[int],
    num_threads: int,
    prefetch: Callable[[int], None] = lambda step: None,
    read_ahead: int = 0,
    decoders: ThreadPoolExecutor | None = None,
) -> Iterator[Made]:
    """Yield batches in order; threads make a few ahead, and the data of `read_ahead` further steps is prefetched.

    Args:
        num_threads: number of threads that make batches, at most MOST_DECODERS.
        decoders: threads that `make` delegates to, shut down at the end; the threads here then only wait for them.
    """
    coming, to_read = iter(steps), iter(steps)
    makers = AHEAD if decoders else min(num_threads, MOST_DECODERS)
    with decoders or nullcontext(), ThreadPoolExecutor(makers, "lift-data") as pool:
        for step in islice(to_read, read_ahead):
            prefetch(step)

        def steps_read_ahead() -> Iterator[int]:
            for step in coming:
                for later in islice(to_read, 1):
                    prefetch(later)
                yield step

        yield from in_order(pool, make, steps_read_ahead(), AHEAD + (0 if decoders else makers - 1))


def in_order(
    pool: ThreadPoolExecutor, make: Callable[[Given], Made], things: Iterable[Given], most: int
) -> Iterator[Made]:
    """Yield the results of `make` in order; threads compute at most `most` of them ahead.

    If the caller stops early, pending work is canceled.

    Args:
        things: iterated in the caller's thread only.
    """
    waiting: deque[Future[Made]] = deque()
    try:
        for thing in things:
            waiting.append(pool.submit(make, thing))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
