"""The model of a run on the data of a workspace, as an evaluation needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lift_ray.data.batches import Batch, evaluation_batches
from lift_ray.data.dataset import Split
from lift_ray.data.order import rank_slice
from lift_ray.evaluation.cpu_parallel import batch_size, on_cores
from lift_ray.evaluation.evaluator import LogitBatch
from lift_ray.evaluation.metrics import ClassGroups, PerClass, groups_of, per_class_rows
from lift_ray.methods.ulfine import FusedHead
from lift_ray.model.heads import over_crops
from lift_ray.settings.run import RunConfig
from lift_ray.training.workspace import Workspace, autocast

CACHED_BATCH = 1000  # images


class SplitPredictor:
    """A single model that gives logits for whole splits.

    Args:
        config: settings; derived values are filled in here.
        workspace: the loaded backbone and data.
        class_counts: (K,), training images of each class, for a model whose weights will be loaded; the dataset then needs no
            training split.
        groups: many, medium and few for such a model; by default those of the dataset.

    Attributes:
        lift: the model of images.
    """

    def __init__(
        self,
        config: RunConfig,
        workspace: Workspace,
        class_counts: Sequence[int] | None = None,
        groups: ClassGroups | None = None,
    ) -> None:
        self.config, self.workspace, self.ranks = workspace.resolve(config), workspace, workspace.ranks
        if class_counts is None:
            self.class_counts = workspace.training(self.config).class_counts(workspace.dataset.num_classes)
        else:
            self.class_counts = np.array(class_counts)
        self.groups = groups or groups_of(workspace.dataset, self.config.evaluation.group_bounds)
        self.lift = workspace.build(self.config, trained_already=class_counts is not None)
        self.branches: Sequence[str] = ("linear", "similarity") if isinstance(self.lift.head, FusedHead) else ()

    @property
    def num_trained(self) -> int:
        """Number of trained parameters, classifier included."""
        return sum(parameter.numel() for parameter in self.lift.trained().values())

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint contains."""
        return self.lift.stored()

    def load_stored(self, state: dict[str, Tensor]) -> None:
        """Load the result of `stored` strictly. Raises ValueError with the names of missing or unexpected tensors."""
        self.lift.load_stored(state)

    def logits(self, split: Split) -> Iterator[LogitBatch]:
        """Yield the logits of this rank's part of a split, in storage order; those of test-time crops are averaged."""
        head = self.lift.head
        for features, labels in self._features(split):
            if isinstance(head, FusedHead):
                both = [over_crops(logits) for logits in head.both(features.float())]
                yield LogitBatch(head.fused(*both), labels, dict(zip(self.branches, both, strict=True)))
            else:
                yield LogitBatch(over_crops(self.lift.classify(features)), labels)

    def _features(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features, labels) of this rank's part of a split: (b, D), with test-time ensembling (b, crops, D)."""
        ranks, workspace, view = self.ranks, self.workspace, self.workspace.view(self.config)
        images = workspace.images(self.config, split)
        if view.tte == "off" and (cached := workspace.cached_features(self.config, self.lift, images)) is not None:
            mine = rank_slice(split.num_samples, ranks.rank, ranks.world_size)
            for start in range(mine.start, mine.stop, CACHED_BATCH):
                batch = slice(start, min(start + CACHED_BATCH, mine.stop))
                with torch.inference_mode(), autocast(self.config, ranks.device):
                    features = self.lift.feature_from_frozen(cached[batch])
                yield features, torch.from_numpy(split.labels[batch]).to(cached.device)
            return
        batches = evaluation_batches(
            workspace.reader(split),
            split,
            view,
            rank=ranks.rank,
            world_size=ranks.world_size,
            decoders=workspace.decoders(self.config),
            batch_size=batch_size(ranks.device, self.lift.tower, view.num_crops),
        )
        feature = workspace.forward(self.config, self.lift.feature)

        def compute(batch: Batch) -> tuple[Tensor, Tensor]:
            return feature(batch.images), workspace.to_device(batch.labels)

        yield from on_cores(ranks.device, compute, batches)

    def per_class_rows(self, per_class: PerClass) -> list[dict[str, Any]]:
        """Return a row for each class from the counts of an evaluation."""
        return per_class_rows(self.workspace.dataset.class_names, self.class_counts, self.groups.names, *per_class)
