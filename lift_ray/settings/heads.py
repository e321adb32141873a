"""Settings of the classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from lift_ray.registry import HEADS, TUNERS, Config, TunerConfig, register_head
from lift_ray.settings.base import OneOf
from lift_ray.settings.tuners import AnyTunerConfig


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


Line = Annotated[str, Field(min_length=1)]
Texts = dict[str, Annotated[list[Line], Field(min_length=1)]]


class HeadConfig(Config):
    """The classifier, and the initialization of its weights."""

    kind: str
    init: Literal["semantic", "class_mean", "linear_probe", "random"] = "semantic"
    """semantic: from the class names through the text tower; class_mean: mean feature of at most 100 images per class;
    linear_probe: balanced logistic regression on the frozen features, as scikit-learn's with C = 1; random: rows of unit length."""
    template: Template = "a photo of a {}."
    """Text around the class name for the semantic initialization: one, several (their mean), or `ensemble`, CLIP's own 80."""
    # left out of the tree if not set, so that digests are those of versions without it
    texts: Annotated[Texts | None, Field(exclude_if=lambda texts: texts is None)] = None
    """Descriptions of classes in place of the template, for those that are named: `{puffin: [a black and white sea bird, ...]}`."""


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


class TextHeadConfig(HeadConfig):
    """z_k = scale * cos(f P, t_k): the text embeddings t_k of the classes classify, as in CLIP, in place of a classifier with weights
    (arXiv 2103.00020). By itself it trains nothing; the options train the text side."""

    kind: Literal["text"] = "text"
    init: Literal["semantic"] = "semantic"
    """The texts are the classifier, so there is no other initialization."""
    context: Annotated[int, Field(ge=0)] = 0
    """Number of learned tokens in place of the template's words before the name, shared by all classes (CoOp, arXiv 2109.01134). They
    start as these words if there are as many, else from N(0, 0.02). 0 keeps the words."""
    tuner: AnyTunerConfig | None = None
    """A tuner for the blocks of the text tower: any kind with places in transformer blocks. L is its number of tuned blocks."""
    projections: bool = False
    """Train both projections to the shared space, that of the images and that of the texts."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Factor of the cosines; by default CLIP's own, which it learned in pre-training."""

    @property
    def trains(self) -> bool:
        """True if the text side is trained."""
        return bool(self.context or self.tuner or self.projections)

    @field_validator("context")
    @classmethod
    def _one_template(cls, context: int, info: ValidationInfo) -> int:
        template = info.data.get("template", "")
        if context and (template == "ensemble" or (isinstance(template, list) and len(template) > 1)):
            raise ValueError(
                f"requires a single template, but got {context} with several; set head.template to one text"
            )
        return context

    @field_validator("tuner")
    @classmethod
    def _fits_text(cls, tuner: TunerConfig | None) -> TunerConfig | None:
        if tuner is None:
            return None
        if not TUNERS[tuner.kind].changes_tower:
            raise ValueError(f"must train the text tower, but got {tuner.kind}, which trains nothing in it; use null")
        if remedy := TUNERS[tuner.kind].not_in_text:
            raise ValueError(f"must have places in the blocks of a text tower, but got {tuner.kind}; {remedy}")
        return tuner


register_head(CosineHeadConfig, "lift_ray.model.heads:CosineHead")
register_head(LinearHeadConfig, "lift_ray.model.heads:LinearHead")
register_head(L2NormHeadConfig, "lift_ray.model.heads:L2NormHead")
register_head(LayerNormHeadConfig, "lift_ray.model.heads:LayerNormHead")
register_head(TextHeadConfig, "lift_ray.model.text_head:build", from_text=True)


def _follow() -> None:
    """Accept tuners that were registered after this module was imported."""
    TextHeadConfig.model_fields["tuner"].annotation = TUNERS.union() | None
    TextHeadConfig.model_rebuild(force=True)


TUNERS.followers.append(_follow)

if TYPE_CHECKING:
    AnyHeadConfig = HeadConfig
else:
    AnyHeadConfig = HEADS.union()
