"""Settings of a search: trials, samplers, schedulers, resources per trial and constraints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from lift_ray.registry import SAMPLERS, Config, register_sampler
from lift_ray.settings.base import OneOf

if TYPE_CHECKING:
    from lift_ray.settings.run import RunConfig

Epochs = Annotated[int, Field(ge=1)]
TAUS = tuple(0.25 * i for i in range(9))  # 0 ... 2: strengths of post-hoc logit adjustment tried after training


def taus_of(config: RunConfig) -> tuple[float, ...]:
    """Return the strengths of post-hoc adjustment to try after a training: TAUS and that of its settings."""
    return tuple(sorted({*TAUS, config.evaluation.posthoc_tau}))


class NoSchedulerConfig(Config):
    """Run every trial to its end."""

    kind: Literal["none"] = "none"


class AshaConfig(Config):
    """Stop the worse trials early (arXiv 1810.05934). Baselines always run to their end."""

    kind: Literal["asha"] = "asha"
    grace_epochs: Epochs = 1
    """Epochs that every trial runs at least."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Factor between the rungs in epochs; at each rung the best 1 / reduction_factor of the trials continue."""


class HyperbandConfig(Config):
    """ASHA in several brackets with increasing grace periods (arXiv 1603.06560); trials are assigned to them in turn."""

    kind: Literal["hyperband"] = "hyperband"
    grace_epochs: Epochs = 1
    """Epochs that every trial runs at least."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Factor between the rungs in epochs; at each rung the best 1 / reduction_factor of the trials continue."""


class MedianConfig(Config):
    """Stop a trial if its best value so far is below the median of the other trials' means up to the same epoch."""

    kind: Literal["median"] = "median"
    grace_epochs: Epochs = 1
    """Epochs that every trial runs at least."""
    min_trials: Annotated[int, Field(ge=1)] = 3
    """Minimum number of other trials that have reached this epoch."""


AnyScheduler = NoSchedulerConfig | AshaConfig | HyperbandConfig | MedianConfig


_RULES = "lift_ray.settings.checks"
for _name, _problem, _package in (
    ("tpe", "", ""),
    ("random", "", ""),
    ("grid", f"{_RULES}:grid_problem", ""),
    ("cmaes", f"{_RULES}:cmaes_problem", "cmaes"),
    ("nsga2", f"{_RULES}:nsga2_problem", ""),
    ("gp", f"{_RULES}:gp_problem", "scipy"),
):
    register_sampler(_name, f"lift_ray.searching.samplers:{_name}", problem=_problem, package=_package)

if TYPE_CHECKING:
    AnySampler = str
else:
    AnySampler = SAMPLERS.names()


class ConfirmConfig(Config):
    """Train the best trials and the baselines on the other folds too, and choose the winner by all out-of-fold predictions."""

    best: Annotated[int, Field(ge=1)] = 3
    """Number of the best trials to confirm; finished baselines always are."""
    prefer: Literal["best", "smaller"] = "best"
    """smaller: the fewest trained parameters among the trials within one standard error of the best."""


class SearchConfig(Config):
    """Settings of the search: number of trials, sampler, scheduler, confirmation and final evaluation."""

    trials: Annotated[int, Field(ge=1)] = 32
    """Number of trials, baselines included."""
    per_kind: Annotated[int, Field(ge=1)] | None = None
    """Number of trials for each tuner.kind, instead of `trials`; each kind has its own sampler and rungs."""
    sampler: AnySampler = "tpe"
    """Chooses the settings of the next trial (Optuna): tpe learns from the trials so far; grid takes all combinations."""
    scheduler: Annotated[AnyScheduler, Field(discriminator="kind")] = AshaConfig()
    """Stops the worse trials early."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the sampler and the folds."""
    folds: Annotated[int, Field(ge=1)] = 1
    """Number of folds: fold 1 is the validation split, on which trials are searched; the others divide the training images."""
    confirm: ConfirmConfig | None = None
    """Confirm the best trials on all folds; by default fold 1 decides alone."""
    refit: Annotated[Literal["auto"] | bool, OneOf("auto, true or false")] = "auto"
    """Train best/ again on the training and validation images. auto: not on validation images that are a set of their own."""
    tte_best: Annotated[int, Field(ge=0)] = 1
    """Number of the best trials that are also evaluated with test-time ensembling at the end."""
    seeds_best: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of seeds for training the best settings and the first baseline, including the seed of the search."""

    @model_validator(mode="after")
    def _enough_folds(self) -> SearchConfig:
        if self.folds == 2:
            raise ValueError(
                "folds must be 1 or at least 3, but got 2, so that one fold would be the whole training split; use 3"
            )
        if self.confirm is not None and self.folds == 1:
            raise ValueError("confirm requires folds of at least 3, but got 1; set search.folds: 4")
        return self

    @model_validator(mode="after")
    def _one_number(self) -> SearchConfig:
        if self.per_kind is not None and "trials" in self.model_fields_set:
            raise ValueError("must have trials or per_kind, but got both; remove one")
        return self


class ScaleConfig(Config):
    """Resources of a trial."""

    workers_per_trial: Annotated[int, Field(ge=1)] = 1
    """Number of processes that train a trial together."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """Number of cores of each of them."""
    use_gpu: Annotated[Literal["auto"] | bool, OneOf("auto, true or false")] = "auto"
    """One GPU for each worker; auto: if the cluster has any."""
    max_concurrent: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)], OneOf("auto or an integer of at least 1")
    ] = "auto"
    """Number of trials at a time, at most; auto: as many as fit."""
    fused: Literal["auto", "off"] = "auto"
    """auto: trials of a slot that see the same images train in one pass, which decodes them, and computes the blocks that the trials
    leave frozen, once. It pays with augmented images that are drawn anew, and changes no result; off: one at a time."""
    refit_workers: Annotated[int, Field(ge=1)] = 1
    """Number of Ray Train workers that train best/ again at the end, as `train --workers` does; 1: a slot of the search."""


class PlanConfig(Config):
    """Estimates used by --dry-run only."""

    training_images: Annotated[int, Field(ge=1)] | None = None
    """Number of training images, for datasets that a dry run does not open."""
    images_per_s: Annotated[float, Field(gt=0)] | None = None
    """Training speed of a worker."""


class Constraint(Config):
    """Bounds of a metric that a trial must satisfy."""

    min: float | None = None
    """The metric must be at least this."""
    max: float | None = None
    """The metric must be at most this."""

    @model_validator(mode="after")
    def _some(self) -> Constraint:
        if self.min is None and self.max is None:
            raise ValueError("must have min or max, but got neither; add one")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min must be at most max, but got {self.min:g} and {self.max:g}; swap them")
        return self

    def excess(self, value: float) -> float:
        """Return by how much a value exceeds the bounds; 0 or less if it satisfies them."""
        return max(
            -math.inf if self.max is None else value - self.max, -math.inf if self.min is None else self.min - value
        )


def rungs(scheduler: AnyScheduler, most_epochs: int, bracket: int = 0) -> list[int]:
    """Return the epochs after which ASHA or Hyperband may stop a trial: grace * factor^k, before the last epoch."""
    if not isinstance(scheduler, AshaConfig | HyperbandConfig):
        return []
    out = [scheduler.grace_epochs * scheduler.reduction_factor**bracket]
    while out[-1] * scheduler.reduction_factor < most_epochs:
        out.append(out[-1] * scheduler.reduction_factor)
    return [epoch for epoch in out if epoch < most_epochs]


def num_brackets(scheduler: AnyScheduler, most_epochs: int) -> int:
    """Return the number of Hyperband brackets; the last one never stops a trial."""
    if not isinstance(scheduler, HyperbandConfig):
        return 1
    number = 1
    while scheduler.grace_epochs * scheduler.reduction_factor**number <= most_epochs:
        number += 1
    return number


def expected_epochs(scheduler: AnyScheduler, most_epochs: int) -> float:
    """Return the expected epochs of a sampled trial if each rung lets one in `reduction_factor` continue."""
    factor = scheduler.reduction_factor if isinstance(scheduler, AshaConfig | HyperbandConfig) else 1
    means = []
    for bracket in range(num_brackets(scheduler, most_epochs)):
        fraction, done, mean = 1.0, 0, 0.0
        for epoch in [*rungs(scheduler, most_epochs, bracket), most_epochs]:
            mean += fraction * (epoch - done)
            fraction, done = fraction / factor, epoch
        means.append(mean)
    return sum(means) / len(means)
