"""Settings of the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lift_ray.settings.base import Settings


class LogitAdjustedConfig(Settings):
    """Cross-entropy of z + tau * log prior (arXiv 2007.07314)."""

    kind: Literal["logit_adjusted"] = "logit_adjusted"
    tau: Annotated[float, Field(ge=0)] = 1.0


class CrossEntropyConfig(Settings):
    """Plain cross-entropy."""

    kind: Literal["cross_entropy"] = "cross_entropy"


class FocalConfig(Settings):
    """(1 - p_y)^gamma * CE (arXiv 1708.02002)."""

    kind: Literal["focal"] = "focal"
    gamma: Annotated[float, Field(ge=0)] = 2.0


class LdamConfig(Settings):
    """Cross-entropy with margins that grow for rare classes, n^(-1/4) (arXiv 1906.07413)."""

    kind: Literal["ldam"] = "ldam"
    max_margin: Annotated[float, Field(ge=0)] = 0.5
    scale: Annotated[float, Field(gt=0)] = 25.0
    """What margins are multiplied with; the cosine head's scale."""


class ClassBalancedConfig(Settings):
    """Cross-entropy weighted by (1 - beta) / (1 - beta^n) (arXiv 1901.05555)."""

    kind: Literal["class_balanced"] = "class_balanced"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999


class ReweightedConfig(Settings):
    """Cross-entropy weighted by 1 / prior."""

    kind: Literal["reweighted"] = "reweighted"


class BalancedSoftmaxConfig(Settings):
    """Cross-entropy of z + log n (arXiv 2007.10740)."""

    kind: Literal["balanced_softmax"] = "balanced_softmax"


class LadeConfig(Settings):
    """Balanced softmax and a term that takes the label distribution out of the logits (arXiv 2012.00321)."""

    kind: Literal["lade"] = "lade"
    remine: Annotated[float, Field(ge=0)] = 0.1
    weight: Annotated[float, Field(ge=0)] = 0.1


class GlaConfig(Settings):
    """Cross-entropy of z + log prior + log q, q the label prior inside the foundation model (arXiv 2310.08106, in training by
    assumption): estimated from its zero-shot logits on the validation split, so it needs a text tower."""

    kind: Literal["gla"] = "gla"


LossConfig = Annotated[
    LogitAdjustedConfig
    | CrossEntropyConfig
    | FocalConfig
    | LdamConfig
    | ClassBalancedConfig
    | ReweightedConfig
    | BalancedSoftmaxConfig
    | LadeConfig
    | GlaConfig,
    Field(discriminator="kind"),
]
