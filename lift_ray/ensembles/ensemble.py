"""Ensembles of trained models, evaluated in one pass over the images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from lift_ray.data.dataset import Split
from lift_ray.data.resolutions import View, view_batches
from lift_ray.ensembles.combine import COMBINE, Members
from lift_ray.ensembles.group_table import GroupGainTable
from lift_ray.errors import BadInput
from lift_ray.evaluation.accumulator import PredictionCollector
from lift_ray.evaluation.cpu_parallel import batch_size, on_cores
from lift_ray.methods.prior import Prior, gla, mean_prior, thirds
from lift_ray.model.heads import over_crops
from lift_ray.registry import LOSSES
from lift_ray.settings.losses import LossConfig
from lift_ray.settings.methods import BackdoorConfig
from lift_ray.settings.run import RunConfig
from lift_ray.training.label_prior import fitted, label_prior, zero_shot
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace


class Ensemble(Run):
    """Ensemble of runs on the same data, with the methods of a run that evaluation uses; its logits are the mean of theirs.

    Each image is read and decoded once. Each model gets it at its own size, with its own mean and standard deviation.

    Args:
        config: settings of the ensemble.
        runs: the members by name.

    Attributes:
        in_use: number of members, from the first one on, that are used.
    """

    def __init__(self, config: RunConfig, runs: Mapping[str, Run]) -> None:
        first = next(iter(runs.values()))
        self.config, self.warm, self.ranks, self.class_counts = config, first.warm, first.ranks, first.class_counts
        self.runs, self.in_use = dict(runs), len(runs)
        self.model = Members({name: run.model for name, run in runs.items()})  # type: ignore[assignment]
        self.optimizer, self.epoch, self.step, self.steps_per_epoch = None, 0, 0, 0
        self.losses, self.seconds, self.metrics, self.history = torch.zeros(0, 2), {}, {}, []
        self.pulse, self.per_class, self.evaluated = lambda: None, None, 0.0
        self.combine, self.weights = COMBINE["logits"], [1.0] * len(runs)
        self.gla: Gla | None = None
        self.crossed: GroupGainTable | None = None
        self.p_groups: NDArray[np.str_] | None = None

    def answer(self, combine: str | None = None, weights: Sequence[float] = (), *, with_gla: bool = False) -> None:
        """Set how the logits are combined from now on; arguments that are not given change nothing.

        Args:
            combine: a key of ensembles.combine.COMBINE.
            weights: one for each run, in their order.
            with_gla: remove both priors from each model: z_ft + z_zs - log prior_train - log q (arXiv 2310.08106).

        Raises BadInput for a wrong number of weights, and if a label prior cannot be estimated for GLA.
        """
        if weights and len(weights) != len(self.runs):
            raise BadInput(
                "--weights",
                f"must contain one weight for each of the {len(self.runs)} models ({', '.join(self.runs)})",
                len(weights),
                f"give {len(self.runs)}, separated by commas",
            )
        self.combine = COMBINE[combine] if combine else self.combine
        self.weights = list(weights) or self.weights
        self.gla = Gla(list(self.runs.values())) if with_gla else self.gla

    @classmethod
    def of(cls, config: RunConfig, warms: Sequence[Workspace], class_counts: list[int] | None = None) -> Self:
        """Build the members of `method: backdoor`, on the devices in turn, and the ensemble of them."""
        method = config.method
        assert isinstance(method, BackdoorConfig)
        members = zip(config.members().items(), itertools.cycle(warms), strict=False)
        runs = {name: Run(member, warm, class_counts) for (name, member), warm in members}
        out = cls(config, runs)
        out.answer(method.combine, [method.weights.get(name, 1.0) for name in runs])
        return out

    @property
    def num_trained(self) -> int:
        """Number of trained parameters of all models."""
        return sum(run.num_trained for run in self.runs.values())

    def evaluate_taus(
        self, split_name: str, taus: Sequence[float], each: Sequence[PredictionCollector] = ()
    ) -> list[dict[str, float]]:
        """Return metrics for several taus (Run.evaluate_taus), and count each member at the last tau for `report`."""
        used = list(self.runs)[: self.in_use]
        self.crossed = GroupGainTable(used, self.warm.dataset.num_classes, self.ranks.device)
        log_prior = torch.from_numpy(np.log(self.class_counts / self.class_counts.sum())).float()
        self.shift = taus[-1] * log_prior.to(self.ranks.device)
        found = super().evaluate_taus(split_name, taus, each)
        for tensor in self.crossed.tensors():
            self.ranks.sum(tensor)
        return found

    def report(self, split_name: str) -> dict[str, Any]:
        """Return the report of the last evaluation, which was on this split (GroupGainTable.result)."""
        assert self.crossed is not None
        assert self.per_class is not None
        self.p_groups, why_not = self._p_groups()
        found = self.crossed.result(split_name, self.per_class, self.class_counts, self.p_groups)
        return found | ({"no_parameter_groups": why_not} if why_not else {})

    def _p_groups(self) -> tuple[NDArray[np.str_] | None, str]:
        """Return the parameter group of each class, many, medium or few, (K,), and ""; or None and the reason.

        It follows from the mean label prior of the foundation models that have a text tower.
        """
        models = {}
        for run in self.runs.values():
            if run.warm.backbone(run.config).text is not None:
                models[run.config.backbone, str(run.config.head.template)] = run
        if not models:
            return None, "no model has a text tower"
        if "validation" not in self.warm.dataset.splits:
            return None, "the dataset has no validation split"
        try:
            priors = [label_prior(run.warm, run.config).log_q.cpu() for run in models.values()]
        except BadInput as error:
            return None, str(error)
        return thirds(mean_prior(priors)), ""

    def per_class_rows(self) -> list[dict[str, Any]]:
        """Return a row for each class, after `report` with its parameter group if that is known."""
        rows = super().per_class_rows()
        if self.p_groups is None:
            return rows
        return [row | {"parameter_group": str(group)} for row, group in zip(rows, self.p_groups, strict=True)]

    def _logits(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        used = list(self.runs.values())[: self.in_use]
        for logits, labels in logits_of([*used, *(self.gla.runs if self.gla else [])], split):
            if self.gla:
                logits = self.gla.without_priors(logits)
            if self.crossed is not None:
                self.crossed.add([mine - self.shift for mine in logits], labels)
            yield self.combine(logits, self.weights[: self.in_use]), labels


class Gla:
    """Generalized logit adjustment: removes both priors from trained models; fitted on the validation split at construction.

    Args:
        runs: trained runs, on data with a validation split.

    Raises BadInput for a backbone without a text tower, and if no prior can be fitted.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.priors: list[Prior] = [label_prior(run.warm, run.config) for run in runs]
        self.runs = [Run(zero_shot(run.config), run.warm, run.class_counts.tolist()) for run in runs]
        split = runs[0].warm.dataset.split("validation")
        parts = list(logits_of(runs, split))
        labels = torch.cat([labels for _, labels in parts])
        self.temperatures = [
            fitted(run.warm, torch.cat([logits[m] for logits, _ in parts]), labels, reduce=run.ranks.sum).temperature
            for m, run in enumerate(runs)
        ]
        self.log_priors = [
            prior_left(run.config.loss) * torch.from_numpy(np.log(run.class_counts / run.class_counts.sum())).float()
            for run in runs
        ]

    def without_priors(self, logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the GLA logits (B, K) of each trained model, given the logits of the trained and then of the zero-shot models."""
        number = len(self.priors)
        return [
            gla(tuned / temperature, plain / prior.temperature, left.to(tuned.device), prior.log_q.to(tuned.device))
            for tuned, plain, temperature, prior, left in zip(
                logits[:number], logits[number:], self.temperatures, self.priors, self.log_priors, strict=True
            )
        ]


def prior_left(loss: LossConfig) -> float:
    """Return the fraction of log prior_train that a loss leaves in the logits: 1 for cross-entropy, 1 - tau for logit adjustment."""
    left = LOSSES[loss.kind].prior_left
    return left(loss) if callable(left) else left


def logits_of(runs: Sequence[Run], split: Split) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Yield, for this rank's part of a split, fp32 logits (B, K) of each run on the first one's device, and labels (B,)."""
    first = runs[0].ranks
    views = [View(run.model.tower.resolution_px, run.config.evaluation.tte) for run in runs]
    batches = view_batches(
        runs[0].warm.reader(split),
        split,
        list(dict.fromkeys(views)),
        rank=first.rank,
        world_size=first.world_size,
        num_threads=first.num_threads,
        batch_size=min(batch_size(first.device, run.model.tower, run.config.evaluation.tte) for run in runs),
    )
    predictors = [run.warm.predictor(run.config, run.model) for run in runs]

    def predict(batch: tuple[Mapping[View, torch.Tensor], torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        images, labels = batch
        with torch.inference_mode():
            logits = [over_crops(model(images[view]).float()) for model, view in zip(predictors, views, strict=True)]
            # Copies wait for their GPU, so they come after all GPUs have been given work.
            return [mine.to(first.device) for mine in logits], labels.to(first.device)

    yield from on_cores(first.device, predict, batches)


def run_of(config: RunConfig, warms: Sequence[Workspace], class_counts: list[int] | None = None) -> Run:
    """Build the run of any method; a single model is on the first device."""
    if isinstance(config.method, BackdoorConfig):
        return Ensemble.of(config, warms, class_counts)
    return Run(config, warms[0], class_counts)
