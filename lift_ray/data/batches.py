"""The order of samples, and a stream of decoded batches that runs ahead of the training step.

The order is a pure function of (seed, epoch, layout of the split), and so is the augmentation of every sample: the global
batches are the same for any number of workers, and resuming at a step equals skipping the steps before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.augment import (
    FindCrop,
    any_crop,
    evaluation_image,
    five_crops,
    smallest_area,
    square_crop,
    training_image,
    training_images_on,
)
from lift_ray.data.dataset import Split
from lift_ray.data.decode import Pixels
from lift_ray.data.longtail import Int64s
from lift_ray.data.order import (
    READ_AHEAD_SAMPLES,
    SHUFFLE_BYTES,
    epoch_order,
    kept_patches,
    rank_slice,
    share_of_batch,
    steps_per_epoch,
)
from lift_ray.data.reader import RowReader
from lift_ray.data.views import NUM_DRAWS, two_views
from lift_ray.errors import BadInput

AHEAD = 3
PIECE = 8  # pictures of a batch that one thread decodes at a time
MOST_DECODERS = 4  # more threads of one interpreter wait for each other, and hold up the one that trains

Decode = Literal["exact", "reduced", "gpu"]
Given = TypeVar("Given")
Made = TypeVar("Made")


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


def training_batches(
    reader: RowReader,
    split: Split,
    *,
    size_px: int,
    global_batch_size: int,
    seed: int,
    epoch: int,
    epochs: int,
    schedule: str,
    kind: str = "mda",
    num_patches: int = 0,
    patch_dropout: float = 0.0,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 1,
    decode: Decode = "exact",
    device: torch.device | None = None,
    shuffle_bytes: int = SHUFFLE_BYTES,
) -> Iterator[Batch]:
    """This rank's share of every global batch of an epoch; the incomplete last batch is left out.

    Args:
        size_px: side of the square pictures.
        epoch: from 0, of `epochs` in the run; sets the augmentation's schedule.
        schedule: a key of augment.GROWTH, for `mda`.
        kind: mda, crop_flip, or none for the evaluation crop.
        num_patches: patches in a picture; only patch_dropout needs it.
        patch_dropout: share of them to leave out, in [0, 1); at least one stays.
        start_step: steps of this epoch that are done already.
        decode: exact; reduced: large JPEGs decoded at 1/2, 1/4 or 1/8 where a crop does not need more; gpu: on `device`.
        shuffle_bytes: encoded pictures that are shuffled together; part of what decides the order.
    """
    order = epoch_order(split, seed, epoch, shuffle_bytes)
    smallest, decoders = smallest_area(schedule, epoch, epochs), _decoders(num_threads)

    def places(step: int) -> tuple[Int64s, Int64s]:
        batch = order[step * global_batch_size : (step + 1) * global_batch_size]
        mine = share_of_batch(batch, rank, world_size)
        return mine, batch[mine]

    def make(step: int) -> Batch:
        mine, samples = places(step)
        random = np.random.default_rng([seed, epoch, step])
        draws = random.random((global_batch_size, 3))[mine]
        finds: dict[str, Callable[[int], FindCrop]] = {
            "mda": lambda i: partial(square_crop, smallest=smallest, draw=draws[i]),
            "crop_flip": lambda i: partial(any_crop, draw=draws[i]),
        }
        if kind == "none":
            batch = _batch(reader, split, samples, lambda data, i: evaluation_image(data, size_px), decoders)
        elif decode == "gpu" and device is not None:
            crops = [finds[kind](i) for i in range(len(samples))]
            batch = _batch_on(device, reader, split, samples, size_px, crops)
        else:
            batch = _batch(
                reader,
                split,
                samples,
                lambda data, i: training_image(data, size_px, finds[kind](i), reduced=decode == "reduced"),
                decoders,
            )
        if not patch_dropout:
            return batch
        kept = kept_patches(random, global_batch_size, num_patches, patch_dropout)[mine]
        return replace(batch, patches=torch.from_numpy(kept))

    steps = range(start_step, steps_per_epoch(split, global_batch_size))
    return _ahead(
        make,
        steps,
        num_threads,
        lambda step: reader.prefetch(places(step)[1]),
        READ_AHEAD_SAMPLES // global_batch_size,
        decoders,
    )


def unlabelled_batches(
    reader: RowReader,
    split: Split,
    *,
    size_px: int,
    global_batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    cutout_frac: float,
    num_patches: int = 0,
    patch_dropout: float = 0.0,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 1,
    shuffle_bytes: int = SHUFFLE_BYTES,
) -> Iterator[Batch]:
    """This rank's share of batches of a split whose labels are not learnt from; after a pass over it the next one begins.

    Of each picture there are a weak and a strong view: images (b, 2, 3, H, W), patches (b, 2, P). The labels are for measuring.

    Args:
        start_step: steps since the run began, over all its epochs; the batches are those of the next `num_steps`.
        cutout_frac: as in `views.strong_view`.

    The others are those of `training_batches`.
    """
    order = lru_cache(4)(partial(epoch_order, split, seed, shuffle_bytes=shuffle_bytes))
    decoders = _decoders(num_threads)

    def places(step: int) -> tuple[Int64s, Int64s]:
        rounds, at = np.divmod(np.arange(step * global_batch_size, (step + 1) * global_batch_size), split.num_samples)
        batch = np.concatenate([order(number)[at[rounds == number]] for number in np.unique(rounds).tolist()])
        mine = share_of_batch(batch, rank, world_size)
        return mine, batch[mine]

    def make(step: int) -> Batch:
        mine, samples = places(step)
        random = np.random.default_rng([seed, step, 0, 1])
        draws = random.random((global_batch_size, NUM_DRAWS))[mine]
        batch = _batch(
            reader, split, samples, lambda data, i: two_views(data, size_px, draws[i], cutout_frac), decoders
        )
        if not patch_dropout:
            return batch
        kept = kept_patches(random, 2 * global_batch_size, num_patches, patch_dropout)
        return replace(batch, patches=torch.from_numpy(kept.reshape(global_batch_size, 2, -1)[mine]))

    return _ahead(
        make,
        range(start_step, start_step + num_steps),
        num_threads,
        lambda step: reader.prefetch(places(step)[1]),
        -(-READ_AHEAD_SAMPLES // global_batch_size),
        decoders,
    )


def evaluation_batches(
    reader: RowReader,
    split: Split,
    *,
    size_px: int,
    batch_size: int = 250,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 1,
    crops: bool = False,
    samples: Int64s | None = None,
) -> Iterator[Batch]:
    """This rank's stretch of a split, or of some of its samples; over all ranks every sample comes exactly once.

    Args:
        crops: five crops of each picture: images (b, 5, 3, H, W).
        samples: sample numbers; all when not given.
    """
    wanted = np.arange(split.num_samples) if samples is None else samples
    mine = wanted[rank_slice(len(wanted), rank, world_size)]
    picture, decoders = five_crops if crops else evaluation_image, _decoders(num_threads)

    def make(step: int) -> Batch:
        places = mine[step * batch_size : (step + 1) * batch_size]
        return _batch(reader, split, places, lambda data, i: picture(data, size_px), decoders)

    def prefetch(step: int) -> None:
        reader.prefetch(mine[step * batch_size : (step + 1) * batch_size])

    return _ahead(
        make, range(-(-len(mine) // batch_size)), num_threads, prefetch, -(-READ_AHEAD_SAMPLES // batch_size), decoders
    )


def _decoders(num_threads: int) -> ThreadPoolExecutor | None:
    """Threads that share the pictures of a batch, so that the first one is there soon; None where there is but one."""
    return ThreadPoolExecutor(min(num_threads, MOST_DECODERS), "lift-decode") if num_threads > 1 else None


def _batch(
    reader: RowReader,
    split: Split,
    samples: Int64s,
    picture: Callable[[bytes, int], Pixels],
    decoders: ThreadPoolExecutor | None,
) -> Batch:
    encoded = reader.read(samples)

    def planar(place: int) -> Pixels:
        try:
            return np.moveaxis(picture(encoded[place], place), -1, -3)
        except IMAGE_ERRORS as error:
            raise _broken(split, samples[place], error) from None

    def fill(places: range) -> None:
        for place in places:
            pictures[place] = planar(place)

    first = planar(0)
    pictures = np.empty((len(samples), *first.shape), np.uint8)
    pictures[0] = first
    pieces = [range(start, min(start + PIECE, len(samples))) for start in range(1, len(samples), PIECE)]
    deque((decoders.map if decoders else map)(fill, pieces), maxlen=0)
    return Batch(torch.from_numpy(pictures), torch.from_numpy(split.labels[samples]))


def _batch_on(
    device: torch.device, reader: RowReader, split: Split, samples: Int64s, size_px: int, finds: list[FindCrop]
) -> Batch:
    encoded = reader.read(samples)
    try:
        images = training_images_on(device, encoded, size_px, finds)
    except IMAGE_ERRORS:
        for sample, data in zip(samples, encoded, strict=True):
            try:
                evaluation_image(data, size_px)
            except IMAGE_ERRORS as error:
                raise _broken(split, sample, error) from None
        raise
    return Batch(images, torch.from_numpy(split.labels[samples]))


def _broken(split: Split, sample: int, error: Exception) -> BadInput:
    return BadInput(
        f"{split.shards[0].url.rsplit('/', 1)[0]}: row {split.rows[sample]} of {split.name} must be a readable image, "
        f"but got {' '.join(str(error).split())}; convert again with --skip-bad"
    )


def _ahead(
    make: Callable[[int], Made],
    steps: Iterable[int],
    num_threads: int,
    prefetch: Callable[[int], None] = lambda step: None,
    read_ahead: int = 0,
    decoders: ThreadPoolExecutor | None = None,
) -> Iterator[Made]:
    """Batches in order, a few made ahead by threads, and what `read_ahead` further steps need read ahead.

    Args:
        num_threads: that make them, at most MOST_DECODERS.
        decoders: threads that `make` gives its work to, closed at the end; the threads here then only wait for them.
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
    """What threads make of things, in order, at most so many ahead; what has not begun when it ends early is cancelled.

    Args:
        things: asked for by the caller's thread alone.
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


# what Pillow raises for broken images
IMAGE_ERRORS = (OSError, ValueError, SyntaxError)
