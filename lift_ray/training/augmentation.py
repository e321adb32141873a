"""The augmentation of an epoch, and which images come again, so that features of frozen blocks can be kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from lift_ray.data.augment import (
    CROP_DRAWS,
    Augmentation,
    DrawCrop,
    Draws,
    Preprocessing,
    any_crop,
    growing_px,
    smallest_area,
    square_crop,
)
from lift_ray.data.dataset import Split
from lift_ray.data.decoder_process import ImageMaker
from lift_ray.data.order import view_draws
from lift_ray.model.tower import FrozenTower
from lift_ray.settings.run import CropFlipConfig, MdaConfig, RunConfig


@dataclass(frozen=True, eq=False)
class FixedImages:
    """Images of a split that are the same whenever they come: the evaluation crops, or an augmented view of each.

    Args:
        split: where they come from.
        maker: what becomes of an image.
        seed, view: they decide the random numbers of the view; None for the evaluation crops, which have none.
        drawn_by: the settings of the augmentation, as text.
    """

    split: Split
    maker: ImageMaker
    seed: int = 0
    view: int | None = None
    drawn_by: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """The split, and what decides the images."""
        return (self.split.key,) if self.view is None else (self.split.key, self.seed, self.view, self.drawn_by)

    @cached_property
    def draws(self) -> Draws | None:
        """Random numbers of each sample, (N, CROP_DRAWS)."""
        return None if self.view is None else view_draws(self.split, self.seed, self.view, CROP_DRAWS)


def view_of_epoch(config: RunConfig, epoch: int) -> int | None:
    """Return the view of the training images that an epoch uses; None if it draws anew, or if there is nothing to draw.

    `mda` goes through its views once, as its crops grow over the run. The views of `crop_flip` are alike, and alternate.
    """
    if config.augment.views is None:
        return None
    number = _num_views(config, config.augment.views)
    return epoch * number // config.optim.epochs if isinstance(config.augment, MdaConfig) else epoch % number


def training_images(config: RunConfig, split: Split, maker: Augmentation, epoch: int) -> FixedImages | None:
    """Return the training images of an epoch if they come again.

    Args:
        maker: the augmentation of the epoch.
    """
    if config.augment.views is None:
        return FixedImages(split, maker) if config.augment.is_fixed else None
    # runs of other lengths have the same views if they have as many
    drawn_by = f"{_num_views(config, config.augment.views)} of {config.augment.model_dump_json(exclude={'views'})}"
    return FixedImages(split, maker, config.seed, view_of_epoch(config, epoch), drawn_by)


def _num_views(config: RunConfig, views: int) -> int:
    return min(views, config.optim.epochs)


def augmentation(
    config: RunConfig, preprocessing: Preprocessing, tower: FrozenTower, device: torch.device, epoch: int
) -> Augmentation:
    """Return the augmentation of an epoch, or of the view that the epoch uses."""
    augment, epochs = config.augment, config.optim.epochs
    if augment.start_px:
        size_px = growing_px(augment.start_px, preprocessing.size_px, tower.patch_px, epoch, epochs)
        preprocessing = replace(preprocessing, size_px=size_px)
    crop: DrawCrop | None = None
    if isinstance(augment, MdaConfig):
        view = view_of_epoch(config, epoch)
        t = (epoch, epochs) if view is None or augment.views is None else (view, _num_views(config, augment.views))
        crop = partial(square_crop, smallest=smallest_area(augment.schedule, *t))
    elif isinstance(augment, CropFlipConfig):
        crop = any_crop
    return Augmentation(
        preprocessing,
        crop,
        reduced=augment.decode == "reduced",
        device=device if augment.decode == "gpu" else None,
        num_patches=tower.num_patches(preprocessing.size_px),
        patch_dropout=augment.patch_dropout,
    )
