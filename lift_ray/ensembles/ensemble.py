"""Ensembles of trained models, evaluated in one pass over the images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.data.augment import View
from lift_ray.data.dataset import Split
from lift_ray.data.resolutions import view_batches
from lift_ray.ensembles.combine import COMBINE
from lift_ray.ensembles.group_table import GroupGainTable
from lift_ray.epoch_metrics import GROUPS
from lift_ray.errors import BadInput
from lift_ray.evaluation.accumulator import shift_of
from lift_ray.evaluation.cpu_parallel import batch_size, on_cores
from lift_ray.evaluation.evaluator import LogitBatch
from lift_ray.evaluation.metrics import ClassGroups, PerClass
from lift_ray.methods.prior import Prior, gla, kept, mean_prior, thirds
from lift_ray.model.device import counting_device
from lift_ray.model.heads import over_crops
from lift_ray.registry import LOSSES
from lift_ray.settings.methods import BackdoorConfig
from lift_ray.settings.run import RunConfig
from lift_ray.training.label_prior import fitted, label_prior, resampled_prior, zero_shot
from lift_ray.training.predictor import SplitPredictor
from lift_ray.training.workspace import Workspace


class ParameterGroups(NamedTuple):
    """Groups of the classes by the label prior of the foundation models.

    Args:
        names: (K,), many, medium or few.
        kept: (K,), fraction of resampled sets of validation images with which the class stays in its group.
    """

    names: NDArray[np.str_]
    kept: NDArray[np.float64]


class Ensemble:
    """Models of the same data as one model, whose logits are the mean of theirs.

    Each image is read and decoded once. Each model gets it at its own size, with its own mean and standard deviation.

    Args:
        models: the members by name; for a checkpoint, names must not contain slashes.

    Attributes:
        in_use: number of members, from the first one on, that are used.
    """

    branches: Sequence[str] = ()

    def __init__(self, models: Mapping[str, SplitPredictor]) -> None:
        first = next(iter(models.values()))
        self.workspace, self.ranks = first.workspace, first.ranks
        self.class_counts, self.groups = first.class_counts, first.groups
        self.models, self.in_use = dict(models), len(models)
        self.combine, self.weights = COMBINE["logits"], [1.0] * len(models)
        self.gla: Gla | None = None

    def set_combination(
        self, combine: str | None = None, weights: Sequence[float] = (), *, with_gla: bool = False
    ) -> None:
        """Set how the logits are combined from now on; arguments that are not given change nothing.

        Args:
            combine: a key of ensembles.combine.COMBINE.
            weights: one for each model, in their order.
            with_gla: remove both priors from each model: z_ft + z_zs - log prior_train - log q (arXiv 2310.08106).

        Raises BadInput for a wrong number of weights, and if a label prior cannot be estimated for GLA.
        """
        if weights and len(weights) != len(self.models):
            raise BadInput(
                "--weights",
                f"must contain one weight for each of the {len(self.models)} models ({', '.join(self.models)})",
                len(weights),
                f"give {len(self.models)}, separated by commas",
            )
        self.combine = COMBINE[combine] if combine else self.combine
        self.weights = list(weights) or self.weights
        self.gla = Gla(list(self.models.values())) if with_gla else self.gla

    @property
    def num_trained(self) -> int:
        """Number of trained parameters of all models."""
        return sum(model.num_trained for model in self.models.values())

    def stored(self) -> dict[str, Tensor]:
        """Return the stored tensors of all models, each under NAME/."""
        return {f"{name}/{key}": value for name, model in self.models.items() for key, value in model.stored().items()}

    def load_stored(self, state: dict[str, Tensor]) -> None:
        """Load the result of `stored` strictly. Raises ValueError with the names of missing or unexpected tensors."""
        for name, model in self.models.items():
            mine = {key.removeprefix(f"{name}/"): t for key, t in state.items() if key.startswith(f"{name}/")}
            model.load_stored(mine)
        if strange := sorted({key.split("/")[0] for key in state} - set(self.models)):
            raise ValueError(f"the checkpoint does not fit the model: it also contains {', '.join(strange[:4])}")

    def logits(self, split: Split) -> Iterator[LogitBatch]:
        """Yield the combined logits of this rank's part of a split, in storage order, and those of the members in use."""
        used = list(self.models.values())[: self.in_use]
        for logits, labels in logits_of([*used, *(self.gla.zero_shot if self.gla else [])], split):
            members = self.gla.without_priors(logits) if self.gla else logits
            yield LogitBatch(self.combine(members, self.weights[: self.in_use]), labels, members=members)

    def gain_table(self, tau: float) -> GroupGainTable:
        """Return a counter of the metrics of each member in use, and of the disagreement between them.

        Args:
            tau: strength of the post-hoc adjustment of their logits.
        """
        shift = shift_of(tau, self.class_counts).to(counting_device(self.ranks.device))
        return GroupGainTable(list(self.models)[: self.in_use], shift)

    @cached_property
    def parameter_groups(self) -> ParameterGroups | str:
        """Return the parameter group of each class, or the reason why there are none.

        It follows from the mean label prior of the foundation models that have a text tower. All ranks must ask for it together.
        """
        models = {}
        for model in self.models.values():
            if model.workspace.backbone(model.config).text is not None:
                models[model.config.backbone, str((model.config.head.template, model.config.head.texts))] = model
        if not models:
            return "no model has a text tower"
        if "validation" not in self.workspace.dataset.splits:
            return "the dataset has no validation split"
        try:
            found = [resampled_prior(model.workspace, model.config) for model in models.values()]
        except BadInput as error:
            return str(error)
        priors, samples = zip(*found, strict=True)
        names = thirds(mean_prior(priors))
        return ParameterGroups(names, kept(names, torch.stack(samples).mean(0)))

    def report(self, split_name: str, per_class: PerClass, table: GroupGainTable) -> dict[str, Any]:
        """Return the report of an evaluation, for JSON (GroupGainTable.result). All ranks must call it together.

        Args:
            per_class: counts of the ensemble.
            table: counts of the members.
        """
        groups = self.parameter_groups
        if isinstance(groups, str):
            return table.result(split_name, per_class, self.groups.names, None) | {"no_parameter_groups": groups}
        kept_in = {name: float(groups.kept[groups.names == name].mean()) for name in GROUPS if name in groups.names}
        return table.result(split_name, per_class, self.groups.names, groups.names) | {"parameter_groups_kept": kept_in}

    def per_class_rows(self, per_class: PerClass) -> list[dict[str, Any]]:
        """Return a row for each class from the counts of an evaluation, with its parameter group if that is known.

        All ranks must call it together.
        """
        rows = next(iter(self.models.values())).per_class_rows(per_class)
        groups = self.parameter_groups
        if isinstance(groups, str):
            return rows
        return [
            row | {"parameter_group": str(group), "parameter_group_kept": float(share)}
            for row, group, share in zip(rows, groups.names, groups.kept, strict=True)
        ]


class Gla:
    """Generalized logit adjustment: removes both priors from trained models; fitted on the validation split at construction.

    Args:
        models: trained models, on data with a validation split.

    Attributes:
        zero_shot: the same foundation models without training.

    Raises BadInput for a backbone without a text tower, and if no prior can be fitted.
    """

    def __init__(self, models: Sequence[SplitPredictor]) -> None:
        self.priors: list[Prior] = [label_prior(model.workspace, model.config) for model in models]
        self.zero_shot = [
            SplitPredictor(zero_shot(model.config), model.workspace, model.class_counts.tolist(), model.groups)
            for model in models
        ]
        parts = list(logits_of(models, models[0].workspace.dataset.split("validation")))
        labels = torch.cat([labels for _, labels in parts])
        self.temperatures = [
            fitted(
                model.workspace, torch.cat([logits[m] for logits, _ in parts]), labels, reduce=model.ranks.sum
            ).temperature
            for m, model in enumerate(models)
        ]
        self.log_priors = [shift_of(prior_left(model.config), model.class_counts) for model in models]

    def without_priors(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Return the GLA logits (B, K) of each trained model, given the logits of the trained and then of the zero-shot models."""
        number = len(self.priors)
        return [
            gla(tuned / temperature, plain / prior.temperature, left.to(tuned.device), prior.log_q.to(tuned.device))
            for tuned, plain, temperature, prior, left in zip(
                logits[:number], logits[number:], self.temperatures, self.priors, self.log_priors, strict=True
            )
        ]


def prior_left(config: RunConfig) -> float:
    """Return the fraction of log prior_train that a run leaves in the logits: 1 for cross-entropy, 1 - tau for logit adjustment.

    Classes that `optim.sampling` draws in proportion to n^p have p times the log prior.
    """
    left = LOSSES[config.loss.kind].prior_left
    return config.optim.sampling_power * (left(config.loss) if callable(left) else left)


def logits_of(models: Sequence[SplitPredictor], split: Split) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield, for this rank's part of a split, fp32 logits (B, K) of each model on the first one's device, and labels (B,)."""
    first = models[0].ranks
    views = [model.workspace.view(model.config) for model in models]
    batches = view_batches(
        models[0].workspace.reader(split),
        split,
        list(dict.fromkeys(views)),
        rank=first.rank,
        world_size=first.world_size,
        num_threads=first.num_threads,
        batch_size=min(
            batch_size(first.device, model.lift.tower, view.num_crops)
            for model, view in zip(models, views, strict=True)
        ),
    )
    forwards = [model.workspace.forward(model.config, model.lift) for model in models]

    def predict(batch: tuple[Mapping[View, Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
        images, labels = batch
        with torch.inference_mode():
            logits = [over_crops(model(images[view]).float()) for model, view in zip(forwards, views, strict=True)]
            # Copies wait for their GPU, so they come after all GPUs have been given work.
            return [mine.to(first.device) for mine in logits], labels.to(first.device)

    yield from on_cores(first.device, predict, batches)


def model_of(
    config: RunConfig,
    workspaces: Sequence[Workspace],
    class_counts: list[int] | None = None,
    groups: ClassGroups | None = None,
) -> SplitPredictor | Ensemble:
    """Build the model of any method; a single model is on the first device, the members of an ensemble on the devices in turn."""
    if not isinstance(config.method, BackdoorConfig):
        return SplitPredictor(config, workspaces[0], class_counts, groups)
    members = zip(config.members().items(), itertools.cycle(workspaces), strict=False)
    models = {name: SplitPredictor(member, where, class_counts, groups) for (name, member), where in members}
    return ensemble_of(config.method, models)


def ensemble_of(method: BackdoorConfig, models: Mapping[str, SplitPredictor]) -> Ensemble:
    """Return the members of `method: backdoor` as one model."""
    out = Ensemble(models)
    out.set_combination(method.combine, [method.weights.get(name, 1.0) for name in models])
    return out
