"""What a run in training tells: from the first rank to whoever shows and keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field

Figures = dict[str, float]


@dataclass(frozen=True)
class Began:
    """The workers are ready, at the start or after a failure.

    Args:
        epoch, step: where the run stands: whole epochs, and steps into the next one.
        history: the figures of the epochs that are done.
    """

    num_workers: int
    epochs: int
    steps_per_epoch: int
    epoch: int
    step: int
    history: list[Figures]


@dataclass(frozen=True)
class Stepped:
    """Steps were done; a sign of life when there are no figures.

    Args:
        epoch, step: as in Began.
        figures: of the steps since the last message, by the names in progress.STEP_FIGURES.
    """

    epoch: int
    step: int
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class EpochDone:
    """An epoch is done, validated and in a checkpoint.

    Args:
        checkpoint: its name.
    """

    figures: Figures
    checkpoint: str


@dataclass(frozen=True)
class Tested:
    """The test split's figures, after the last epoch."""

    figures: Figures


@dataclass(frozen=True)
class Halted:
    """The run stopped because it was told to, with a checkpoint."""

    reason: str
    checkpoint: str


@dataclass(frozen=True)
class Failed:
    """Workers were lost, and the run goes on from its last checkpoint."""

    reason: str


@dataclass(frozen=True)
class Problem:
    """What no retry can mend."""

    line: str
    is_bad_input: bool


Message = Began | Stepped | EpochDone | Tested | Halted | Failed | Problem
