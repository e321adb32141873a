"""Progress of a run: metrics.jsonl, TensorBoard, and a progress bar on a terminal or plain lines elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from lift_ray.epoch_metrics import FIELDS, MAIN, EpochMetrics
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import METRICS
from lift_ray.storage.output import Output
from lift_ray.terminal.tables import console
from lift_ray.text import count, printable
from lift_ray.training.events import (
    EpochEnded,
    Event,
    RunAborted,
    RunStarted,
    RunStopped,
    StepsDone,
    TestEnded,
    WorkersLost,
)

TENSORBOARD = "tensorboard"
STEP_FIGURES = {
    "loss": "training loss",
    "accuracy": "fraction of training images classified correctly",
    "lr": "learning rate",
    "images_per_s": "images per second",
    "data_wait_frac": "fraction of time spent waiting for data",
    "gpu_memory_gib": "peak GPU memory of tensors",
}


class Progress:
    """Receiver of a run's events that stores its figures and shows them.

    Args:
        output: destination of metrics.jsonl and tensorboard/.

    Attributes:
        last: metrics of the latest epoch, or of the test split.
        retries: reasons of the retries so far, in order.
        problem: the error that ended the run.
        halted: set if the run stopped on request.
        checkpoint: name of the latest checkpoint at the end of an epoch.
        listeners: functions that also receive every event.
    """

    def __init__(self, output: Output) -> None:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        self.output, self.path = output, output.folder / METRICS
        self.last = EpochMetrics(0)
        self.retries: list[str] = []
        self.problem: RunAborted | None = None
        self.halted: RunStopped | None = None
        self.began: RunStarted | None = None
        self.checkpoint = ""
        self.listeners: list[Callable[[Event], None]] = []
        self._writer = SummaryWriter(str(output.folder / TENSORBOARD))
        self._console, self._started = console(), time.monotonic()
        self._bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, epoch=0, speed="")
        self._takes: dict[type, Callable[[Any], None]] = {
            RunStarted: self._began,
            StepsDone: self._stepped,
            EpochEnded: self._epoch_done,
            TestEnded: self._tested,
            WorkersLost: self._failed,
            RunStopped: self._halted,
            RunAborted: self._problem,
        }

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._writer.close()

    def take(self, message: Event) -> None:
        """Store and show an event. Raises RunFailed if remote storage does not accept the figures."""
        self._takes[type(message)](message)
        for listener in self.listeners:
            listener(message)

    def _began(self, message: RunStarted) -> None:
        self.began = message
        self._write(message.history)
        if message.epoch or message.step:
            self._say(
                f"continuing from epoch {message.epoch + 1}, step {message.step} of {message.steps_per_epoch}, "
                f"on {count(message.num_workers, 'worker')}"
            )
        total = message.epochs * message.steps_per_epoch
        self._bar.update(self._task, total=total, completed=self._steps(message), epoch=message.epoch + 1)

    def _stepped(self, message: StepsDone) -> None:
        speed = f"{message.figures['images_per_s']:.0f} images/s" if message.figures else "evaluating"
        self._bar.update(self._task, completed=self._steps(message), epoch=message.epoch + 1, speed=speed)
        for name, value in message.figures.items():
            self._writer.add_scalar(f"step/{name}", value, self._steps(message))

    def _epoch_done(self, message: EpochEnded) -> None:
        metrics, self.checkpoint = message.metrics, message.checkpoint
        self._keep(metrics)
        if metrics.train:
            validated = metrics.validation.get(MAIN)
            self._say(
                f"epoch {metrics.epoch}/{self.began.epochs if self.began else 0}  loss {metrics.train['loss']:.4f}"
                + ("" if validated is None else f"  validation mean class accuracy {validated:.4f}")
                + f"  {metrics.train['images_per_s']:.0f} images/s"
            )

    def _tested(self, message: TestEnded) -> None:
        self._keep(message.metrics)

    def _failed(self, message: WorkersLost) -> None:
        self.retries.append(message.reason)
        self._say(f"{message.reason}; retrying from the last checkpoint")

    def _halted(self, message: RunStopped) -> None:
        self.halted = message

    def _problem(self, message: RunAborted) -> None:
        self.problem = self.problem or message

    def _keep(self, metrics: EpochMetrics) -> None:
        self.last = metrics
        self._write([*read_metrics(self.path), metrics])
        for name, value in metrics.flat(*FIELDS).items():
            self._writer.add_scalar(name, value, metrics.epoch)
        self._writer.flush()
        self.output.publish()

    def _write(self, history: list[EpochMetrics]) -> None:
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(metrics.flat()) + "\n" for metrics in history))

    def _steps(self, at: RunStarted | StepsDone) -> int:
        return at.epoch * (self.began.steps_per_epoch if self.began else 0) + at.step

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._started:5.0f} s  {printable(text)}", soft_wrap=True)


def read_metrics(path: Path) -> list[EpochMetrics]:
    """Read the lines of a metrics.jsonl; a missing file has none."""
    return [EpochMetrics.of(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
