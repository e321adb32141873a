"""Jobs of a slot, as plain data: the driver imports neither torch nor Ray for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lift_ray.data.folds import EVERYTHING, SEARCHED, Folds
from lift_ray.ray_runtime.capacity import Need
from lift_ray.settings.run import BackboneConfig
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
        folds: division of the labeled images.
        tunings: `frozen_cuts.tunings` of the space.
        is_only: no other slot runs, so this one may take a GPU that Ray does not count.
        exchange: name of the exchange of features with other nodes; "" if there are none.
    """

    dataset: str
    need: Need
    out: str
    study: str
    number: int = 0
    folds: Folds = field(default_factory=Folds)
    tunings: tuple[dict[str, Any], ...] = ()
    is_only: bool = False
    exchange: str = ""


@dataclass(frozen=True)
class TrainJob:
    """Train a run to its end, from its last checkpoint if there is one.

    Args:
        number: number of the trial whose settings it has, or of a repeat with another seed.
        config: the settings of its run.
        fold: the fold that it holds out; EVERYTHING if it trains on all labeled images.
        then: what follows the training. A trial has reported all its results by then (""); other jobs end with JobDone, after
            they have written the predictions for the images of the fold ("hold out"), were evaluated on the test split ("test"),
            or at once ("keep").
        tau: strength of the post-hoc adjustment in the test; None for that of the settings.
    """

    number: int
    config: dict[str, Any]
    fold: int = SEARCHED
    then: Literal["", "hold out", "test", "keep"] = ""
    tau: float | None = None

    @property
    def key(self) -> str:
        """Name of the job, and of its stored result."""
        fold = "" if self.fold == SEARCHED else f" {self._of_fold}"
        return f"train {self.number}{fold}" + ("" if self.tau is None else f" tau {self.tau:g}")

    @property
    def is_refit(self) -> bool:
        """True if it trains a final model again on all labeled images."""
        return self.then == "keep" and self.number < FIRST_REPEAT

    @property
    def _of_fold(self) -> str:
        return "refit" if self.fold == EVERYTHING else f"fold {self.fold}"

    @property
    def title(self) -> str:
        """The job in words, for the display of progress."""
        if self.number >= FIRST_REPEAT:
            return "another seed"
        return f"trial {self.number}{'' if self.fold == SEARCHED else f', {self._of_fold}'}"


@dataclass(frozen=True)
class Pack:
    """Train several trials in one pass. Its replies are Replies, one for each trial that has something to tell."""

    jobs: tuple[TrainJob, ...]

    @property
    def fold(self) -> int:
        """The fold that the trials hold out."""
        return self.jobs[0].fold

    @property
    def key(self) -> str:
        """Name of the job."""
        return "train " + "+".join(str(job.number) for job in self.jobs)

    @property
    def title(self) -> str:
        """The job in words, for the display of progress."""
        numbers = [job.number for job in self.jobs]
        if len(numbers) > 2 and numbers == [*range(numbers[0], numbers[-1] + 1)]:
            return f"trials {numbers[0]} to {numbers[-1]}"
        return f"trials {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


@dataclass(frozen=True)
class EvaluationJob:
    """Evaluate a model on one split, for several strengths of the post-hoc adjustment in one pass over the images.

    Args:
        model: its name in results; predictions on the test split go to OUT/predictions/MODEL-tau-TAU.
        config: the settings of its run.
        checkpoint: the folder of its weights in OUT; None for a model that trains nothing.
        split: validation or test.
        taus: post-hoc adjustment of each result; an ensemble reports on the last one.
        out_of_fold: number of the trial, to write the predictions on the validation split as those of its first fold.
        fold: the fold that the model was trained on; EVERYTHING for all labeled images. Post-hoc adjustment requires the prior of
            its training images.
    """

    model: str
    config: dict[str, Any]
    checkpoint: str | None
    split: str
    taus: tuple[float, ...]
    out_of_fold: int | None = None
    fold: int = SEARCHED

    @property
    def key(self) -> str:
        """Name of the job, and of its stored result."""
        return f"evaluate {self.model} {self.split} {self.taus}"

    @property
    def title(self) -> str:
        """The job in words, for the display of progress."""
        return f"{self.model} on {self.split}"


@dataclass(frozen=True)
class IdleJob:
    """Open a slot, and keep it open while there is nothing to do. Replies JobDone repeatedly.

    Each slot begins with an IdleJob, so that a trial is only drawn, and its clock only starts, when a slot is ready for it. Later
    an IdleJob keeps a slot that will be needed again, because Tune ends all but one of the slots without a job.
    """

    key: str = "idle"
    fold: int = SEARCHED


Job = TrainJob | Pack | EvaluationJob | IdleJob
AnyJob = TypeVar("AnyJob", TrainJob, Job)
Loaded = tuple[str, str | None, int | None]  # a backbone: its model, weights, and side of the images
FIRST_REPEAT = 1_000_000  # lowest number of the repeats with other seeds


def parts(job: Job) -> tuple[Job, ...]:
    """Return the jobs of a pack, or the job itself."""
    return job.jobs if isinstance(job, Pack) else (job,)


def backbone_of(job: Job) -> Loaded | None:
    """Return the backbone that a job needs; None if it needs none. Members of `method: backdoor` may need others too."""
    first = parts(job)[0]
    if not isinstance(first, TrainJob | EvaluationJob):
        return None
    wanted = BackboneConfig.model_validate(first.config.get("backbone", {}))
    return wanted.model, wanted.pretrained, wanted.resolution_px


def first_fitting(jobs: Sequence[AnyJob], loaded: Collection[Loaded]) -> AnyJob:
    """Return the first job whose backbone a slot has loaded, else the first one. No evaluation overtakes a training that waits."""
    alike = (job for job in jobs if isinstance(job, type(jobs[0])))
    return next((job for job in alike if backbone_of(job) in loaded), jobs[0])


def trial_checkpoints(number: int, fold: int = SEARCHED) -> str:
    """Return the folder in OUT for the checkpoints of a trial, or of its settings on another fold."""
    name = "" if fold == SEARCHED else "-refit" if fold == EVERYTHING else f"-fold-{fold}"
    return f"{CHECKPOINTS}/{number:04d}{name}"


def trial_checkpoint_path(number: int, epoch: int, fold: int = SEARCHED) -> str:
    """Return the folder of a trial's checkpoint in OUT."""
    return f"{trial_checkpoints(number, fold)}/epoch-{epoch:04d}"
