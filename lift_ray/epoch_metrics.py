"""Metrics of an epoch, and the names of all metrics; imports nothing, so that every room can use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, overload

GROUPS = ("many", "medium", "few")  # of classes, by their number of training images
MAIN = "mean_class_accuracy"  # chooses models by default
ACCURACIES = ("accuracy", MAIN, *GROUPS)
FURTHER = ("worst_class", "harmonic_mean", "geometric_mean", "macro_f1", "calibration_error")
LOSSES = ("balanced_log_loss", "loss")  # not in [0, 1]
METRICS = (MAIN, "accuracy", *GROUPS, *FURTHER, *LOSSES)  # of a split
MAIN_METRIC = f"validation/{MAIN}"
POSTHOC = ("posthoc_tau", f"posthoc_{MAIN}", "posthoc_optimism")  # best tau after training, on validation
POSTHOC_TAU, POSTHOC_ACCURACY, POSTHOC_OPTIMISM = POSTHOC
SECONDS = ("begin_s", "load_s", "features_s", "train_s", "data_wait_s", "evaluate_s", "save_s", "member_s")
TRAINED_PARAMETERS = "trained_parameters"
COUNTS = (TRAINED_PARAMETERS, "num_epochs")
FIELDS = {  # prefix of flat names -> field of EpochMetrics, in the order of the columns of files
    "train": "train",
    "time": "seconds",
    "cost": "cost",
    "unlabelled": "unlabelled",
    "validation": "validation",
    "test": "test",
}
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
        seconds: time by what it was spent on (SECONDS); load_s is part of begin_s, data_wait_s of train_s. features_s, for
            computing cached features, is part of no other.
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

    def flat(self, *prefixes: str) -> dict[str, float]:
        """Return all known metrics by their flat names, or only those with the given prefixes."""
        out: dict[str, float] = {}
        for prefix in prefixes or FIELDS:
            out |= named(prefix, getattr(self, FIELDS[prefix]))
        counts = {name: count for name in COUNTS if (count := getattr(self, name)) is not None}
        return out if prefixes else {"epoch": self.epoch, **out, **counts}

    @classmethod
    def of(cls, flat: Metrics) -> EpochMetrics:
        """Return the metrics from their flat names; unknown names are dropped."""
        fields: dict[str, Any] = {name: {} for name in FIELDS.values()}
        for name, value in flat.items():
            prefix, slash, rest = name.partition("/")
            if slash and prefix in FIELDS:
                fields[FIELDS[prefix]][rest] = value
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
        value: float | None = None
        if slash and prefix in FIELDS:
            value = getattr(self, FIELDS[prefix]).get(rest)
        elif name in ("epoch", *COUNTS):
            value = getattr(self, name)
        return default if value is None else value
