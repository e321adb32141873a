"""Settings of the classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from lift_ray.registry import HEADS, Config, register_head
from lift_ray.settings.base import OneOf


def _holds_place(template: str | list[str]) -> str | list[str]:
    for line in [template] if isinstance(template, str) else template:
        if "{}" not in line and template != "ensemble":
            raise ValueError(f"must contain {{}} for the class name, but got {line!r}; add it")
    return template


Template = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)],
    OneOf("a text with {}, a list of such texts, or ensemble"),
    AfterValidator(_holds_place),
]


class HeadConfig(Config):
    """The classifier, and the initialization of its weights."""

    kind: str
    init: Literal["semantic", "class_mean", "linear_probe", "random"] = "semantic"
    """semantic: from the class names through the text tower; class_mean: mean feature of at most 100 images per class;
    linear_probe: balanced logistic regression on the frozen features, as scikit-learn's with C = 1; random: rows of unit length."""
    template: Template = "a photo of a {}."
    """Text around the class name for the semantic initialization: one, several (their mean), or `ensemble`, CLIP's own 80."""


class CosineHeadConfig(HeadConfig):
    """z_k = scale * cos(f, w_k)."""

    kind: Literal["cosine"] = "cosine"
    scale: Annotated[float, Field(gt=0)] = 25.0
    """Factor of the cosines, which lie between -1 and 1."""


class LinearHeadConfig(HeadConfig):
    """z = W f + b."""

    kind: Literal["linear"] = "linear"


class L2NormHeadConfig(HeadConfig):
    """z_k = <f, w_k / |w_k|>."""

    kind: Literal["l2norm"] = "l2norm"


class LayerNormHeadConfig(HeadConfig):
    """z_k = <LayerNorm(f), w_k / |w_k|>."""

    kind: Literal["layernorm"] = "layernorm"


register_head(CosineHeadConfig, "lift_ray.model.heads:CosineHead")
register_head(LinearHeadConfig, "lift_ray.model.heads:LinearHead")
register_head(L2NormHeadConfig, "lift_ray.model.heads:L2NormHead")
register_head(LayerNormHeadConfig, "lift_ray.model.heads:LayerNormHead")

if TYPE_CHECKING:
    AnyHeadConfig = HeadConfig
else:
    AnyHeadConfig = HEADS.union()
