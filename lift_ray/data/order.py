"""The order of samples in an epoch: a pure function of (seed, epoch, layout of the split)."""

from __future__ import annotations

import numpy as np

from lift_ray.data.dataset import Split
from lift_ray.data.longtail import Int64s

SHUFFLE_SAMPLES = 8192
SHUFFLE_BYTES = 192 * 2**20
READ_AHEAD_SAMPLES = 2048


def epoch_order(split: Split, seed: int, epoch: int, shuffle_bytes: int = SHUFFLE_BYTES) -> Int64s:
    """Return the sample numbers of an epoch, (N,): row groups are permuted, then samples are shuffled within a bounded buffer.

    A sample moves by at most the size of the buffer, which bounds the encoded images in memory: as many as fit in
    `shuffle_bytes`, at most SHUFFLE_SAMPLES. A split that fits is shuffled as a whole.
    """
    random = np.random.default_rng([seed, epoch])
    ends = np.cumsum([rows for shard in split.shards for rows in shard.row_groups])
    group = np.searchsorted(ends, split.rows, side="right")
    order = np.argsort(random.permutation(len(ends))[group], kind="stable")
    buffer = shuffle_buffer(split, shuffle_bytes)
    if len(order) <= buffer:
        random.shuffle(order)
        return order
    return order[np.argsort(np.arange(len(order)) + buffer * random.random(len(order)), kind="stable")]


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


def share_of_batch(batch: Int64s, rank: int, world_size: int) -> Int64s:
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


def kept_patches(random: np.random.Generator, batch_size: int, num_patches: int, dropout: float) -> Int64s:
    """Draw the patches to keep for each image independently, (B, P), ascending."""
    kept = max(1, int(num_patches * (1 - dropout)))
    order = np.argsort(random.random((batch_size, num_patches), dtype=np.float32), axis=1)
    return np.sort(order[:, :kept], axis=1)
