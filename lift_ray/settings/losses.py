"""Settings of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lift_ray.registry import LOSSES, Config, register_loss


class LossConfig(Config):
    """The settings of a loss."""

    kind: str


class SmoothedConfig(LossConfig):
    """A loss with label smoothing."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the target that is spread over all classes (arXiv 1512.00567)."""


class LogitAdjustedConfig(SmoothedConfig):
    """Cross-entropy of z + tau * log prior (arXiv 2007.07314)."""

    kind: Literal["logit_adjusted"] = "logit_adjusted"
    tau: Annotated[float, Field(ge=0)] = 1.0
    """Strength of the adjustment: 0 is plain cross-entropy, 1 removes the prior, more favors rare classes."""


class CrossEntropyConfig(SmoothedConfig):
    """Plain cross-entropy."""

    kind: Literal["cross_entropy"] = "cross_entropy"


class FocalConfig(LossConfig):
    """(1 - p_y)^gamma * CE (arXiv 1708.02002)."""

    kind: Literal["focal"] = "focal"
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """How little images count that are classified well; 0 is plain cross-entropy."""


class LdamConfig(LossConfig):
    """Cross-entropy with margins that grow for rare classes, n^(-1/4) (arXiv 1906.07413)."""

    kind: Literal["ldam"] = "ldam"
    max_margin: Annotated[float, Field(ge=0)] = 0.5
    """Margin of the rarest class, in cosines."""
    scale: Annotated[float, Field(gt=0)] = 25.0
    """Factor of the margins: the scale of the cosine head."""


class ClassBalancedConfig(LossConfig):
    """Cross-entropy weighted by (1 - beta) / (1 - beta^n) (arXiv 1901.05555)."""

    kind: Literal["class_balanced"] = "class_balanced"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """How much a further image of a class adds: 0 weights all classes equally, near 1 by 1 / n."""


class ReweightedConfig(LossConfig):
    """Cross-entropy weighted by 1 / prior."""

    kind: Literal["reweighted"] = "reweighted"


class BalancedSoftmaxConfig(SmoothedConfig):
    """Cross-entropy of z + log n (arXiv 2007.10740)."""

    kind: Literal["balanced_softmax"] = "balanced_softmax"


class LadeConfig(LossConfig):
    """Balanced softmax and a term that takes the label distribution out of the logits (arXiv 2012.00321)."""

    kind: Literal["lade"] = "lade"
    remine: Annotated[float, Field(ge=0)] = 0.1
    """Strength of the penalty that keeps the second term stable."""
    weight: Annotated[float, Field(ge=0)] = 0.1
    """Strength of the second term; 0 is balanced_softmax."""


class GlaConfig(LossConfig):
    """Cross-entropy of z + log prior + log q, q the label prior inside the foundation model (arXiv 2310.08106, in training by
    assumption): estimated from its zero-shot logits on the validation split, so it needs a text tower."""

    kind: Literal["gla"] = "gla"


register_loss(LogitAdjustedConfig, "lift_ray.model.losses:logit_adjusted", prior_left=lambda loss: 1 - loss.tau)
register_loss(CrossEntropyConfig, "lift_ray.model.losses:cross_entropy")
register_loss(FocalConfig, "lift_ray.model.losses:focal")
register_loss(LdamConfig, "lift_ray.model.losses:ldam")
register_loss(ClassBalancedConfig, "lift_ray.model.losses:class_balanced", prior_left=0.0)
register_loss(ReweightedConfig, "lift_ray.model.losses:reweighted", prior_left=0.0)
register_loss(BalancedSoftmaxConfig, "lift_ray.model.losses:balanced_softmax", prior_left=0.0)
register_loss(LadeConfig, "lift_ray.model.losses:lade", prior_left=0.0)
register_loss(GlaConfig, "lift_ray.model.losses:gla", prior_left=0.0)

if TYPE_CHECKING:
    AnyLossConfig = LossConfig
else:
    AnyLossConfig = LOSSES.union()
