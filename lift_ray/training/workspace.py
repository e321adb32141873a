"""Backbones, data and cached features that stay loaded from one run of a process to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lift_ray.data.batches import Batch, evaluation_batches
from lift_ray.data.dataset import Dataset, Split
from lift_ray.data.longtail import Int64s
from lift_ray.data.open import open_dataset
from lift_ray.data.order import SHUFFLE_BYTES, memory_bytes, rank_slice
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.evaluation.cpu_parallel import batch_size, on_cores
from lift_ray.methods.lift import Lift
from lift_ray.methods.ulfine import FusedHead
from lift_ray.methods.world import Ranks
from lift_ray.model.backbone import Backbone, check_tuner, load_backbone
from lift_ray.model.heads import MEAN_OF, CosineHead, class_means, probe_weights, random_weights
from lift_ray.registry import HEADS
from lift_ray.settings.methods import UlfineConfig
from lift_ray.settings.run import RunConfig
from lift_ray.training.feature_cache import FeatureCache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 2**30


class Workspace:
    """The loaded backbones, the index and open files of a dataset, and the cached features.

    Args:
        dataset: URI, or an open dataset.
        ranks: this process among those that train together.

    Attributes:
        cache: the cached features.
    """

    def __init__(self, dataset: str | Dataset, ranks: Ranks) -> None:
        began = time.monotonic()
        self.ranks = ranks
        self.dataset = open_dataset(dataset) if isinstance(dataset, str) else dataset
        self._backbones: dict[tuple[Any, ...], Backbone] = {}
        self._readers: dict[str, RowReader] = {}
        self._subsets: dict[float, Split] = {}
        self.cache = FeatureCache()
        self._seconds = {"load": time.monotonic() - began}  # shared by all views

    @property
    def load_s(self) -> float:
        """Seconds spent loading so far."""
        return self._seconds["load"]

    def on(self, dataset: Dataset) -> Workspace:
        """Return a workspace for another view of the dataset, which shares backbones, open files and cached features."""
        view = copy(self)
        view.dataset, view._subsets = dataset, {}
        return view

    def release(self) -> None:
        """Drop the encoded images that open files keep in memory; they are read again when they are needed."""
        for reader in self._readers.values():
            reader.close()

    def backbone(self, config: RunConfig) -> Backbone:
        """Return the frozen backbone of a run, loaded once. Raises BadInput."""
        wanted, key = config.backbone, _key(config)
        if key not in self._backbones:
            if wanted.precision != "fp32" and self.ranks.device.type == "cpu":
                raise BadInput(
                    "backbone.precision",
                    "must be fp32 on a CPU",
                    wanted.precision,
                    "set backbone.precision=fp32, or use a GPU",
                )
            began = time.monotonic()
            self._backbones[key] = load_backbone(
                wanted.model,
                wanted.pretrained,
                device=self.ranks.device,
                resolution_px=wanted.resolution_px,
                checkpointing=wanted.checkpointing,
            )
            self._seconds["load"] += time.monotonic() - began
        return self._backbones[key]

    def reader(self, split: Split, shuffle_bytes: int = SHUFFLE_BYTES) -> RowReader:
        """Return the open files of a split, with memory for the encoded images that are shuffled together."""
        if split.key not in self._readers:
            self._readers[split.key] = RowReader(split)
        reader = self._readers[split.key]
        reader.cache_bytes = memory_bytes(split, shuffle_bytes)
        return reader

    def training(self, config: RunConfig) -> Split:
        """Return the training split of a run, or the fraction of it that it uses. Raises BadInput if there is none."""
        frac = config.optim.data_frac
        if frac not in self._subsets:
            self._subsets[frac] = self.dataset.split("train").subset(frac)
        return self._subsets[frac]

    def resolve(self, config: RunConfig) -> RunConfig:
        """Return the settings with every derived value filled in, checked against the backbone. Raises BadInput."""
        backbone = self.backbone(config)
        tower = backbone.tower
        for tuner in config.tuners():
            check_tuner(tower, tuner.kind)
        if isinstance(config.method, UlfineConfig) and backbone.text is None:
            raise BadInput(
                "method ulfine",
                "requires a text tower for its prototypes",
                but=f"{backbone.name} has none",
                remedy="use fixmatch or loft",
            )
        for name in ("patch_dropout", "start_px"):
            if getattr(config.augment, name) and not tower.attention:
                raise BadInput(
                    f"augment.{name}",
                    "requires a backbone with patches",
                    but=f"{backbone.name} has none",
                    remedy="remove it",
                )
        try:
            return config.resolve(self.dataset.num_classes, tower.num_blocks, tower.width)
        except ValueError as error:
            raise BadInput(str(error)) from None

    def build(self, config: RunConfig, trained_already: bool = False) -> Lift:
        """Return a new model on the shared backbone, for resolved settings; the same on every rank.

        Args:
            trained_already: its weights will be loaded, so the initial weights of the classifier do not matter.
        """
        backbone, head = self.backbone(config), config.head
        tower = backbone.tower
        parts: dict[str, dict[str, Any]] = {}
        for tuner in config.tuners():
            parts[tuner.kind] = tuner.options(tower.num_blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if "zero_shot" in parts:
                classifier: torch.nn.Module = backbone.zero_shot_head(self.dataset.class_names, head.template)
                return Lift(tower, parts, classifier).to(self.ranks.device)
            options = head.model_dump(exclude={"kind", "init", "template"})
            start = random_weights(self.dataset.num_classes, tower.width)
            if not trained_already and head.init != "random":
                start = self._start_weights(config)
            classifier = HEADS.build(head.kind, start, **options)
            if isinstance(config.method, UlfineConfig):
                text = start if trained_already else backbone.semantic_weights(self.dataset.class_names, head.template)
                assert isinstance(classifier, CosineHead)
                classifier = FusedHead(
                    classifier, text, **config.method.model_dump(include={"mu", "ema", "pseudo_ema", "eta"})
                )
            return Lift(tower, parts, classifier).to(self.ranks.device)

    def _start_weights(self, config: RunConfig) -> torch.Tensor:
        """Return the initial weights of the classifier, (K, D)."""
        if config.head.init == "semantic":
            return self.backbone(config).semantic_weights(self.dataset.class_names, config.head.template)
        split = self.training(config)
        key = (*_key(config), config.head.init, split.key)

        def compute() -> torch.Tensor:
            samples = first_of_each_class(split.labels, MEAN_OF)
            probe = Lift(self.backbone(config).tower, {"linear_probe": {}}, torch.nn.Identity())
            # Folds overlap: one pass over all their images is cheaper than a pass over these samples for each fold.
            whole = self.cached_features(config, probe, split) if split.parts else None
            found = self.frozen(config, probe, split, samples) if whole is None else whole.cpu()[samples]
            features = found.float().cpu()
            make = class_means if config.head.init == "class_mean" else probe_weights
            try:
                weights = make(features, torch.from_numpy(split.labels[samples]), self.dataset.num_classes)
            except ValueError as error:
                raise BadInput("head.init", str(error)) from None
            return F.normalize(weights, dim=-1)

        return self.cache.get(key, compute)

    def frozen(self, config: RunConfig, model: Lift, split: Split, samples: Int64s) -> torch.Tensor:
        """Return the output of the blocks below the first tuned one for these samples, on every rank.

        Its shape is (N, T, D), or (N, D) if no block is tuned. All ranks must call it together: each computes its slice, and the
        sum over the ranks puts the slices together.
        """
        backbone, ranks = self.backbone(config), self.ranks
        batches = evaluation_batches(
            self.reader(split),
            split,
            size_px=backbone.tower.resolution_px,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_threads=ranks.num_threads,
            samples=samples,
            batch_size=batch_size(ranks.device, backbone.tower),
        )
        normalized = self.normalizer(config)

        def frozen(batch: Batch) -> torch.Tensor:
            with torch.no_grad(), autocast(config, ranks.device):
                return model.frozen_part(normalized(batch.images))

        out, at = None, rank_slice(len(samples), ranks.rank, ranks.world_size).start
        for part in on_cores(ranks.device, frozen, batches):
            if out is None:
                out = part.new_zeros(len(samples), *part.shape[1:])
            out[at : at + len(part)] = part
            at += len(part)
        if out is None:
            out = torch.zeros(len(samples), *self._frozen_shape(config, model), device=ranks.device)
        return ranks.sum(out)

    def cached_features(self, config: RunConfig, model: Lift, split: Split) -> torch.Tensor | None:
        """Return `frozen` of a whole split, computed once for all runs; None if it does not fit or nothing is frozen."""
        if not model.first_tuned:
            return None
        if split.parts:
            # Folds share the features of the splits that they are made of.
            whole = [(self.cached_features(config, model, part), samples) for part, samples in split.parts]
            parts = [
                features[torch.from_numpy(samples).to(features.device)]
                for features, samples in whole
                if features is not None
            ]
            if len(parts) < len(whole):
                return None
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        key = (*_key(config), split.key, model.first_tuned)
        num_bytes = 4 * split.num_samples * int(np.prod(self._frozen_shape(config, model)))
        # `frozen` is a collective call: sizes follow from settings and data alone, so all ranks decide the same.
        if not self.cache.fits(key, num_bytes, config.backbone.cache_gib * GIB):
            return None
        return self.cache.get(key, lambda: self.frozen(config, model, split, np.arange(split.num_samples)))

    def _frozen_shape(self, config: RunConfig, model: Lift) -> tuple[int, ...]:
        tower = self.backbone(config).tower
        if model.first_tuned == tower.num_blocks:
            return (tower.width,)
        return (tower.num_patches(tower.resolution_px) + 1, tower.width)

    def device_batches(
        self, config: RunConfig, batches: Iterable[Batch]
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yield normalized images, labels and kept patches on the device; copies to a GPU are asynchronous."""
        normalized = self.normalizer(config)
        for batch in batches:
            patches = None if batch.patches is None else self.to_device(batch.patches)
            yield normalized(batch.images), self.to_device(batch.labels), patches

    def normalizer(self, config: RunConfig) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that turns uint8 images (..., 3, H, W) into the backbone's input, on the device."""
        backbone, device = self.backbone(config), self.ranks.device
        std = torch.tensor(backbone.std, device=device).view(3, 1, 1)
        # (x / 255 - mean) / std as one multiplication and one addition
        gain, offset = 1 / (255 * std), -torch.tensor(backbone.mean, device=device).view(3, 1, 1) / std
        return lambda images: self.to_device(images).float().mul_(gain).add_(offset)

    def forward(
        self, config: RunConfig, model: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function from uint8 images (b, 3, H, W) or (b, 5, 3, H, W) to the model's output, (b, ...) or (b, 5, ...)."""
        normalized, device = self.normalizer(config), self.ranks.device

        def predict(images: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode(), autocast(config, device):
                inputs = normalized(images)
                outputs: torch.Tensor = model(inputs.flatten(0, -4)).unflatten(0, inputs.shape[:-3])
            return outputs

        return predict

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the device; the copy to a GPU is asynchronous."""
        if self.ranks.device.type == tensor.device.type:  # the CPU, or images that were decoded on the GPU
            return tensor
        return tensor.pin_memory().to(self.ranks.device, non_blocking=True)


def first_of_each_class(labels: Int64s, number: int) -> Int64s:
    """Return the sample numbers of at most `number` images of each class, in ascending order."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order], side="left")
    return np.sort(order[np.arange(len(order)) - starts < number])


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of the precision that the frozen backbone computes in."""
    dtype = DTYPES[config.backbone.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _key(config: RunConfig) -> tuple[Any, ...]:
    wanted = config.backbone
    return (wanted.model, wanted.pretrained, wanted.precision, wanted.resolution_px, wanted.checkpointing)
