"""Backbones, data and cached features that stay loaded from one run of a process to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lift_ray.data.augment import Augmentation, Preprocessing, View
from lift_ray.data.batches import Batch, Decoders, evaluation_batches
from lift_ray.data.dataset import Dataset, Shard, Split
from lift_ray.data.decoder_pool import CAN_START, DecoderPool
from lift_ray.data.longtail import Int64s
from lift_ray.data.open import open_dataset
from lift_ray.data.order import SHUFFLE_BYTES, memory_bytes, rank_slice
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput, did_you_mean
from lift_ray.evaluation.cpu_parallel import batch_size, on_cores
from lift_ray.methods.lift import Lift
from lift_ray.methods.ulfine import FusedHead
from lift_ray.methods.world import Ranks
from lift_ray.model.backbone import Backbone, check_precision, check_tuner, load_backbone
from lift_ray.model.device import WITH_STREAMS, precision_fault
from lift_ray.model.heads import MEAN_OF, CosineHead, class_means, probe_weights, random_weights
from lift_ray.model.tuners.base import first_block
from lift_ray.registry import HEADS
from lift_ray.settings.heads import HeadConfig, TextHeadConfig
from lift_ray.settings.methods import UlfineConfig
from lift_ray.settings.run import NoAugmentConfig, RunConfig
from lift_ray.settings.tuners import resolve_tuner
from lift_ray.training.augmentation import FixedImages, augmentation, training_images
from lift_ray.training.events import FeaturesDone
from lift_ray.training.feature_cache import FeatureCache, Features, Part
from lift_ray.training.shared_features import FeatureFile, SharedFeatures, chunks_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 2**30
MOST_PROCESSES = 16  # that decode for a GPU, unless the settings ask for more: several thousand images/s


class Workspace:
    """The loaded backbones, the index and open files of a dataset, and the cached features.

    Args:
        dataset: URI, or an open dataset.
        ranks: this process among those that train together.
        shared: files for the cached features, which processes of one rank share; None to keep them in this process.
        tunings: tuners of all runs to come whose images never change: features are first computed for the one that changes
            the lowest block, and those of more blocks are derived from them.

    Attributes:
        cache: the cached features.
        watch: called often while features are computed, and with None at the end; it may raise.
    """

    def __init__(
        self,
        dataset: str | Dataset,
        ranks: Ranks,
        shared: SharedFeatures | None = None,
        tunings: Sequence[RunConfig] = (),
    ) -> None:
        began = time.monotonic()
        self.ranks = ranks
        self.dataset = open_dataset(dataset) if isinstance(dataset, str) else dataset
        self._backbones: dict[tuple[Any, ...], Backbone] = {}
        self._readers: dict[str, RowReader] = {}
        self._subsets: dict[float, Split] = {}
        self._likes: dict[tuple[Any, ...], torch.Tensor] = {}
        self._weights: dict[tuple[Any, ...], str] = {}  # digests
        self._pools: dict[int, DecoderPool] = {}  # at most one, by number of processes; views share it
        self.cache, self.shared, self.tunings = FeatureCache(), shared, tunings
        self.watch: Callable[[FeaturesDone | None], None] = lambda done: None
        self._seconds = {"load": time.monotonic() - began, "features": 0.0}  # shared by all views

    @property
    def load_s(self) -> float:
        """Seconds spent loading so far."""
        return self._seconds["load"]

    @property
    def features_s(self) -> float:
        """Seconds spent computing cached features so far, or waiting for other processes that do."""
        return self._seconds["features"]

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
            if fault := precision_fault(wanted.precision, self.ranks.device):
                raise fault
            began = time.monotonic()
            if (pool := self.decoders(config).pool) is not None:
                pool.start()  # they import torch meanwhile
            loaded = load_backbone(
                wanted.model,
                wanted.pretrained,
                quickgelu=wanted.quickgelu,
                device=self.ranks.device,
                resolution_px=wanted.resolution_px,
                checkpointing=wanted.checkpointing,
                prepacked=wanted.prepacked,
            )
            check_precision(loaded.tower, wanted.precision)
            self._backbones[key] = loaded
            self._seconds["load"] += time.monotonic() - began
        return self._backbones[key]

    def preprocessing(self, config: RunConfig) -> Preprocessing:
        """Return how images become the inputs of a run's backbone: as its weights say, unless the settings say otherwise."""
        backbone = self.backbone(config)
        interpolation = config.backbone.interpolation or backbone.interpolation
        return Preprocessing(backbone.tower.resolution_px, interpolation, backbone.squash)

    def view(self, config: RunConfig) -> View:
        """Return what the model of a run gets of an image in an evaluation."""
        wanted = config.evaluation
        return View(self.preprocessing(config), wanted.tte, wanted.expand_px, wanted.views)

    def augmentation(self, config: RunConfig, epoch: int) -> Augmentation:
        """Return the augmentation of an epoch of a run."""
        return augmentation(config, self.preprocessing(config), self.backbone(config).tower, self.ranks.device, epoch)

    def images(self, config: RunConfig, split: Split) -> FixedImages:
        """Return the evaluation crops of a split."""
        return FixedImages(split, View(self.preprocessing(config)))

    def training_images(self, config: RunConfig, split: Split, epoch: int) -> FixedImages | None:
        """Return the training images of an epoch of a run, if they come again in this run or another."""
        return training_images(config, split, self.augmentation(config, epoch), epoch)

    def reader(self, split: Split, shuffle_bytes: int = SHUFFLE_BYTES) -> RowReader:
        """Return the open files of a split, with memory for the encoded images that are shuffled together."""
        if split.key not in self._readers:
            self._readers[split.key] = RowReader(split)
        reader = self._readers[split.key]
        reader.cache_bytes = memory_bytes(split, shuffle_bytes)
        return reader

    def decoders(self, config: RunConfig) -> Decoders:
        """Return where the images of a run are decoded: in processes if there is a GPU, otherwise in threads, or as the settings say.

        On a CPU the forward pass needs the cores, and a process would take memory for nothing.
        """
        threads, wanted = self.ranks.num_threads, config.optim.decode_processes
        has_gpu = self.ranks.device.type != "cpu"
        number = wanted if wanted != "auto" else min(threads, MOST_PROCESSES) if has_gpu and threads > 1 else 0
        if not number or not CAN_START:
            return Decoders(threads)
        if number not in self._pools:
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()
            self._pools[number] = DecoderPool(number)
        return Decoders(threads, self._pools[number])

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
            if getattr(config.augment, name) and not tower.can_drop_patches:
                raise BadInput(
                    f"augment.{name}",
                    "requires a backbone with patches",
                    but=f"{backbone.name} has none",
                    remedy="remove it",
                )
        self._check_texts(config)
        try:
            resolved = config.resolve(self.dataset.num_classes, tower.num_blocks, tower.width)
            return resolved.model_copy(update={"head": self._resolved_head(config)})
        except ValueError as error:
            raise BadInput(str(error)) from None

    def _check_texts(self, config: RunConfig) -> None:
        """Raise BadInput for texts of a class that the dataset does not have."""
        names = self.dataset.class_names
        if unknown := sorted((config.head.texts or {}).keys() - set(names)):
            raise BadInput("head.texts", f"unknown class '{unknown[0]}'", remedy=did_you_mean(unknown[0], names))

    def _resolved_head(self, config: RunConfig) -> HeadConfig:
        """Return the head with derived values filled in. Raises ValueError as `resolve_tuner`."""
        head = config.head
        if not isinstance(head, TextHeadConfig) or head.tuner is None:
            return head
        text = self.backbone(config).text_tower
        tuner = resolve_tuner(head.tuner, "head.tuner", self.dataset.num_classes, text.num_blocks, text.width)
        return head.model_copy(update={"tuner": tuner})

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
                classifier: torch.nn.Module = backbone.zero_shot_head(
                    self.dataset.class_names, head.template, head.texts
                )
                return Lift(tower, parts, classifier).to(self.ranks.device)
            if HEADS[head.kind].from_text:
                dtype = DTYPES[config.backbone.precision]
                classifier = HEADS.build(head.kind, backbone, self.dataset.class_names, head, dtype)
                return Lift(tower, parts, classifier).to(self.ranks.device)
            options = head.model_dump(exclude={"kind", "init", "template", "texts"})
            start = random_weights(self.dataset.num_classes, tower.width)
            if not trained_already and head.init != "random":
                start = self._start_weights(config)
            classifier = HEADS.build(head.kind, start, **options)
            if isinstance(config.method, UlfineConfig):
                text = start if trained_already else self._semantic_weights(config)
                assert isinstance(classifier, CosineHead)
                classifier = FusedHead(
                    classifier, text, **config.method.model_dump(include={"mu", "ema", "pseudo_ema", "eta"})
                )
            return Lift(tower, parts, classifier).to(self.ranks.device)

    def _semantic_weights(self, config: RunConfig) -> torch.Tensor:
        head = config.head
        return self.backbone(config).semantic_weights(self.dataset.class_names, head.template, head.texts)

    def _start_weights(self, config: RunConfig) -> torch.Tensor:
        """Return the initial weights of the classifier, (K, D)."""
        if config.head.init == "semantic":
            return self._semantic_weights(config)
        split = self.training(config)
        key = (*self._key(config), config.head.init, split.key)

        def compute() -> torch.Tensor:
            samples = first_of_each_class(split.labels, MEAN_OF)
            probe = Lift(self.backbone(config).tower, {"linear_probe": {}}, torch.nn.Identity())
            # In a search, training needs the features of all images too if they never change. And folds overlap, so that one pass
            # over all their images is cheaper than a pass over these samples for each fold.
            is_needed = split.parts or (isinstance(config.augment, NoAugmentConfig) and self.tunings)
            images = self.images(config, split)
            whole = self.cached_features(config, probe, images) if is_needed else None
            found = self.frozen(config, probe, images, samples) if whole is None else whole[samples]
            features = found.float().cpu()
            make = class_means if config.head.init == "class_mean" else probe_weights
            try:
                return make(features, torch.from_numpy(split.labels[samples]), self.dataset.num_classes)
            except ValueError as error:
                raise BadInput("head.init", str(error)) from None

        return self.cache.get(key, compute)

    def frozen(self, config: RunConfig, model: Lift, images: FixedImages, samples: Int64s) -> torch.Tensor:
        """Return the output of the blocks below the first tuned one for these samples, on every rank.

        Its shape is (N, T, D), or (N, D) if no block is tuned. All ranks must call it together: each computes its slice, and the
        sum over the ranks puts the slices together.
        """
        ranks, like = self.ranks, self._like(config, model, model.first_tuned)
        mine = rank_slice(len(samples), ranks.rank, ranks.world_size)
        out, at = like.new_zeros(len(samples), *like.shape), mine.start
        tell = self._telling(mine.stop - mine.start)
        try:
            for part in self._activations(config, model, images, samples[mine], model.first_tuned):
                out[at : at + len(part)] = part
                at += len(part)
                tell(at - mine.start)
        finally:
            self.watch(None)
        return ranks.sum(out)

    def _activations(
        self, config: RunConfig, model: Lift, images: FixedImages, samples: Int64s, stop: int
    ) -> Iterator[torch.Tensor]:
        """Yield the output of the blocks below `stop`, batch by batch: from the deepest cached features, else from the images."""
        ranks, size = self.ranks, batch_size(self.ranks.device, self.backbone(config).tower)
        if found := self._deepest(config, model, images, stop):
            batches = (Features([found])[samples[at : at + size]] for at in range(0, len(samples), size))
            yield from on_cores(ranks.device, self._continue_frozen(config, model, found.stop, stop), batches)
            return
        normalized = self.normalizer(config)

        def frozen(batch: Batch) -> torch.Tensor:
            with torch.no_grad(), autocast(config, ranks.device):
                return model.frozen_part(normalized(batch.images), stop)

        decoded = evaluation_batches(
            self.reader(images.split),
            images.split,
            images.maker,
            decoders=self.decoders(config),
            samples=samples,
            draws=images.draws,
            batch_size=size,
        )
        yield from on_cores(ranks.device, frozen, decoded)

    def _continue_frozen(
        self, config: RunConfig, model: Lift, start: int, stop: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def continued(activations: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), autocast(config, self.ranks.device):
                return model.continue_frozen(activations, start, stop)

        return continued

    def cached_features(self, config: RunConfig, model: Lift, images: FixedImages) -> Features | None:
        """Return `frozen` of all images, computed once for all runs; None if they do not fit or nothing is frozen.

        If it does not fit beside cached features of fewer blocks, the blocks in between run for each batch.
        """
        stop, began = model.first_tuned, time.monotonic()
        try:
            parts = self._cached_parts(config, model, images) if stop else None
        finally:
            self._seconds["features"] += time.monotonic() - began
        if parts is None:
            return None
        if all(part.stop == stop for part in parts):
            return Features(parts)
        size = batch_size(self.ranks.device, self.backbone(config).tower)

        def deepen(activations: torch.Tensor, start: int) -> torch.Tensor:
            batches = activations.split(size)
            return torch.cat([*on_cores(self.ranks.device, self._continue_frozen(config, model, start, stop), batches)])

        return Features(parts, deepen)

    def _cached_parts(self, config: RunConfig, model: Lift, images: FixedImages) -> list[Part] | None:
        """Return the cached features of the splits that a fold is made of, which all folds share; None if some do not fit."""
        parts = []
        for whole, samples in images.split.parts or ((images.split, None),):
            if not (found := self._cached(config, model, replace(images, split=whole), model.first_tuned)):
                return None
            parts.append(replace(found, samples=samples))
        return parts

    def _cached(self, config: RunConfig, model: Lift, images: FixedImages, stop: int) -> Part | None:
        """Return the features of all images after the blocks below `stop`, or after fewer blocks if there is no room for these."""
        key, limit = (*self._key(config), *images.key, stop), config.backbone.cache_gib * GIB
        if key not in self.cache:
            number = images.split.num_samples
            num_bytes = number * self._like(config, model, stop).nbytes
            # `frozen` is a collective call: sizes follow from settings and data alone, so all ranks decide the same.
            if self.shared is None or not number:
                if self.cache.fits(key, num_bytes, limit):
                    self.cache.get(key, lambda: self.frozen(config, model, images, np.arange(number)))
            else:
                first = self._shallowest(config)
                if first < stop and (*self._key(config), *images.key, first) not in self.cache:
                    self._share(config, model, images, first, limit - num_bytes)
                self._share(config, model, images, stop, limit)
        return self._deepest(config, model, images, stop)

    def _share(self, config: RunConfig, model: Lift, images: FixedImages, stop: int, limit_bytes: float) -> None:
        """Compute features together with other processes, and cache them if they fit."""
        assert self.shared is not None
        like, (name, chunks) = self._like(config, model, stop), self._file(config, images, stop)
        file = self.shared.file(name, chunks, like.nbytes, limit_bytes)
        if file is None:
            return

        def compute(chunk: range) -> Iterator[torch.Tensor]:
            return self._activations(config, model, images, np.arange(chunk.start, chunk.stop), stop)

        try:
            if file.fill(compute, self._telling(images.split.num_samples)):
                self._keep((*self._key(config), *images.key, stop), file, like)
        finally:
            self.watch(None)

    def _keep(self, key: tuple[Any, ...], file: FeatureFile, like: torch.Tensor) -> None:
        """Cache the features of a file that is done: mapped, or copied to a GPU."""
        self.cache.get(key, lambda: file.tensor(like.shape, like.dtype).to(self.ranks.device))

    def _deepest(self, config: RunConfig, model: Lift, images: FixedImages, stop: int) -> Part | None:
        """Return the cached features of images after most blocks, but none from `stop` on; None if there are none."""
        for block in range(stop, 0, -1):
            key = (*self._key(config), *images.key, block)
            if key not in self.cache and self.shared is not None:
                name, chunks = self._file(config, images, block)
                if file := self.shared.find(name, chunks):
                    self._keep(key, file, self._like(config, model, block))
            if key in self.cache:
                return Part(self.cache[key], block)
        return None

    def _shallowest(self, config: RunConfig) -> int:
        """Return the first block that a run of the search tunes, but for those that tune the very first; all blocks if unknown."""
        tower = self.backbone(config).tower
        stops = [tower.num_blocks]
        for tuning in self.tunings if config.augment.is_fixed else ():
            with suppress(ValueError):  # it names blocks of another backbone
                resolved = tuning.resolve(self.dataset.num_classes, tower.num_blocks, tower.width)
                stops.append(first_tuned(resolved, tower.num_blocks))
        return min(filter(None, stops))

    def _file(self, config: RunConfig, images: FixedImages, stop: int) -> tuple[str, list[range]]:
        """Return the name of the file that is shared with other processes, and its chunks."""
        tower, key = self.backbone(config).tower, self._key(config)
        if key not in self._weights:
            digest = sha256()
            for tensor in tower.state_dict().values():
                digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            self._weights[key] = digest.hexdigest()
        files = [_content(shard) for shard in images.split.shards]
        size = batch_size(self.ranks.device, tower)
        identity = repr((key, self._weights[key], images.key, files, size, self.ranks.device.type, _code()))
        return f"{sha256(identity.encode()).hexdigest()[:24]}-{stop}", chunks_of(images.split.num_samples, size)

    def _telling(self, total: int) -> Callable[[int], None]:
        """Return a function that reports how many of the images are done."""
        began, first = time.monotonic(), -1

        def tell(done: int) -> None:
            nonlocal first
            first = done if first < 0 else first
            self.watch(FeaturesDone(done, total, (done - first) / max(1e-3, time.monotonic() - began)))

        return tell

    def _key(self, config: RunConfig) -> tuple[Any, ...]:
        """Return what decides the features of an image, but for the number of blocks."""
        return (*_key(config), self.preprocessing(config))

    def _like(self, config: RunConfig, model: Lift, stop: int) -> torch.Tensor:
        """Return features of one black image, (T, D) or (D,)."""
        key, px = (*self._key(config), stop), self.backbone(config).tower.resolution_px
        if key not in self._likes:
            with torch.no_grad(), autocast(config, self.ranks.device):
                self._likes[key] = model.frozen_part(torch.zeros(1, 3, px, px, device=self.ranks.device), stop)[0]
        return self._likes[key]

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
        """Return a function from uint8 images (b, 3, H, W) or (b, crops, 3, H, W) to the output, (b, ...) or (b, crops, ...)."""
        normalized, device = self.normalizer(config), self.ranks.device

        def predict(images: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode(), autocast(config, device):
                inputs = normalized(images)
                outputs: torch.Tensor = model(inputs.flatten(0, -4)).unflatten(0, inputs.shape[:-3])
            return outputs

        return predict

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the device; the copy to CUDA and XPU is asynchronous."""
        device = self.ranks.device
        if tensor.device.type == device.type:  # the CPU, or images that were decoded on the GPU
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True) if device.type in WITH_STREAMS else tensor.to(device)


def first_of_each_class(labels: Int64s, number: int) -> Int64s:
    """Return the sample numbers of at most `number` images of each class, in ascending order."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order], side="left")
    return np.sort(order[np.arange(len(order)) - starts < number])


def first_tuned(config: RunConfig, num_blocks: int) -> int:
    """Return the first block that resolved settings tune; `num_blocks` if they tune none."""
    return min(first_block(tuner.kind, tuner.options(num_blocks), num_blocks) for tuner in config.tuners())


def _content(shard: Shard) -> tuple[int | str, ...]:
    """Return what changes with the content of a file: its checksum, the store's identity, or the time of its last change."""
    known = shard.sha256 or shard.identity
    path = Path(shard.url.removeprefix("file://"))
    return shard.num_bytes, known or (path.stat().st_mtime_ns if path.exists() else "")


@lru_cache(1)
def _code() -> str:
    """Return what changes with the code that computes features: a version is not enough for those who change it."""
    package, installed = Path(__file__).parent.parent, []
    for name in ("torch", "torchcodec", "pillow", "open_clip_torch", "timm"):
        with suppress(PackageNotFoundError):
            installed.append(f"{name} {version(name)}")
    digest = sha256(" ".join(installed).encode())
    for folder in ("data", "evaluation", "methods", "model", "training"):
        for file in sorted(package.glob(f"{folder}/**/*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context of the precision that the frozen backbone computes in."""
    dtype = DTYPES[config.backbone.precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _key(config: RunConfig) -> tuple[Any, ...]:
    wanted = config.backbone
    return (
        wanted.model,
        wanted.pretrained,
        wanted.quickgelu,
        wanted.precision,
        wanted.resolution_px,
        wanted.checkpointing,
        wanted.prepacked,
    )
