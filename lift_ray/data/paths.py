"""Paths of images, as their dataset names them."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np

from lift_ray.data.dataset import Shard, Split
from lift_ray.data.footers import read_cells, read_footer
from lift_ray.storage.store import PATIENCE_S


def image_paths(split: Split, patience_s: float = PATIENCE_S) -> list[str]:
    """Return the path of each kept image of a split, (N,); `FILE:ROW` for one without a path. Raises BadInput."""
    starts = np.cumsum([0, *(shard.num_rows for shard in split.shards)])
    owner = np.searchsorted(starts, split.rows, side="right") - 1
    paths = [""] * split.num_samples
    for number in np.unique(owner).tolist():
        here = np.flatnonzero(owner == number)
        shard = split.shards[number]
        found = _of_shard(shard, split.image_column, patience_s)
        for sample, row in zip(here.tolist(), (split.rows[here] - starts[number]).tolist(), strict=True):
            paths[sample] = found[row] or f"{PurePosixPath(shard.url).name}:{row}"
    return paths


def _of_shard(shard: Shard, column: str, patience_s: float) -> list[str | None]:
    footer, leaf = read_footer(shard.url, patience_s), f"{column}.path"
    if leaf not in footer.leaves:
        return [None] * shard.num_rows
    found: list[str | None] = read_cells(shard.url, footer, range(len(shard.row_groups)), leaf, patience_s).to_pylist()
    return found
