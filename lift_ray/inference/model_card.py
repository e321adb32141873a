"""Model card of an export: training data, accuracy, and how to use the files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from lift_ray.epoch_metrics import ACCURACIES
from lift_ray.model.merging import licence
from lift_ray.terminal.tables import tte_in_words
from lift_ray.text import count, printable

if TYPE_CHECKING:
    from lift_ray.inference.classifier import Classifier

MARKUP = re.compile(r"[\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w)|^[#+-]|(?<=^\d)[.)]")  # of a name in Markdown
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


def model_card(classifier: Classifier, exported: Sequence[Exported], metrics: Mapping[str, float]) -> str:
    """Return the text of README.md, in the format that model hubs read.

    Args:
        classifier: the exported model.
        exported: the files next to the card.
        metrics: validation metrics, and test metrics if they are known, as `split/name`, in [0, 1]. They were measured with
            the post-hoc tau of the run; the files use that of the classifier.
    """
    markdown = Environment(  # names from outside pass the filters `text` or `code`
        loader=PackageLoader("lift_ray.inference", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    markdown.filters |= {"thousands": "{:,}".format, "text": markdown_text, "code": markdown_code}
    record, config = classifier.record, classifier.config.to_dict()
    counts = np.array(record.class_counts)
    return markdown.get_template("model_card.md").render(
        record=record,
        config=config,
        settings="\n".join(_yaml(config)),
        license=licence(config["backbone"]["model"], config["backbone"]["pretrained"]),
        exported=exported,
        size_px=classifier.size_px,
        rendering=classifier.rendering.sentences(),
        preprocessing=classifier.view.preprocessing,
        short_px=round(classifier.size_px * 8 / 7),
        counts=counts,
        num_images=count(int(counts.sum()), "training image"),
        num_classes=count(len(counts), "class"),
        groups=record.groups.names,
        rules=record.groups.rules,
        note=record.groups.note,
        metrics=metrics,
        splits=[split for split in ("validation", "test") if any(name.startswith(f"{split}/") for name in metrics)],
        shown=(*ACCURACIES, "worst_class", "calibration_error"),
        crops=tte_in_words(classifier.view.tte),
        trained_tau=classifier.trained_tau,
        shown_classes=SHOWN_CLASSES,
    )


def markdown_text(name: str) -> str:
    """Return a name as text for a line or a table cell of Markdown: no emphasis, link, HTML or new column."""
    return MARKUP.sub(r"\\\g<0>", printable(name).replace("\n", " "))


def markdown_code(name: str) -> str:
    """Return a name in the font of code, also if it has a backtick."""
    return f"`` {name} ``" if "`" in name else f"`{name}`"


def _yaml(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _yaml(value, indent + "  ")
        else:
            yield f"{indent}{name}: {'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
