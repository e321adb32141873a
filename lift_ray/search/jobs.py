"""The jobs of a slot. Plain data: the driver imports neither torch nor Ray for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lift_ray.ray_runtime.capacity import Need
from lift_ray.storage.layout import CHECKPOINTS


@dataclass(frozen=True)
class SlotSettings:
    """The settings that all jobs of a search share.

    Args:
        dataset: URI, absolute.
        need: processes of a slot, and what each takes of a node.
        out: the search's Output, as a URL.
        study: name of the search, the tag of its metrics.
        number: of the slot, from 0; a slot keeps the number that it was started with.
    """

    dataset: str
    need: Need
    out: str
    study: str
    number: int = 0


@dataclass(frozen=True)
class TrainJob:
    """Train a run to its end, one epoch after another, from its last checkpoint if there is one.

    Args:
        number: of the trial; its checkpoints are OUT/checkpoints/NUMBER/epoch-N.
        config: the settings of its run.
        then_test: evaluate it on the test split at the end.
    """

    number: int
    config: dict[str, Any]
    then_test: bool = False

    @property
    def key(self) -> str:
        """Names the job, and its result where that is stored."""
        return f"train {self.number}"


@dataclass(frozen=True)
class EvaluationJob:
    """Evaluate a model on one split, for several strengths of the post-hoc adjustment in one pass over the images.

    Args:
        model: its name in results; predictions on the test split go to OUT/predictions/MODEL-tau-TAU.
        config: the settings of its run.
        checkpoint: the folder of its weights in OUT; None for a model that trains nothing.
        split: validation or test.
        taus: what each result is adjusted by; an ensemble reports on the last one.
    """

    model: str
    config: dict[str, Any]
    checkpoint: str | None
    split: str
    taus: tuple[float, ...]

    @property
    def key(self) -> str:
        """Names the job."""
        return f"evaluate {self.model} {self.split} {self.taus}"


@dataclass(frozen=True)
class IdleJob:
    """Open a slot, and keep it open while there is nothing to do. Replies Done, again and again.

    Each slot begins with one, so that a trial is drawn, and its time counts, when a slot is there for it. Later it keeps a slot
    that will be needed again: Tune ends all but one of those without a job.
    """

    key: str = "idle"


Job = TrainJob | EvaluationJob | IdleJob


def trial_checkpoint_path(number: int, epoch: int) -> str:
    """Where, inside OUT, the checkpoint of a trial is."""
    return f"{CHECKPOINTS}/{number:04d}/epoch-{epoch:04d}"
