"""A finished model without the data it was trained on: for export, prediction and serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.dataset import Dataset
from lift_ray.errors import BadInput
from lift_ray.evaluation.cpu_parallel import batch_size
from lift_ray.methods.world import Ranks
from lift_ray.model.heads import over_crops
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training import checkpoint
from lift_ray.training.workspace import Workspace

BATCH = 100  # pictures, on a GPU


def single_record(folder: Path) -> checkpoint.Record:
    """The record of a checkpoint of one model. Raises BadInput, also for several models that answer together."""
    record = checkpoint.read_record(folder)
    if record.config["method"]["kind"] == "backdoor":
        names, place = list(record.config["method"]["members"]), folder.parent / "members"
        if not place.is_dir():
            one = "the folder members/NAME beside it"
        else:  # train names them by their names, tune by their settings
            one = str(place / names[0]) if (place / names[0]).is_dir() else f"a folder in {place}"
        raise BadInput(
            f"{folder}: must be a single model, but method backdoor made {len(names)} that answer together "
            f"({', '.join(names)}); give one of them, {one}"
        )
    return record


class Classifier:
    """A checkpoint's model, ready to classify as an evaluation of it does.

    On a CPU it computes in fp32, whatever it was trained in.

    Args:
        folder: of the checkpoint.
        ranks: device and threads.
        posthoc_tau: strength of the post-hoc adjustment; None for that of the run.

    Raises BadInput.
    """

    def __init__(self, folder: Path, ranks: Ranks, posthoc_tau: float | None = None) -> None:
        self.record, self.ranks = single_record(folder), ranks
        here: dict[str, Any] = {"backbone.precision": "fp32"} if ranks.device.type == "cpu" else {}
        if posthoc_tau is not None:
            here["evaluation.posthoc_tau"] = posthoc_tau
        self._warm = Workspace(Dataset(self.record.dataset, tuple(self.record.class_names), {}), ranks)
        self.config = self._warm.resolve(RunConfig.model_validate(apply_overrides(self.record.config, here, RunConfig)))
        self.backbone = self._warm.backbone(self.config)
        self.model = self._warm.build(self.config, trained_already=True)
        checkpoint.load_weights(folder, self.model)
        self.model.eval().requires_grad_(False)
        self._answer = self._warm.predictor(self.config, self.model)
        counts = np.array(self.record.class_counts)
        log_prior = torch.from_numpy(np.log(counts / counts.sum())).float().to(ranks.device)
        self.offset = self.config.evaluation.posthoc_tau * log_prior
        """(K,), what the post-hoc adjustment takes off the logits."""

    @property
    def trained_tau(self) -> float:
        """Strength of the post-hoc adjustment in the run, which its metrics are of."""
        return float(self.record.config["evaluation"]["posthoc_tau"])

    @property
    def size_px(self) -> int:
        """Side of the pictures."""
        return self.backbone.tower.resolution_px

    @property
    def five_crops(self) -> bool:
        """Whether it looks at five crops of a picture (test-time ensembling)."""
        return self.config.evaluation.tte

    @property
    def batch_size(self) -> int:
        """Pictures to give it at a time."""
        return batch_size(self.ranks.device, self.backbone.tower, self.five_crops, BATCH)

    def logits(self, pictures: Tensor) -> Tensor:
        """Adjusted logits (B, K) in fp32 on the device; pictures are (B, 3, H, W) uint8, or (B, 5, 3, H, W)."""
        with torch.inference_mode():
            return over_crops(self._answer(pictures)).float() - self.offset
