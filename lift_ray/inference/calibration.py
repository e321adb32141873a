"""Probabilities that mean what they say: one temperature for the logits, fitted on the validation split (arXiv 1706.04599)."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.batches import evaluation_batches
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.evaluation.accumulator import MetricAccumulator
from lift_ray.evaluation.cpu_parallel import on_cores
from lift_ray.inference.classifier import Classifier
from lift_ray.storage.layout import CALIBRATION
from lift_ray.training.checkpoint import difference

COLDEST, HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class Calibration:
    """What logits are divided by, and what that was fitted on.

    Attributes:
        temperature: 1 leaves them as they are.
        dataset: whose validation split; "" when the temperature was given by hand.
        num_images: of that split.
        error_before, error_after: expected calibration error there, in [0, 1]. After is what it was fitted for, on the same images.
    """

    temperature: float
    dataset: str = ""
    num_images: int = 0
    error_before: float | None = None
    error_after: float | None = None

    def __str__(self) -> str:
        if not self.dataset:
            return f"temperature {self.temperature:g}, as given"
        return (
            f"temperature {self.temperature:.3f}, fitted on {self.num_images:,} validation images of {self.dataset}: calibration "
            f"error there {100 * (self.error_before or 0):.1f}% before, {100 * (self.error_after or 0):.1f}% after"
        )


def calibrated(folder: Path, finished: Classifier) -> Calibration:
    """The calibration that is kept beside a checkpoint; fitted, and kept there where that can be written, when there is none.

    Raises BadInput when its validation split cannot be read.
    """
    tau = finished.config.evaluation.posthoc_tau
    name = CALIBRATION if tau == finished.trained_tau else f"calibration-tau-{tau:g}.json"
    if found := kept(folder / name):
        return found
    made = _fitted(finished)
    with suppress(
        OSError
    ):  # a checkpoint in object storage, or in a folder of somebody else, is fitted again each time
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(made)) + "\n")
        temporary.replace(folder / name)
    return made


def kept(path: Path) -> Calibration | None:
    """The calibration in a file, if there is one. Raises BadInput when it is not readable."""
    try:
        return Calibration(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: must be a calibration, but got {error}; delete it") from None


def _fitted(finished: Classifier) -> Calibration:
    record, ranks = finished.record, finished.ranks
    try:
        dataset = open_dataset(record.dataset)
        split = dataset.split("validation")
        if list(dataset.class_names) != record.class_names:
            raise BadInput(
                f"{dataset.uri}: must have the classes of the checkpoint, but "
                f"{difference(record.class_names, dataset.class_names)}"
            )
    except BadInput as error:
        raise BadInput(f"{error}; or give --temperature 1, for probabilities that are not calibrated") from None
    with RowReader(split) as reader:
        batches = evaluation_batches(
            reader,
            split,
            size_px=finished.size_px,
            num_threads=ranks.num_threads,
            crops=finished.five_crops,
            batch_size=finished.batch_size,
        )
        found = list(on_cores(ranks.device, lambda batch: (finished.logits(batch.images).cpu(), batch.labels), batches))
    logits, labels = torch.cat([z for z, _ in found]), torch.cat([y for _, y in found])
    temperature = fit_temperature(logits, labels)
    errors = [_error(z, labels, record.class_counts) for z in (logits, logits / temperature)]
    return Calibration(temperature, record.dataset, len(labels), *errors)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [0.01, 100] for which softmax(z / T) has the least cross-entropy (arXiv 1706.04599).

    The loss is convex in 1 / T, so its derivative, mean(E_p[z] - z_y), is bisected.

    Args:
        logits: (N, K).
        labels: (N,).
    """
    right = logits.gather(1, labels.unsqueeze(1)).mean()
    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)  # of log(1 / T)
    for _ in range(40):
        middle = (low + high) / 2
        mean = (torch.softmax(math.exp(middle) * logits, dim=1) * logits).sum(1).mean()
        low, high = (low, middle) if mean > right else (middle, high)
    return math.exp(-(low + high) / 2)


def _error(logits: Tensor, labels: Tensor, class_counts: list[int]) -> float:
    tally = MetricAccumulator(logits.shape[1], logits.device)
    tally.add(logits, labels)
    return tally.result(np.array(class_counts))[0]["calibration_error"]
