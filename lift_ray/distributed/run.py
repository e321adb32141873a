"""One run: from settings to a trained model, epoch by epoch. The same code under Ray Train, in a search, and alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lift_ray.data.catalog import Dataset, Split, open_dataset
from lift_ray.data.shards import RowReader
from lift_ray.data.stream import Batch, evaluation_batches, steps_per_epoch, training_batches
from lift_ray.distributed import checkpoint
from lift_ray.distributed.ranks import Ranks
from lift_ray.errors import BadInput, RunFailed
from lift_ray.methods.lift import Lift, make_optimizer
from lift_ray.model.backbone import Backbone, load_backbone
from lift_ray.model.classifier import CosineHead, ZeroShotHead, random_weights
from lift_ray.model.losses import LOSSES
from lift_ray.model.tuners import Tuner
from lift_ray.results.metrics import summarise
from lift_ray.settings.run import RunConfig, check_global_batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Warm:
    """What stays loaded from one run to the next in a process: the tower, the data set's index and its open files."""

    def __init__(self, dataset: str, ranks: Ranks) -> None:
        began = time.monotonic()
        self.ranks = ranks
        self.dataset: Dataset = open_dataset(dataset)
        self._backbones: dict[tuple[str, str | None, str], Backbone] = {}
        self._readers: dict[str, RowReader] = {}
        self.load_s = time.monotonic() - began

    def backbone(self, config: RunConfig) -> Backbone:
        """The frozen tower of a run, loaded once. Raises BadInput."""
        wanted = config.backbone
        key = (wanted.model, wanted.pretrained, wanted.precision)
        if key not in self._backbones:
            if wanted.precision != "fp32" and self.ranks.device.type == "cpu":
                raise BadInput(
                    f"backbone.precision: must be fp32 on a CPU, but got {wanted.precision}; "
                    "set backbone.precision=fp32, or use a GPU"
                )
            began = time.monotonic()
            self._backbones[key] = load_backbone(wanted.model, wanted.pretrained, device=self.ranks.device)
            self.load_s += time.monotonic() - began
        return self._backbones[key]

    def reader(self, split: Split) -> RowReader:
        """The open files of a split."""
        return self._readers.setdefault(split.name, RowReader(split))

    def resolve(self, config: RunConfig) -> RunConfig:
        """The run with every derived value filled in. Raises BadInput."""
        try:
            return config.resolve(self.dataset.num_classes, self.backbone(config).tower.num_blocks)
        except ValueError as error:
            raise BadInput(str(error)) from None

    def build(self, config: RunConfig) -> Lift:
        """A fresh model on the shared tower, for resolved settings; the same on every rank."""
        backbone, names = self.backbone(config), self.dataset.class_names
        options = config.tuner.model_dump(exclude={"kind", "blocks"})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            tuner = Tuner(
                config.tuner.kind,
                backbone.tower.width,
                backbone.tower.num_blocks,
                getattr(config.tuner, "blocks", None),
                **options,
            )
            if config.tuner.kind == "zero_shot":
                head: CosineHead | ZeroShotHead = backbone.zero_shot_head(names, config.head.template)
            elif config.head.init == "semantic":
                head = CosineHead(backbone.semantic_weights(names, config.head.template), config.head.scale)
            else:
                head = CosineHead(random_weights(len(names), backbone.tower.width), config.head.scale)
        return Lift(backbone.tower, tuner, head).to(self.ranks.device)


class Run:
    """A run at some point of its training.

    Args:
        config: settings; derived values are filled in here.
        warm: the loaded tower and data.
        class_counts: (K,) of the data it was trained on, for a run that is only evaluated; the data set then needs no
            training split.
    """

    def __init__(self, config: RunConfig, warm: Warm, class_counts: list[int] | None = None) -> None:
        self.config = config = warm.resolve(config)
        self.warm, self.ranks = warm, warm.ranks
        self.model = warm.build(config)
        self.trained = self.model.trained()
        self.optimizer: torch.optim.Optimizer | None = None
        self.epoch = self.steps_per_epoch = 0
        self.metrics: dict[str, float] = {}
        if class_counts is None:
            self._prepare_training()
        else:
            self.class_counts = np.array(class_counts)
        backbone, device = warm.backbone(config), self.ranks.device
        std = torch.tensor(backbone.std, device=device).view(1, 3, 1, 1)
        self._gain = 1 / (255 * std)
        self._offset = -torch.tensor(backbone.mean, device=device).view(1, 3, 1, 1) / std

    def _prepare_training(self) -> None:
        self.train = self.warm.dataset.split("train")
        self.class_counts = self.train.class_counts(self.warm.dataset.num_classes)
        prior = self.class_counts / self.class_counts.sum()
        self.log_prior = torch.from_numpy(np.log(prior)).float().to(self.ranks.device)
        if not self.trained:
            return
        batch = self.config.optim.global_batch_size
        try:
            check_global_batch(batch, self.ranks.world_size)
        except ValueError as error:
            raise BadInput(str(error)) from None
        self.steps_per_epoch = steps_per_epoch(self.train, batch)
        if not self.steps_per_epoch:
            raise BadInput(
                f"optim.global_batch_size: must be at most the {self.train.num_samples} training images, "
                f"but got {batch}; lower it"
            )
        self.optimizer = make_optimizer(self.trained, self.config.optim)
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=self.config.backbone.precision == "fp16")

    @property
    def num_epochs(self) -> int:
        """Epochs to train: none when nothing is trained."""
        return self.config.optim.epochs if self.trained else 0

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training split; returns train/loss, speed and where the time went.

        Raises RunFailed when the loss is not finite.
        """
        config, ranks, optimizer = self.config, self.ranks, self.optimizer
        assert optimizer is not None
        loss_of, options = LOSSES[config.loss.kind], config.loss.model_dump(exclude={"kind"})
        total_steps = self.steps_per_epoch * config.optim.epochs
        loss_sum = torch.zeros((), device=ranks.device)
        wait_s, began = 0.0, time.monotonic()
        batches = training_batches(
            self.warm.reader(self.train), self.train, size_px=self.model.tower.resolution_px,
            global_batch_size=config.optim.global_batch_size, seed=config.seed, epoch=self.epoch,
            epochs=config.optim.epochs, schedule=config.augment.schedule, num_patches=self.model.tower.num_patches,
            patch_dropout=config.augment.patch_dropout, rank=ranks.rank, world_size=ranks.world_size,
            num_threads=ranks.num_threads,
        )  # fmt: skip
        for step in range(self.steps_per_epoch):
            asked = time.monotonic()
            images, labels, patches = self._to_device(next(batches))
            wait_s += time.monotonic() - asked
            done = (self.epoch * self.steps_per_epoch + step) / total_steps
            for group in optimizer.param_groups:
                group["lr"] = config.optim.lr * 0.5 * (1 + math.cos(math.pi * done))
            with self._autocast():
                logits = self.model(images, patches)
            loss = loss_of(logits, labels, self.log_prior, **options)
            optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            ranks.average_gradients(self.trained.values())
            self.scaler.step(optimizer)
            self.scaler.update()
            loss_sum += loss.detach()
        loss_mean = float(ranks.sum(loss_sum)) / (self.steps_per_epoch * ranks.world_size)
        self.epoch += 1
        if not math.isfinite(loss_mean):
            raise RunFailed(
                f"epoch {self.epoch}: the training loss must be finite, but got {loss_mean} with "
                f"optim.lr={config.optim.lr:g} in {config.backbone.precision}; lower optim.lr"
            )
        seconds = time.monotonic() - began
        images_seen = self.steps_per_epoch * config.optim.global_batch_size
        return {"train/loss": loss_mean, "time/train_s": seconds, "time/data_wait_s": wait_s,
                "train/images_per_s": images_seen / seconds}  # fmt: skip

    def evaluate(self, split_name: str) -> dict[str, float]:
        """Metrics of a split as `split/name`, over all ranks, each image counted once."""
        began, split = time.monotonic(), self.warm.dataset.split(split_name)
        num_classes, ranks = self.warm.dataset.num_classes, self.ranks
        counts = torch.zeros(2, num_classes, dtype=torch.int64, device=ranks.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        batches = evaluation_batches(
            self.warm.reader(split), split, size_px=self.model.tower.resolution_px, rank=ranks.rank,
            world_size=ranks.world_size, num_threads=ranks.num_threads,
        )  # fmt: skip
        with torch.inference_mode(), self._autocast():
            for images, labels, _ in map(self._to_device, batches):
                logits = self.model(images)
                hits = labels[logits.argmax(1) == labels]
                counts[0] += torch.bincount(hits, minlength=num_classes)
                counts[1] += torch.bincount(labels, minlength=num_classes)
                loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
        correct, total = ranks.sum(counts).cpu().numpy()
        found = summarise(correct, total, float(ranks.sum(loss_sum)), self.class_counts)
        return {f"{split_name}/{name}": value for name, value in found.items()} | {
            "time/evaluate_s": time.monotonic() - began
        }

    def epochs(self) -> Iterator[dict[str, float]]:
        """Train to the end from wherever the run stands; yields the figures of each epoch, validation included.

        Where nothing is trained, validation is the one thing to yield, as epoch 0.
        """
        if not self.trained:
            self.metrics = self.evaluate("validation")
            yield {"epoch": 0, **self.metrics, "trained_parameters": 0}
        while self.epoch < self.num_epochs:
            figures = self.train_epoch()
            self.metrics = self.evaluate("validation")
            yield {"epoch": self.epoch, **figures, **self.metrics, "trained_parameters": self.num_trained}

    @property
    def num_trained(self) -> int:
        """Number of trained values, classifier included."""
        return sum(p.numel() for p in self.trained.values())

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder; called on the first rank."""
        data = self.warm.dataset
        record = checkpoint.Record(
            config=self.config.to_dict(), digest=self.config.digest(), dataset=data.uri, class_names=list(data.class_names),
            class_counts=self.class_counts.tolist(), epoch=self.epoch, step=self.epoch * self.steps_per_epoch,
            metrics={k: v for k, v in self.metrics.items() if "/" in k and not k.startswith("time/")},
        )  # fmt: skip
        checkpoint.save(folder, self.model, self.optimizer, record)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint of the same settings. Raises BadInput, naming the first setting that differs."""
        record = checkpoint.read_record(folder)
        here = self.config.to_dict()
        for section in here:
            if record.config.get(section) != here[section]:
                raise BadInput(
                    f"{folder}: must be of the same settings, but {section} was {record.config.get(section)} "
                    f"and is {here[section]}; use another --out, or the settings it began with"
                )
        checkpoint.load_weights(folder, self.model)
        if self.optimizer is not None:
            checkpoint.load_optimizer(folder, self.model, self.optimizer)
        self.epoch, self.metrics = record.epoch, record.metrics

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Normalised float images, labels and kept patches on the device; copied without waiting on a GPU."""
        device = self.ranks.device

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        patches = None if batch.patches is None else move(batch.patches)
        return move(batch.images) * self._gain + self._offset, move(batch.labels), patches

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.config.backbone.precision]
        return torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype != torch.float32)
