"""Facts about the dataset of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lift_ray.data.dataset import Dataset
from lift_ray.data.folds import EVERYTHING, SEARCHED, Folds, unseen_classes
from lift_ray.settings.space import SpaceFile


@dataclass(frozen=True)
class SearchData:
    """What the driver of a search knows about its dataset.

    Args:
        folds: division of the labeled images.
        groups: many, medium or few for each class, (K,).
        num_images: images of each split in the first fold.
        retrains: True if best/ is trained again on images that the trials do not train on.
        train_on: images that best/ is trained on, as in a run file.
        final_images: number of these images.
        unseen: names of the classes without an out-of-fold image.
    """

    folds: Folds = Folds()
    groups: NDArray[np.str_] = field(default_factory=lambda: np.array([], str))
    num_images: Mapping[str, int] = field(default_factory=dict)
    retrains: bool = False
    train_on: str = "train"
    final_images: int = 0
    unseen: Sequence[str] = ()

    @classmethod
    def of(cls, space: SpaceFile, dataset: Dataset, groups: NDArray[np.str_]) -> SearchData:
        """Return the facts about a dataset that is searched as a space file says."""
        search = space.search
        folds = Folds(search.folds, search.seed, train_on_separate=search.refit is True)
        searched, everything = (folds.view(dataset, fold).splits for fold in (SEARCHED, EVERYTHING))
        # An ensemble is combined with the help of validation images, so it must not be trained on them.
        retrains = (
            search.refit is not False
            and everything["train"].num_samples > searched["train"].num_samples
            and not space.config({}).members()
        )
        return cls(
            folds,
            groups,
            {name: split.num_samples for name, split in searched.items()},
            retrains,
            "train+validation" if retrains and "validation" in dataset.splits else "train",
            (everything if retrains else searched)["train"].num_samples,
            unseen_classes(dataset, folds),
        )
