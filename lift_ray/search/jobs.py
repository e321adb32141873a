"""Jobs of a slot, as plain data: the driver imports neither torch nor Ray for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lift_ray.ray_runtime.capacity import Need
from lift_ray.storage.layout import CHECKPOINTS


@dataclass(frozen=True)
class SlotSettings:
    """Settings that all jobs of a search share.

    Args:
        dataset: absolute URI.
        need: number of processes of a slot, and the resources of each.
        out: URL of the search's Output.
        study: name of the search, which tags its metrics.
        number: number of the slot, from 0. A slot keeps the number that it was started with.
    """

    dataset: str
    need: Need
    out: str
    study: str
    number: int = 0


@dataclass(frozen=True)
class TrainJob:
    """Train a run to its end, from its last checkpoint if there is one.

    Args:
        number: number of the trial; its checkpoints are OUT/checkpoints/NUMBER/epoch-N.
        config: the settings of its run.
        then_test: evaluate it on the test split at the end.
    """

    number: int
    config: dict[str, Any]
    then_test: bool = False

    @property
    def key(self) -> str:
        """Name of the job, and of its stored result."""
        return f"train {self.number}"


@dataclass(frozen=True)
class EvaluationJob:
    """Evaluate a model on one split, for several strengths of the post-hoc adjustment in one pass over the images.

    Args:
        model: its name in results; predictions on the test split go to OUT/predictions/MODEL-tau-TAU.
        config: the settings of its run.
        checkpoint: the folder of its weights in OUT; None for a model that trains nothing.
        split: validation or test.
        taus: post-hoc adjustment of each result; an ensemble reports on the last one.
    """

    model: str
    config: dict[str, Any]
    checkpoint: str | None
    split: str
    taus: tuple[float, ...]

    @property
    def key(self) -> str:
        """Name of the job."""
        return f"evaluate {self.model} {self.split} {self.taus}"


@dataclass(frozen=True)
class IdleJob:
    """Open a slot, and keep it open while there is nothing to do. Replies JobDone repeatedly.

    Each slot begins with an IdleJob, so that a trial is only drawn, and its clock only starts, when a slot is ready for it. Later
    an IdleJob keeps a slot that will be needed again, because Tune ends all but one of the slots without a job.
    """

    key: str = "idle"


Job = TrainJob | EvaluationJob | IdleJob


def trial_checkpoints(number: int) -> str:
    """Return the folder of a trial's checkpoints in OUT."""
    return f"{CHECKPOINTS}/{number:04d}"


def trial_checkpoint_path(number: int, epoch: int) -> str:
    """Return the folder of a trial's checkpoint in OUT."""
    return f"{trial_checkpoints(number)}/epoch-{epoch:04d}"
