"""The checkpoints of a run in training: when to write one, which to keep, which to resume from."""

from __future__ import annotations

import re
import time

from lift_ray.storage.layout import CHECKPOINTS, FINAL_CHECKPOINT, RECORD
from lift_ray.storage.output import Output
from lift_ray.training.run import Run

NAME = re.compile(r"epoch-\d{4,}(-step-\d{6,})?")
METRIC = "validation/mean_class_accuracy"
KEPT = 2


class CheckpointManager:
    """Manager of OUT/checkpoints/epoch-0003-step-000120 and the like; it keeps the last two and the best.

    Args:
        output: destination of the run's files.
        every_s: seconds between checkpoints, in addition to one after each epoch.
        every_steps: steps between checkpoints, in addition; None for none.
    """

    def __init__(self, output: Output, every_s: float, every_steps: int | None) -> None:
        self.output, self.every_s, self.every_steps = output, every_s, every_steps
        self._saved_at = time.monotonic()
        self._names: list[str] = []

    def restore(self, run: Run) -> None:
        """Load the last checkpoint, the same on every rank, if there is one. Raises BadInput."""
        last = ""
        if run.ranks.is_first:
            for name in self.output.names(CHECKPOINTS):
                if name.endswith((".tmp", ".old")):  # left by a process that was killed
                    self.output.remove(f"{CHECKPOINTS}/{name}")
                elif NAME.fullmatch(name) and self.output.holds(f"{CHECKPOINTS}/{name}/{RECORD}"):
                    self._names.append(name)
            last = self._names[-1] if self._names else ""
        # Only the first rank lists the folder, so that all ranks load the same checkpoint.
        if last := run.ranks.from_first(last):
            with self.output.fetched(f"{CHECKPOINTS}/{last}") as folder:
                run.load(folder)

    def due(self, run: Run) -> bool:
        """Return True if this rank is to save a checkpoint after this step."""
        in_steps = bool(self.every_steps) and run.step % (self.every_steps or 1) == 0
        return run.ranks.is_first and (in_steps or time.monotonic() - self._saved_at >= self.every_s)

    def save(self, run: Run) -> str:
        """Write a checkpoint of the current state, delete those that are no longer needed, and return its name.

        Any rank may call it, because all have the same state. Raises RunFailed if it cannot be written; previous checkpoints are
        then kept.
        """
        name = f"epoch-{run.epoch:04d}" + (f"-step-{run.step:06d}" if run.step else "")
        if name not in self._names:
            with self.output.staged(f"{CHECKPOINTS}/{name}", last=RECORD) as folder:
                run.save(folder)
            self._names.append(name)
            for old in self._names[:-KEPT]:
                if old != best(run):
                    self.output.remove(f"{CHECKPOINTS}/{old}")
                    self._names.remove(old)
        self._saved_at = time.monotonic()
        return name

    def finish(self, run: Run) -> None:
        """Write OUT/checkpoint, the trained model. Raises RunFailed if it cannot be written."""
        with self.output.staged(FINAL_CHECKPOINT, last=RECORD) as folder:
            run.save(folder)


def best(run: Run) -> str:
    """Return the name of the checkpoint with the best validation/mean_class_accuracy; "" before the first epoch ends."""
    values = [(figures[METRIC], int(figures["epoch"])) for figures in run.history]
    return f"epoch-{max(values, key=lambda pair: pair[0])[1]:04d}" if values else ""
