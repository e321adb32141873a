"""A trained model without its training data: for Python programs, prediction, serving and export."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lift_ray.data.bad_image import MAX_PIXELS
from lift_ray.data.batches import made_ahead
from lift_ray.data.bit_depth import Rendering
from lift_ray.data.dataset import Dataset
from lift_ray.data.decode import Pixels, decode
from lift_ray.errors import BadInput
from lift_ray.evaluation.accumulator import shift_of
from lift_ray.evaluation.cpu_parallel import batch_size, on_cores
from lift_ray.inference.calibration import Calibration, calibrated
from lift_ray.inference.evaluate import EvaluationRequest, evaluate_with, not_held_out
from lift_ray.inference.exported_model import exported_model
from lift_ray.inference.given_images import AnyImage, pixels_of
from lift_ray.inference.new_images import of_dataset, opened_images
from lift_ray.methods.world import Ranks
from lift_ray.model.device import best_device, device_named, precision_fault
from lift_ray.model.heads import over_crops
from lift_ray.model.text_head import TextHead
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training import checkpoint
from lift_ray.training.workspace import Workspace

BATCH = 100  # crops of images, on a GPU
MOST_CLASSES = 5  # that are named for an image by default


def default_top(num_classes: int) -> int:
    """Return how many classes are named for an image if the user does not say."""
    return min(MOST_CLASSES, num_classes)


def single_record(folder: Path) -> checkpoint.Record:
    """Return the record of a checkpoint of one model. Raises BadInput, also if the checkpoint is an ensemble."""
    record = checkpoint.read_record(folder)
    if record.config["method"]["kind"] == "backdoor":
        names, place = list(record.config["method"]["members"]), folder.parent / "members"
        if not place.is_dir():
            one = "members/NAME next to the checkpoint"
        else:  # `train` names the folders after the members, `tune` after the digests of their settings
            one = str(place / names[0]) if (place / names[0]).is_dir() else f"a folder in {place}"
        raise BadInput(
            str(folder),
            "must be a single model",
            f"an ensemble of {len(names)} ({', '.join(names)})",
            f"pass one of its members: {one}",
        )
    return record


@dataclass(frozen=True)
class EvaluationResult:
    """Result of `Classifier.evaluate`.

    Attributes:
        metrics: by name, as accuracy, mean_class_accuracy, few.
        per_class: a row for each class: its name, group, training images, images, accuracy, and more.
        notes: sentences about what was left out, such as classes that the model does not have, and about images that the model was
            trained on.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    notes: list[str]


class Classifier:
    """The model of a checkpoint, which classifies images exactly as an evaluation of the checkpoint does.

    `Classifier.load` is for Python programs. On a device that cannot compute in the precision of the training, as a CPU in bf16, it
    computes in fp32.

    Args:
        folder: folder of the checkpoint.
        ranks: device and number of threads.
        posthoc_tau: strength of the post-hoc adjustment; None for the value of the run.

    Raises BadInput.
    """

    calibration = Calibration(1.0)
    """The temperature that divides the logits."""

    @classmethod
    def load(
        cls,
        where: str | os.PathLike[str],
        *,
        temperature: float | None = None,
        posthoc_tau: float | None = None,
        device: str | None = None,
        ranks: Ranks | None = None,
    ) -> Classifier:
        """Load a trained model.

        Args:
            where: folder or URL of the results of `tune` (its best model) or `train`, or of a checkpoint.
            temperature: divides the logits; 1 for uncalibrated probabilities. None: fitted on validation images, once.
            posthoc_tau: strength of the post-hoc logit adjustment (arXiv 2007.07314); None for the value of the run.
            device: a name of torch, as "cpu", "cuda:1" or "mps"; None for the first GPU, or else the CPU.
            ranks: device and number of threads, instead of `device`; None leaves torch's threads as they are.

        Raises BadInput if it cannot be read, or if it is an ensemble.
        """
        if ranks is None:
            ranks = Ranks(0, 1, device_named(device) if device else best_device(), torch.get_num_threads())
        with checkpoint.opened(os.fspath(where)) as folder:
            one = cls(folder, ranks, posthoc_tau)
            one.calibration = calibrated(folder, one) if temperature is None else Calibration(temperature)
        one._where = os.fspath(where)
        return one

    def __init__(self, folder: Path, ranks: Ranks, posthoc_tau: float | None = None) -> None:
        self.record, self.ranks, self._where = single_record(folder), ranks, str(folder)
        self.rendering = Rendering.of(self.record.rendering)
        """How images with more than 8 bits, several pages or transparency become 8-bit RGB, as in training."""
        trained = self.record.config["backbone"]["precision"]
        here: dict[str, Any] = {"backbone.precision": "fp32"} if precision_fault(trained, ranks.device) else {}
        if posthoc_tau is not None:
            here["evaluation.posthoc_tau"] = posthoc_tau
        self._workspace = Workspace(Dataset(self.record.dataset, tuple(self.record.class_names), {}), ranks)
        self.config = self._workspace.resolve(
            RunConfig.model_validate(apply_overrides(self.record.config, here, RunConfig))
        )
        self.backbone = self._workspace.backbone(self.config)
        self.view = self._workspace.view(self.config)
        """Input of the model: how an image is resized and cropped."""
        self.model = self._workspace.build(self.config, trained_already=True)
        checkpoint.load_weights(folder, self.model)
        self.model.eval().requires_grad_(False)
        if isinstance(self.model.head, TextHead):
            self.model.head.text()  # once, before threads share the model
        self._predict = self._workspace.forward(self.config, self.model)
        counts = np.array(self.record.class_counts)
        self.offset = shift_of(self.config.evaluation.posthoc_tau, counts).to(ranks.device)
        """(K,), subtracted from the logits (post-hoc adjustment)."""

    @property
    def trained_tau(self) -> float:
        """Strength of the post-hoc adjustment in the run; the metrics of the checkpoint were measured with it."""
        return float(self.record.config["evaluation"]["posthoc_tau"])

    @property
    def size_px(self) -> int:
        """Side of the input images."""
        return self.backbone.tower.resolution_px

    @property
    def batch_size(self) -> int:
        """Number of images to classify at a time."""
        return batch_size(self.ranks.device, self.backbone.tower, self.view.num_crops, BATCH)

    def image(self, encoded: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
        """Decode an image as an evaluation does: (H, W, 3), or (crops, H, W, 3) for several, uint8. Raises what `decode` raises."""
        whole = decode(encoded, max_pixels=max_pixels, rendering=self.rendering)
        return self.view.of(whole)

    def logits(self, images: Tensor) -> Tensor:
        """Return adjusted logits (B, K) in fp32 on the device, for images (B, 3, H, W) or (B, crops, 3, H, W) in uint8."""
        with torch.inference_mode():
            return over_crops(self._predict(images)).float() - self.offset

    def probabilities(self, images: Tensor, temperature: float | None = None) -> Tensor:
        """Return probabilities (B, K) on the device, for images as in `logits`.

        Args:
            temperature: divides the logits; None for that of `calibration`.
        """
        return torch.softmax(self.logits(images) / (temperature or self.calibration.temperature), dim=1)

    @property
    def classes(self) -> list[str]:
        """Names of the K classes, in the order of the probabilities."""
        return list(self.record.class_names)

    @property
    def metrics(self) -> dict[str, float]:
        """Validation metrics of the model when it was trained, by name; empty if it was trained without validation."""
        return {name.removeprefix("validation/"): value for name, value in self.record.metrics.items()}

    @property
    def module(self) -> nn.Module:
        """The model as a module from uint8 images (B, 3, H, W) of side `size_px` to logits (B, K), without temperature."""
        return exported_model(self.model, self.backbone, self.offset)

    def predict(self, images: Sequence[AnyImage], top: int | None = None) -> list[list[tuple[str, float]]]:
        """Return the most probable classes of each image with their probabilities, the most probable first.

        Args:
            images: paths, URLs, bytes, Pillow images, arrays or tensors (`AnyImage`).
            top: number of classes; None for 5, or all if there are fewer.

        Raises BadInput, with the number of the image, for one that cannot be read.
        """
        top = default_top(len(self.classes)) if top is None else top
        if not 1 <= top <= len(self.classes):
            raise BadInput("top", f"must be 1 to {len(self.classes)}", top)
        names, found = self.classes, self.predict_proba(images)
        best = np.argsort(-found, axis=1, kind="stable")[:, :top]
        return [[(names[k], float(row[k])) for k in order] for row, order in zip(found, best, strict=True)]

    def predict_proba(self, images: Sequence[AnyImage]) -> NDArray[np.float32]:
        """Return calibrated probabilities (N, K) in the order of `classes`. Arguments and errors as in `predict`."""
        return self._over(images, self.probabilities, len(self.classes))

    def embed(self, images: Sequence[AnyImage]) -> NDArray[np.float32]:
        """Return features (N, D) before the classifier, not normalized; of several crops, their mean. Otherwise as `predict`."""
        features = self._workspace.forward(self.config, self.model.feature)
        return self._over(images, lambda batch: over_crops(features(batch)).float(), self.backbone.tower.width)

    def evaluate(self, data: str | os.PathLike[str] | Dataset, split: str | None = None) -> EvaluationResult:
        """Evaluate on labeled images, whose classes are matched by name.

        Args:
            data: a dataset, also an open one; a folder of class directories; a table (CSV, Parquet); or a URL of one.
            split: the split to use; None for the test split, or for all images if there are no splits.

        Raises BadInput.
        """
        if isinstance(data, Dataset):
            opening = nullcontext(of_dataset(data, self.classes, split))
        else:
            opening = opened_images(os.fspath(data), self.classes, split, rendering=self.rendering)  # type: ignore[assignment]
        with opening as images:
            tau = self.config.evaluation.posthoc_tau
            request = EvaluationRequest((self._where,), images.dataset, images.split, (tau,))
            found = evaluate_with(request, self.ranks)
            metrics = {name.partition("/")[2]: value for name, value in found.figures[0].items() if "/" in name}
            seen = not_held_out(self.record, images.dataset, images.split)
            return EvaluationResult(metrics, found.rows, [*([seen] if seen else []), *images.notes(absent=True)])

    def _over(self, images: Sequence[AnyImage], compute: Callable[[Tensor], Tensor], width: int) -> NDArray[np.float32]:
        """Return `compute` of all images, (N, width); batches are decoded in threads while others are computed."""
        if isinstance(images, str | bytes | os.PathLike | Tensor) or not hasattr(images, "__len__"):
            raise BadInput("images", "must be a list of images", type(images).__name__, "put it into a list")
        starts = range(0, len(images), self.batch_size)

        def decoded(number: int) -> Tensor:
            batch = []
            for at in range(starts[number], min(starts[number] + self.batch_size, len(images))):
                try:
                    batch.append(self.view.of(pixels_of(images[at], self.rendering)))
                except BadInput as error:
                    raise BadInput(f"images[{at}]", str(error)) from None
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.stack(batch), -1, -3)))

        batches = made_ahead(decoded, range(len(starts)), self.ranks.num_threads)
        found = on_cores(self.ranks.device, lambda batch: compute(batch).cpu().numpy(), batches)
        return np.concatenate([np.zeros((0, width), np.float32), *found])
