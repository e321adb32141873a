"""Inputs for the steps of an epoch: images, with pairs of views of unlabeled images if needed, or cached features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from lift_ray.data.augment import growing_px
from lift_ray.data.batches import training_batches, unlabelled_batches
from lift_ray.data.dataset import Split
from lift_ray.data.order import epoch_order, share_of_batch, steps_per_epoch
from lift_ray.model.resnet import AnyTower
from lift_ray.settings.methods import HalfLabelledConfig
from lift_ray.settings.run import MdaConfig, RunConfig
from lift_ray.training.workspace import Workspace

Inputs = Sequence[torch.Tensor | None]
Batches = Iterator[tuple[Inputs, torch.Tensor]]


def image_batches(config: RunConfig, warm: Workspace, tower: AnyTower, epoch: int, step: int) -> Batches:
    """Yield ((images, patches), labels) for the steps of an epoch from `step` on, this rank's part of each.

    With a method for half-labeled data a batch contains labeled images, then weak views of unlabeled images, then strong views of the
    same images. The label of a view is the true one of its image; only statistics may use it.
    """
    ranks, augment, optim = warm.ranks, config.augment, config.optim
    start_px, patch_dropout = getattr(augment, "start_px", None), getattr(augment, "patch_dropout", 0.0)
    full_px = tower.resolution_px
    size_px = growing_px(start_px, full_px, tower.patch_px, epoch, optim.epochs) if start_px else full_px
    train = warm.training(config)
    labelled = warm.device_batches(
        config,
        training_batches(
            warm.reader(train, optim.shuffle_bytes),
            train,
            size_px=size_px,
            global_batch_size=optim.global_batch_size,
            seed=config.seed,
            epoch=epoch,
            epochs=optim.epochs,
            kind=augment.kind,
            schedule=augment.schedule if isinstance(augment, MdaConfig) else "max",
            num_patches=tower.num_patches(size_px),
            patch_dropout=patch_dropout,
            start_step=step,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_threads=ranks.num_threads,
            decode=getattr(augment, "decode", "exact"),
            device=ranks.device,
            shuffle_bytes=optim.shuffle_bytes,
        ),
    )
    if not isinstance(config.method, HalfLabelledConfig):
        return (((images, patches), labels) for images, labels, patches in labelled)
    pool, num_steps = warm.dataset.split("unlabelled"), steps_per_epoch(train, optim.global_batch_size)
    views = warm.device_batches(
        config,
        unlabelled_batches(
            warm.reader(pool, optim.shuffle_bytes),
            pool,
            size_px=size_px,
            global_batch_size=optim.global_batch_size * config.method.unlabelled_ratio,
            seed=config.seed,
            start_step=epoch * num_steps + step,
            num_steps=num_steps - step,
            cutout_frac=config.method.cutout_frac,
            num_patches=tower.num_patches(size_px),
            patch_dropout=patch_dropout,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_threads=ranks.num_threads,
            shuffle_bytes=optim.shuffle_bytes,
        ),
    )
    return (
        (
            (_joined(images, pairs), None if patches is None else _joined(patches, pair_patches)),
            torch.cat([labels, true, true]),
        )
        for (images, labels, patches), (pairs, true, pair_patches) in zip(labelled, views, strict=True)
    )


def _joined(labelled: torch.Tensor, pairs: torch.Tensor | None) -> torch.Tensor:
    """(B, ...) and (U, 2, ...) -> (B + 2 U, ...)."""
    assert pairs is not None
    return torch.cat([labelled, *pairs.unbind(1)])


def cached_batches(
    config: RunConfig, warm: Workspace, train: Split, kept: torch.Tensor, epoch: int, step: int
) -> Batches:
    """Yield ((features,), labels) for the steps of an epoch from `step` on, this rank's part of each.

    Args:
        kept: cached features of the whole training split (Workspace.kept).
    """
    size, ranks = config.optim.global_batch_size, warm.ranks
    order = epoch_order(train, config.seed, epoch, config.optim.shuffle_bytes)
    for number in range(step, steps_per_epoch(train, size)):
        batch = order[number * size : (number + 1) * size]
        rows = torch.from_numpy(batch[share_of_batch(batch, ranks.rank, ranks.world_size)])
        labels = torch.from_numpy(train.labels[rows.numpy()])
        yield (kept[rows.to(kept.device)],), labels.to(kept.device)


def micro_batches(size: int, number: int) -> list[slice]:
    """Split a batch into at most `number` slices of almost equal length."""
    ends = [size * i // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends) if stop > start]
