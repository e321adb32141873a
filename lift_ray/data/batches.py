"""Streams of decoded batches that are prepared ahead of the training step.

The order of samples and their augmentation are pure functions of (seed, epoch, layout of the split). The global batches are
therefore the same for any number of workers, and resuming at a step is the same as skipping the steps before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.augment import (
    CROP_DRAWS,
    Augmentation,
    Draws,
    FindCrop,
    Preprocessing,
    evaluation_image,
    training_images_on,
)
from lift_ray.data.bad_image import BadImage
from lift_ray.data.batch_stream import AHEAD, Drawn, Work
from lift_ray.data.dataset import Split
from lift_ray.data.decoder_pool import DecoderPool
from lift_ray.data.decoder_process import PIECE, ImageMaker, broken_image, decode_piece
from lift_ray.data.longtail import Int64s
from lift_ray.data.order import Sampling, rank_slice, steps_per_epoch
from lift_ray.data.reader import RowReader
from lift_ray.data.views import NUM_DRAWS, TwoViews

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


@dataclass(frozen=True)
class Decoders:
    """Threads or processes that decode images.

    Args:
        num_threads: number of threads of this process.
        pool: processes that decode instead; None for the threads.
    """

    num_threads: int = 1
    pool: DecoderPool | None = None


ONE_THREAD = Decoders()


def training_batches(
    reader: RowReader,
    split: Split,
    sampling: Sampling,
    augmentation: Augmentation,
    *,
    epoch: int,
    start_step: int = 0,
    fixed_draws: Draws | None = None,
    decoders: Decoders = ONE_THREAD,
) -> Iterator[Batch]:
    """Yield this rank's part of every global batch of an epoch; an incomplete last batch is dropped.

    Args:
        start_step: number of steps of this epoch already done.
        fixed_draws: random numbers of the augmentation of each sample, (N, CROP_DRAWS); by default each step draws its own.
    """
    batch_size = sampling.global_batch_size
    rank_samples = sampling.of_epoch(split, epoch)

    def draw(step: int) -> Drawn:
        positions, samples = rank_samples(step)
        random = np.random.default_rng([sampling.seed, epoch, step])
        draws = random.random((batch_size, CROP_DRAWS))[positions]
        draws = draws if fixed_draws is None else fixed_draws[samples]
        return Drawn(samples, draws, augmentation.patches(random, positions, batch_size))

    steps = range(start_step, steps_per_epoch(split, batch_size))
    work = Work(split, augmentation, steps, lambda step: rank_samples(step)[1], draw, batch_size // sampling.world_size)
    device, crop = augmentation.device, augmentation.crop
    if device is None or crop is None:
        return _decoded(reader, work, decoders)

    def make(step: int) -> Batch:
        drawn = draw(step)
        finds: list[FindCrop] = [partial(crop, draw=numbers) for numbers in drawn.draws]
        images = _images_on(device, reader, split, drawn.samples, augmentation.preprocessing, finds)
        return _batch(split, drawn, images)

    return _made_on_threads(make, reader, work, decoders.num_threads)


def unlabelled_batches(
    reader: RowReader,
    split: Split,
    sampling: Sampling,
    augmentation: Augmentation,
    *,
    cutout_frac: float,
    start_step: int,
    num_steps: int,
    decoders: Decoders = ONE_THREAD,
) -> Iterator[Batch]:
    """Yield this rank's part of the batches of a split whose labels are not used for training; passes follow each other.

    Each image has a weak and a strong view: images (b, 2, 3, H, W), patches (b, 2, P). The labels are for evaluation only.

    Args:
        augmentation: preprocessing and patch dropout; the views replace its crop, and are decoded exactly on the CPU.
        cutout_frac: side of the gray square of the strong view, as a fraction of the image's side.
        start_step: number of steps since the run began, over all epochs; the batches of the next `num_steps` follow.
    """
    batch_size = sampling.global_batch_size
    rank_samples = sampling.of_passes(split)

    def draw(step: int) -> Drawn:
        positions, samples = rank_samples(step)
        random = np.random.default_rng([sampling.seed, step, 0, 1])
        draws = random.random((batch_size, NUM_DRAWS))[positions]
        return Drawn(samples, draws, augmentation.patches(random, positions, batch_size, 2))

    steps, views = range(start_step, start_step + num_steps), TwoViews(augmentation.preprocessing, cutout_frac)
    work = Work(split, views, steps, lambda step: rank_samples(step)[1], draw, batch_size // sampling.world_size)
    return _decoded(reader, work, decoders)


def evaluation_batches(
    reader: RowReader,
    split: Split,
    view: ImageMaker,
    *,
    batch_size: int = 250,
    rank: int = 0,
    world_size: int = 1,
    decoders: Decoders = ONE_THREAD,
    samples: Int64s | None = None,
    draws: Draws | None = None,
) -> Iterator[Batch]:
    """Yield this rank's slice of a split, or of some of its samples; over all ranks, every sample comes exactly once.

    Args:
        view: what the model gets of an image: images are (b, *view.shape).
        samples: sample numbers; None for all.
        draws: random numbers of each sample of the split for `view`, (N, ...), if it draws.
    """
    wanted = np.arange(split.num_samples) if samples is None else samples
    mine = wanted[rank_slice(len(wanted), rank, world_size)]
    drawn = np.empty((split.num_samples, 0)) if draws is None else draws

    def samples_of(step: int) -> Int64s:
        return mine[step * batch_size : (step + 1) * batch_size]

    def draw(step: int) -> Drawn:
        return Drawn(samples_of(step), drawn[samples_of(step)])

    steps = range(-(-len(mine) // batch_size))
    return _decoded(reader, Work(split, view, steps, samples_of, draw, batch_size), decoders)


def _decoded(reader: RowReader, work: Work, decoders: Decoders) -> Iterator[Batch]:
    """Yield the batches of a stream, decoded by threads or by processes."""
    if decoders.pool is not None:
        for drawn, images in decoders.pool.decode(work, reader.cache_bytes):
            yield _batch(work.split, drawn, images)
        return
    several = decoders.num_threads > 1
    # threads share the images of a batch, so that the first one is ready soon
    sharing = ThreadPoolExecutor(min(decoders.num_threads, MOST_DECODERS), "lift-decode") if several else None

    def make(step: int) -> Batch:
        drawn = work.draw(step)
        return _batch(work.split, drawn, _images(reader, work, drawn, sharing))

    yield from _made_on_threads(make, reader, work, decoders.num_threads, sharing)


def _batch(split: Split, drawn: Drawn, images: Tensor) -> Batch:
    return Batch(images, torch.from_numpy(split.labels[drawn.samples]), drawn.patches)


def _made_on_threads(
    make: Callable[[int], Batch],
    reader: RowReader,
    work: Work,
    num_threads: int,
    sharing: ThreadPoolExecutor | None = None,
) -> Iterator[Batch]:
    def prefetch(step: int) -> None:
        reader.prefetch(work.samples_of(step))

    return made_ahead(make, work.steps, num_threads, prefetch, work.read_ahead, sharing)


def _images(reader: RowReader, work: Work, drawn: Drawn, sharing: ThreadPoolExecutor | None) -> Tensor:
    """Decode the samples of a step on these threads, or on the calling one: (b, *maker.shape)."""
    encoded, rows = reader.read(drawn.samples), work.split.rows[drawn.samples]
    images, places = np.empty((len(encoded), *work.maker.shape), np.uint8), np.arange(len(encoded))

    def fill(at: range) -> None:
        if fault := decode_piece(work.split, work.maker, encoded, rows, drawn.draws, images, at, places):
            raise fault[1] from None

    pieces = [range(start, min(start + PIECE, len(rows))) for start in range(0, len(rows), PIECE)]
    deque((sharing.map if sharing else map)(fill, pieces), maxlen=0)
    return torch.from_numpy(images)


def _images_on(
    device: torch.device,
    reader: RowReader,
    split: Split,
    samples: Int64s,
    preprocessing: Preprocessing,
    finds: list[FindCrop],
) -> Tensor:
    encoded = reader.read(samples)
    try:
        return training_images_on(device, encoded, preprocessing, finds)
    except BadImage:
        for sample, data in zip(samples, encoded, strict=True):
            try:
                evaluation_image(data, preprocessing)
            except BadImage as error:
                raise broken_image(split, int(split.rows[sample]), error) from None
        raise


def made_ahead(
    make: Callable[[int], Made],
    steps: Iterable[int],
    num_threads: int,
    prefetch: Callable[[int], None] = lambda step: None,
    read_ahead: int = 0,
    sharing: ThreadPoolExecutor | None = None,
) -> Iterator[Made]:
    """Yield batches in order; threads make a few ahead, and the data of `read_ahead` further steps is prefetched.

    Args:
        num_threads: number of threads that make batches, at most MOST_DECODERS.
        sharing: threads that `make` delegates to, shut down at the end; the threads here then only wait for them.
    """
    coming, to_read = iter(steps), iter(steps)
    makers = AHEAD if sharing else min(num_threads, MOST_DECODERS)
    with sharing or nullcontext(), ThreadPoolExecutor(makers, "lift-data") as pool:
        for step in islice(to_read, read_ahead):
            prefetch(step)

        def steps_read_ahead() -> Iterator[int]:
            for step in coming:
                for later in islice(to_read, 1):
                    prefetch(later)
                yield step

        yield from in_order(pool, make, steps_read_ahead(), AHEAD + (0 if sharing else makers - 1))


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
