"""One run, from settings to a trained model, epoch by epoch. The same code runs under Ray Train, in a search and alone."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lift_ray.data.batches import evaluation_batches
from lift_ray.data.dataset import Split
from lift_ray.data.order import rank_slice, steps_per_epoch
from lift_ray.errors import BadInput, RunFailed
from lift_ray.evaluation.accumulator import MetricAccumulator, PredictionCollector
from lift_ray.evaluation.cpu_parallel import batch_size, on_cores
from lift_ray.evaluation.metrics import GROUPS, PerClass, per_class_rows, pseudo_label_figures
from lift_ray.methods.ulfine import FusedHead
from lift_ray.model.heads import over_crops
from lift_ray.registry import METHODS
from lift_ray.settings.methods import check_splits
from lift_ray.settings.run import NoAugmentConfig, RunConfig
from lift_ray.settings.run_file import batch_fault
from lift_ray.training import checkpoint
from lift_ray.training.batches import Batches, Inputs, cached_batches, image_batches, micro_batches
from lift_ray.training.label_prior import loss_of
from lift_ray.training.workspace import Workspace, autocast

if TYPE_CHECKING:
    from lift_ray.settings.run import OptimConfig

Forward = Callable[..., torch.Tensor]
Step = tuple[Forward, Inputs, torch.Tensor]
Figures = dict[str, float]


class Run:
    """State of a training run after `epoch` whole epochs and `step` steps of the next one.

    Args:
        config: settings; derived values are filled in here.
        warm: the loaded backbone and data.
        class_counts: (K,), training images of each class, for a run that is only evaluated; the dataset then needs no training
            split.

    Attributes:
        pulse: called after every step and every evaluation batch. It may raise, at a point where the run can be saved.
    """

    def __init__(self, config: RunConfig, warm: Workspace, class_counts: list[int] | None = None) -> None:
        self.config = config = warm.resolve(config)
        self.warm, self.ranks = warm, warm.ranks
        if class_counts is None:
            self.train = warm.training(config)
            self.class_counts = self.train.class_counts(warm.dataset.num_classes)
            check_splits(config.method, warm.dataset.uri, warm.dataset.splits)
        else:
            self.class_counts = np.array(class_counts)
        self.model = warm.build(config, trained_already=class_counts is not None)
        self.trained = self.model.trained()
        self.optimizer: torch.optim.Optimizer | None = None
        self.epoch = self.step = self.steps_per_epoch = 0
        self.losses = torch.zeros(0, 2)  # of every step of this epoch: loss, fraction of the batch classified correctly
        self.seconds = {"time/train_s": 0.0, "time/data_wait_s": 0.0}
        self.metrics: Figures = {}
        self.history: list[Figures] = []
        self.pulse: Callable[[], None] = lambda: None
        self.per_class: PerClass | None = None
        self.auxiliary: dict[str, MetricAccumulator] = {}  # metrics of the head's other logits in an evaluation
        self.evaluated = 0.0  # fraction of the split that the current evaluation has processed
        if class_counts is None and self.trained:
            self._prepare_training()

    def _prepare_training(self) -> None:
        batch = self.config.optim.global_batch_size
        if fault := batch_fault(batch, self.ranks.world_size, "optim.global_batch_size"):
            raise fault
        self.steps_per_epoch = steps_per_epoch(self.train, batch)
        if not self.steps_per_epoch:
            raise BadInput(
                "optim.global_batch_size",
                f"must be at most the {self.train.num_samples} training images",
                batch,
                "lower it",
            )
        if getattr(self.config.augment, "decode", "exact") == "gpu" and self.ranks.device.type != "cuda":
            raise BadInput("augment.decode", "must be exact or reduced without a GPU", "gpu", "leave it out")
        self.losses = torch.zeros(self.steps_per_epoch, 2, device=self.ranks.device)
        counts = torch.from_numpy(self.class_counts).float().to(self.ranks.device)
        labelled, method = loss_of(self.config, self.warm, counts), self.config.method
        self.objective = METHODS.build(method.kind, method, counts, self.model, labelled, self.ranks)
        self.optimizer = make_optimizer(self.trained, self.config.optim)
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=self.config.backbone.precision == "fp16")
        self.forward: Forward = self.objective.forward
        if self.config.backbone.compile:
            if self.ranks.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
                raise BadInput(
                    "backbone.compile",
                    "requires a C++ compiler on a CPU",
                    but="there is none",
                    remedy="install g++, or set it to false",
                )
            self.forward = torch.compile(self.forward)

    @property
    def num_epochs(self) -> int:
        """Number of epochs to train; 0 if nothing is trained."""
        return self.config.optim.epochs if self.trained else 0

    def train_epoch(self) -> Figures:
        """Train one epoch without validation, and return its figures."""
        for batch in self.batches():
            self.train_step(batch)
        self._settle()
        return self._end_epoch()

    def batches(self) -> Iterator[Step]:
        """Yield the remaining steps of this epoch."""
        forward, coming = self._batches()
        for _ in range(self.step, self.steps_per_epoch):
            self._asked = time.monotonic()
            inputs, labels = next(coming)
            self.seconds["time/data_wait_s"] += time.monotonic() - self._asked
            yield forward, inputs, labels

    def train_step(self, batch: Step) -> None:
        """Do one step of SGD over the ranks' parts of a global batch; nothing is read back from the device."""
        (forward, inputs, labels), config, optimizer = batch, self.config, self.optimizer
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = self.lr(self.epoch, self.step)
        optimizer.zero_grad(set_to_none=True)
        figures = torch.zeros(2, device=self.ranks.device)
        for part in micro_batches(len(labels), config.optim.accumulate):
            weight = (part.stop - part.start) / len(labels)  # so that micro-batches add up to the mean over the batch
            with autocast(config, self.ranks.device):
                output = forward(*(x if x is None else x[part] for x in inputs))
            loss, right = (figure * weight for figure in self.objective(output, labels[part]))
            self.scaler.scale(loss).backward()
            figures += torch.stack([loss.detach(), right])
        self.losses[self.step] = self.ranks.average(self.trained.values(), figures)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        self.seconds["time/train_s"] += time.monotonic() - self._asked
        self.pulse()

    def end_epoch(self) -> Figures:
        """Validate after the last step of an epoch, and move to the start of the next one.

        Returns train/loss, train/accuracy, speed, times, and the metrics of validation.
        Raises RunFailed if a loss was not finite.
        """
        self._settle()
        self.metrics = self.evaluate("validation")
        figures = {"epoch": self.epoch + 1, **self._end_epoch(), **self.metrics, "trained_parameters": self.num_trained}
        self.history.append(figures)
        return figures

    def _settle(self) -> None:
        """Wait for the device to finish its steps and check their losses. The wait counts as training time."""
        asked = time.monotonic()
        self.check_finite()
        self.seconds["time/train_s"] += time.monotonic() - asked

    def _end_epoch(self) -> Figures:
        loss, right = self.losses.mean(0).tolist()
        images_seen = self.steps_per_epoch * self.config.optim.global_batch_size
        figures = {
            "train/loss": loss,
            "train/accuracy": right,
            **self.seconds,
            "train/images_per_s": images_seen / self.seconds["time/train_s"],
        }
        if self.objective.pseudo_labels is not None:
            figures |= pseudo_label_figures(self.objective.pseudo_labels.cpu().numpy(), self.class_counts)
            self.objective.pseudo_labels = None
        self.epoch, self.step = self.epoch + 1, 0
        self.losses = torch.zeros_like(self.losses)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return figures

    def lr(self, epoch: int, step: int) -> float:
        """Return the learning rate of a step: a cosine schedule over the whole run. Epoch and step count from 0."""
        optim = self.config.optim
        done = (epoch * self.steps_per_epoch + step) / (self.steps_per_epoch * optim.epochs)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * done))

    def check_finite(self) -> None:
        """Raise RunFailed, with the number of the step, if a loss of this epoch is not finite."""
        losses = self.losses[:, 0].cpu()
        if not (wrong := (~losses.isfinite()).nonzero()).numel():
            return
        step, optim = int(wrong[0]), self.config.optim
        raise RunFailed(
            f"epoch {self.epoch + 1}, step {step + 1}: the training loss must be finite, but got {float(losses[step])} with "
            f"optim.lr={optim.lr:g} (at that step {self.lr(self.epoch, step):.3g}) in "
            f"{self.config.backbone.precision}; lower optim.lr"
        )

    def _batches(self) -> tuple[Forward, Batches]:
        """Return the forward function, and the rest of this epoch's (inputs, labels): images, or cached features."""
        config, warm, model = self.config, self.warm, self.model
        if isinstance(config.augment, NoAugmentConfig) and (kept := warm.kept(config, model, self.train)) is not None:
            return model.from_frozen, cached_batches(config, warm, self.train, kept, self.epoch, self.step)
        return self.forward, image_batches(config, warm, model.tower, self.epoch, self.step)

    def evaluate(self, split_name: str) -> dict[str, float]:
        """Return the metrics of a split as `split/name`, over all ranks, each image counted once."""
        began = time.monotonic()
        found = self.evaluate_taus(split_name, [self.config.evaluation.posthoc_tau])[0]
        return found | {"time/evaluate_s": time.monotonic() - began}

    def evaluate_taus(
        self, split_name: str, taus: Sequence[float], each: Sequence[PredictionCollector] = ()
    ) -> list[dict[str, float]]:
        """Return metrics for several strengths of the post-hoc adjustment z - tau * log prior; logits are computed once.

        If the head has other logits, their accuracies without adjustment are included, as `split/accuracy_linear` and the like.

        Args:
            split_name: the split.
            taus: the strengths.
            each: one collector for each tau, for the prediction of every image.
        """
        device = self.ranks.device
        log_prior = torch.from_numpy(np.log(self.class_counts / self.class_counts.sum())).float().to(device)
        tallies = [MetricAccumulator(self.warm.dataset.num_classes, device) for _ in taus]
        names = ("linear", "similarity") if isinstance(self.model.head, FusedHead) else ()
        self.auxiliary = {name: MetricAccumulator(self.warm.dataset.num_classes, device) for name in names}
        with torch.inference_mode(), autocast(self.config, device):
            split = self.warm.dataset.split(split_name)
            for logits, labels in self._logits(split):
                self.evaluated += len(labels) * self.ranks.world_size / split.num_samples
                self.pulse()
                for tau, tally, images in zip_longest(taus, tallies, each):
                    adjusted = logits.float() - tau * log_prior if tau else logits.float()
                    tally.add(adjusted, labels)
                    if images is not None:
                        images.add(adjusted)
        self.evaluated = 0.0
        counts = [tally.tensors() for tally in (*tallies, *self.auxiliary.values())] + [
            images.tensors() for images in each
        ]
        for tensor in chain.from_iterable(counts):
            self.ranks.sum(tensor)
        further = {
            f"{split_name}/{metric}_{name}": value
            for name, tally in self.auxiliary.items()
            for metric, value in tally.result(self.class_counts)[0].items()
            if metric in ("accuracy", "mean_class_accuracy", *GROUPS)
        }
        out = []
        for tally in tallies:
            figures, self.per_class = tally.result(self.class_counts)
            out.append({f"{split_name}/{name}": value for name, value in figures.items()} | further)
        return out

    def _logits(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (logits, labels) of this rank's part of a split; the head's other logits go to `auxiliary`."""
        head = self.model.head
        for features, labels in self._features(split):
            if isinstance(head, FusedHead):
                with torch.autocast(features.device.type, enabled=False):
                    both = [over_crops(logits) for logits in head.both(features.float())]
                for tally, logits in zip(self.auxiliary.values(), both, strict=True):
                    tally.add(logits, labels)
                yield head.fused(*both), labels
            else:
                yield over_crops(self.model.classify(features)), labels

    def _features(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (features, labels) of this rank's part of a split: (b, D), with test-time ensembling (b, 5, D)."""
        ranks, tte = self.ranks, self.config.evaluation.tte
        if not tte and (kept := self.warm.kept(self.config, self.model, split)) is not None:
            mine = rank_slice(split.num_samples, ranks.rank, ranks.world_size)
            labels = torch.from_numpy(split.labels[mine]).to(kept.device)
            yield from zip(map(self.model.feature_from_frozen, kept[mine].split(1000)), labels.split(1000), strict=True)
            return
        batches = evaluation_batches(
            self.warm.reader(split),
            split,
            size_px=self.model.tower.resolution_px,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_threads=ranks.num_threads,
            crops=tte,
            batch_size=batch_size(ranks.device, self.model.tower, tte),
        )
        feature = self.warm.predictor(self.config, self.model.feature)
        yield from on_cores(ranks.device, lambda one: (feature(one.images), self.warm.to_device(one.labels)), batches)

    def epochs(self) -> Iterator[Figures]:
        """Train from the current state to the end, and yield the figures of each epoch, validation included.

        If nothing is trained, only validation is yielded, as epoch 0.
        """
        if not self.trained:
            yield self.validate_untrained()
        while self.epoch < self.num_epochs:
            for batch in self.batches():
                self.train_step(batch)
            yield self.end_epoch()

    def validate_untrained(self) -> Figures:
        """Return the figures of a run that trains nothing: validation, as epoch 0."""
        self.metrics = self.evaluate("validation")
        self.history = [{"epoch": 0, **self.metrics, "trained_parameters": 0}]
        return self.history[0]

    @property
    def num_trained(self) -> int:
        """Number of trained parameters, classifier included."""
        return sum(p.numel() for p in self.trained.values())

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the current state, which is the same on every rank.

        Raises RunFailed if a loss is not finite, and OSError.
        """
        self.check_finite()
        data, scaling = self.warm.dataset, self.optimizer is not None and self.scaler.is_enabled()
        record = checkpoint.Record(
            config=self.config.to_dict(),
            digest=self.config.digest(),
            dataset=data.uri,
            class_names=list(data.class_names),
            class_counts=self.class_counts.tolist(),
            epoch=self.epoch,
            step=self.epoch * self.steps_per_epoch + self.step,
            metrics={k: v for k, v in self.metrics.items() if "/" in k and not k.startswith("time/")},
            history=self.history,
            seconds=self.seconds,
            scaler=self.scaler.state_dict() if scaling else {},
        )
        state = {"losses": self.losses, "random/cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            state["random/cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        if self.optimizer is not None and self.objective.pseudo_labels is not None:
            state["pseudo_labels"] = self.objective.pseudo_labels
        rows = self.per_class_rows() if self.per_class else []
        checkpoint.save(folder, self.model, self.optimizer, state, record, rows)

    def per_class_rows(self) -> list[dict[str, Any]]:
        """Return a row for each class, from the last evaluation."""
        assert self.per_class is not None
        return per_class_rows(self.warm.dataset.class_names, self.class_counts, *self.per_class)

    def load(self, folder: Path) -> None:
        """Load a checkpoint with the same settings. Raises BadInput, with the first setting that differs."""
        record = checkpoint.read_record(folder)
        checkpoint.check_same(folder, record, self.config.to_dict(), self.warm.dataset.class_names)
        checkpoint.load_weights(folder, self.model)
        state = checkpoint.load_state(folder)
        if self.optimizer is not None:
            checkpoint.load_optimizer(folder, self.model, self.optimizer)
            self.scaler.load_state_dict(record.scaler)
            self.losses = state["losses"].to(self.ranks.device)
            counts = state.get("pseudo_labels")
            self.objective.pseudo_labels = None if counts is None else counts.to(self.ranks.device)
        torch.set_rng_state(state["random/cpu"])
        if self.ranks.device.type == "cuda" and "random/cuda" in state:
            torch.cuda.set_rng_state(state["random/cuda"], self.ranks.device)
        self.epoch, self.step = record.epoch, record.step - record.epoch * self.steps_per_epoch
        self.metrics, self.history = record.metrics, record.history
        self.seconds |= record.seconds


def make_optimizer(trained: dict[str, nn.Parameter], optim: OptimConfig) -> torch.optim.SGD:
    """Return SGD with momentum over all trained parameters, as in LIFT, with one fused update per step."""
    return torch.optim.SGD(
        trained.values(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
    )
