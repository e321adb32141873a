"""The settings of one run: the only place where defaults live.

World size and paths are not here, so a digest names the experiment on any cluster. `None` means derived; `resolve` fills
it before anything is built. Defaults are LIFT+ (arXiv 2504.13282).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lift_ray.registry import HEADS, LOSSES, METHODS, TUNERS, Config, TunerConfig, load_plugins
from lift_ray.settings.base import OneOf
from lift_ray.settings.heads import AnyHeadConfig, HeadConfig
from lift_ray.settings.losses import AnyLossConfig
from lift_ray.settings.messages import explain_first
from lift_ray.settings.methods import AnyMethodConfig, BackdoorConfig, MethodConfig, check_suits
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.tuners import AnyTunerConfig, check_pair, resolve_tuner

Share = Annotated[float, Field(ge=0, lt=1)]
GroupBound = Annotated[int, Field(ge=1)]


def _ascending(bounds: Literal["auto"] | list[int]) -> Literal["auto"] | list[int]:
    if bounds != "auto" and bounds[0] > bounds[1]:
        raise ValueError("the numbers descend")
    return bounds


GroupBounds = Annotated[
    Literal["auto"] | Annotated[list[GroupBound], Field(min_length=2, max_length=2)],
    AfterValidator(_ascending),
    OneOf("auto or two positive numbers in ascending order, for example [20, 100]"),
]


TteMode = Literal["off", "five_crops", "ten_crops", "augmented"]


def _mode(tte: object) -> object:
    """Return the mode for the values of earlier versions, true and false; any other value as it is."""
    return ("five_crops" if tte else "off") if isinstance(tte, bool) else tte


class BackboneConfig(Config):
    """The frozen foundation model."""

    model: str = "embedded:lift-small"
    """`embedded:lift-small`, a name open_clip knows (ViT-B-16, RN50), `hf-hub:...`, `local-dir:...`, or `timm:NAME` for an image
    tower without text."""
    pretrained: str | None = None
    """open_clip's tag of the weights (openai, laion2b_s34b_b88k) or a local file; timm's own weights when not given; not with
    embedded, hf-hub or local-dir."""
    quickgelu: bool | None = None
    """Activation that the weights of a local file were trained with: true for QuickGELU (OpenAI, MetaCLIP, DFN), false for GELU. It is
    known, and need not be set, for tags, names of the Hub and of timm, and files whose SHA-256 digest open_clip lists."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the frozen tower; bf16 and fp16 use autocast on a GPU. fp16 is refused for DINOv3 and Swin, whose activations are
    too large."""
    resolution_px: Annotated[int, Field(ge=1)] | None = None
    """Side of the images; by default the side that the backbone was trained with."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """How images are resized, in training and evaluation; by default that of the weights' preprocessing, or bicubic if it names
    none. LIFT is bilinear, LIFT+ bicubic."""
    compile: bool = False
    """Compile the blocks with torch.compile: slower to start, faster steps on some GPUs."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: a third more work, much less memory."""
    prepacked: bool = False
    """Keep the frozen weights in the layout that a CPU multiplies fastest: faster steps for two to three times the memory of the
    weights. It has no effect on a GPU, and none on results but in the last bits."""
    cache_gib: Annotated[float, Field(ge=0)] = 2.0
    """Limit of cached activations of frozen blocks, for images that never change; 0 turns the cache off. All searches
    of a user on a node share files, all of which together it limits; other workers keep theirs in memory, and it limits each."""

    @property
    def is_embedded(self) -> bool:
        """True if it comes with the package."""
        return self.model.startswith("embedded:")

    @property
    def has_text(self) -> bool:
        """True if it has a text tower; models of timm have none."""
        return not self.model.startswith("timm:")


class RandomCropsConfig(Config):
    """Settings that save work with images that change from epoch to epoch."""

    views: Annotated[int, Field(ge=1)] | None = None
    """Number of augmented views of each training image, drawn once. crop_flip alternates between them from epoch to epoch; mda, whose
    crops grow, uses each for an equal part of the run. Like images that never change, they go through the frozen blocks only once, and
    their activations are cached, which takes this many times the memory. By default each epoch draws anew."""

    patch_dropout: Share = 0.0
    """Fraction of the patches dropped in training, chosen anew for each image; evaluation uses all (arXiv 2212.00794)."""
    start_px: Annotated[int, Field(ge=1)] | None = None
    """Side of the training images in the first epoch, which grows to the backbone's; by default the backbone's."""
    decode: Literal["exact", "reduced", "gpu"] = "exact"
    """reduced: large JPEGs are decoded at 1/2, 1/4 or 1/8 where a crop needs no more pixels, which moves edges by up to a pixel;
    gpu: JPEGs are decoded and resized on the GPU. Evaluation is always exact."""

    @property
    def is_fixed(self) -> bool:
        """True if the same images come again, so that activations of frozen blocks can be cached."""
        return self.views is not None

    @model_validator(mode="after")
    def _views_stay_the_same(self) -> RandomCropsConfig:
        others = [
            ("patch_dropout too, which drops other patches in every epoch", self.patch_dropout > 0),
            ("start_px too, which changes the size in every epoch", self.start_px is not None),
            (
                "decode too, which asks for the GPU, while the images of views are decoded on the CPU",
                self.decode == "gpu",
            ),
        ]
        if self.views is not None and (other := next((why for why, is_set in others if is_set), None)):
            raise ValueError(f"views must be alone, but got {other}; remove one")
        return self


class MdaConfig(RandomCropsConfig):
    """Minimalist data augmentation: a random square crop whose smallest area grows over the run (arXiv 2504.13282)."""

    kind: Literal["mda"] = "mda"
    schedule: Literal["convex", "linear", "concave", "min", "max"] = "convex"
    """How the smallest area grows over the run; min and max keep it at its start and at its end."""


class CropFlipConfig(RandomCropsConfig):
    """A random crop of any aspect and a random flip, as LIFT has it (arXiv 2309.10019). LIFT also sets `backbone.interpolation` to
    bilinear."""

    kind: Literal["crop_flip"] = "crop_flip"


class NoAugmentConfig(Config):
    """The evaluation crop, also in training. The activations of the frozen blocks are then computed once and cached."""

    kind: Literal["none"] = "none"
    # constants, not settings: training reads them for every kind
    patch_dropout: ClassVar[float] = 0.0
    start_px: ClassVar[int | None] = None
    views: ClassVar[int | None] = None
    is_fixed: ClassVar[bool] = True
    decode: ClassVar[Literal["exact", "reduced", "gpu"]] = "exact"


class OptimConfig(Config):
    """The optimizer, its learning rate, and how the training images are drawn."""

    optimizer: Literal["sgd", "sgd_nesterov", "adamw"] = "sgd"
    """sgd, as published; sgd_nesterov, which looks ahead along its momentum; or adamw (arXiv 1711.05101), whose steps have about the
    same size in every layer and need smaller rates."""
    schedule: Literal["cosine_by_epoch", "cosine"] = "cosine_by_epoch"
    """cosine_by_epoch lowers the rate after every epoch, as published: the first epoch has the full rate, the last of five a tenth of
    it. cosine lowers it in every step, to almost 0 at the end."""
    epochs: Annotated[int, Field(ge=1)] = 5
    """Number of passes over the training images."""
    global_batch_size: Annotated[int, Field(ge=1)] = 128
    """Images a step, over all workers."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Number of micro-batches in which a worker's part of a step goes through the tower, to save memory."""
    lr: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate at the start of the cosine schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd; for adamw the decay of the mean gradient, beta_1."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Decay of the trained parameters towards 0."""
    sampling: Literal["natural", "square_root", "balanced"] = "natural"
    """How often an image is drawn: natural, each once an epoch; square_root and balanced repeat images of rare classes and skip some of
    frequent ones, so that class k has a part of the epoch in proportion to sqrt(n_k), or all have the same. An epoch keeps its
    number of images, and the loss corrects for the frequency with which classes are drawn."""
    shuffle_mib: Annotated[float, Field(gt=0)] = 192.0
    """Encoded images that are shuffled together, at most 8,192: the part of a larger dataset that a worker holds in memory."""
    decode_processes: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=0)], OneOf("auto or an integer of at least 0")
    ] = "auto"
    """Processes that decode the images of a worker; 0: threads of the worker itself. auto: with a GPU one for each core but one, up
    to 16, otherwise 0. It changes no result and no digest, and an interrupted run may continue with another value."""
    data_frac: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of each class's training images to use, at least one per class: shows what more images would be worth."""

    @field_validator("momentum")
    @classmethod
    def _looks_ahead(cls, momentum: float, info: ValidationInfo) -> float:
        if info.data.get("optimizer") == "sgd_nesterov" and not momentum:
            raise ValueError("sgd_nesterov needs momentum above 0; raise it, or use optimizer sgd")
        return momentum

    @property
    def sampling_power(self) -> float:
        """The power p with which class k is drawn in proportion to n_k^p."""
        return {"natural": 1.0, "square_root": 0.5, "balanced": 0.0}[self.sampling]

    @property
    def shuffle_bytes(self) -> int:
        """shuffle_mib in bytes."""
        return int(self.shuffle_mib * 2**20)


class EvaluationConfig(Config):
    """Classification after training."""

    posthoc_tau: Annotated[float, Field(ge=0)] = 0.0
    """Subtract this times the log of the training prior from the logits (arXiv 2007.07314)."""
    tte: Annotated[TteMode, BeforeValidator(_mode, json_schema_input_type=TteMode | bool)] = "off"
    """Test-time ensembling: the mean of the logits of several crops of an image (arXiv 2309.10019). five_crops are the corners and the
    center, ten_crops these and their mirror images, augmented random crops and flips, the same for every image. true is five_crops,
    and false off. It applies to every evaluation, also during training."""
    expand_px: Annotated[int, Field(ge=0)] | None = None
    """Margin of five_crops and ten_crops: the short side of an image is resized to the side of the crops plus this. By default 24 px,
    in proportion fewer if the images of the backbone are smaller than 224 px. LIFT has 24 px, and 21 px for ViT-L/14."""
    views: Annotated[int, Field(ge=1)] = 10
    """Number of random crops of `tte: augmented`."""
    group_bounds: GroupBounds = "auto"
    """[LOW, HIGH]: few-shot classes have fewer than LOW labeled training images, many-shot classes more than HIGH. auto: [20, 100]
    if each group then has a class, otherwise thirds of the classes."""


FREE = {"optim": "decode_processes", "backbone": "prepacked"}  # settings that are no part of an experiment
AugmentConfig = Annotated[MdaConfig | CropFlipConfig | NoAugmentConfig, Field(discriminator="kind")]


class RunConfig(Config):
    """Everything that decides what a run computes, and nothing else."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights, the order of images and their augmentation."""
    backbone: BackboneConfig = BackboneConfig()
    augment: AugmentConfig = MdaConfig()
    tuner: AnyTunerConfig = TUNERS.default("adaptformer")
    extra_tuner: AnyTunerConfig | None = None
    """A second tuner, which changes other places."""
    head: AnyHeadConfig = HEADS.default("cosine")
    loss: AnyLossConfig = LOSSES.default("logit_adjusted")
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    method: AnyMethodConfig = METHODS.default("lift")

    @field_validator("extra_tuner")
    @classmethod
    def _goes_together(cls, extra: TunerConfig | None, info: ValidationInfo) -> TunerConfig | None:
        if extra is not None and "tuner" in info.data:
            check_pair(info.data["tuner"].kind, extra.kind)
        return extra

    @field_validator("head")
    @classmethod
    def _has_texts(cls, head: HeadConfig, info: ValidationInfo) -> HeadConfig:
        backbone = info.data.get("backbone")
        if HEADS[head.kind].from_text and backbone is not None and not backbone.has_text:
            raise ValueError(
                f"kind {head.kind} requires a text tower, but got backbone.model {backbone.model}; use cosine with init class_mean"
            )
        return head

    @field_validator("method")
    @classmethod
    def _suits_the_rest(cls, method: MethodConfig, info: ValidationInfo) -> MethodConfig:
        check_suits(method, info.data)
        return method

    @field_validator("method")
    @classmethod
    def _members_are_runs(cls, method: MethodConfig, info: ValidationInfo) -> MethodConfig:
        if isinstance(method, BackdoorConfig) and len(info.data) == len(RunConfig.model_fields) - 1:
            for name in method.members:
                _member(info.data, method, name)
        return method

    def members(self) -> dict[str, RunConfig]:
        """The runs of the members of `method: backdoor` by name; empty for other methods."""
        if not isinstance(self.method, BackdoorConfig):
            return {}
        return {name: _member(dict(self), self.method, name) for name in self.method.used}

    def tuners(self) -> list[TunerConfig]:
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

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> RunConfig:
        """Return the settings in a plain tree. Raises ValueError, in one line, for the first problem."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ValueError(explain_first(cls, error)) from None

    def digest(self) -> str:
        """Twelve hex digits that name the experiment."""
        return hashlib.sha256(json.dumps(experiment(self.to_dict()), sort_keys=True).encode()).hexdigest()[:12]


def experiment(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that say only where or how fast work is done."""
    return {**tree, **{section: _without(tree[section], name) for section, name in FREE.items()}}


def _without(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != name}


def _member(fields: Mapping[str, Any], method: BackdoorConfig, name: str) -> RunConfig:
    """The run of one of several models.

    Args:
        fields: of the run as a whole, by name.

    Raises ValueError in one line for settings that make no run.
    """
    own = method.members[name]
    if strange := next((key for key in own if key.split(".")[0] == "method"), None):
        raise ValueError(f"members.{name} {strange}: must not be set, since a member is a single model; remove it")
    sections = ((key, fields[key]) for key in RunConfig.model_fields if key != "method")
    tree = {key: value.model_dump() if isinstance(value, BaseModel) else value for key, value in sections}
    try:
        return RunConfig.parse(apply_overrides(tree, own, RunConfig))
    except ValueError as error:
        raise ValueError(f"members.{name} {error}") from None


def _follow() -> None:
    """Accept kinds that were registered after this module was imported."""
    models: list[type[RunConfig]] = [RunConfig, *RunConfig.__subclasses__()]
    for model in models:
        fields = model.model_fields
        fields["tuner"].annotation, fields["extra_tuner"].annotation = TUNERS.union(), TUNERS.union() | None
        fields["head"].annotation, fields["loss"].annotation = HEADS.union(), LOSSES.union()
        model.model_rebuild(force=True)


for _kinds in (TUNERS, HEADS, LOSSES):
    _kinds.followers.append(_follow)
load_plugins()
