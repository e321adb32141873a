"""Facts about the dataset of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lift_ray.data.dataset import Dataset
from lift_ray.data.folds import EVERYTHING, SEARCHED, Folds, unseen_classes
from lift_ray.errors import first_few
from lift_ray.evaluation.metrics import ClassGroups, groups_of
from lift_ray.settings.space import SpaceFile


def unseen_line(unseen: Sequence[str], num_classes: int) -> str:
    """Say how many classes have no held-out image, and name up to three."""
    have = "classes has" if len(unseen) == 1 else "classes have"
    return f"{len(unseen)} of {num_classes} {have} no held-out image, so the search does not see {first_few(unseen)}"


@dataclass(frozen=True)
class SearchData:
    """Facts about a dataset that the driver of its search needs.

    Args:
        folds: division of the labeled images.
        groups: division of the classes into many, medium and few.
        num_images: images of each split in the first fold.
        retrains: True if best/ is trained again on images that the trials do not train on.
        train_on: images that best/ is trained on, as in a run file.
        final_images: number of these images.
        unseen: names of the classes without an out-of-fold image.
    """

    folds: Folds = field(default_factory=Folds)
    groups: ClassGroups = field(default_factory=lambda: ClassGroups.of([]))
    num_images: Mapping[str, int] = field(default_factory=dict)
    retrains: bool = False
    train_on: str = "train"
    final_images: int = 0
    unseen: Sequence[str] = ()

    @classmethod
    def of(cls, space: SpaceFile, dataset: Dataset) -> SearchData:
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
            groups_of(dataset, space.config({}).evaluation.group_bounds),
            {name: split.num_samples for name, split in searched.items()},
            retrains,
            "train+validation" if retrains and "validation" in dataset.splits else "train",
            (everything if retrains else searched)["train"].num_samples,
            unseen_classes(dataset, folds),
        )
