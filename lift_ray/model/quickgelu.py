"""Activation of the weights of a CLIP: QuickGELU or GELU. They load with either, and the wrong one shows only in the features."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from lift_ray.errors import BadInput, first_few

PLACE = "backbone.quickgelu"
ENDING, TIMM_PART = "-quickgelu", "_clip_quickgelu_"
TIMM_NOTE = "natively QuickGELU"
TIMM_WITHOUT_NOTE = ("vit_base_patch16_clip_224.dfn2b",)  # QuickGELU in open_clip and in its publisher's own config


class Published(NamedTuple):
    """Weights that open_clip lists with a SHA-256 digest.

    Args:
        digest: the whole digest, or its first 8 hex digits.
        name: model and tag in open_clip.
        quick: True if they were trained with QuickGELU.
    """

    digest: str
    name: str
    quick: bool


@cache
def _listed() -> list[Published]:
    """Weights with a digest in their URL, which is where `open_clip.pretrained.download_pretrained_from_url` takes it from."""
    import open_clip

    out = []
    for model, tag in open_clip.list_pretrained():
        about = open_clip.pretrained.get_pretrained_cfg(model, tag)
        url = about.get("url", "")
        digest = url.split("/")[-2] if "openaipublic" in url else Path(url).stem.rpartition("-")[2]
        if "openaipublic" in url or "mlfoundations" in url:
            out.append(Published(digest, f"{model} {tag}", bool(about.get("quick_gelu"))))
    return out


def published(path: str) -> Published | None:
    """Return the published weights that a file holds, by its digest; None for any other file. Raises BadInput if it cannot be read."""
    try:
        about = Path(path).stat()
        digest = _sha256(path, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise BadInput("backbone.pretrained", "must be a readable file", but=f"{path} is not ({error})") from None
    return next((weights for weights in _listed() if digest.startswith(weights.digest)), None)


@lru_cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_clip_activation(model: str, pretrained: str, wanted: bool | None) -> bool:
    """Return whether weights under an open_clip name need QuickGELU.

    Args:
        pretrained: tag, or path of a file.
        wanted: the setting; None for derived.

    Raises BadInput if that is unknown, and for a setting that contradicts the name or the weights.
    """
    import open_clip

    plain = model.removesuffix(ENDING)
    if plain + ENDING not in open_clip.list_models():
        return _only_one(model, wanted)
    tags = {
        tag: bool(open_clip.pretrained.get_pretrained_cfg(plain, tag).get("quick_gelu"))
        for tag in open_clip.list_pretrained_tags_by_model(plain)
    }
    name, quick = pretrained, tags.get(pretrained)
    if quick is None and (known := published(pretrained)):
        name, quick = known.name, known.quick
    return _decide(_Names(model, plain, plain + ENDING), name, quick, wanted, tags)


def timm_activation(name: str, pretrained: str | None, wanted: bool | None) -> bool:
    """Return whether weights under a name of timm need QuickGELU. Raises BadInput as `open_clip_activation`.

    A tag in the name says which weights they are. timm's own `vit_base_patch16_clip_224.openai` has plain GELU, and a note that its
    weights need QuickGELU (timm issue 2031).
    """
    import timm

    arch, _, tag = name.partition(".")
    plain = arch.replace(TIMM_PART, "_clip_")
    twin = plain.replace("_clip_", TIMM_PART)
    if twin == plain or not timm.is_model(twin):
        return _only_one(f"timm:{name}", wanted)
    names = timm.list_models(f"{plain}.*", pretrained=True)
    tags = {one.partition(".")[2]: _timm_quick(one) for one in names}
    quick = _timm_quick(name) if tag or pretrained is None else None
    return _decide(_Names(f"timm:{name}", f"timm:{plain}", f"timm:{twin}"), tag or "of timm", quick, wanted, tags)


def _timm_quick(name: str) -> bool:
    import timm

    notes = getattr(timm.get_pretrained_cfg(name), "notes", None) or ()
    return name in TIMM_WITHOUT_NOTE or any(TIMM_NOTE in note for note in notes)


class _Names(NamedTuple):
    given: str
    plain: str
    quick: str

    @property
    def says_quick(self) -> bool:
        return self.given == self.quick or self.given.startswith(f"{self.quick}.")


def _only_one(model: str, wanted: bool | None) -> bool:
    if wanted is not None:
        rule = f"must not be given with {model}, which has one activation"
        raise BadInput(PLACE, rule, str(wanted).lower(), "remove it")
    return False


def _decide(names: _Names, weights: str, quick: bool | None, wanted: bool | None, tags: dict[str, bool]) -> bool:
    """Return the activation by the weights, the name and the setting, which must agree. Raises BadInput.

    Args:
        weights: name of the weights.
        quick: their activation; None if it is unknown.
        tags: activation of the published weights of this architecture, for the message.
    """
    if names.says_quick and quick is False:
        raise BadInput("backbone.model", f"must be {names.plain} for the weights {weights}", names.given, "rename it")
    if quick is None and names.says_quick:
        weights, quick = names.given, True
    if quick is None and wanted is None:
        rule = f"must be true or false for a weights file of {names.given}"
        known = [", ".join(tag for tag in tags if tags[tag]), first_few([tag for tag in tags if not tags[tag]], 4)]
        yes, no = (f" (as {text})" if text else "" for text in known)
        remedy = f"set true for weights trained with QuickGELU{yes}, false for others{no}"
        raise BadInput(PLACE, rule, "null", remedy)
    if None not in (quick, wanted) and quick != wanted:
        other = f", or use {names.plain}" if weights == names.given else ""
        rule = f"must be {str(quick).lower()} for {weights}"
        raise BadInput(PLACE, rule, str(wanted).lower(), f"remove it{other}")
    return bool(wanted if quick is None else quick)
