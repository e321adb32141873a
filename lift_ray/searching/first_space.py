"""A first search space for a source of images: settings that fit their number, and a comment for each that says why."""

from __future__ import annotations

import json
import math
import os.path
import re
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lift_ray.data.convert.sources import KINDS, Source
from lift_ray.data.dataset import Dataset
from lift_ray.data.folds import Folds
from lift_ray.epoch_metrics import MAIN_METRIC
from lift_ray.errors import BadInput
from lift_ray.model.tuners.config import derived_width
from lift_ray.settings.shipped import SCHEMA, SPACES, shipped_folder
from lift_ray.storage.store import join
from lift_ray.text import count, printable

LARGE_PX = 256  # short side to which larger images are converted: a crop of 224 px needs no more
SMALL_PX, WIDE_PX, PATCH_PX = 84, 126, 14  # sides of the images and patches of lift-small
LARGEST_BATCH = 128
NUM_FOLDS = 4
MOST_FOR_FOLDS = 20_000  # training images; with more, a few trainings on all folds take too long
FEW_HELD_OUT = 5  # validation images of a class below which one image more or less decides
COLUMN = 72  # where comments begin


@dataclass(frozen=True)
class Fit:
    """Facts that a space file is made of.

    Attributes:
        source: the images.
        sizes: (width, height) of some of them.
        gpus: NVIDIA GPUs of this machine.
        name: of the search.
        dataset: what the file names as its dataset.
        convert: the command that makes this dataset, as words; empty if it is there.
        out: the file to write.
    """

    source: Source
    sizes: list[tuple[int, int]]
    gpus: int
    name: str
    dataset: str
    convert: list[str]
    out: Path

    @classmethod
    def of(cls, source: Source, sizes: list[tuple[int, int]], gpus: int, out: Path, name: str) -> Fit:
        """Decide where the dataset will be. Raises BadInput if no search can use the images."""
        if len(source.class_names) < 2:
            raise BadInput(source.place, "must have at least 2 classes", len(source.class_names), "add another")
        if "validation" not in source.splits and source.labelled.max() < 2:
            rule = "must have a class with two training images"
            raise BadInput(source.place, rule, but="no validation image can be drawn", remedy="add images")
        if source.is_converted:
            return cls(source, sizes, gpus, name, _seen_from(source.place, out), [], out)
        made = _free_folder(join("data", name))
        shorter = statistics.median(map(min, sizes)) if sizes else 0
        command = ["lift-ray", *source.convert_command(made, LARGE_PX if shorter > LARGE_PX else None)]
        return cls(source, sizes, gpus, name, _seen_from(made, out), command, out)

    def next_commands(self, text: str) -> list[str]:
        """Return the commands to run next, for a file of this text."""
        run = shlex.join(["lift-ray", _verb(text), str(self.out)])
        return [*([shlex.join(self.convert)] if self.convert else []), f"{run} --dry-run", run]

    @property
    def num_images(self) -> int:
        """Training images of a trial."""
        return int(self.source.splits["train"].sum())

    @property
    def batch(self) -> int:
        """A power of two of which an epoch has at least eight, at most LARGEST_BATCH."""
        return min(LARGEST_BATCH, 1 << max(0, int(math.log2(max(1, self.num_images // 8)))))

    def epochs(self, steps: int, least: int, most: int) -> int:
        """Return the number of epochs for about this number of steps."""
        return min(most, max(least, math.ceil(steps * self.batch / self.num_images)))

    @property
    def thin(self) -> int:
        """Number of classes with fewer than FEW_HELD_OUT validation images."""
        drawn = np.round(0.1 * self.source.splits["train"])
        return int((self.source.splits.get("validation", drawn) < FEW_HELD_OUT).sum())

    @property
    def folds(self) -> bool:
        """True if the validation images are too few for a choice, and all folds can be trained."""
        train = self.source.splits["train"]
        if self.thin * 4 <= len(train) or self.num_images > MOST_FOR_FOLDS or np.maximum(train - 1, 0).sum() < 16:
            return False
        data, folds = self.source.origin, Folds(NUM_FOLDS)
        return not isinstance(data, Dataset) or all(
            folds.view(data, fold).split("validation").num_samples for fold in range(1, NUM_FOLDS + 1)
        )

    @property
    def has_names(self) -> bool:
        """True if most class names are words, from which a text tower makes a classifier."""
        return sum(any(map(str.isalpha, name)) for name in self.source.class_names) * 2 > len(self.source.class_names)


def describe(source: Source, sizes: list[tuple[int, int]], problem: str = "") -> list[str]:
    """Return lines about a source for the terminal.

    Args:
        source: the images.
        sizes: (width, height) of some images.
        problem: why another one could not be read, or "".
    """
    counts = source.labelled
    splits = ", ".join(f"{int(held.sum()):,} {name}" for name, held in source.splits.items())
    lines = [
        f"{source.place}: {KINDS[source.kind]}{'' if source.is_converted else ', not converted yet'}",
        f"images: {int(counts.sum()):,} labeled for training in {_spread(source)}",
        f"rare classes: {_below(source, 20)} with fewer than 20 images, {_below(source, 5)} with fewer than 5",
    ]
    if sizes:
        lines.append(f"size: {typical(sizes)} px, the median of {count(len(sizes), 'image')}")
    if problem:
        lines.append(f"an image cannot be read: {problem}")
    return [*lines, f"splits: {splits}{'' if source.is_converted else ' (as convert will draw them)'}"]


def figures_of(source: Source, sizes: list[tuple[int, int]]) -> dict[str, object]:
    """Return the figures of `describe` as JSON values."""
    return {
        "images_in": source.place,
        "converted": source.is_converted,
        "classes": len(source.class_names),
        "images": int(source.labelled.sum()),
        "largest": int(source.labelled.max()),
        "smallest": int(source.labelled.min()),
        "classes_below": {str(number): int((source.labelled < number).sum()) for number in (20, 5)},
        "size_px": [round(statistics.median(side)) for side in zip(*sizes, strict=True)] or None,
        "splits": {name: int(held.sum()) for name, held in source.splits.items()},
    }


def typical(sizes: list[tuple[int, int]]) -> str:
    """Return the median size: `640 x 480`."""
    width, height = (round(statistics.median(side)) for side in zip(*sizes, strict=True))
    return f"{width} x {height}"


def space_text(fit: Fit) -> str:
    """Return a space file that fits."""
    body = "\n".join([*_data(fit), *(_on_gpu(fit) if fit.gpus else _on_cpu(fit)), ""])
    return "\n".join([*_header(fit, body), body])


def copied_text(fit: Fit, name: str, text: str) -> str:
    """Return a shipped space or run file with another dataset.

    Args:
        fit: the dataset.
        name: of the shipped file.
        text: its content.
    """
    text = re.sub(r"(?m)^# yaml-language-server:.*\n", "", text)
    for key, value in (("name", fit.name), ("dataset", _scalar(fit.dataset))):
        old = re.search(rf"(?m)^{key}: .*$", text)
        text = text.replace(old[0], f"{key}: {value}", 1) if old else text
    text = re.sub(r"\btraining_images: \d+", f"training_images: {fit.num_images}", text)
    head = _header(fit, text)
    head = head if _verb(text) == "tune" else head[1:]  # the schema is that of search spaces
    return "\n".join([*head, f"# The rest is {name}, with another name and dataset.", text])


def check_place(place: str) -> None:
    """Raise BadInput for a path that cannot be written into a line of a file in UTF-8."""
    if printable(place) != place or "\n" in place or "\t" in place:
        raise BadInput(repr(place), "must consist of printable characters", remedy="rename it")


def name_for(place: str) -> str:
    """Return a name for a search of these images: `photos` for photos/, s3://bucket/photos/*.parquet and photos.csv."""
    parts = [part for part in re.split(r"[/:\\]", place) if part and "*" not in part]
    last = parts[-1] if parts and parts[-1].strip(".") else os.path.basename(os.path.abspath(place))
    stem = re.sub(r"\.(csv|tsv|txt|parquet)$", "", last, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "mine"


def _header(fit: Fit, text: str) -> list[str]:
    """Return the comments above the text of a file."""
    source = fit.source
    lines = [
        f"# yaml-language-server: $schema={_schema_from(fit.out)}",
        f"# Written by lift-ray init for {source.place}: {int(source.labelled.sum()):,} training images in {_spread(source)}.",
        f"# {'First convert the images, then check and start' if fit.convert else 'Check and start'}:",
    ]
    return [*lines, *(f"#   {command}" for command in fit.next_commands(text))]


def _verb(text: str) -> str:
    """Return the verb that takes a file of this text."""
    return "tune" if re.search(r"(?m)^space:", text) else "train"


def _data(fit: Fit) -> Iterator[str]:
    yield f"name: {fit.name}"
    yield _line(f"dataset: {_scalar(fit.dataset)}", "relative to this file" if _is_relative(fit.dataset) else "")
    yield _line(
        f"objectives: {{{MAIN_METRIC}: max}}",
        "every class counts equally, however rare; docs/reference/metrics.md has the others",
    )
    if "test" not in fit.source.splits:
        yield _line("test: none", "the dataset has no test split, so the result is not held out from the search")


def _on_cpu(fit: Fit) -> Iterator[str]:
    epochs = fit.epochs(steps=100, least=3, most=20)
    yield "base:"
    yield _line("  backbone: {model: embedded:lift-small}", "no GPU here: a ViT-S/14 of the package, downloads nothing")
    if fit.sizes and statistics.median(map(min, fit.sizes)) >= 2 * SMALL_PX:
        more = (WIDE_PX**2 / PATCH_PX**2 + 1) / (SMALL_PX**2 / PATCH_PX**2 + 1)
        yield f"  # It sees {SMALL_PX} px of your {typical(fit.sizes)}."
        yield f"  # backbone.resolution_px: {WIDE_PX} shows more, for {more:.1f} times the work."
    yield _line(
        "  augment: {kind: none}", "images stay the same, so the frozen blocks are computed once for all trials"
    )
    yield _line(
        "  head: {kind: cosine, init: class_mean}",
        "starts from the mean feature of each class; lift-small knows few names",
    )
    yield _optim(fit, epochs)
    yield "space:"
    yield _line(
        "  tuner.kind: {choices: [adaptformer, lora, linear_probe]}", "is a tuner better than a classifier alone?"
    )
    when = "when: {tuner.kind: [adaptformer, lora]}"
    yield _line(f"  tuner.blocks.last: {{int: [1, 2], {when}}}", "the blocks below are cached; more would take longer")
    yield _line(f"  tuner.bottleneck: {{int: [4, 64], log: true, {when}}}", "how much is tuned")
    yield _tau(0.5)
    yield _line("  optim.lr: {float: [2.0e-2, 0.3], log: true}", "few steps need large ones")
    yield "baselines:  # run first, never stopped early; each at the best of three learning rates"
    yield "  - &probe {name: linear probe, tuner.kind: linear_probe, loss.tau: 1.0, optim.lr: 0.03}"
    yield from ("  - {<<: *probe, optim.lr: 0.1}", "  - {<<: *probe, optim.lr: 0.3}")
    yield "  - &last {name: AdaptFormer in the last block, tuner.kind: adaptformer, tuner.blocks.last: 1, tuner.bottleneck: 8,"
    yield "            loss.tau: 1.0, optim.lr: 0.03}"
    yield from ("  - {<<: *last, optim.lr: 0.1}", "  - {<<: *last, optim.lr: 0.3}")
    yield from _search(fit, 18, "6 baselines and 12 others", epochs)
    yield _line("  tte_best: 0", "five crops of each image cost five times the time")
    yield _line("scale: {workers_per_trial: 1, max_concurrent: auto}", "as many trials at a time as there are cores")


def _on_gpu(fit: Fit) -> Iterator[str]:
    epochs = 15 if fit.num_images >= 200_000 else fit.epochs(steps=400, least=5, most=30)
    width = derived_width(len(fit.source.class_names), 24)
    low, high = max(1, width // 4), min(512, max(16, 16 * width))
    yield "base:"
    yield _line(
        "  backbone: {model: ViT-B-16, pretrained: openai, precision: bf16}",
        "CLIP as published; downloaded when it is first used",
    )
    if not fit.has_names:
        yield _line(
            "  head: {kind: cosine, init: class_mean}", "class names are numbers, which tell the text tower nothing"
        )
    yield _optim(fit, epochs)
    yield "space:"
    yield _line(
        "  tuner.kind: {choices: [adaptformer, lora, linear_probe]}", "is a tuner better than a classifier alone?"
    )
    yield _line(
        f"  tuner.bottleneck: {{int: [{low}, {high}], log: true, when: {{tuner.kind: [adaptformer, lora]}}}}",
        f"around the published rule for {len(fit.source.class_names):,} classes, {width}",
    )
    yield _tau(0.0)
    yield _line("  optim.lr: {float: [2.0e-3, 1.0e-1], log: true}", "around the published 0.02")
    yield "baselines:  # run first, never stopped early"
    yield f"  - {{name: LIFT+ defaults, tuner.kind: adaptformer, tuner.bottleneck: {width}, loss.tau: 1.0, optim.lr: 0.02}}"
    yield from _search(fit, 32, "the baseline and 31 others", epochs)
    cores = max(1, min(8, (os.cpu_count() or 1) // fit.gpus))
    yield _line(
        f"scale: {{workers_per_trial: 1, cpus_per_worker: {cores}, use_gpu: true, max_concurrent: auto}}",
        "a GPU for each trial",
    )


def _optim(fit: Fit, epochs: int) -> str:
    steps = epochs * max(1, fit.num_images // fit.batch)
    why = f"about {steps:,} steps on {count(fit.num_images, 'training image')}"
    return _line(f"  optim: {{epochs: {epochs}, global_batch_size: {fit.batch}}}", why)


def _tau(low: float) -> str:
    return _line(
        f"  loss.tau: {{float: [{low}, 2.0]}}", "how strongly the loss favors rare classes; 1.0 is the published value"
    )


def _search(fit: Fit, trials: int, what: str, epochs: int) -> Iterator[str]:
    yield "search:"
    yield _line(f"  trials: {trials}", f"{what}; search.trials=N on the command line changes it")
    yield _line("  sampler: tpe", "learns from the trials before")
    grace = max(1, epochs // 7)
    yield _line(
        f"  scheduler: {{kind: asha, grace_epochs: {grace}, reduction_factor: 3}}", "stops the worse trials early"
    )
    if fit.folds:
        classes = f"{fit.thin:,} of {count(len(fit.source.class_names), 'class')}"
        why = f"{classes} have under {FEW_HELD_OUT} validation images: chance would choose"
        yield _line(f"  folds: {NUM_FOLDS}", why)
        yield _line("  confirm: {best: 3}", "the best three and the baselines on all folds; about doubles the time")
    yield _line(
        "  refit: auto",
        "best/ is trained again on drawn validation images too; true: also on those of a set of their own",
    )
    yield "  seed: 0"


def _line(text: str, why: str) -> str:
    return f"{text:<{COLUMN}} # {why}" if why else text


def _spread(source: Source) -> str:
    """Return `8 classes, from 60 ('motorbikes') to 1 ('ewer')`."""
    most, least = int(source.labelled.argmax()), int(source.labelled.argmin())
    names, counts = source.class_names, source.labelled
    return (
        f"{count(len(names), 'class')}, from {counts[most]:,} ({names[most]!r}) to {counts[least]:,} ({names[least]!r})"
    )


def _below(source: Source, number: int) -> str:
    return count(int((source.labelled < number).sum()), "class")


def _seen_from(place: str, out: Path) -> str:
    """Return a dataset as a file at `out` names it: local relative paths start from its folder."""
    if ":" in place or os.path.isabs(place) or place.startswith("~"):
        return place
    return Path(os.path.relpath(place, out.absolute().parent)).as_posix()


def _is_relative(dataset: str) -> bool:
    return not (":" in dataset or os.path.isabs(dataset) or dataset.startswith("~"))


def _schema_from(out: Path) -> str:
    schema = shipped_folder(SPACES) / SCHEMA
    try:
        return Path(os.path.relpath(schema, out.absolute().parent)).as_posix()
    except ValueError:  # on another drive
        return schema.as_posix()


def _free_folder(place: str) -> str:
    """Return this path, or the first with a number that is not taken."""
    number, free = 1, place
    while os.path.exists(free):
        number += 1
        free = f"{place}-{number}"
    return free


def _scalar(text: str) -> str:
    """Return a text as YAML, in quotes if it needs them."""
    return (
        text
        if re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./:+=@-]*", text) and ": " not in text
        else json.dumps(text, ensure_ascii=False)
    )
