"""Features of frozen blocks in processes that note which chunks they compute, and in files of made-up numbers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lift_ray.training import shared_features
from lift_ray.training.shared_features import FeatureFile, SharedFeatures, chunks_of

ONE = 4 * 3  # bytes of an image's features in made-up files


def file_of(shared: SharedFeatures, num_images: int = 1000) -> FeatureFile:
    """Return a file for made-up features."""
    found = shared.file("name", chunks_of(num_images, 100), ONE, 1e9)
    assert found is not None
    return found


def numbers(chunk: range) -> Iterator[torch.Tensor]:
    """Yield features that are the numbers of the samples, in batches of a hundred."""
    for start in range(chunk.start, chunk.stop, 100):
        yield torch.arange(start, min(start + 100, chunk.stop)).float()[:, None].expand(-1, 3)


def tell(done: int) -> None:
    """Listen to nothing."""


def hang(chunk: range) -> Iterator[torch.Tensor]:
    """Say that a chunk is being computed, and never end."""
    print("computing", flush=True)
    time.sleep(600)
    yield torch.zeros(0)


def note_chunks(log: Path, chunk_s: float) -> None:
    """Note each chunk that this process computes in a file: its process, split, number of blocks and first sample.

    Args:
        chunk_s: seconds that a chunk takes longer.
    """
    from lift_ray.training.workspace import Workspace

    shared_features.CHUNK = 1  # a batch
    computed = Workspace._activations

    def noted(self: Workspace, config: Any, model: Any, images: Any, samples: Any, stop: int) -> Iterator[torch.Tensor]:
        yield from computed(self, config, model, images, samples, stop)
        time.sleep(chunk_s)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {images.split.key[:6]} {stop} {samples[0]}\n")

    Workspace._activations = noted  # type: ignore[method-assign]


def chunks_in(log: Path) -> list[tuple[str, ...]]:
    """Return the chunks that were computed, without their process."""
    return [tuple(line.split()[1:]) for line in log.read_text().splitlines()]


def processes_in(log: Path) -> set[str]:
    """Return the processes that computed a chunk."""
    return {line.split()[0] for line in log.read_text().splitlines()}


def cached_here(folder: Path, data: str, config: Any, barrier: Any) -> None:
    """Compute the features of the training split together with the processes at the barrier, and write them to a file."""
    from lift_ray.methods.world import Ranks
    from lift_ray.training.run import Run
    from lift_ray.training.workspace import Workspace

    note_chunks(folder / "log", 0.2)
    shared = SharedFeatures()
    workspace = Workspace(data, Ranks.alone(), shared)
    run = Run(config, workspace)
    barrier.wait(100)
    features = workspace.cached_features(run.config, run.model, workspace.images(run.config, run.train))
    assert features is not None
    np.save(folder / f"{os.getpid()}.npy", features[:].numpy())
    barrier.wait(100)
    shared.close()
