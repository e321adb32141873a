"""Several trained models that answer together, evaluated in one pass over the images."""

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
    """A run whose logits are the mean of several runs' on the same data; what a run is asked when it is evaluated.

    Each picture is read and decoded once, and each model gets it at its own size, with its own mean and deviation.

    Args:
        config: settings of the whole.
        runs: by name.

    Attributes:
        in_use: the first so many runs answer.
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
        """How the models answer from now on; what is not given stays as it is.

        Args:
            combine: a key of methods.backdoor.COMBINE.
            weights: of the runs, in their order.
            with_gla: take both priors out of each model: z_ft + z_zs - log prior_train - log q (arXiv 2310.08106).

        Raises BadInput for weights that are not one for each run, and as `Gla`.
        """
        if weights and len(weights) != len(self.runs):
            raise BadInput(
                f"--weights: must be one for each of the {len(self.runs)} models ({', '.join(self.runs)}), but got "
                f"{len(weights)}; give {len(self.runs)}, with commas between them"
            )
        self.combine = COMBINE[combine] if combine else self.combine
        self.weights = list(weights) or self.weights
        self.gla = Gla(list(self.runs.values())) if with_gla else self.gla

    @classmethod
    def of(cls, config: RunConfig, warms: Sequence[Workspace], class_counts: list[int] | None = None) -> Self:
        """The members of `method: backdoor`, as `Run` makes one, each on one of the devices in turn."""
        method = config.method
        assert isinstance(method, BackdoorConfig)
        members = zip(config.members().items(), itertools.cycle(warms), strict=False)
        runs = {name: Run(member, warm, class_counts) for (name, member), warm in members}
        out = cls(config, runs)
        out.answer(method.combine, [method.weights.get(name, 1.0) for name in runs])
        return out

    @property
    def num_trained(self) -> int:
        """Number of trained values of all models."""
        return sum(run.num_trained for run in self.runs.values())

    def evaluate_taus(
        self, split_name: str, taus: Sequence[float], each: Sequence[PredictionCollector] = ()
    ) -> list[dict[str, float]]:
        """As of a run; `report` then says what the models did alone, too, all at the last tau."""
        used = list(self.runs)[: self.in_use]
        self.crossed = GroupGainTable(used, self.warm.dataset.num_classes, self.ranks.device)
        log_prior = torch.from_numpy(np.log(self.class_counts / self.class_counts.sum())).float()
        self.shift = taus[-1] * log_prior.to(self.ranks.device)
        found = super().evaluate_taus(split_name, taus, each)
        for tensor in self.crossed.tensors():
            self.ranks.sum(tensor)
        return found

    def report(self, split_name: str) -> dict[str, Any]:
        """What the last evaluation, of this split, found (GroupGainTable.result)."""
        assert self.crossed is not None
        assert self.per_class is not None
        self.p_groups, why_not = self._p_groups()
        found = self.crossed.result(split_name, self.per_class, self.class_counts, self.p_groups)
        return found | ({"no_parameter_groups": why_not} if why_not else {})

    def _p_groups(self) -> tuple[NDArray[np.str_] | None, str]:
        """many, medium or few by the label prior of the foundation models together, (K,), and ""; None where it cannot be had, and why.

        Models without a text tower have no say.
        """
        models = {}
        for run in self.runs.values():
            if run.warm.backbone(run.config).text is not None:
                models[run.config.backbone, str(run.config.head.template)] = run
        if not models:
            return None, "no model has a text tower"
        if "validation" not in self.warm.dataset.splits:
            return None, "the data set has no validation split"
        try:
            priors = [label_prior(run.warm, run.config).log_q.cpu() for run in models.values()]
        except BadInput as error:
            return None, str(error)
        return thirds(mean_prior(priors)), ""

    def per_class_rows(self) -> list[dict[str, Any]]:
        """As of a run; after `report` with each class's parameter group, where it is known."""
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
    """What takes both priors out of trained models; fitted on the validation split when it is made.

    Args:
        runs: trained, on data with a validation split.

    Raises BadInput for a backbone without a text tower, and where no prior can be fitted.
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
        """Logits (B, K) of the trained and then of the zero-shot models -> those of GLA, one for each trained model."""
        number = len(self.priors)
        return [
            gla(tuned / temperature, plain / prior.temperature, left.to(tuned.device), prior.log_q.to(tuned.device))
            for tuned, plain, temperature, prior, left in zip(
                logits[:number], logits[number:], self.temperatures, self.priors, self.log_priors, strict=True
            )
        ]


def prior_left(loss: LossConfig) -> float:
    """How much of log prior_train a loss leaves in the raw logits: all after cross-entropy, 1 - tau after logit adjustment."""
    left = LOSSES[loss.kind].prior_left
    return left(loss) if callable(left) else left


def logits_of(runs: Sequence[Run], split: Split) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """This rank's share of a split: fp32 logits (B, K) of each run on the first one's device, and labels (B,)."""
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
    answers = [run.warm.predictor(run.config, run.model) for run in runs]

    def answer(batch: tuple[Mapping[View, torch.Tensor], torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        pictures, labels = batch
        with torch.inference_mode():
            logits = [over_crops(mine(pictures[view]).float()) for mine, view in zip(answers, views, strict=True)]
            return [mine.to(first.device) for mine in logits], labels.to(first.device)  # all GPUs have work by now

    yield from on_cores(first.device, answer, batches)


def run_of(config: RunConfig, warms: Sequence[Workspace], class_counts: list[int] | None = None) -> Run:
    """The run of any method; a single model is on the first device."""
    if isinstance(config.method, BackdoorConfig):
        return Ensemble.of(config, warms, class_counts)
    return Run(config, warms[0], class_counts)
