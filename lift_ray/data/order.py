"""The order of samples in an epoch: a pure function of (seed, epoch, layout of the split)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from lift_ray.data.dataset import Split
from lift_ray.data.longtail import Int64s

SHUFFLE_SAMPLES = 8192
SHUFFLE_BYTES = 192 * 2**20
READ_AHEAD_SAMPLES = 2048

# step -> this rank's positions in the global batch, and their sample numbers
RankSamples = Callable[[int], tuple[Int64s, Int64s]]


@dataclass(frozen=True)
class Sampling:
    """The samples of each global batch, and this rank's part of them.

    Args:
        seed: seed of the order and of the augmentation.
        global_batch_size: images of a step, over all ranks.
        shuffle_bytes: size of the encoded images that are shuffled together; the order depends on it.
        power: class k is drawn in proportion to n_k^power; 1 draws each image once an epoch.
    """

    seed: int
    global_batch_size: int
    shuffle_bytes: int = SHUFFLE_BYTES
    power: float = 1.0
    rank: int = 0
    world_size: int = 1

    def of_epoch(self, split: Split, epoch: int) -> RankSamples:
        """Return this rank's samples by step of an epoch."""
        order = epoch_order(split, self.seed, epoch, self.shuffle_bytes, self.power)
        return lambda step: self._of_rank(order[self._span(step)])

    def of_passes(self, split: Split) -> RankSamples:
        """Return this rank's samples by step since the run began; passes over the split follow each other."""
        order = lru_cache(4)(partial(epoch_order, split, self.seed, shuffle_bytes=self.shuffle_bytes))

        def samples(step: int) -> tuple[Int64s, Int64s]:
            span = self._span(step)
            passes, at = np.divmod(np.arange(span.start, span.stop), split.num_samples)
            parts = [order(number)[at[passes == number]] for number in np.unique(passes).tolist()]
            return self._of_rank(np.concatenate(parts))

        return samples

    def _span(self, step: int) -> slice:
        return slice(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def _of_rank(self, batch: Int64s) -> tuple[Int64s, Int64s]:
        positions = rank_positions(batch, self.rank, self.world_size)
        return positions, batch[positions]


def epoch_order(split: Split, seed: int, epoch: int, shuffle_bytes: int = SHUFFLE_BYTES, power: float = 1.0) -> Int64s:
    """Return the sample numbers of an epoch, (N,): row groups are permuted, then samples are shuffled within a bounded buffer.

    A sample moves by at most the size of the buffer, which bounds the encoded images in memory: as many as fit in
    `shuffle_bytes`, at most SHUFFLE_SAMPLES. A split that fits is shuffled as a whole.
    """
    random = np.random.default_rng([seed, epoch])
    ends = np.cumsum([rows for shard in split.shards for rows in shard.row_groups])
    group = np.searchsorted(ends, split.rows, side="right")
    order = np.argsort(random.permutation(len(ends))[group], kind="stable")
    if power != 1:
        order = np.repeat(order, times_drawn(split.labels, power, random)[order])
    buffer = shuffle_buffer(split, shuffle_bytes)
    if len(order) <= buffer:
        random.shuffle(order)
        return order
    return order[np.argsort(np.arange(len(order)) + buffer * random.random(len(order)), kind="stable")]


def view_draws(split: Split, seed: int, view: int, number: int) -> NDArray[np.float64]:
    """Return random numbers in [0, 1) for a view of each sample, (N, number). They stay with an image in every part of its split."""
    if split.parts:
        return np.concatenate([view_draws(whole, seed, view, number)[samples] for whole, samples in split.parts])
    return np.random.default_rng([seed, 0, view]).random((int(split.row_group_starts[-1]), number))[split.rows]


def times_drawn(labels: Int64s, power: float, random: np.random.Generator) -> Int64s:
    """Return how often each of N images is drawn, (N,): N draws in all, of class k in proportion to n_k^power.

    The draws of a class are divided among its images as equally as possible; chance decides who has one more.

    Args:
        labels: (N,).
        power: 1 draws each image once, 0 all classes equally often.
    """
    counts = np.bincount(labels)
    expected = counts[labels] ** (power - 1.0)
    shuffled = random.permutation(len(labels))
    # images of a class are neighbors, so that rounding moves its total by less than one
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ends = np.cumsum(expected[by_class])
    ends = np.floor(ends / ends[-1] * len(labels) + random.random())
    ends[-1] = len(labels)
    times = np.empty(len(labels), np.int64)
    times[by_class] = np.diff(ends, prepend=0)
    return times


def shuffle_buffer(split: Split, shuffle_bytes: int = SHUFFLE_BYTES) -> int:
    """Return the number of samples in the shuffle buffer."""
    sizes = [size for shard in split.shards for size in shard.row_group_bytes]
    mean_bytes = sum(sizes) / max(1, sum(shard.num_rows for shard in split.shards))
    return max(1, int(min(SHUFFLE_SAMPLES, shuffle_bytes / max(1.0, mean_bytes))))


def memory_bytes(split: Split, shuffle_bytes: int = SHUFFLE_BYTES) -> int:
    """Return the memory that a reader of this split requires for encoded images: those being shuffled and those read ahead."""
    sizes = [size for shard in split.shards for size in shard.row_group_bytes]
    rows = max(1, sum(shard.num_rows for shard in split.shards))
    samples = shuffle_buffer(split, shuffle_bytes) + READ_AHEAD_SAMPLES
    return int(1.25 * samples * sum(sizes) / rows) + 8 * max(sizes, default=2**20)


def rank_positions(batch: Int64s, rank: int, world_size: int) -> Int64s:
    """Return this rank's positions in a global batch, ascending.

    Each rank takes a contiguous part of the batch in storage order, so a row group is read by one or two ranks and not by all.
    """
    size = len(batch) // world_size
    return np.sort(np.argsort(batch, kind="stable")[rank * size : (rank + 1) * size])


def rank_slice(number: int, rank: int, world_size: int) -> slice:
    """Return this rank's slice of `number` items divided among the ranks in order; sizes differ by at most one."""
    return slice(number * rank // world_size, number * (rank + 1) // world_size)


def steps_per_epoch(split: Split, global_batch_size: int) -> int:
    """Return the number of complete global batches in an epoch."""
    return split.num_samples // global_batch_size
