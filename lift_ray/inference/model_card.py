"""Model card of an export: training data, accuracy, and how to use the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lift_ray.epoch_metrics import ACCURACIES, GROUPS
from lift_ray.evaluation.metrics import RULES, class_groups

SHOWN_CLASSES = 1000  # rows in the card; classes.json has all classes


@dataclass(frozen=True)
class Exported:
    """One exported format.

    Attributes:
        name: open_clip, onnx or torch.
        file: file name in the folder.
        difference: largest difference from the checkpoint's logits.
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
    license_name: str,
    exported: Sequence[Exported],
    five_crops: bool,
    trained_tau: float,
) -> str:
    """Return the text of README.md, in the format that model hubs read.

    Args:
        config: resolved settings.
        class_counts: (K,), training images of each class.
        metrics: validation metrics, and test metrics if they are known, as `split/name`, in [0, 1].
        size_px: side of the input images.
        license_name: license of the backbone's weights, or "unknown".
        five_crops: True if the metrics were measured on five crops of each image.
        trained_tau: post-hoc tau that the metrics were measured with; the files use the one in `config`.
    """
    backbone, tuner, tau = config["backbone"], config["tuner"]["kind"], config["evaluation"]["posthoc_tau"]
    adjusted = (
        []
        if tau == trained_tau
        else [
            f"These metrics were measured with post-hoc tau {trained_tau:g}; the exported files use tau {tau:g}. "
            f"`python -m lift_ray.evaluate CHECKPOINT --posthoc-tau {tau:g}` prints the metrics for tau {tau:g}.",
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
        f"Fine-tuned with lift_ray {version} on `{dataset}` (settings digest {digest}).",
        "",
        "| file | contents | largest difference from the checkpoint's logits |",
        "|---|---|---|",
        *(f"| `{each.file}` | {CONTENTS[each.name]} | {each.difference:.1e} |" for each in exported),
        "| `classes.json` | the class names, in the order of the logits | |",
        "",
        "## Usage",
        "",
        f"The input is a batch of RGB images in uint8, (B, 3, {size_px}, {size_px}) for any B; the model normalizes them itself. "
        f"Resize the short side to {round(size_px * 8 / 7)} px (bicubic, antialiased), then crop the center:",
        "",
        *(line for each in exported for line in _usage(each.name, size_px)),
        "## Training data",
        "",
        *_counts(class_counts),
        "",
        "## Metrics",
        "",
        *_metrics(metrics, five_crops),
        "",
        *adjusted,
        "## License",
        "",
        f"Weights of the backbone (`{backbone['model']}`{', ' + str(backbone['pretrained']) if backbone['pretrained'] else ''}): "
        f"{license_name}{'; ask their publisher' if license_name == 'unknown' else ''}. "
        "The license of the training data may add restrictions.",
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
    yield f"{counts.sum():,} training images in {len(counts):,} classes, {counts.max():,} to {counts.min():,} per class."
    yield ""
    yield "| group | training images per class | classes | images |"
    yield "|---|---|---|---|"
    for group in GROUPS:
        yield f"| {group} | {RULES[group]} | {(groups == group).sum():,} | {counts[groups == group].sum():,} |"


def _metrics(metrics: Mapping[str, float], five_crops: bool) -> Iterator[str]:
    splits = sorted({name.partition("/")[0] for name in metrics} & {"validation", "test"}, reverse=True)
    if "test" not in splits:
        yield "The test split was not evaluated before the export; `python -m lift_ray.evaluate CHECKPOINT` prints its metrics."
        yield ""
    if not splits:
        return
    plural = "s" if len(splits) > 1 else ""
    yield f"In %, on the {' and '.join(splits)} split{plural}{' (five crops of each image)' if five_crops else ''}:"
    yield ""
    shown = (*ACCURACIES, "worst_class", "calibration_error")
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


CONTENTS = {
    "open_clip": "the CLIP model with the tuner merged into its image tower, for open_clip; no classifier head",
    "torch": "the whole classifier, for torch.export.load",
    "onnx": "the whole classifier, in ONNX format",
}
IMAGE = (
    "import json, numpy as np",
    "from PIL import Image, ImageOps",
    'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
    "scale = {short} / min(image.size)",
    "image = image.resize([max({short}, int(scale * side)) for side in image.size], Image.Resampling.BICUBIC)",
    "left, top = ((side - {size}) // 2 for side in image.size)",
    "image = image.crop((left, top, left + {size}, top + {size}))",
    "images = np.asarray(image).transpose(2, 0, 1)[None].copy()",
)
BEST = 'print(json.load(open("classes.json"))[int(logits[0].argmax())])'
USAGE = {
    "open_clip": (
        "import open_clip",
        'clip = open_clip.create_model("local-dir:open_clip")  # in lift_ray: backbone: {{model: local-dir:open_clip}}',
    ),
    "torch": (
        *IMAGE,
        "import torch",
        'logits = torch.export.load("model.pt2").module()(torch.from_numpy(images))',
        BEST,
    ),
    "onnx": (
        *IMAGE,
        "import onnxruntime",
        'logits = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": images}})[0]',
        BEST,
    ),
}
