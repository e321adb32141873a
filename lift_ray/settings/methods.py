"""Methods on top of a tuner and a head: LIFT itself, methods for half-labeled data, and several models together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lift_ray.errors import BadInput, did_you_mean
from lift_ray.registry import METHODS, Config, Kind

Weight = Annotated[float, Field(ge=0)]


class MethodConfig(Config):
    """The settings of a method."""

    kind: str


class LiftConfig(MethodConfig):
    """One model on labeled images (arXiv 2309.10019, 2504.13282)."""

    kind: Literal["lift"] = "lift"


class HalfLabelledConfig(MethodConfig):
    """Settings of methods that also learn from the split `unlabelled`, whose labels are not used."""

    kind: str
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """A pseudo-label counts when its probability is at least this. No source states ULFine's; LoFT has 0.6 on CIFAR-100."""
    unlabelled_ratio: Annotated[int, Field(ge=1)] = 7
    """Unlabeled images per labeled image in a step. No source states ULFine's; 7 is FixMatch's."""
    cutout_frac: Annotated[float, Field(ge=0, le=1)] = 16 / 224
    """Side of the gray square in strong views, as a fraction of the image's side: 16 of 224 px in LoFT; FixMatch has 16 of 32."""


class FixmatchConfig(HalfLabelledConfig):
    """Confident pseudo-labels of a weak view teach a strong view (arXiv 2001.07685), on the labelled loss of the run."""

    kind: Literal["fixmatch"] = "fixmatch"
    lambda_u: Weight = 1.0
    """Weight of the unlabelled loss."""


class LoftConfig(HalfLabelledConfig):
    """FixMatch with soft labels for images below the threshold (arXiv 2509.09926)."""

    kind: Literal["loft"] = "loft"
    lambda_1: Weight = 3.0
    """Weight of confident images."""
    lambda_2: Weight = 0.0
    """Weight of the remaining images."""


class UlfineConfig(HalfLabelledConfig):
    """ULFine (arXiv 2505.05062), our reading: prototype adaptive fitting and dual logit fusion. No default here is the paper's,
    whose full text and code were not available."""

    kind: Literal["ulfine"] = "ulfine"
    mu: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Step of the text prototype of the most frequent pseudo-label towards its visual prototype."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the visual prototypes."""
    pseudo_ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the frequency of pseudo-labels."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fraction of the similarity logits in the fused logits; the rest comes from the linear head."""
    lambda_u: Weight = 1.0
    """Weight of the unlabelled loss."""
    lambda_s: Weight = 1.0
    """Weight of the cross-entropy of the similarity logits on labeled images."""
    similarity_tau: Annotated[float, Field(ge=0)] = 0.0
    """Strength of the logit adjustment in that cross-entropy; 0 turns it off."""
    lambda_o: Weight = 0.1
    """Weight of the orthogonality of the prototypes."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class BackdoorConfig(MethodConfig):
    """Several models trained independently, whose mean classifies (arXiv 2501.15955)."""

    kind: Literal["backdoor"] = "backdoor"
    members: Annotated[dict[Name, dict[str, Any]], Field(min_length=2)]
    """The models by name, each with the dotted settings that differ from the rest of the run: `b16: {backbone.model: ViT-B-16}`."""
    use: str | None = None
    """Members to use, as `a+b`; all by default."""
    combine: Literal["logits", "probabilities"] = "logits"
    """Average logits, as in the released code, or probabilities, as in the paper's equation."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Weights of the members by name; 1 by default."""

    @model_validator(mode="after")
    def _known_members(self) -> BackdoorConfig:
        for key, names in (("use", self.used), ("weights", self.weights)):
            for name in names:
                if name not in self.members:
                    raise ValueError(f"{key} must name members, but got '{name}'; {did_you_mean(name, self.members)}")
        if len(set(self.used)) < max(2, len(self.used)):
            raise ValueError(f"use must name at least 2 members, each once, but got '{self.use}'; write a+b")
        return self

    @property
    def used(self) -> list[str]:
        """The names of the members that take part."""
        return list(self.members) if self.use is None else self.use.split("+")


def check_suits(method: MethodConfig, run: Mapping[str, Any]) -> None:
    """Raises ValueError if a method for half-labeled data does not fit the other sections of a run."""
    if not isinstance(method, HalfLabelledConfig):
        return
    rules = [
        ("augment", "kind", "none", "images that change", "use mda or crop_flip"),
        ("augment", "decode", "gpu", "images decoded on the CPU", "leave decode out"),
        ("tuner", "kind", "zero_shot", "a model that is trained", "use linear_probe"),
    ]
    for section, setting, refused, wanted, todo in rules:
        if section in run and getattr(run[section], setting) == refused:
            raise ValueError(f"{method.kind} needs {wanted}, but got {section}.{setting} {refused}; {todo}")
    if "augment" in run and (views := run["augment"].views) is not None:
        raise ValueError(f"{method.kind} needs images that change, but got augment.views {views}; leave views out")
    if "optim" in run and (parts := run["optim"].accumulate) > 1:
        raise ValueError(
            f"{method.kind} needs all images of a step at once, but got optim.accumulate {parts}; use backbone.checkpointing instead"
        )
    if isinstance(method, UlfineConfig) and "head" in run and (head := run["head"].kind) != "cosine":
        raise ValueError(f"{method.kind} needs a head as its prototypes are, but got head.kind {head}; use cosine")


def check_splits(method: MethodConfig, dataset: str, splits: Iterable[str]) -> None:
    """Raises BadInput if a method learns from unlabeled images and the dataset has no such split."""
    if isinstance(method, HalfLabelledConfig) and "unlabelled" not in splits:
        raise BadInput(
            f"method {method.kind}",
            "requires the split 'unlabelled'",
            but=f"{dataset} has only {', '.join(splits)}",
            remedy="convert with --labelled and --unlabelled, or use method lift",
        )


def _named(method: Any) -> Any:
    return {"kind": method} if isinstance(method, str) else method


for _config, _name in (
    (LiftConfig, "lift"),
    (FixmatchConfig, "fixmatch"),
    (LoftConfig, "loft"),
    (UlfineConfig, "ulfine"),
    (BackdoorConfig, "lift"),  # of each of its models
):
    METHODS.add(Kind(_config, f"lift_ray.methods.half_labelled:{_name}"))

if TYPE_CHECKING:
    AnyMethodConfig = MethodConfig
else:
    _Named = Literal[tuple(name for name in METHODS if name != "backdoor")]
    AnyMethodConfig = Annotated[
        METHODS.union(), BeforeValidator(_named, json_schema_input_type=METHODS.union() | _Named)
    ]
    """`method: ulfine` is short for `method: {kind: ulfine}`."""
