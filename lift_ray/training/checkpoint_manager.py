"""The checkpoints of a training: when to write one, which to keep, which to resume from."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass

from lift_ray.epoch_metrics import MAIN, EpochMetrics
from lift_ray.storage.layout import CHECKPOINTS, FINAL_CHECKPOINT, RECORD
from lift_ray.storage.output import Output
from lift_ray.training.run import Training

NAME = re.compile(r"epoch-\d{4,}(-step-\d{6,})?")


@dataclass(frozen=True)
class CheckpointPolicy:
    """When to write checkpoints in addition to the one after each epoch, and how many to keep.

    Args:
        every_s: seconds between checkpoints.
        every_steps: steps between checkpoints; None for none.
        keep: number of the latest checkpoints to keep.
        keep_best: also keep the checkpoint of the best epoch.
    """

    every_s: float = math.inf
    every_steps: int | None = None
    keep: int = 2
    keep_best: bool = True


class CheckpointManager:
    """Manager of FOLDER/epoch-0003-step-000120 and the like in OUT.

    Args:
        output: destination of the run's files.
        policy: when to write one, and which to keep.
        folder: their folder in OUT.

    Attributes:
        save_s: seconds that the last checkpoint took.
    """

    def __init__(self, output: Output, policy: CheckpointPolicy, folder: str = CHECKPOINTS) -> None:
        self.output, self.policy, self.folder = output, policy, folder
        self.save_s = 0.0
        self._saved_at = time.monotonic()
        self._names: list[str] = []

    def restore(self, run: Training) -> None:
        """Load the last checkpoint, the same on every rank, if there is one. Raises BadInput."""
        last = ""
        if run.ranks.is_first:
            for name in self.output.names(self.folder):
                if name.endswith((".tmp", ".old")):  # left by a process that was killed
                    self.output.remove(f"{self.folder}/{name}")
                elif NAME.fullmatch(name) and self.output.holds(f"{self.folder}/{name}/{RECORD}"):
                    self._names.append(name)
            last = self._names[-1] if self._names else ""
        # Only the first rank lists the folder, so that all ranks load the same checkpoint.
        if last := run.ranks.from_first(last):
            with self.output.fetched(f"{self.folder}/{last}") as folder:
                run.load(folder)

    def due(self, run: Training) -> bool:
        """Return True if this rank is to save a checkpoint after this step."""
        every = self.policy.every_steps
        in_steps = every is not None and run.step % every == 0
        return run.ranks.is_first and (in_steps or time.monotonic() - self._saved_at >= self.policy.every_s)

    def save(self, run: Training) -> str:
        """Write a checkpoint of the current state, delete those that are no longer needed, and return its name.

        Any rank may call it, because all have the same state. Raises RunFailed if it cannot be written; previous checkpoints are
        then kept.
        """
        began = time.monotonic()
        name = f"epoch-{run.epoch:04d}" + (f"-step-{run.step:06d}" if run.step else "")
        if name not in self._names:
            with self.output.staged(f"{self.folder}/{name}", last=RECORD) as folder:
                run.save(folder)
            self._names.append(name)
            for old in self._names[: -self.policy.keep]:
                if not self.policy.keep_best or old != best(run.history):
                    self.output.remove(f"{self.folder}/{old}")
                    self._names.remove(old)
        self._saved_at = time.monotonic()
        self.save_s = self._saved_at - began
        return name

    def finish(self, run: Training) -> None:
        """Write OUT/checkpoint, the trained model. Raises RunFailed if it cannot be written."""
        with self.output.staged(FINAL_CHECKPOINT, last=RECORD) as folder:
            run.save(folder)


def best(history: list[EpochMetrics]) -> str:
    """Return the name of the checkpoint with the best validation/mean_class_accuracy; "" if no epoch was validated."""
    validated = [metrics for metrics in history if MAIN in metrics.validation]
    return f"epoch-{max(validated, key=lambda metrics: metrics.validation[MAIN]).epoch:04d}" if validated else ""
