"""Foundation models: loading them, and what turns class names into classifier weights."""

from __future__ import annotations

import importlib.resources
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_ray.errors import BadInput, did_you_mean, one_line
from lift_ray.model.heads import ZeroShotHead
from lift_ray.model.hosted import fill_buffers
from lift_ray.model.linear import prepack
from lift_ray.model.loading import image_tower, rebuild
from lift_ray.model.packed import read_packed
from lift_ray.model.quickgelu import PLACE as QUICKGELU
from lift_ray.model.quickgelu import open_clip_activation, timm_activation
from lift_ray.model.text_tower import TextTower, rebuild_text
from lift_ray.model.tower import FrozenTower
from lift_ray.model.tuners.config import PROMPT_TOKENS
from lift_ray.model.weights_file import PLACE, POSITIONS, check_fit, check_kind, fill_clip, read_weights
from lift_ray.registry import TUNERS
from lift_ray.storage.file_kinds import SAFETENSORS

EMBEDDED, TIMM, LOCAL = "embedded:", "timm:", "local-dir:"
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")  # that open_clip looks for in a folder
Template = str | list[str]
Texts = Mapping[str, list[str]]  # descriptions of classes in place of the template, by class name
NORMS = {"layernorm": "layer norms", "batchnorm": "batch norms"}  # kinds that train one sort of norm


@dataclass(frozen=True)
class Fit:
    """Kinds of tuners that have a place in a family of towers, and the error for the others.

    Attributes:
        kinds: their names; None for all, those of plugins too. Kinds that change nothing in the tower fit every family.
        rule, but, remedy: parts of the error; {make} is the tower's architecture, {norm} the kind that trains its norms.
    """

    kinds: tuple[str, ...] | None = None
    rule: str = ""
    but: str = ""
    remedy: str = ""


FITS = {
    "transformer": Fit(),
    "resnet": Fit(
        ("ssf", "bitfit", "batchnorm", "full", "partial"),
        "requires attention blocks",
        "this backbone ({make}) has none",
        "use ssf, bitfit, {norm} or linear_probe",
    ),
    "stages": Fit(
        ("adaptformer", "adapter", "bitfit", "layernorm", "batchnorm", "full", "partial"),
        "requires the blocks of a plain transformer",
        "this backbone ({make}) has none",
        "use adaptformer, adapter, bitfit or linear_probe",
    ),
    "opaque": Fit(
        (),
        "requires places inside the backbone",
        "this backbone ({make}) has none",
        "use linear_probe or clip_adapter",
    ),
}


@dataclass
class Backbone:
    """A frozen image tower and, for CLIP, what turns class names into classifier weights.

    Args:
        name: as the settings name it.
        tower: the image tower, parameters frozen.
        mean: of each channel, for images in [0, 1].
        std: the same.
        text: names -> (N, E) normalised text embeddings; None for towers without text.
        projection: (D, E), from image features to the shared space, the identity if they are in it; None without text.
        projection_bias: (E,), added there; None for none.
        logit_scale: CLIP's own 1 / temperature; 1 without text.
        interpolation: bicubic or bilinear, as the images of the weights were resized.
        squash: whole images were resized to a square, whatever their aspect.
        clip: the model of open_clip that `text` asks; None without text.
        tokenizer: lines of text and a length T -> token ids (N, T), as open_clip's; None without text.
    """

    name: str
    tower: FrozenTower
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    text: Callable[[list[str]], Tensor] | None
    projection: Tensor | None
    logit_scale: float
    projection_bias: Tensor | None = None
    interpolation: str = "bicubic"
    squash: bool = False
    clip: Any = None
    tokenizer: Callable[[list[str], int], Tensor] | None = None
    _embedded: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @cached_property
    def text_tower(self) -> TextTower:
        """The text tower with places for tuners and context, frozen; it shares all tensors with `clip`.

        Raises BadInput if there is no text tower, or if it is of another make than open_clip's own.
        """
        tower = rebuild_text(self.clip) if self.clip is not None else None
        if tower is None:
            own = "has none" if self.text is None else f"has one of another make ({type(self.clip).__name__})"
            raise BadInput(
                "head text",
                "requires one of open_clip's own text towers to train its text side",
                but=f"{self.name} {own}",
                remedy="leave out head.context, head.tuner and head.projections, or use another backbone",
            )
        tower.checkpointing = self.tower.checkpointing
        return tower

    def text_embeddings(self, class_names: Sequence[str], template: Template, texts: Texts | None = None) -> Tensor:
        """Normalised text embeddings of the classes, (K, E); computed once for a list of names and what is said of them.

        Underscores in names become spaces (arXiv 2309.10019).

        Args:
            template: text with {} for the name; several for the mean of their normalised embeddings, normalised again;
                `ensemble` for CLIP's own 80 (arXiv 2103.00020).
            texts: of the classes in it, the texts in place of the template; several as for templates.

        Raises BadInput for a tower without text, a class without a name and a template without a place for it.
        """
        if self.text is None or self.projection is None:
            raise BadInput(
                "head.init",
                "semantic requires a text tower",
                but=f"{self.name} has none",
                remedy="use head.init=class_mean",
            )
        names = spoken(class_names)
        own = {k: texts[name] for k, name in enumerate(class_names) if name in texts} if texts else {}
        key = (
            template if isinstance(template, str) else tuple(template),
            tuple(class_names),
            *((k, *lines) for k, lines in own.items()),
        )
        if key not in self._embedded:
            first, *others = templates_of(template)
            embedded = self.text([first(name) for name in names])
            for around in others:
                embedded = embedded + self.text([around(name) for name in names])
            embedded = F.normalize(embedded, dim=-1) if others else embedded
            if own:
                embedded = embedded.clone()
                found = self.text([line for lines in own.values() for line in lines])
                for k, rows in zip(own, found.split([len(lines) for lines in own.values()]), strict=True):
                    embedded[k] = F.normalize(rows.sum(0), dim=-1) if len(rows) > 1 else rows[0]
            self._embedded[key] = embedded
        return self._embedded[key]

    def semantic_weights(self, class_names: Sequence[str], template: Template, texts: Texts | None = None) -> Tensor:
        """Classifier weights from class names: w_k = normalise(text_k @ projection^T), (K, D) (arXiv 2309.10019)."""
        text = self.text_embeddings(class_names, template, texts)
        assert self.projection is not None
        return F.normalize(text @ self.projection.T, dim=-1)

    def zero_shot_head(
        self, class_names: Sequence[str], template: Template, texts: Texts | None = None, scale: float | None = None
    ) -> ZeroShotHead:
        """CLIP's own classifier for these classes (arXiv 2103.00020). Raises BadInput as `text_embeddings`.

        Args:
            scale: factor of the cosines; None for CLIP's own.
        """
        if self.text is None:
            raise BadInput(
                "tuner zero_shot", "requires a text tower", but=f"{self.name} has none", remedy="use linear_probe"
            )
        text = self.text_embeddings(class_names, template, texts)
        assert self.projection is not None
        return ZeroShotHead(self.projection, text, self.logit_scale if scale is None else scale, self.projection_bias)


def spoken(class_names: Sequence[str]) -> list[str]:
    """The names as text: underscores become spaces (arXiv 2309.10019). Raises BadInput for a class without a name."""
    names = [name.replace("_", " ") for name in class_names]
    unnamed = [k for k, name in enumerate(names) if not name.strip()]
    if unnamed:
        raise BadInput(
            "head.init",
            "semantic requires a name for every class",
            but=f"class {unnamed[0]} has none",
            remedy="add names or use head.init=class_mean",
        )
    return names


def templates_of(template: Template) -> list[Callable[[str], str]]:
    """For each template a function from a class name to a line of text."""
    if template == "ensemble":
        import open_clip

        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    texts = [template] if isinstance(template, str) else template
    for text in texts:
        if "{}" not in text:
            raise BadInput("head.template", "must contain {} for the class name", repr(text), "add it")
    return [partial(text.replace, "{}") for text in texts]


def load_backbone(
    model: str,
    pretrained: str | None = None,
    *,
    quickgelu: bool | None = None,
    device: torch.device | str = "cpu",
    resolution_px: int | None = None,
    checkpointing: bool = False,
    prepacked: bool = False,
) -> Backbone:
    """Load a frozen CLIP through open_clip, or an image tower without text through timm.

    Args:
        model: `embedded:lift-small`, an open_clip name, `hf-hub:...`, `local-dir:...` or `timm:NAME`.
        pretrained: open_clip's tag or a local weights file, for an open_clip name; None (timm's own weights) or a local
            safetensors file for a timm name.
        quickgelu: True if a weights file was trained with QuickGELU, False if with GELU; None for weights whose activation is known.
        resolution_px: side of the images, a multiple of the patch size; by default the side that the backbone was trained with.
        checkpointing: compute activations again in the backward pass, to save memory.
        prepacked: see `linear.prepack`, for the image tower.

    Raises:
        BadInput: unknown names, missing weights, or a tower that cannot be rebuilt.
    """
    backbone = (_load_timm if model.startswith(TIMM) else _load_open_clip)(model, pretrained, quickgelu)
    tower, patch_px = backbone.tower.to(device), backbone.tower.patch_px
    if resolution_px is not None:
        if resolution_px < patch_px or resolution_px % patch_px:
            raise BadInput(
                "backbone.resolution_px",
                f"must be a multiple of the patch size, {patch_px} px",
                resolution_px,
                f"use {max(1, round(resolution_px / patch_px)) * patch_px}",
            )
        tower.resolution_px = resolution_px
    tower.checkpointing = checkpointing
    if prepacked:
        prepack(tower)
    return backbone


def check_tuner(tower: FrozenTower, kind: str) -> None:
    """Raises BadInput, with the make of the tower, when a kind of tuner has no place in it."""
    fit, make, norm = FITS[tower.family], tower.make, tower.norm
    if fit.kinds is not None and TUNERS[kind].changes_tower and kind not in fit.kinds:
        words = {"make": make, "norm": norm}
        raise BadInput(f"tuner {kind}", fit.rule, but=fit.but.format(**words), remedy=fit.remedy.format(**words))
    if kind in NORMS and kind != norm:
        raise BadInput(
            f"tuner {kind}",
            f"requires {NORMS[kind]}",
            but=f"this backbone ({make}) has none",
            remedy=f"use {norm or 'bitfit'}",
        )
    if TUNERS[kind].owns == PROMPT_TOKENS and not tower.can_drop_patches:
        raise BadInput(
            f"tuner {kind}",
            "requires a backbone that takes more tokens",
            but=f"this one ({make}) has a bias for each pair of its own",
            remedy="use adaptformer or lora",
        )


def check_precision(tower: FrozenTower, precision: str) -> None:
    """Raise BadInput for fp16 and a tower whose activations are too large for it."""
    if precision == "fp16" and tower.overflows_in_fp16:
        raise BadInput(
            "backbone.precision",
            "must be fp32 or bf16 for DINOv3 and Swin, whose activations are too large for fp16",
            precision,
            "set backbone.precision=bf16",
        )


def _load_open_clip(model: str, pretrained: str | None, quickgelu: bool | None) -> Backbone:
    import open_clip

    clip, source, _ = clip_of(model, pretrained, quickgelu)
    try:
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # as in `clip_of`
        raise _not_loaded(model, error) from None
    clip.eval().requires_grad_(False)
    images = image_tower(clip.visual, model)
    projection = torch.eye(images.tower.width) if images.projection is None else images.projection
    config = clip.visual.preprocess_cfg

    @torch.inference_mode()
    def text(lines: list[str]) -> Tensor:
        parts = [clip.encode_text(tokenizer(lines[i : i + 256]), normalize=True) for i in range(0, len(lines), 256)]
        return torch.cat(parts).clone()

    scale = float(clip.logit_scale.exp())
    resizing = _resizing(model, config.get("interpolation"), config.get("resize_mode"))
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Backbone(model, images.tower, mean, std, text, projection, scale, images.bias, *resizing, clip, tokenizer)


def _resizing(model: str, interpolation: str | None, mode: str | None) -> tuple[str, bool]:
    """Return the interpolation of the weights' preprocessing, and whether it squashes images. Raises BadInput for another mode.

    Args:
        interpolation: bicubic unless it says bilinear, as in open_clip.
        mode: open_clip's resize mode, or timm's crop mode, which names the same things.
    """
    if mode not in (None, "shortest", "center", "squash"):
        raise BadInput(
            "backbone.model",
            "must be trained on images that are cropped or squashed to a square",
            but=f"the preprocessing of {model} says {mode}",
            remedy="use another model",
        )
    return "bilinear" if interpolation == "bilinear" else "bicubic", mode == "squash"


def clip_of(model: str, pretrained: str | None, quickgelu: bool | None = None) -> tuple[Any, str, bool]:
    """Return a whole CLIP, open_clip's name for it, and whether its weights were trained with QuickGELU. Raises BadInput.

    Args:
        model: name as in the settings.
        pretrained: tag of its weights, or a weights file.
        quickgelu: as in the settings.
    """
    import open_clip

    source, quick_gelu = _source(model, pretrained, quickgelu)
    if model.startswith(EMBEDDED):
        return _embedded_clip(source), source, quick_gelu
    if _is_file(model, pretrained):
        with _without_warnings():  # open_clip warns that the weights, which come next, are random
            clip: Any = open_clip.create_model(source, force_quick_gelu=quick_gelu, pretrained_text=False)
        fill_clip(clip, model, str(pretrained))
        return clip, source, quick_gelu
    try:
        clip = open_clip.create_model(
            source, pretrained=pretrained, force_quick_gelu=quick_gelu, require_pretrained=True, weights_only=True
        )
    except Exception as error:  # open_clip raises RuntimeError, OSError, hub and safetensors errors
        raise _not_loaded(model, error) from None
    return clip, source, quick_gelu


def _embedded_clip(source: str) -> Any:
    """Return a CLIP of the package. Its position embeddings are those of larger images: the tower resizes them to any size."""
    import open_clip

    state = read_packed(Path(source.removeprefix(LOCAL)))
    with _without_warnings():  # as for a file
        clip: Any = open_clip.create_model(source, load_weights=False, pretrained_text=False)
    clip.visual.positional_embedding = nn.Parameter(state[POSITIONS])
    clip.load_state_dict(state, strict=True)
    return clip


def _is_file(model: str, pretrained: str | None) -> bool:
    """Return True if weights of an open_clip name are in a file, and not behind a tag."""
    import open_clip

    return pretrained is not None and pretrained not in open_clip.list_pretrained_tags_by_model(model)


@contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def check_source(model: str, pretrained: str | None, quickgelu: bool | None = None) -> None:
    """Check that the model and its weights exist, as far as possible without a network. Raises BadInput.

    Args:
        model: name as in the settings.
        pretrained: tag of its weights, or a weights file.
        quickgelu: as in the settings.
    """
    if model.startswith(TIMM):
        _timm_name(model, pretrained, quickgelu)
    else:
        source, _ = _source(model, pretrained, quickgelu)
        if source.startswith(LOCAL) and not Path(source.removeprefix(LOCAL), "open_clip_config.json").is_file():
            raise BadInput("backbone.model", "must be a folder with open_clip_config.json", model, "check the path")


def weights_are_here(model: str, pretrained: str | None) -> bool:
    """Return True if the weights need no network: embedded ones, a file, or those in the cache of the Hugging Face Hub."""
    from huggingface_hub import try_to_load_from_cache

    if model.startswith((EMBEDDED, LOCAL)) or (pretrained is not None and Path(pretrained).is_file()):
        return True
    if model.startswith(TIMM):
        from timm.models import get_pretrained_cfg

        found: Any = get_pretrained_cfg(model.removeprefix(TIMM))
        repository = found.hf_hub_id if found else ""
    else:
        from open_clip.pretrained import get_pretrained_cfg as open_clip_cfg

        repository = open_clip_cfg(model, pretrained or "").get("hf_hub", "").rstrip("/")
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
    return bool(repository) and any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)


def _timm_name(model: str, pretrained: str | None, quickgelu: bool | None) -> tuple[str, bool]:
    """timm's name for a model of ours, and whether its weights need QuickGELU.

    Raises BadInput when the name, or the file of its weights, is not there, and as `timm_activation`.
    """
    import timm

    name = model.removeprefix(TIMM)
    arch = name.partition(".")[0]
    known = timm.list_models()
    if timm.is_model(arch):
        known = [arch, *timm.list_models(f"{arch}.*", pretrained=True)]
    if (name != arch and name not in known) or not timm.is_model(arch):
        raise BadInput("backbone.model", f"unknown model '{model}'", remedy=did_you_mean(name, known))
    if pretrained is not None:
        if not Path(pretrained).is_file():
            raise BadInput(PLACE, "must be an existing safetensors file", repr(pretrained), "check the path")
        check_kind(pretrained, (SAFETENSORS,))
    return name, timm_activation(name, pretrained, quickgelu)


def _load_timm(model: str, pretrained: str | None, quickgelu: bool | None) -> Backbone:
    import timm
    from timm.data.config import resolve_model_data_config

    name, quick = _timm_name(model, pretrained, quickgelu)
    activation: dict[str, Any] = {"act_layer": "quick_gelu"} if quick else {}
    try:
        with torch.device("cpu" if pretrained is None else "meta"):  # a file's weights replace all of them
            vit = timm.create_model(name, pretrained=pretrained is None, **activation)
    except Exception as error:  # as open_clip
        raise _not_loaded(model, error) from None
    if pretrained is not None:
        _fill(vit, model, pretrained)
    config = resolve_model_data_config(vit)  # type: ignore[no-untyped-call]
    resizing = _resizing(model, config.get("interpolation"), config.get("crop_mode"))
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Backbone(model, rebuild(vit, model), mean, std, None, None, 1.0, None, *resizing)


def _fill(vit: Any, model: str, path: str) -> None:
    """Load a file into timm's model, strictly except for the classifier; position embeddings may be for another image size."""
    named = vit.pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    state = {key: value for key, value in read_weights(path, (SAFETENSORS,)).items() if not key.startswith(classifiers)}
    vit.reset_classifier(0)
    positions = state.get("pos_embed", torch.empty(0))
    num_patches = positions.shape[1] - _prefix_positions(vit) if positions.ndim == 3 else 0
    if num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches:
        vit.pos_embed = nn.Parameter(torch.empty(positions.shape, device="meta"))
    check_fit(vit.state_dict(), state, model, path)
    vit.load_state_dict(state, strict=True, assign=True)
    fill_buffers(vit)


def _prefix_positions(vit: Any) -> int:
    """Return the number of position embeddings before those of the patches, in a model of timm."""
    return 0 if getattr(vit, "no_embed_class", False) else getattr(vit, "num_prefix_tokens", 1)


class BackboneUnavailable(BadInput):
    """The library that builds the backbone could not load it: a wrong name, a broken file, or no network."""


def _not_loaded(model: str, error: Exception) -> BadInput:
    """Return the error of a library as ours; a file in a local folder that holds no weights is named instead."""
    if model.startswith(LOCAL):
        for path in sorted(Path(model.removeprefix(LOCAL)).glob("*")):
            if path.suffix in WEIGHTS_SUFFIXES:
                try:
                    check_kind(str(path), place="backbone.model")
                except BadInput as fault:
                    return fault
    why = one_line(error)
    if "weights_only" in why:  # torch's text advises to unpickle everything
        why = "its weights file holds more than tensors, or is damaged"
    return BackboneUnavailable(
        "backbone.model", f"{model} could not be loaded ({why})", remedy="check name and network"
    )


def _check_tokenizer(model: str, config: dict[str, Any]) -> None:
    """Raise BadInput, before anything is downloaded, if the text half needs a package that is not installed."""
    text = config.get("text_cfg", {})
    needed = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    if needed and importlib.util.find_spec("transformers") is None:
        raise BadInput(
            "backbone.model",
            f"{model} requires the package transformers, which has the tokenizer {needed}",
            but="it is not installed",
            remedy="pip install 'lift_ray[tokenizers]'",
        )


def _source(model: str, pretrained: str | None, quickgelu: bool | None) -> tuple[str, bool]:
    """open_clip's name for a model of ours, and whether its weights need QuickGELU beyond what a folder's own config says."""
    source = model
    if model.startswith(EMBEDDED):
        assets = importlib.resources.files("lift_ray") / "assets"
        folder = Path(str(assets / model.removeprefix(EMBEDDED)))
        if not (folder / "open_clip_config.json").is_file():
            known = [p.parent.name for p in Path(str(assets)).glob("*/open_clip_config.json")]
            raise BadInput(
                "backbone.model", f"unknown embedded model '{model}'", remedy=did_you_mean(folder.name, known)
            )
        source = f"{LOCAL}{folder}"
    if ":" in source:
        if pretrained is not None:
            raise BadInput(PLACE, f"must not be given with {model}", repr(pretrained), "remove it")
        if quickgelu is not None:
            rule, remedy = f"must not be given with {model}", "remove it; its open_clip_config.json says quick_gelu"
            raise BadInput(QUICKGELU, rule, str(quickgelu).lower(), remedy)
        return source, False
    import open_clip

    if model not in open_clip.list_models():
        raise BadInput(
            "backbone.model", f"unknown model '{model}'", remedy=did_you_mean(model, open_clip.list_models())
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or (pretrained not in tags and not Path(pretrained).is_file()):
        raise BadInput(
            PLACE,
            f"must be a tag of {model} or a weights file",
            repr(pretrained),
            did_you_mean(pretrained, tags) if tags else "give the path of a weights file: it has no tags",
        )
    if _is_file(model, pretrained):
        check_kind(pretrained)
    # open_clip only warns when OpenAI's weights meet a config with plain GELU, and not even that for a file.
    quick_gelu = open_clip_activation(model, pretrained, quickgelu)
    _check_tokenizer(model, open_clip.get_model_config(model) or {})
    return model, quick_gelu
