"""Metrics of an epoch, and the names of all metrics; imports nothing, so that every room can use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

GROUPS = ("many", "medium", "few")  # of classes, by their number of training images
ACCURACIES = ("accuracy", "mean_class_accuracy", *GROUPS)
METRICS = (  # of a split
    "mean_class_accuracy",
    "accuracy",
    *GROUPS,
    "worst_class",
    "harmonic_mean",
    "geometric_mean",
    "macro_f1",
    "calibration_error",
    "loss",
)
TRAINED_PARAMETERS = "trained_parameters"
PREFIXES = {  # field of EpochMetrics -> prefix of its names where metrics are stored flat
    "train": "train/",
    "seconds": "time/",
    "unlabelled": "unlabelled/",
    "validation": "validation/",
    "test": "test/",
    "cost": "cost/",
}
FIELDS = {prefix: name for name, prefix in PREFIXES.items()}
COUNTS = (TRAINED_PARAMETERS, "num_epochs")
Metrics = Mapping[str, float]


def named(group: str, metrics: Metrics) -> dict[str, float]:
    """Return metrics by their flat names, which start with the name of a split or another group."""
    return {f"{group}/{name}": value for name, value in metrics.items()}


@dataclass(frozen=True)
class EpochMetrics:
    """Metrics of one epoch of a run.

    They are flat only where they are stored (Optuna, Parquet, JSON) or shown by other services: `flat` and `of`. An objective is
    known by its flat name, so `metrics["validation/few"]` works, and so does `"validation/few" in metrics`.

    Args:
        epoch: number of finished epochs; 0 for a run that trains nothing.
        train: loss, accuracy and images_per_s, means over the steps.
        seconds: time by what it was spent on: train_s, data_wait_s, evaluate_s, save_s and others.
        unlabelled: precision, recall and number of pseudo-labels.
        validation, test: metrics of a split (METRICS).
        cost: train_s, what the training would have cost if no other trial had shared its work.
        trained_parameters: number of trained parameters, None if it is not known.
        num_epochs: epochs of the whole training, None if it is not known.
    """

    epoch: int
    train: Metrics = field(default_factory=dict)
    seconds: Metrics = field(default_factory=dict)
    unlabelled: Metrics = field(default_factory=dict)
    validation: Metrics = field(default_factory=dict)
    test: Metrics = field(default_factory=dict)
    cost: Metrics = field(default_factory=dict)
    trained_parameters: int | None = None
    num_epochs: int | None = None

    def flat(self) -> dict[str, float]:
        """Return all metrics by their flat names; those that are not known are left out."""
        return dict(self._items())

    @classmethod
    def of(cls, flat: Metrics) -> EpochMetrics:
        """Return the metrics that `flat` turned into names; unknown names are dropped."""
        fields: dict[str, Any] = {name: {} for name in PREFIXES}
        for name, value in flat.items():
            prefix, slash, rest = name.partition("/")
            if prefix + slash in FIELDS:
                fields[FIELDS[prefix + slash]][rest] = value
        fields |= {name: int(flat[name]) for name in COUNTS if name in flat}
        return cls(int(flat.get("epoch", 0)), **fields)

    def __getitem__(self, name: str) -> float:
        if (value := self.get(name)) is None:
            raise KeyError(name)
        return value

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    @overload
    def get(self, name: str) -> float | None: ...
    @overload
    def get(self, name: str, default: float) -> float: ...
    def get(self, name: str, default: float | None = None) -> float | None:
        """Return the metric of a flat name, or the default if it is not known."""
        prefix, slash, rest = name.partition("/")
        if not slash:
            value: float | None = getattr(self, name) if name in ("epoch", *COUNTS) else None
        else:
            value = getattr(self, FIELDS[prefix + slash]).get(rest) if prefix + slash in FIELDS else None
        return default if value is None else value

    def _items(self) -> Iterator[tuple[str, float]]:
        yield "epoch", self.epoch
        for name, prefix in PREFIXES.items():
            for metric, value in getattr(self, name).items():
                yield prefix + metric, value
        for name in COUNTS:
            if (count := getattr(self, name)) is not None:
                yield name, count
