"""The settings of one run: the only place where defaults live.

World size and paths are not here, so a digest names the experiment on any cluster. `None` means derived; `resolve` fills
it before anything is built. Defaults are LIFT+ (arXiv 2504.13282).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

TunerKind = Literal["adaptformer", "lora", "linear_probe", "zero_shot"]
TUNER_KINDS: tuple[str, ...] = ("adaptformer", "lora", "linear_probe", "zero_shot")


class Settings(BaseModel):
    """Strict, frozen, no unknown keys."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, data: Any) -> Any:
        """A section without `kind` is of the default kind: `loss: {tau: 0.5}` is enough."""
        if not isinstance(data, dict):
            return data
        missing = {
            name: {"kind": field.default.kind, **data[name]}
            for name, field in cls.model_fields.items()
            if hasattr(field.default, "kind") and isinstance(data.get(name), dict) and "kind" not in data[name]
        }
        return {**data, **missing}


class Backbone(Settings):
    """The frozen foundation model."""

    model: str = "embedded:lift-tiny"
    """`embedded:lift-tiny`, a name open_clip knows (ViT-B-16), `hf-hub:...` or `local-dir:...`."""
    pretrained: str | None = None
    """open_clip's tag of the weights (openai, laion2b_s34b_b88k) or a local file; not with embedded, hf-hub or local-dir."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the frozen tower computes in; bf16 and fp16 are autocast on a GPU."""


class Augment(Settings):
    """Minimalist data augmentation (MDA): a random square crop whose smallest area grows over the run (arXiv 2504.13282)."""

    schedule: Literal["convex", "linear", "concave", "min", "max"] = "convex"
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the patches that are left out in training, others for each picture; all are used in evaluation (arXiv 2212.00794)."""


class Adaptformer(Settings):
    """A bottleneck beside the MLP of each block (arXiv 2205.13535)."""

    kind: Literal["adaptformer"] = "adaptformer"
    bottleneck: Annotated[int, Field(ge=1)] | None = None
    """Width R; derived as 2^max(0, floor(log2(K / 2L))) for K classes and L tuned blocks."""
    blocks: list[Annotated[int, Field(ge=0)]] | None = None
    """Block numbers from 0; all when not given."""


class Lora(Settings):
    """Low-rank changes of the query and value projections (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    bottleneck: Annotated[int, Field(ge=1)] | None = None
    """Rank R; derived as 2^max(0, floor(log2(K / 4L)))."""
    blocks: list[Annotated[int, Field(ge=0)]] | None = None
    """Block numbers from 0; all when not given."""


class LinearProbe(Settings):
    """Nothing in the tower is trained, only the classifier."""

    kind: Literal["linear_probe"] = "linear_probe"


class ZeroShot(Settings):
    """Nothing is trained: CLIP's own classifier, cosines with the class names in the shared space."""

    kind: Literal["zero_shot"] = "zero_shot"


def _holds_place(template: str) -> str:
    if "{}" not in template:
        raise ValueError(f"must hold {{}} for the class name, but got {template!r}; add it")
    return template


class CosineHead(Settings):
    """z_k = scale * cos(f, w_k)."""

    kind: Literal["cosine"] = "cosine"
    scale: Annotated[float, Field(gt=0)] = 25.0
    init: Literal["semantic", "random"] = "semantic"
    """semantic: from the class names through the text tower; random: Kaiming uniform."""
    template: Annotated[str, AfterValidator(_holds_place)] = "a photo of a {}."
    """Text around the class name for the semantic initialisation."""


class LogitAdjusted(Settings):
    """Cross-entropy of z + tau * log prior (arXiv 2007.07314)."""

    kind: Literal["logit_adjusted"] = "logit_adjusted"
    tau: Annotated[float, Field(ge=0)] = 1.0


class CrossEntropy(Settings):
    """Plain cross-entropy."""

    kind: Literal["cross_entropy"] = "cross_entropy"


class Optim(Settings):
    """SGD with a cosine schedule over the whole run."""

    epochs: Annotated[int, Field(ge=1)] = 5
    global_batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a step, over all workers."""
    lr: Annotated[float, Field(gt=0)] = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4


Tuner = Annotated[Adaptformer | Lora | LinearProbe | ZeroShot, Field(discriminator="kind")]
Loss = Annotated[LogitAdjusted | CrossEntropy, Field(discriminator="kind")]


class RunConfig(Settings):
    """Everything that decides what a run computes, and nothing else."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    backbone: Backbone = Backbone()
    augment: Augment = Augment()
    tuner: Tuner = Adaptformer()
    head: CosineHead = CosineHead()
    loss: Loss = LogitAdjusted()
    optim: Optim = Optim()

    def resolve(self, num_classes: int, num_blocks: int) -> RunConfig:
        """Fill every derived value, so that the result states all that was computed (METHODS: derived widths).

        Raises ValueError when a block number is outside 0 ... num_blocks - 1.
        """
        tuner = self.tuner
        if not isinstance(tuner, Adaptformer | Lora):
            return self
        blocks = sorted(set(tuner.blocks)) if tuner.blocks is not None else list(range(num_blocks))
        if not blocks or blocks[-1] >= num_blocks:
            raise ValueError(
                f"tuner.blocks: must lie in 0 ... {num_blocks - 1}, but got {tuner.blocks}; name at least one"
            )
        divisor = 2 if isinstance(tuner, Adaptformer) else 4
        width = tuner.bottleneck or derived_width(num_classes, divisor * len(blocks))
        return self.model_copy(update={"tuner": tuner.model_copy(update={"blocks": blocks, "bottleneck": width})})

    def to_dict(self) -> dict[str, Any]:
        """A plain tree for Ray, YAML and JSON."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """Twelve hex digits that name the experiment."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


class RunFile(RunConfig):
    """A run file: the settings of one run, and the data it runs on."""

    name: str = "run"
    dataset: str
    """Any fsspec URL or path of Parquet shards, or embedded:NAME."""
    out: str | None = None

    @property
    def config(self) -> RunConfig:
        """The settings alone."""
        return RunConfig.model_validate(self.model_dump(include=set(RunConfig.model_fields)))


def derived_width(num_classes: int, divisor: int) -> int:
    """2^max(0, floor(log2(K / divisor))): LIFT's rule for bottlenecks (arXiv 2309.10019)."""
    return 1 << max(0, math.floor(math.log2(num_classes / divisor)))


def check_global_batch(size: int, workers: int) -> None:
    """Raises ValueError, with what would fit, when a global batch cannot be shared evenly."""
    if size % workers:
        fits = max(1, round(size / workers)) * workers
        fewer = max(w for w in range(1, workers) if size % w == 0)
        raise ValueError(
            f"optim.global_batch_size: must be divisible by {workers} workers, but got {size}; "
            f"use {fits}, or {fewer} worker{'s' if fewer > 1 else ''}"
        )


def apply_overrides(
    tree: dict[str, Any], overrides: dict[str, Any], model: type[BaseModel] = RunConfig
) -> dict[str, Any]:
    """A copy of a settings tree with dotted overrides (`{"loss.tau": 0.5}`) set in it.

    Setting the `kind` of a section to another kind drops that section's other keys, which belonged to the old kind;
    kinds are therefore set first.

    Args:
        model: what the tree describes; it says which kind a section without `kind` is of.
    """
    out = copy.deepcopy(tree)
    for path in sorted(overrides, key=lambda p: (not p.endswith(".kind"), p)):
        *parents, leaf = path.split(".")
        node = out
        for name in parents:
            child = node.get(name)
            node[name] = child if isinstance(child, dict) else {}
            node = node[name]
        if leaf == "kind" and node.get("kind", _default_kind(model, parents)) != overrides[path]:
            node.clear()
        node[leaf] = overrides[path]
    return out


def _default_kind(model: type[BaseModel], section: list[str]) -> str | None:
    """The kind that a section has when the file does not say; a `base` holds a RunConfig."""
    default: Any = None
    for name in section:
        default = model.model_fields[name].default if name in model.model_fields else None
        model = type(default) if isinstance(default, BaseModel) else RunConfig
    return getattr(default, "kind", None)
