"""Events of a run in training, from its first rank to whoever shows and stores them; and what else a slot of a search answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Figures = dict[str, float]


@dataclass(frozen=True)
class RunStarted:
    """The workers are ready, at the start or after a failure.

    Args:
        epoch, step: where the run stands: whole epochs, and steps into the next one.
        history: the figures of the epochs that are done.
        trained_parameters: number of trained values.
    """

    num_workers: int
    epochs: int
    steps_per_epoch: int
    epoch: int
    step: int
    history: list[Figures]
    trained_parameters: int = 0


@dataclass(frozen=True)
class StepsDone:
    """Steps were done; a sign of life when there are no figures.

    Args:
        epoch, step: as in Began.
        figures: of the steps since the last message, by the names in progress.STEP_FIGURES.
        evaluated: share of a split that an evaluation has done; 0 in training.
    """

    epoch: int
    step: int
    figures: Figures = field(default_factory=dict)
    evaluated: float = 0.0


@dataclass(frozen=True)
class EpochEnded:
    """An epoch is done, validated and in a checkpoint.

    Args:
        checkpoint: its name.
    """

    figures: Figures
    checkpoint: str


@dataclass(frozen=True)
class TestEnded:
    """The test split's figures, after the last epoch."""

    figures: Figures


@dataclass(frozen=True)
class RunStopped:
    """The run stopped because it was told to, with a checkpoint."""

    reason: str
    checkpoint: str


@dataclass(frozen=True)
class WorkersLost:
    """Workers were lost, and the run goes on from its last checkpoint."""

    reason: str


@dataclass(frozen=True)
class RunAborted:
    """An error that no retry can fix."""

    line: str
    is_bad_input: bool


@dataclass(frozen=True)
class RunDiverged:
    """The training loss is not finite: the settings are to blame, and a retry would end the same way."""

    reason: str


@dataclass(frozen=True)
class JobDone:
    """The result of a job that is not a trial: a dict for JSON."""

    value: dict[str, Any]


Event = RunStarted | StepsDone | EpochEnded | TestEnded | RunStopped | WorkersLost | RunAborted
Reply = RunStarted | StepsDone | EpochEnded | RunDiverged | JobDone | RunAborted  # of a slot of a search
