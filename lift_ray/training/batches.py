"""Inputs for the steps of an epoch: images, with pairs of views of unlabeled images if needed, or cached features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lift_ray.data.batches import training_batches, unlabelled_batches
from lift_ray.data.dataset import Split
from lift_ray.data.order import Sampling, steps_per_epoch
from lift_ray.methods.world import Ranks
from lift_ray.settings.methods import HalfLabelledConfig
from lift_ray.settings.run import RunConfig
from lift_ray.training.feature_cache import Features
from lift_ray.training.workspace import Workspace

Inputs = Sequence[torch.Tensor | None]
Batches = Iterator[tuple[Inputs, torch.Tensor]]


def image_batches(config: RunConfig, workspace: Workspace, epoch: int, step: int) -> Batches:
    """Yield ((images, patches), labels) for the steps of an epoch from `step` on, this rank's part of each.

    With a method for half-labeled data a batch contains labeled images, then weak views of unlabeled images, then strong views of the
    same images. The label of a view is the true one of its image; only statistics may use it.
    """
    ranks, optim, train = workspace.ranks, config.optim, workspace.training(config)
    sampling, decoders = _sampling(config, ranks), workspace.decoders(config)
    augmentation, fixed = workspace.augmentation(config, epoch), workspace.training_images(config, train, epoch)
    batches = training_batches(
        workspace.reader(train, optim.shuffle_bytes),
        train,
        sampling,
        augmentation,
        epoch=epoch,
        start_step=step,
        fixed_draws=None if fixed is None else fixed.draws,
        decoders=decoders,
    )
    labelled = workspace.device_batches(config, batches)
    if not isinstance(config.method, HalfLabelledConfig):
        return (((images, patches), labels) for images, labels, patches in labelled)
    pool, num_steps = workspace.dataset.split("unlabelled"), steps_per_epoch(train, optim.global_batch_size)
    batches = unlabelled_batches(
        workspace.reader(pool, optim.shuffle_bytes),
        pool,
        replace(sampling, global_batch_size=optim.global_batch_size * config.method.unlabelled_ratio),
        augmentation,
        cutout_frac=config.method.cutout_frac,
        start_step=epoch * num_steps + step,
        num_steps=num_steps - step,
        decoders=decoders,
    )
    views = workspace.device_batches(config, batches)
    return (
        (
            (_joined(images, pairs), None if patches is None else _joined(patches, pair_patches)),
            torch.cat([labels, true, true]),
        )
        for (images, labels, patches), (pairs, true, pair_patches) in zip(labelled, views, strict=True)
    )


def _sampling(config: RunConfig, ranks: Ranks) -> Sampling:
    optim = config.optim
    return Sampling(
        config.seed, optim.global_batch_size, optim.shuffle_bytes, optim.sampling_power, ranks.rank, ranks.world_size
    )


def _joined(labelled: torch.Tensor, pairs: torch.Tensor | None) -> torch.Tensor:
    """(B, ...) and (U, 2, ...) -> (B + 2 U, ...)."""
    assert pairs is not None
    return torch.cat([labelled, *pairs.unbind(1)])


def cached_batches(
    config: RunConfig, workspace: Workspace, train: Split, features: Features, epoch: int, step: int
) -> Batches:
    """Yield ((features,), labels) for the steps of an epoch from `step` on, this rank's part of each.

    Args:
        features: cached features of the images of this epoch (Workspace.cached_features).
    """
    sampling, device = _sampling(config, workspace.ranks), features.device
    rank_samples = sampling.of_epoch(train, epoch)
    for number in range(step, steps_per_epoch(train, sampling.global_batch_size)):
        _, samples = rank_samples(number)
        labels = torch.from_numpy(train.labels[samples])
        yield (features[samples],), labels.to(device)


def micro_batches(size: int, number: int) -> list[slice]:
    """Split a batch into at most `number` slices of almost equal length."""
    ends = [size * i // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends) if stop > start]
