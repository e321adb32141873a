"""Calibrated probabilities: one temperature for the logits, fitted on images that the model has not seen (arXiv 1706.04599)."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.data.batches import Decoders, evaluation_batches
from lift_ray.data.dataset import Dataset, Split
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput, one_line
from lift_ray.evaluation.accumulator import MetricAccumulator
from lift_ray.evaluation.cpu_parallel import on_cores
from lift_ray.storage.layout import CALIBRATION, OUT_OF_FOLD_FILE
from lift_ray.text import count
from lift_ray.training.checkpoint import Record, difference

if TYPE_CHECKING:
    from lift_ray.inference.classifier import Classifier

COLDEST, HOTTEST = 0.01, 100.0
ROWS, MOST_LOGITS = 1024, 2 * 10**8  # images read at a time, and numbers kept for the fit of the temperature


@dataclass(frozen=True)
class Calibration:
    """A temperature that divides the logits, and the images that it was fitted on.

    Attributes:
        temperature: 1 leaves the logits unchanged.
        dataset: dataset of these images; "" if the user set the temperature.
        num_images: their number; 0 if no labeled image was held out from training.
        error_before: expected calibration error on them without the temperature, in [0, 1].
        error_after: the same with it. It is optimistic: it is measured on the images that the temperature was fitted on.
        images: what they are: validation images, or out-of-fold images.
    """

    temperature: float
    dataset: str = ""
    num_images: int = 0
    error_before: float | None = None
    error_after: float | None = None
    images: str = "validation images"

    def __str__(self) -> str:
        if not self.dataset:
            return f"temperature {self.temperature:g}, set by the user"
        if not self.num_images:
            return "not calibrated: no labeled image was held out from training (temperature 1)"
        images = count(self.num_images, self.images.removesuffix("s"))
        return (
            f"temperature {self.temperature:.3f}, fitted on {images} of {self.dataset}: calibration "
            f"error {100 * (self.error_before or 0):.1f}% before, {100 * (self.error_after or 0):.1f}% after"
        )


def calibrated(folder: Path, classifier: Classifier) -> Calibration:
    """Return the calibration stored next to a checkpoint; if there is none, fit it and try to store it there.

    Raises BadInput if the validation split cannot be read.
    """
    tau = classifier.config.evaluation.posthoc_tau
    name = CALIBRATION if tau == classifier.trained_tau else f"calibration-tau-{tau:g}.json"
    if found := _stored(folder / name):
        return found
    made = _fitted(folder, classifier)
    # A checkpoint in a read-only folder or in object storage is fitted again each time. The temporary name holds the process
    # id because several workers may fit the same checkpoint at once.
    with suppress(OSError):
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(made)) + "\n")
        temporary.replace(folder / name)
    return made


def _stored(path: Path) -> Calibration | None:
    """Return the calibration in a file, None if there is no file. Raises BadInput if it cannot be read."""
    try:
        return Calibration(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(str(path), "must be a calibration", one_line(error), "delete this file") from None


def _fitted(folder: Path, classifier: Classifier) -> Calibration:
    record, images = classifier.record, "validation images"
    if (folder / OUT_OF_FOLD_FILE).exists():
        logits, labels = _out_of_fold(folder / OUT_OF_FOLD_FILE)
        logits, images = logits - classifier.offset.cpu(), "out-of-fold images"
    else:
        dataset = _dataset(record)
        if record.train_on != "train" or "validation" not in dataset.splits:
            return Calibration(1.0, record.dataset)
        logits, labels = _on_validation(classifier, dataset.split("validation"))
    temperature = fit_temperature(logits, labels)
    before, after = (_error(z, labels, record.groups.names) for z in (logits, logits / temperature))
    return Calibration(temperature, record.dataset, len(labels), before, after, images)


def _out_of_fold(path: Path) -> tuple[Tensor, Tensor]:
    """Return raw logits (N, K) and labels (N,) of the models of other folds; of a large dataset, those of every n-th image.

    Raises BadInput if the file cannot be read.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    try:
        file = pq.ParquetFile(path)
        step = 1
        for batch in file.iter_batches(ROWS, columns=["label", "logits"]):
            labels = batch["label"].to_numpy().astype(np.int64)
            logits = batch["logits"].flatten().to_numpy(zero_copy_only=False).reshape(len(labels), -1)
            step = step if parts else math.ceil(file.metadata.num_rows * logits.shape[1] / MOST_LOGITS)
            parts.append((torch.tensor(logits[::step]), torch.tensor(labels[::step])))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BadInput(str(path), "must be a table of predictions", one_line(error), "copy the folder again") from None
    return torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts])


def _dataset(record: Record) -> Dataset:
    """Return the dataset of a checkpoint. Raises BadInput if it cannot be read, or has other classes."""
    try:
        dataset = open_dataset(record.dataset)
        if list(dataset.class_names) != record.class_names:
            different = difference(record.class_names, dataset.class_names)
            raise BadInput(dataset.uri, "must have the classes of the checkpoint", but=different)
    except BadInput as error:
        remedy = "or pass --temperature 1 for uncalibrated probabilities"
        raise BadInput("", str(error), remedy=remedy) from None
    return dataset


def _on_validation(classifier: Classifier, split: Split) -> tuple[Tensor, Tensor]:
    """Return adjusted logits (N, K) and labels (N,) of the validation split. Raises BadInput if it cannot be read."""
    ranks = classifier.ranks
    with RowReader(split) as reader:
        batches = evaluation_batches(
            reader,
            split,
            classifier.view,
            decoders=Decoders(ranks.num_threads),
            batch_size=classifier.batch_size,
        )
        found = list(
            on_cores(ranks.device, lambda batch: (classifier.logits(batch.images).cpu(), batch.labels), batches)
        )
    return torch.cat([z for z, _ in found]), torch.cat([y for _, y in found])


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T in [0.01, 100] that minimizes the cross-entropy of softmax(z / T) (arXiv 1706.04599).

    The loss is convex in 1 / T, so bisection finds the zero of its derivative, mean(E_p[z] - z_y).

    Args:
        logits: (N, K).
        labels: (N,).
    """
    target = logits.gather(1, labels.unsqueeze(1)).mean()
    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)  # bounds of log(1 / T)
    for _ in range(40):
        middle = (low + high) / 2
        mean = (torch.softmax(math.exp(middle) * logits, dim=1) * logits).sum(1).mean()
        low, high = (low, middle) if mean > target else (middle, high)
    return math.exp(-(low + high) / 2)


def _error(logits: Tensor, labels: Tensor, groups: NDArray[np.str_]) -> float:
    metrics = MetricAccumulator(logits.shape[1], logits.device)
    metrics.add(logits, labels)
    return metrics.result(groups)[0]["calibration_error"]
