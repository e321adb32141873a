"""The model card of an export: what was trained on what, how good it is, and how the files are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lift_ray.evaluation.metrics import GROUPS, RULES, class_groups

SHOWN_CLASSES = 1000  # of a card; all are in classes.json


@dataclass(frozen=True)
class Exported:
    """One format that was written.

    Attributes:
        name: open_clip, onnx or torch.
        file: its name in the folder.
        difference: the largest from the checkpoint's logits.
    """

    name: str
    file: str
    difference: float


def model_card(
    *,
    config: Mapping[str, Any],
    class_names: Sequence[str],
    class_counts: Sequence[int],
    metrics: Mapping[str, float],
    dataset: str,
    digest: str,
    version: str,
    size_px: int,
    licence: str,
    exported: Sequence[Exported],
    five_crops: bool,
    trained_tau: float,
) -> str:
    """README.md, in the form that model hubs read.

    Args:
        config: the resolved settings.
        class_counts: (K,), training images.
        metrics: of validation, and of test where that is known, by `split/name`, in [0, 1].
        size_px: side of the pictures.
        licence: of the backbone's weights, or "unknown".
        five_crops: whether the metrics are those of five crops of each picture.
        trained_tau: the post-hoc adjustment that the metrics are of; that of `config` is in the files.
    """
    backbone, tuner, tau = config["backbone"], config["tuner"]["kind"], config["evaluation"]["posthoc_tau"]
    adjusted = (
        []
        if tau == trained_tau
        else [
            f"That is with post-hoc adjustment of tau {trained_tau:g}; the files adjust with tau {tau:g}. `python -m lift_ray.evaluate "
            f"CHECKPOINT --posthoc-tau {tau:g}` prints the accuracy for it.",
            "",
        ]
    )
    lines = [
        "---",
        "library_name: lift_ray",
        "pipeline_tag: image-classification",
        "---",
        "",
        f"# {backbone['model']}, {tuner}, {len(class_names):,} classes",
        "",
        f"Fine-tuned with lift_ray {version} on `{dataset}`; settings {digest}.",
        "",
        "| file | what it is | largest difference from the checkpoint's logits |",
        "|---|---|---|",
        *(f"| `{each.file}` | {WHAT[each.name]} | {each.difference:.1e} |" for each in exported),
        "| `classes.json` | the class names, in the order of the logits | |",
        "",
        "## How it is used",
        "",
        f"Pictures are RGB, uint8, ({size_px}, {size_px}), as (B, 3, {size_px}, {size_px}) for any B; normalisation is inside. "
        f"Resize the short side to {round(size_px * 8 / 7)} (bicubic, antialiased), cut out the centre:",
        "",
        *(line for each in exported for line in _usage(each.name, size_px)),
        "## Data",
        "",
        *_counts(class_counts),
        "",
        "## How good it is",
        "",
        *_metrics(metrics, five_crops),
        "",
        *adjusted,
        "## Licence",
        "",
        f"Weights of the backbone (`{backbone['model']}`{', ' + str(backbone['pretrained']) if backbone['pretrained'] else ''}): "
        f"{licence}{'; ask who published them' if licence == 'unknown' else ''}. "
        "What the training data allows is for its owner to say.",
        "",
        "## Settings",
        "",
        "```yaml",
        *_yaml(config),
        "```",
        "",
        "## Classes",
        "",
        "| class | training images | group |",
        "|---|---|---|",
        *_classes(class_names, class_counts),
        "",
    ]
    return "\n".join(lines)


def _usage(name: str, size_px: int) -> list[str]:
    return ["```python", *(line.format(short=round(size_px * 8 / 7), size=size_px) for line in USAGE[name]), "```", ""]


def _counts(class_counts: Sequence[int]) -> Iterator[str]:
    counts = np.array(class_counts)
    groups = class_groups(counts)
    yield f"{counts.sum():,} training images of {len(counts):,} classes, {counts.max():,} to {counts.min():,} each."
    yield ""
    yield "| group | training images of a class | classes | images |"
    yield "|---|---|---|---|"
    for group in GROUPS:
        yield f"| {group} | {RULES[group]} | {(groups == group).sum():,} | {counts[groups == group].sum():,} |"


def _metrics(metrics: Mapping[str, float], five_crops: bool) -> Iterator[str]:
    splits = sorted({name.partition("/")[0] for name in metrics} & {"validation", "test"}, reverse=True)
    if "test" not in splits:
        yield "How it does on the test split was not measured before the export; `python -m lift_ray.evaluate CHECKPOINT` prints it."
        yield ""
    if not splits:
        return
    yield f"In %, on the {' and '.join(splits)} split{' (five crops of each picture)' if five_crops else ''}:"
    yield ""
    shown = ("accuracy", "mean_class_accuracy", *GROUPS, "worst_class", "calibration_error")
    yield f"| {' | '.join(['split', *(name.replace('_', ' ') for name in shown)])} |"
    yield f"|{'---|' * (1 + len(shown))}"
    for split in splits:
        values = [metrics.get(f"{split}/{name}") for name in shown]
        yield f"| {' | '.join([split, *('' if value is None else f'{100 * value:.1f}' for value in values)])} |"


def _yaml(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _yaml(value, indent + "  ")
        else:
            yield f"{indent}{name}: {'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"


def _classes(class_names: Sequence[str], class_counts: Sequence[int]) -> Iterator[str]:
    groups = class_groups(np.array(class_counts))
    for name, count, group in list(zip(class_names, class_counts, groups, strict=True))[:SHOWN_CLASSES]:
        yield f"| {name.replace('|', '/')} | {count:,} | {group} |"
    if len(class_names) > SHOWN_CLASSES:
        yield f"| ... {len(class_names) - SHOWN_CLASSES:,} more in classes.json | | |"


WHAT = {
    "open_clip": "the CLIP with the tuner merged into its image tower, for open_clip; no classifier",
    "torch": "the whole classifier, torch.export",
    "onnx": "the whole classifier, ONNX",
}
PICTURE = (
    "import json, numpy as np",
    "from PIL import Image, ImageOps",
    'picture = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
    "scale = {short} / min(picture.size)",
    "picture = picture.resize([max({short}, int(scale * side)) for side in picture.size], Image.Resampling.BICUBIC)",
    "left, top = ((side - {size}) // 2 for side in picture.size)",
    "picture = picture.crop((left, top, left + {size}, top + {size}))",
    "images = np.asarray(picture).transpose(2, 0, 1)[None].copy()",
)
BEST = 'print(json.load(open("classes.json"))[int(logits[0].argmax())])'
USAGE = {
    "open_clip": (
        "import open_clip",
        'clip = open_clip.create_model("local-dir:open_clip")  # in lift_ray: backbone: {{model: local-dir:open_clip}}',
    ),
    "torch": (
        *PICTURE,
        "import torch",
        'logits = torch.export.load("model.pt2").module()(torch.from_numpy(images))',
        BEST,
    ),
    "onnx": (
        *PICTURE,
        "import onnxruntime",
        'logits = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": images}})[0]',
        BEST,
    ),
}
