"""Events that the first rank of a run sends to whatever shows and stores them, and the replies of a slot of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lift_ray.epoch_metrics import EpochMetrics


@dataclass(frozen=True)
class RunStarted:
    """The workers are ready, at the start or after a failure.

    Args:
        num_workers: number of workers that train.
        epochs: number of epochs of the run.
        steps_per_epoch: number of steps of an epoch.
        epoch: number of finished epochs.
        step: number of finished steps of the current epoch.
        history: metrics of the finished epochs.
        trained_parameters: number of trained parameters.
    """

    num_workers: int
    epochs: int
    steps_per_epoch: int
    epoch: int
    step: int
    history: list[EpochMetrics]
    trained_parameters: int = 0


@dataclass(frozen=True)
class FeaturesDone:
    """Features of frozen blocks are computed, to be cached.

    Args:
        images: number of images that are done, over all processes that compute the features of this split together.
        total: number of images of the split.
        images_per_s: speed of these processes together.
    """

    images: int
    total: int
    images_per_s: float


@dataclass(frozen=True)
class StepsDone:
    """Steps are finished; without figures it is a heartbeat.

    Args:
        epoch: number of finished epochs.
        step: number of finished steps of the current epoch.
        figures: means over the steps since the last event, by the names in progress.STEP_FIGURES.
        evaluated: fraction of a split that the current evaluation has processed; 0 in training.
        features: progress of features that the next step or evaluation waits for.
        warning: a line for the user.
    """

    epoch: int
    step: int
    figures: dict[str, float] = field(default_factory=dict)
    evaluated: float = 0.0
    features: FeaturesDone | None = None
    warning: str = ""


@dataclass(frozen=True)
class EpochEnded:
    """An epoch is finished, validated and saved.

    Args:
        metrics: metrics and times of the epoch.
        checkpoint: name of its checkpoint.
    """

    metrics: EpochMetrics
    checkpoint: str


@dataclass(frozen=True)
class TestEnded:
    """The metrics of the test split, after the last epoch."""

    metrics: EpochMetrics


@dataclass(frozen=True)
class RunStopped:
    """The run stopped on request and wrote a checkpoint."""

    reason: str
    checkpoint: str


@dataclass(frozen=True)
class WorkersLost:
    """Workers were lost, and the run resumes from its last checkpoint."""

    reason: str


@dataclass(frozen=True)
class RunAborted:
    """An error that no retry can fix."""

    line: str
    is_bad_input: bool
    diverged: bool = False


@dataclass(frozen=True)
class RunDiverged:
    """The training loss is not finite. The settings cause this, so a retry would end in the same way."""

    reason: str


@dataclass(frozen=True)
class JobDone:
    """The result, for JSON, of a job that is not a trial."""

    value: dict[str, Any]


# reply of a training; JobDone only of one that is not a trial
OfTrial = RunStarted | EpochEnded | RunDiverged | JobDone


@dataclass(frozen=True)
class Replies:
    """Replies of trials that train in one pass.

    Args:
        of: the reply by the number of the trial.
    """

    of: Mapping[int, OfTrial]


Event = RunStarted | StepsDone | EpochEnded | TestEnded | RunStopped | WorkersLost | RunAborted
Reply = OfTrial | Replies | StepsDone | RunAborted  # of a slot of a search
