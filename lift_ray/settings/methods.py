"""What is trained on top of a tuner and a head: LIFT itself, its neighbours for half-labelled data, several models at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lift_ray.settings.base import Settings

Weight = Annotated[float, Field(ge=0)]


class Lift(Settings):
    """One model on labelled pictures (arXiv 2309.10019, 2504.13282)."""

    kind: Literal["lift"] = "lift"


class HalfLabelled(Settings):
    """What all methods share that also learn from the split `unlabelled`, of which no label is read."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """A pseudo-label counts when its probability is larger. No source states ULFine's; LoFT has 0.6 on CIFAR-100."""
    unlabelled_ratio: Annotated[int, Field(ge=1)] = 7
    """Unlabelled pictures for each labelled one in a step. No source states ULFine's; 7 is FixMatch's."""


class Fixmatch(HalfLabelled):
    """Confident pseudo-labels of a weak view teach a strong view (arXiv 2001.07685), on the labelled loss of the run."""

    kind: Literal["fixmatch"] = "fixmatch"
    lambda_u: Weight = 1.0
    """Weight of the unlabelled loss."""


class Loft(HalfLabelled):
    """FixMatch with soft labels for the pictures below the threshold (arXiv 2509.09926)."""

    kind: Literal["loft"] = "loft"
    lambda_1: Weight = 3.0
    """Weight of confident pictures."""
    lambda_2: Weight = 0.0
    """Weight of the others."""


class Ulfine(HalfLabelled):
    """ULFine (arXiv 2505.05062), our reading: prototype adaptive fitting and dual logit fusion. No default here is the paper's,
    whose full text and code were not available."""

    kind: Literal["ulfine"] = "ulfine"
    mu: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How far the text prototype of the most frequent pseudo-label moves towards its visual one."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """How much of the visual prototypes stays in a step."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the similarity logits in the fused ones; the rest is the linear head's."""
    lambda_u: Weight = 1.0
    """Weight of the unlabelled loss."""
    lambda_o: Weight = 0.1
    """Weight of the orthogonality of the prototypes."""


class Backdoor(Settings):
    """Several models trained independently, whose mean classifies (arXiv 2501.15955)."""

    kind: Literal["backdoor"] = "backdoor"
    members: Annotated[list[dict[str, Any]], Field(min_length=2)]
    """For each model what differs from the rest of the run, as dotted settings: `{backbone.model: ViT-B-16}`."""
    combine: Literal["logits", "probabilities"] = "logits"
    """What is averaged: logits as in the released code, or probabilities as in the paper's equation."""
    weights: Annotated[list[Annotated[float, Field(gt=0)]] | None, Field(min_length=2)] = None
    """Of the models; equal when not given."""


def _named(method: Any) -> Any:
    return {"kind": method} if isinstance(method, str) else method


Method = Annotated[
    Annotated[Lift | Fixmatch | Loft | Ulfine | Backdoor, Field(discriminator="kind")], BeforeValidator(_named)
]
"""`method: ulfine` is short for `method: {kind: ulfine}`."""
