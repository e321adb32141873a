"""A trained model without its training data, for export, prediction and serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.augment import centre_crop, corners_and_centre
from lift_ray.data.bad_image import MAX_PIXELS
from lift_ray.data.bit_depth import Rendering
from lift_ray.data.dataset import Dataset
from lift_ray.data.decode import Pixels, decode
from lift_ray.errors import BadInput
from lift_ray.evaluation.accumulator import shift_of
from lift_ray.evaluation.cpu_parallel import batch_size
from lift_ray.methods.world import Ranks
from lift_ray.model.heads import over_crops
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training import checkpoint
from lift_ray.training.workspace import Workspace

BATCH = 100  # images, on a GPU
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


class Classifier:
    """The model of a checkpoint, which classifies images exactly as an evaluation of the checkpoint does.

    On a CPU it computes in fp32, whatever the training precision.

    Args:
        folder: folder of the checkpoint.
        ranks: device and number of threads.
        posthoc_tau: strength of the post-hoc adjustment; None for the value of the run.

    Raises BadInput.
    """

    def __init__(self, folder: Path, ranks: Ranks, posthoc_tau: float | None = None) -> None:
        self.record, self.ranks = single_record(folder), ranks
        self.rendering = Rendering.of(self.record.rendering)
        """How images with more than 8 bits, several pages or transparency become 8-bit RGB, as in training."""
        here: dict[str, Any] = {"backbone.precision": "fp32"} if ranks.device.type == "cpu" else {}
        if posthoc_tau is not None:
            here["evaluation.posthoc_tau"] = posthoc_tau
        self._workspace = Workspace(Dataset(self.record.dataset, tuple(self.record.class_names), {}), ranks)
        self.config = self._workspace.resolve(
            RunConfig.model_validate(apply_overrides(self.record.config, here, RunConfig))
        )
        self.backbone = self._workspace.backbone(self.config)
        self.model = self._workspace.build(self.config, trained_already=True)
        checkpoint.load_weights(folder, self.model)
        self.model.eval().requires_grad_(False)
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
    def five_crops(self) -> bool:
        """True if the logits are averaged over five crops of an image (test-time ensembling)."""
        return self.config.evaluation.tte

    @property
    def batch_size(self) -> int:
        """Number of images to classify at a time."""
        return batch_size(self.ranks.device, self.backbone.tower, self.five_crops, BATCH)

    def image(self, encoded: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
        """Decode an image as an evaluation does: (H, W, 3) or, for five crops, (5, H, W, 3) uint8. Raises what `decode` raises."""
        whole = decode(encoded, max_pixels=max_pixels, rendering=self.rendering)
        return (corners_and_centre if self.five_crops else centre_crop)(whole, self.size_px)

    def logits(self, images: Tensor) -> Tensor:
        """Return adjusted logits (B, K) in fp32 on the device, for images (B, 3, H, W) or (B, 5, 3, H, W) in uint8."""
        with torch.inference_mode():
            return over_crops(self._predict(images)).float() - self.offset
