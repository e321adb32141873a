"""The label prior of a foundation model, estimated from its zero-shot logits on the validation split, and the losses that use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lift_ray.errors import BadInput
from lift_ray.methods.prior import Prior, fit, resampled
from lift_ray.model.device import counting_device
from lift_ray.model.heads import MEAN_OF
from lift_ray.model.losses import Loss
from lift_ray.registry import LOSSES
from lift_ray.settings.run import RunConfig
from lift_ray.training.workspace import Workspace, first_of_each_class


def zero_shot(config: RunConfig) -> RunConfig:
    """Return settings for the same foundation model without training, as a single model."""
    return RunConfig.model_validate(
        config.model_dump(exclude={"tuner", "extra_tuner", "method"}) | {"tuner": {"kind": "zero_shot"}}
    )


def label_prior(workspace: Workspace, config: RunConfig) -> Prior:
    """Fit the label prior to the zero-shot logits of the validation split (methods.prior.fit); the same on every rank.

    Raises BadInput if there is no text tower, if a class has no validation image, or if no prior can be fitted.
    """
    return fitted(workspace, *_zero_shot_logits(workspace, config))


def resampled_prior(workspace: Workspace, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log q (K,) of `label_prior`, and that of resampled validation images (n, K), on the CPU. Raises BadInput as it does."""
    logits, labels = _zero_shot_logits(workspace, config)
    prior = fitted(workspace, logits, labels)
    where = counting_device(logits.device)
    with _as_bad_input(workspace):
        return prior.log_q.cpu(), resampled(logits.to(where), labels.to(where), prior).cpu()


def _zero_shot_logits(workspace: Workspace, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the foundation model on the validation split, and the labels.

    Training images take its place on a further fold, whose validation images are held out from everything, and if there is no
    validation split: the zero-shot model has seen neither.

    Raises BadInput if there is no text tower.
    """
    if (backbone := workspace.backbone(config)).text is None:
        raise BadInput(
            "GLA",
            "requires a text tower",
            but=f"{backbone.name} has none",
            remedy="leave GLA out, or use another backbone",
        )
    split = workspace.dataset.splits.get("validation")
    if split is None or split.parts:
        training = workspace.training(config)
        split = training.take(first_of_each_class(training.labels, MEAN_OF))
    plain = workspace.resolve(zero_shot(config))
    model = workspace.build(plain)
    images = workspace.images(plain, split)
    cached = workspace.cached_features(plain, model, images)
    features = workspace.frozen(plain, model, images, np.arange(split.num_samples)) if cached is None else cached[:]
    labels = torch.from_numpy(split.labels).to(features.device)
    with torch.inference_mode():
        return torch.cat([model.classify(part) for part in features.split(1000)]), labels


def fitted(workspace: Workspace, logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> Prior:
    """Call `methods.prior.fit` on the validation split. Raises BadInput if no prior can be fitted."""
    where = counting_device(logits.device)
    with _as_bad_input(workspace):
        return fit(logits.to(where), labels.to(where), **options)


@contextmanager
def _as_bad_input(workspace: Workspace) -> Iterator[None]:
    """Raise BadInput if the block finds no label prior."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"{workspace.dataset.uri} validation", str(error), remedy="GLA cannot be used with it") from None


def loss_of(config: RunConfig, workspace: Workspace, counts: torch.Tensor) -> Loss:
    """Return the loss on labeled images. Raises BadInput if it requires a label prior that `label_prior` cannot estimate.

    Args:
        counts: (K,), training images of each class, on the device of the logits. The loss corrects for the frequency with which
            `optim.sampling` draws the classes.
    """
    options = config.loss.model_dump(exclude={"kind"})
    if config.loss.kind == "gla":
        options["log_q"] = label_prior(workspace, config).log_q
    loss: Loss = LOSSES.build(config.loss.kind, counts**config.optim.sampling_power, **options)
    return loss
