"""One run, from settings to a trained model, epoch by epoch. The same code runs under Ray Train, in a search and alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lift_ray.data.order import steps_per_epoch
from lift_ray.epoch_metrics import EpochMetrics, named
from lift_ray.errors import BadInput, RunFailed
from lift_ray.evaluation.evaluator import Evaluation, evaluate
from lift_ray.evaluation.metrics import PerClass, pseudo_label_figures
from lift_ray.methods.world import Ranks
from lift_ray.model.device import random_state, set_random_state
from lift_ray.settings.methods import check_splits
from lift_ray.settings.run import OptimConfig, RunConfig
from lift_ray.settings.run_file import batch_fault, too_large
from lift_ray.training import checkpoint
from lift_ray.training.batches import Batches, Inputs, cached_batches, image_batches
from lift_ray.training.predictor import SplitPredictor
from lift_ray.training.step import Forward, TrainStep
from lift_ray.training.workspace import Workspace

StepBatch = tuple[Forward, Inputs, Tensor]


class Position(Protocol):
    """Anything that trains or is evaluated."""

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""

    @property
    def step(self) -> int:
        """Number of finished steps of the current epoch."""


class Callback(Protocol):
    """Called after every training step and evaluation batch. It may raise, because the run can be saved at these points."""

    def __call__(self, at: Position, evaluated: float = 0.0) -> None:
        """Receive the position, and the fraction of a split that is evaluated; 0 in training."""


class Training(Position, Protocol):
    """A run, or an ensemble that is trained model by model."""

    ranks: Ranks
    steps_per_epoch: int
    history: list[EpochMetrics]
    callback: Callback

    @property
    def num_epochs(self) -> int:
        """Number of epochs to train."""

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train from the current state to the end, and yield the metrics of each epoch."""

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the current state."""

    def load(self, folder: Path) -> None:
        """Load a checkpoint with the same settings."""


class Diverged(RunFailed):
    """The training loss is not finite."""


class Run:
    """State of a training run after `epoch` whole epochs and `step` steps of the next one.

    Args:
        config: settings; derived values are filled in here.
        workspace: the loaded backbone and data.
        tau_grid: strengths of the post-hoc adjustment; the validation after the last epoch also reports the best of them.

    Attributes:
        predictor: the model that is trained.
        losses: (steps, 2), of every step of this epoch: loss, and fraction of the batch classified correctly.
        seconds: time spent in this epoch, by what it was spent on.
        history: metrics of the finished epochs.
    """

    def __init__(self, config: RunConfig, workspace: Workspace, tau_grid: Sequence[float] = ()) -> None:
        check_splits(config.method, workspace.dataset.uri, workspace.dataset.splits)
        self.predictor = SplitPredictor(config, workspace)
        self.config, self.workspace, self.ranks = self.predictor.config, workspace, workspace.ranks
        self.class_counts, self.tau_grid = self.predictor.class_counts, tau_grid
        self.train = workspace.training(self.config)
        self.model = self.predictor.lift
        self.epoch = self.step = self.steps_per_epoch = 0
        self.losses = torch.zeros(0, 2)
        self.seconds = {"train_s": 0.0, "data_wait_s": 0.0}
        self.history: list[EpochMetrics] = []
        self.callback: Callback = lambda at, evaluated=0.0: None
        self.per_class: PerClass | None = None
        self.stepper = self._prepare_training() if self.num_trained else None

    def _prepare_training(self) -> TrainStep:
        batch = self.config.optim.global_batch_size
        if fault := batch_fault(batch, self.ranks.world_size, "optim.global_batch_size"):
            raise fault
        self.steps_per_epoch = steps_per_epoch(self.train, batch)
        if not self.steps_per_epoch:
            raise too_large(batch, self.train.num_samples)
        if self.config.augment.decode == "gpu" and self.ranks.device.type != "cuda":
            raise BadInput("augment.decode", "must be exact or reduced without a CUDA GPU", "gpu", "leave it out")
        self.losses = torch.zeros(self.steps_per_epoch, 2, device=self.ranks.device)
        return TrainStep(self.config, self.workspace, self.model, self.class_counts)

    @property
    def num_epochs(self) -> int:
        """Number of epochs to train; 0 if nothing is trained."""
        return self.config.optim.epochs if self.stepper else 0

    @property
    def num_trained(self) -> int:
        """Number of trained parameters, classifier included."""
        return self.predictor.num_trained

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train from the current state to the end, and yield the metrics of each epoch, validated if there is a validation split.

        If nothing is trained, only validation is yielded, as epoch 0.

        Raises Diverged if a loss is not finite.
        """
        if not self.stepper:
            self.history = []
            yield self._note(EpochMetrics(0), self._validation(self.tau_grid))
        while self.epoch < self.num_epochs:
            self._finish_steps()
            is_last = self.epoch + 1 == self.num_epochs
            validation = self._validation(self.tau_grid if is_last else ())
            yield self._note(self._end_epoch(), validation)

    def train_epoch(self) -> EpochMetrics:
        """Train one epoch without validation, and return its metrics. Raises Diverged if a loss is not finite."""
        self._finish_steps()
        return self._end_epoch()

    def batches(self) -> Iterator[StepBatch]:
        """Yield the remaining batches of this epoch."""
        forward, coming = self._batches()
        for _ in range(self.step, self.steps_per_epoch):
            asked = time.monotonic()
            inputs, labels = next(coming)
            self.step_began(asked, time.monotonic() - asked)
            yield forward, inputs, labels

    def step_began(self, at: float, waited_s: float) -> None:
        """Note when a step began, by time.monotonic(), and how long it waited for its batch."""
        self._began_at = at
        self.seconds["data_wait_s"] += waited_s

    def _batches(self) -> tuple[Forward, Batches]:
        """Return the forward function, and the rest of this epoch's (inputs, labels): images, or cached features."""
        assert self.stepper is not None
        config, workspace, model = self.config, self.workspace, self.model
        if (images := workspace.training_images(config, self.train, self.epoch)) is not None:
            cached = workspace.cached_features(config, model, images)
            if cached is not None:
                batches = cached_batches(config, workspace, self.train, cached, self.epoch, self.step)
                return model.from_frozen, batches
        return self.stepper.forward, image_batches(config, workspace, self.epoch, self.step)

    def train_step(self, batch: StepBatch) -> None:
        """Do one step, over the ranks' parts of a global batch; nothing is read back from the device."""
        assert self.stepper is not None
        self.losses[self.step] = self.stepper(*batch, self.lr(self.epoch, self.step))
        self.step += 1
        self.seconds["train_s"] += time.monotonic() - self._began_at
        self.callback(self)

    def lr(self, epoch: int, step: int) -> float:
        """Return the learning rate of a step by `optim.schedule`. Epoch and step count from 0."""
        return learning_rate(self.config.optim, epoch, step / self.steps_per_epoch)

    def _finish_steps(self) -> None:
        """Do the remaining steps of this epoch, wait for the device, and check the losses. The wait counts as training time."""
        for batch in self.batches():
            self.train_step(batch)
        asked = time.monotonic()
        self.check_finite()
        self.seconds["train_s"] += time.monotonic() - asked

    def check_finite(self) -> None:
        """Raise Diverged, with the number of the step, if a loss of this epoch is not finite."""
        losses = self.losses[:, 0].cpu()
        if not (wrong := (~losses.isfinite()).nonzero()).numel():
            return
        step, optim = int(wrong[0]), self.config.optim
        raise Diverged(
            f"epoch {self.epoch + 1}, step {step + 1}: the training loss must be finite, but got {float(losses[step])} with "
            f"optim.lr={optim.lr:g} (at that step {self.lr(self.epoch, step):.3g}) in "
            f"{self.config.backbone.precision}; lower optim.lr"
        )

    def _end_epoch(self) -> EpochMetrics:
        """Move to the start of the next epoch, and return the metrics of training."""
        assert self.stepper is not None
        loss, right = self.losses.mean(0).tolist()
        images_seen = self.steps_per_epoch * self.config.optim.global_batch_size
        train = {"loss": loss, "accuracy": right, "images_per_s": images_seen / self.seconds["train_s"]}
        unlabelled: dict[str, float] = {}
        if (counts := self.stepper.objective.pseudo_labels) is not None:
            unlabelled = pseudo_label_figures(counts.cpu().numpy(), self.predictor.groups.names)
            self.stepper.objective.pseudo_labels = None
        metrics = EpochMetrics(self.epoch + 1, train, self.seconds, unlabelled)
        self.epoch, self.step = self.epoch + 1, 0
        self.losses = torch.zeros_like(self.losses)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return metrics

    def _validation(self, tau_grid: Sequence[float]) -> Evaluation | None:
        return self.evaluate("validation", tau_grid) if "validation" in self.workspace.dataset.splits else None

    def _note(self, metrics: EpochMetrics, validation: Evaluation | None) -> EpochMetrics:
        """Complete the metrics of an epoch with its validation, and add them to the history."""
        whole = replace(metrics, trained_parameters=self.num_trained)
        if validation is not None:
            seconds = {**metrics.seconds, "evaluate_s": validation.seconds}
            whole = replace(whole, validation=validation.metrics, seconds=seconds)
        self.history.append(whole)
        return whole

    def evaluate(self, split_name: str, tau_grid: Sequence[float] = ()) -> Evaluation:
        """Evaluate with the post-hoc adjustment of the settings, over all ranks; its seconds are without those of cached features."""
        features_s = self.workspace.features_s
        found = evaluate(
            self.predictor,
            self.workspace.dataset.split(split_name),
            [self.config.evaluation.posthoc_tau],
            tau_grid=tau_grid,
            callback=lambda fraction: self.callback(self, fraction),
        )
        self.per_class = found.at_tau[0].per_class
        return replace(found, seconds=max(0.0, found.seconds - (self.workspace.features_s - features_s)))

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the current state, which is the same on every rank.

        Raises Diverged if a loss is not finite, and OSError.
        """
        self.check_finite()
        state = {"losses": self.losses, **random_state(self.ranks.device)}
        optimizer = None
        if self.stepper is not None:
            optimizer = self.stepper.optimizer_state()
            if self.stepper.objective.pseudo_labels is not None:
                state["pseudo_labels"] = self.stepper.objective.pseudo_labels
        record = checkpoint.record_of(
            self.config,
            self.workspace.dataset,
            self.class_counts,
            self.history,
            self.epoch,
            step=self.epoch * self.steps_per_epoch + self.step,
            seconds=named("time", self.seconds),
            scaler=self.stepper.scaler.state_dict() if self.stepper and self.stepper.scaler.is_enabled() else {},
        )
        rows = self.predictor.per_class_rows(self.per_class) if self.per_class else []
        checkpoint.save(folder, self.predictor.stored(), record, state=state, optimizer=optimizer, per_class=rows)

    def load(self, folder: Path) -> None:
        """Load a checkpoint with the same settings. Raises BadInput, with the first setting that differs."""
        record = checkpoint.read_record(folder)
        checkpoint.check_same(folder, record, self.config.to_dict(), self.workspace.dataset.class_names)
        checkpoint.load_weights(folder, self.predictor)
        state = checkpoint.load_state(folder)
        if self.stepper is not None:
            self.stepper.load_optimizer_state(checkpoint.load_optimizer_state(folder))
            self.stepper.scaler.load_state_dict(record.scaler)
            self.losses = state["losses"].to(self.ranks.device)
            counts = state.get("pseudo_labels")
            self.stepper.objective.pseudo_labels = None if counts is None else counts.to(self.ranks.device)
        set_random_state(self.ranks.device, state)
        self.epoch, self.step = record.epoch, record.step - record.epoch * self.steps_per_epoch
        self.history = [EpochMetrics.of(flat) for flat in record.history]
        self.seconds |= {name.removeprefix("time/"): value for name, value in record.seconds.items()}


def learning_rate(optim: OptimConfig, epoch: int, part: float) -> float:
    """Return lr (1 + cos(pi t)) / 2, t the fraction of the run that is done before this step, or before its epoch.

    Args:
        part: fraction of the epoch that is done.
    """
    done = (epoch + (part if optim.schedule == "cosine" else 0)) / optim.epochs
    return optim.lr * 0.5 * (1 + math.cos(math.pi * done))
