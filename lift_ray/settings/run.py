"""The settings of one run: the only place where defaults live.

World size and paths are not here, so a digest names the experiment on any cluster. `None` means derived; `resolve` fills
it before anything is built. Defaults are LIFT+ (arXiv 2504.13282).
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator

from lift_ray.settings.base import OneOf, Settings
from lift_ray.settings.members import member
from lift_ray.settings.methods import Backdoor, Lift, Method, check_suits
from lift_ray.settings.tuners import Adaptformer, AnyTuner, Tuner, check_pair, resolve_tuner

Share = Annotated[float, Field(ge=0, lt=1)]


class Backbone(Settings):
    """The frozen foundation model."""

    model: str = "embedded:lift-tiny"
    """`embedded:lift-tiny`, a name open_clip knows (ViT-B-16, RN50), `hf-hub:...`, `local-dir:...`, or `timm:NAME` for a ViT without
    text tower."""
    pretrained: str | None = None
    """open_clip's tag of the weights (openai, laion2b_s34b_b88k) or a local file; timm's own weights when not given; not with
    embedded, hf-hub or local-dir."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the frozen tower computes in; bf16 and fp16 are autocast on a GPU."""
    resolution_px: Annotated[int, Field(ge=1)] | None = None
    """Side of the pictures; the one it was trained with when not given."""
    compile: bool = False
    """Compile the blocks with torch.compile: slower to start, faster steps on some GPUs."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: a third more work, much less memory."""
    cache_gib: Annotated[float, Field(ge=0)] = 2.0
    """Memory a worker may use for what frozen blocks make of pictures that stay the same; 0 computes it every time."""

    @property
    def is_embedded(self) -> bool:
        """Whether it comes with the package."""
        return self.model.startswith("embedded:")

    @property
    def has_text(self) -> bool:
        """Whether it knows names: models of timm have no text tower."""
        return not self.model.startswith("timm:")


class RandomCrops(Settings):
    """What saves work with pictures that change from epoch to epoch."""

    patch_dropout: Share = 0.0
    """Share of the patches that are left out in training, others for each picture; all are used in evaluation (arXiv 2212.00794)."""
    start_px: Annotated[int, Field(ge=1)] | None = None
    """Side of the training pictures in the first epoch, from where it grows to the backbone's; the backbone's when not given."""
    decode: Literal["exact", "reduced", "gpu"] = "exact"
    """reduced: large JPEGs are decoded at 1/2, 1/4 or 1/8 where a crop needs no more pixels, which moves edges by up to a pixel;
    gpu: JPEGs are decoded and resized on the GPU. Evaluation is always exact."""


class Mda(RandomCrops):
    """Minimalist data augmentation: a random square crop whose smallest area grows over the run (arXiv 2504.13282)."""

    kind: Literal["mda"] = "mda"
    schedule: Literal["convex", "linear", "concave", "min", "max"] = "convex"


class CropFlip(RandomCrops):
    """A random crop of any aspect and a random flip, bilinear, as LIFT has it (arXiv 2309.10019)."""

    kind: Literal["crop_flip"] = "crop_flip"


class NoAugment(Settings):
    """The evaluation crop in training too. What the frozen blocks make of a picture is then computed once and kept."""

    kind: Literal["none"] = "none"


def _holds_place(template: str | list[str]) -> str | list[str]:
    for line in [template] if isinstance(template, str) else template:
        if "{}" not in line and template != "ensemble":
            raise ValueError(f"must hold {{}} for the class name, but got {line!r}; add it")
    return template


Template = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)],
    OneOf("a text with {}, a list of such texts, or ensemble"),
    AfterValidator(_holds_place),
]


class Start(Settings):
    """Where the weights of the classifier start."""

    init: Literal["semantic", "class_mean", "linear_probe", "random"] = "semantic"
    """semantic: from the class names through the text tower; class_mean: mean feature of at most 100 images a class;
    linear_probe: balanced logistic regression on the frozen features; random: Kaiming uniform."""
    template: Template = "a photo of a {}."
    """Text around the class name for the semantic initialisation: one, several (their mean), or `ensemble`, CLIP's own 80."""


class CosineHead(Start):
    """z_k = scale * cos(f, w_k)."""

    kind: Literal["cosine"] = "cosine"
    scale: Annotated[float, Field(gt=0)] = 25.0


class LinearHead(Start):
    """z = W f + b."""

    kind: Literal["linear"] = "linear"


class L2NormHead(Start):
    """z_k = <f, w_k / |w_k|>."""

    kind: Literal["l2norm"] = "l2norm"


class LayerNormHead(Start):
    """z_k = <LayerNorm(f), w_k / |w_k|>."""

    kind: Literal["layernorm"] = "layernorm"


class LogitAdjusted(Settings):
    """Cross-entropy of z + tau * log prior (arXiv 2007.07314)."""

    kind: Literal["logit_adjusted"] = "logit_adjusted"
    tau: Annotated[float, Field(ge=0)] = 1.0


class CrossEntropy(Settings):
    """Plain cross-entropy."""

    kind: Literal["cross_entropy"] = "cross_entropy"


class Focal(Settings):
    """(1 - p_y)^gamma * CE (arXiv 1708.02002)."""

    kind: Literal["focal"] = "focal"
    gamma: Annotated[float, Field(ge=0)] = 2.0


class Ldam(Settings):
    """Cross-entropy with margins that grow for rare classes, n^(-1/4) (arXiv 1906.07413)."""

    kind: Literal["ldam"] = "ldam"
    max_margin: Annotated[float, Field(ge=0)] = 0.5
    scale: Annotated[float, Field(gt=0)] = 25.0
    """What margins are multiplied with; the cosine head's scale."""


class ClassBalanced(Settings):
    """Cross-entropy weighted by (1 - beta) / (1 - beta^n) (arXiv 1901.05555)."""

    kind: Literal["class_balanced"] = "class_balanced"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999


class Reweighted(Settings):
    """Cross-entropy weighted by 1 / prior."""

    kind: Literal["reweighted"] = "reweighted"


class BalancedSoftmax(Settings):
    """Cross-entropy of z + log n (arXiv 2007.10740)."""

    kind: Literal["balanced_softmax"] = "balanced_softmax"


class Lade(Settings):
    """Balanced softmax and a term that takes the label distribution out of the logits (arXiv 2012.00321)."""

    kind: Literal["lade"] = "lade"
    remine: Annotated[float, Field(ge=0)] = 0.1
    weight: Annotated[float, Field(ge=0)] = 0.1


class Gla(Settings):
    """Cross-entropy of z + log prior + log q, q the label prior inside the foundation model (arXiv 2310.08106, in training by
    assumption): estimated from its zero-shot logits on the validation split, so it needs a text tower."""

    kind: Literal["gla"] = "gla"


class Optim(Settings):
    """SGD with a cosine schedule over the whole run."""

    epochs: Annotated[int, Field(ge=1)] = 5
    global_batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a step, over all workers."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Parts in which a worker's share of a step goes through the tower, for less memory."""
    lr: Annotated[float, Field(gt=0)] = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    shuffle_mib: Annotated[float, Field(gt=0)] = 192.0
    """Encoded pictures that are shuffled together, at most 8,192: what a worker holds in memory of a larger data set."""
    data_frac: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each class's training pictures that is learnt from, at least one of each: what would more pictures be worth?"""

    @property
    def shuffle_bytes(self) -> int:
        """shuffle_mib in bytes."""
        return int(self.shuffle_mib * 2**20)


class Evaluation(Settings):
    """How images are classified after training."""

    posthoc_tau: Annotated[float, Field(ge=0)] = 0.0
    """Subtract this times the log of the training prior from the logits (arXiv 2007.07314)."""
    tte: bool = False
    """Test-time ensembling: the mean of the logits of five crops (arXiv 2309.10019)."""


Augment = Annotated[Mda | CropFlip | NoAugment, Field(discriminator="kind")]
Head = Annotated[CosineHead | LinearHead | L2NormHead | LayerNormHead, Field(discriminator="kind")]
Loss = Annotated[
    LogitAdjusted | CrossEntropy | Focal | Ldam | ClassBalanced | Reweighted | BalancedSoftmax | Lade | Gla,
    Field(discriminator="kind"),
]


class RunConfig(Settings):
    """Everything that decides what a run computes, and nothing else."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    backbone: Backbone = Backbone()
    augment: Augment = Mda()
    tuner: Tuner = Adaptformer()
    extra_tuner: Tuner | None = None
    """A second tuner, of a kind that changes other places."""
    head: Head = CosineHead()
    loss: Loss = LogitAdjusted()
    optim: Optim = Optim()
    evaluation: Evaluation = Evaluation()
    method: Method = Lift()

    @field_validator("extra_tuner")
    @classmethod
    def _goes_together(cls, extra: AnyTuner | None, info: ValidationInfo) -> AnyTuner | None:
        if extra is not None and "tuner" in info.data:
            check_pair(info.data["tuner"].kind, extra.kind)
        return extra

    @field_validator("method")
    @classmethod
    def _suits_the_rest(cls, method: Method, info: ValidationInfo) -> Method:
        check_suits(method, info.data)
        return method

    @field_validator("method")
    @classmethod
    def _members_are_runs(cls, method: Method, info: ValidationInfo) -> Method:
        if isinstance(method, Backdoor) and len(info.data) == len(RunConfig.model_fields) - 1:
            for name in method.members:
                member(info.data, method, name)
        return method

    def members(self) -> dict[str, RunConfig]:
        """The runs of the models of `method: backdoor` that take part, by name; none for other methods."""
        if not isinstance(self.method, Backdoor):
            return {}
        return {name: member(dict(self), self.method, name) for name in self.method.used}

    def tuners(self) -> list[AnyTuner]:
        """The one or two tuners."""
        return [self.tuner] if self.extra_tuner is None else [self.tuner, self.extra_tuner]

    def resolve(self, num_classes: int, num_blocks: int, width: int) -> RunConfig:
        """Fill every derived value, so that the result states all that was computed.

        Raises ValueError when a block number is outside 0 ... num_blocks - 1.
        """
        named = [("tuner", self.tuner), ("extra_tuner", self.extra_tuner)]
        filled = {name: resolve_tuner(t, name, num_classes, num_blocks, width) for name, t in named if t is not None}
        return self.model_copy(update=filled)

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
            child = {"kind": node[name]} if isinstance(node.get(name), str) else node.get(name)
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
