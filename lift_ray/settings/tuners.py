"""The settings of each kind of tuner, and what is derived when it is not given."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from lift_ray.settings.base import Settings

Width = Annotated[int, Field(ge=1)]
Blocks = Annotated[
    list[Annotated[int, Field(ge=0)]] | None, Field(description="Block numbers from 0; all when not given.")
]


class AdaptformerConfig(Settings):
    """A bottleneck beside the MLP of each block (arXiv 2205.13535)."""

    kind: Literal["adaptformer"] = "adaptformer"
    bottleneck: Width | None = None
    """Width R; derived as 2^max(0, floor(log2(K / 2L))) for K classes and L tuned blocks."""
    blocks: Blocks = None


class AdapterConfig(Settings):
    """A bottleneck behind the MLP of each block (arXiv 1902.00751)."""

    kind: Literal["adapter"] = "adapter"
    bottleneck: Width | None = None
    """Width R; derived as 2^max(0, floor(log2(K / 2L)))."""
    blocks: Blocks = None


class LoraConfig(Settings):
    """Low-rank changes of the query and value projections (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    bottleneck: Width | None = None
    """Rank R; derived as 2^max(0, floor(log2(K / 4L)))."""
    mlp: bool = False
    """Change both projections of the MLP too."""
    blocks: Blocks = None


class SsfConfig(Settings):
    """Scale and shift after every projection (arXiv 2210.08823)."""

    kind: Literal["ssf"] = "ssf"
    norms: bool = False
    """After both layer norms too."""
    blocks: Blocks = None


class VptShallowConfig(Settings):
    """Learned tokens before the first block (arXiv 2203.12119)."""

    kind: Literal["vpt_shallow"] = "vpt_shallow"
    length: Width | None = None
    """Number of tokens; derived as 2^max(0, floor(log2(K / L))), L = blocks of the tower."""


class VptDeepConfig(Settings):
    """Learned tokens, others in every block (arXiv 2203.12119)."""

    kind: Literal["vpt_deep"] = "vpt_deep"
    length: Width | None = None
    """Number of tokens in a block; derived as 2^max(0, floor(log2(K / L)))."""
    blocks: Blocks = None
    """Block numbers from 0; all when not given. Tokens stay until the next tuned block replaces them."""


class BitfitConfig(Settings):
    """The biases of the blocks (arXiv 2106.10199)."""

    kind: Literal["bitfit"] = "bitfit"
    blocks: Blocks = None


class LayernormConfig(Settings):
    """The layer norms of the blocks."""

    kind: Literal["layernorm"] = "layernorm"
    blocks: Blocks = None


class BatchnormConfig(Settings):
    """Weights and biases of the batch norms of a convolutional tower; their statistics stay as they are."""

    kind: Literal["batchnorm"] = "batchnorm"
    blocks: Blocks = None


class SparseConfig(Settings):
    """Arbitrary sparse fine-tuning: a random part of the weights, chosen once by the seed (arXiv 2309.10019)."""

    kind: Literal["sparse"] = "sparse"
    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the weights; derived as K / (L (12 D + 9)): as many values as the classifier has."""
    blocks: Blocks = None


class FullConfig(Settings):
    """All parameters of the blocks: the heavy fine-tuning that hurts rare classes."""

    kind: Literal["full"] = "full"
    blocks: Blocks = None


class PartialConfig(Settings):
    """All parameters of the last blocks."""

    kind: Literal["partial"] = "partial"
    last: Annotated[int, Field(ge=1)] = 1
    """Number of blocks."""


class LinearProbeConfig(Settings):
    """Nothing in the tower is trained, only the classifier."""

    kind: Literal["linear_probe"] = "linear_probe"


class ZeroShotConfig(Settings):
    """Nothing is trained: CLIP's own classifier, cosines with the class names in the shared space."""

    kind: Literal["zero_shot"] = "zero_shot"


AnyTunerConfig = (
    AdaptformerConfig
    | AdapterConfig
    | LoraConfig
    | SsfConfig
    | VptShallowConfig
    | VptDeepConfig
    | BitfitConfig
    | LayernormConfig
    | BatchnormConfig
    | SparseConfig
    | FullConfig
    | PartialConfig
    | LinearProbeConfig
    | ZeroShotConfig
)
TunerConfig = Annotated[AnyTunerConfig, Field(discriminator="kind")]
TunerKind = Literal[
    "adaptformer",
    "adapter",
    "lora",
    "ssf",
    "vpt_shallow",
    "vpt_deep",
    "bitfit",
    "layernorm",
    "batchnorm",
    "sparse",
    "full",
    "partial",
    "linear_probe",
    "zero_shot",
]
NO_PLACE = ("linear_probe", "zero_shot")
PROMPTS = ("vpt_shallow", "vpt_deep")
OWN_WEIGHTS = ("bitfit", "layernorm", "batchnorm", "sparse", "full", "partial")


def check_pair(first: str, second: str) -> None:
    """Raises ValueError, with the reason, when two kinds of tuner do not go together."""
    pair = f"{first} and {second}"
    if first == second:
        reason = "they are the same"
    elif first in NO_PLACE or second in NO_PLACE:
        reason = "one of them trains nothing in the tower"
    elif first in PROMPTS and second in PROMPTS:
        reason = "both own the prompt tokens"
    elif first in OWN_WEIGHTS and second in OWN_WEIGHTS:
        reason = "both train the tower's own weights, and share some of them"
    else:
        return
    raise ValueError(f"must change other places than tuner, but got {pair}: {reason}; remove one")


def derived_width(num_classes: int, divisor: int) -> int:
    """2^max(0, floor(log2(K / divisor))): LIFT's rule for bottlenecks (arXiv 2309.10019)."""
    return 1 << max(0, math.floor(math.log2(num_classes / divisor)))


def resolve_tuner(tuner: AnyTunerConfig, where: str, num_classes: int, num_blocks: int, width: int) -> AnyTunerConfig:
    """A tuner with blocks and sizes filled in (METHODS: derived widths).

    Args:
        where: name of the section, for errors.

    Raises ValueError when a block number is outside 0 ... num_blocks - 1.
    """
    filled: dict[str, Any] = {}
    num_tuned = num_blocks
    if isinstance(tuner, PartialConfig) and tuner.last > num_blocks:
        raise ValueError(
            f"{where}.last: must be at most the tower's {num_blocks} blocks, but got {tuner.last}; lower it"
        )
    if hasattr(tuner, "blocks"):
        blocks = sorted(set(tuner.blocks)) if tuner.blocks is not None else list(range(num_blocks))
        if not blocks or blocks[-1] >= num_blocks:
            raise ValueError(
                f"{where}.blocks: must lie in 0 ... {num_blocks - 1}, but got {tuner.blocks}; name at least one"
            )
        filled["blocks"], num_tuned = blocks, len(blocks)
    if isinstance(tuner, AdaptformerConfig | AdapterConfig):
        filled["bottleneck"] = tuner.bottleneck or derived_width(num_classes, 2 * num_tuned)
    elif isinstance(tuner, LoraConfig):
        filled["bottleneck"] = tuner.bottleneck or derived_width(num_classes, 4 * num_tuned)
    elif isinstance(tuner, VptShallowConfig | VptDeepConfig):
        filled["length"] = tuner.length or derived_width(num_classes, num_tuned)
    elif isinstance(tuner, SparseConfig):
        filled["ratio"] = tuner.ratio or min(1.0, num_classes / (num_tuned * (12 * width + 9)))
    return tuner.model_copy(update=filled)
