"""The label prior inside a foundation model, from what it makes of the validation split untrained; the loss that may need it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lift_ray.errors import BadInput
from lift_ray.methods.prior import Prior, fit
from lift_ray.model.losses import Loss
from lift_ray.registry import LOSSES
from lift_ray.settings.run import RunConfig
from lift_ray.training.workspace import Workspace


def zero_shot(config: RunConfig) -> RunConfig:
    """The same foundation model without training, as a single model."""
    return RunConfig.model_validate(
        config.model_dump(exclude={"tuner", "extra_tuner", "method"}) | {"tuner": {"kind": "zero_shot"}}
    )


def label_prior(warm: Workspace, config: RunConfig) -> Prior:
    """`methods.prior.fit` of the zero-shot logits of the validation split, the same on every rank.

    Raises BadInput without a text tower, without a validation image of every class, and where no prior can be fitted.
    """
    if (backbone := warm.backbone(config)).text is None:
        raise BadInput(f"GLA: needs a text tower, but {backbone.name} has none; leave it out, or use another backbone")
    split, plain = warm.dataset.split("validation"), warm.resolve(zero_shot(config))
    model = warm.build(plain)
    features = warm.kept(plain, model, split)
    if features is None:
        features = warm.frozen(plain, model, split, np.arange(split.num_samples))
    labels = torch.from_numpy(split.labels).to(features.device)
    with torch.inference_mode():
        return fitted(warm, torch.cat([model.classify(part) for part in features.split(1000)]), labels)


def fitted(warm: Workspace, logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> Prior:
    """`methods.prior.fit` on the validation split. Raises BadInput in one line where it cannot be fitted."""
    try:
        return fit(logits, labels, **options)
    except ValueError as error:
        raise BadInput(f"{warm.dataset.uri} validation: {error}; GLA cannot be used with it") from None


def loss_of(config: RunConfig, warm: Workspace, counts: torch.Tensor) -> Loss:
    """The loss on labelled pictures. Raises BadInput as `label_prior` for the loss that needs one.

    Args:
        counts: (K,), training images of each class, on the device of the logits.
    """
    options = config.loss.model_dump(exclude={"kind"})
    if config.loss.kind == "gla":
        options["log_q"] = label_prior(warm, config).log_q
    loss: Loss = LOSSES.build(config.loss.kind, counts, **options)
    return loss
