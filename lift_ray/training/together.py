"""Steps of several runs on the same batches: shared work is computed once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lift_ray.training.batches import image_batches
from lift_ray.training.run import Run
from lift_ray.training.workspace import autocast


@dataclass(frozen=True)
class SharedBatch:
    """A batch of several runs.

    Args:
        activations: output of the frozen blocks, by the first tuned block of a run.
        patches: (B, P), the patches that were looked at; None for all.
        size_px: side of the images.
        labels: (B,).
        waited_s: seconds that passed until the images were there.
    """

    activations: Mapping[int, Tensor]
    patches: Tensor | None
    size_px: int
    labels: Tensor
    waited_s: float


def train_together(runs: Sequence[Run]) -> None:
    """Do the remaining steps of this epoch of several runs, as each would do them alone.

    Images are decoded once, and go once through each block that a run leaves frozen: (p + J s) instead of J (p + s) for J runs, of
    which p can be shared. The rest follows run by run, so results equal those of the runs alone to the last bit.

    Args:
        runs: of one workspace, at the same epoch and step, whose settings agree in all that `packs.shared_by` returns.
    """
    asked = time.monotonic()
    for batch in shared_batches(runs):
        shared_s = (time.monotonic() - asked) / len(runs)  # the time of all runs adds up to what has passed
        for run in runs:
            run.step_began(time.monotonic() - shared_s, batch.waited_s / len(runs))
            forward = partial(run.model.from_frozen, size_px=batch.size_px)
            run.train_step((forward, (batch.activations[run.model.first_tuned], batch.patches), batch.labels))
        asked = time.monotonic()


def shared_batches(runs: Sequence[Run]) -> Iterator[SharedBatch]:
    """Yield what the remaining steps of this epoch of several runs share."""
    first = runs[0]
    models = {run.model.first_tuned: run.model for run in runs}
    coming = image_batches(first.config, first.workspace, first.epoch, first.step)
    for _ in range(first.step, first.steps_per_epoch):
        asked = time.monotonic()
        (images, patches), labels = next(coming)
        waited_s = time.monotonic() - asked
        assert images is not None
        size_px, activations, done = images.shape[-1], {}, 0
        with torch.no_grad(), autocast(first.config, first.ranks.device):
            x = first.model.tower.embed(images, patches)
            for stop, model in sorted(models.items()):
                x = model.continue_frozen(x, done, stop, patches, size_px)
                activations[stop], done = x, stop
        yield SharedBatch(activations, patches, size_px, labels, waited_s)
