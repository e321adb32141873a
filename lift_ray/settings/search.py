"""How a space is searched, and what a trial may use of the cluster."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lift_ray.settings.base import OneOf, Settings

Epochs = Annotated[int, Field(ge=1)]
TAUS = tuple(0.25 * i for i in range(9))  # 0 ... 2: the strengths of post-hoc adjustment that are tried after training


class NoSchedulerConfig(Settings):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class AshaConfig(Settings):
    """Stop the worse trials early (arXiv 1810.05934). Baselines (`start`) always run to their end."""

    kind: Literal["asha"] = "asha"
    grace_epochs: Epochs = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class HyperbandConfig(Settings):
    """ASHA in several brackets, each with a longer grace than the one before (arXiv 1603.06560); trials take turns."""

    kind: Literal["hyperband"] = "hyperband"
    grace_epochs: Epochs = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class MedianConfig(Settings):
    """Stop a trial whose best value so far is below the median of the others' means up to the same epoch."""

    kind: Literal["median"] = "median"
    grace_epochs: Epochs = 1
    min_trials: Annotated[int, Field(ge=1)] = 3
    """Minimum number of other trials that have reached this epoch."""


AnyScheduler = NoSchedulerConfig | AshaConfig | HyperbandConfig | MedianConfig


class SearchConfig(Settings):
    """How the space is searched."""

    trials: Annotated[int, Field(ge=1)] = 32
    per_kind: Annotated[int, Field(ge=1)] | None = None
    """So many trials for each tuner.kind, in place of `trials`; each kind has a sampler and rungs of its own."""
    sampler: Literal["tpe", "random", "grid", "cmaes", "nsga2", "gp"] = "tpe"
    scheduler: Annotated[AnyScheduler, Field(discriminator="kind")] = AshaConfig()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    tte_best: Annotated[int, Field(ge=0)] = 1
    """Number of the best trials that are also evaluated with test-time ensembling at the end."""
    seeds_best: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of seeds with which the best settings and the first baseline are trained, the search's own included."""

    @model_validator(mode="after")
    def _one_number(self) -> SearchConfig:
        if self.per_kind is not None and "trials" in self.model_fields_set:
            raise ValueError("must have trials or per_kind, but got both; remove one")
        return self


class ScaleConfig(Settings):
    """What a trial may use of the cluster."""

    workers_per_trial: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    use_gpu: Annotated[Literal["auto"] | bool, OneOf("auto, true or false")] = "auto"
    max_concurrent: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)], OneOf("auto or an integer of at least 1")
    ] = "auto"


class PlanConfig(Settings):
    """Estimates used by --dry-run only."""

    training_images: Annotated[int, Field(ge=1)] | None = None
    """Of data that a dry run does not open."""
    images_per_s: Annotated[float, Field(gt=0)] | None = None
    """A worker's speed in training."""


class Constraint(Settings):
    """What a trial's figure must keep to."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _some(self) -> Constraint:
        if self.min is None and self.max is None:
            raise ValueError("must have min or max, but got neither; add one")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min must be at most max, but got {self.min:g} and {self.max:g}; swap them")
        return self

    def excess(self, value: float) -> float:
        """By how much a value breaks the limit; 0 or less when it keeps to it."""
        return max(
            -math.inf if self.max is None else value - self.max, -math.inf if self.min is None else self.min - value
        )


def rungs(scheduler: AnyScheduler, most_epochs: int, bracket: int = 0) -> list[int]:
    """The epochs after which ASHA or Hyperband may stop a trial: grace * factor^k, below the end."""
    if not isinstance(scheduler, AshaConfig | HyperbandConfig):
        return []
    out = [scheduler.grace_epochs * scheduler.reduction_factor**bracket]
    while out[-1] * scheduler.reduction_factor < most_epochs:
        out.append(out[-1] * scheduler.reduction_factor)
    return [epoch for epoch in out if epoch < most_epochs]


def num_brackets(scheduler: AnyScheduler, most_epochs: int) -> int:
    """How many brackets Hyperband has; the last one stops nothing."""
    if not isinstance(scheduler, HyperbandConfig):
        return 1
    number = 1
    while scheduler.grace_epochs * scheduler.reduction_factor**number <= most_epochs:
        number += 1
    return number


def expected_epochs(scheduler: AnyScheduler, most_epochs: int) -> float:
    """Mean epochs of a drawn trial, when each rung lets one in `reduction_factor` go on."""
    means = []
    for bracket in range(num_brackets(scheduler, most_epochs)):
        share, done, mean = 1.0, 0, 0.0
        for epoch in [*rungs(scheduler, most_epochs, bracket), most_epochs]:
            mean += share * (epoch - done)
            share, done = share / getattr(scheduler, "reduction_factor", 1), epoch
        means.append(mean)
    return sum(means) / len(means)
