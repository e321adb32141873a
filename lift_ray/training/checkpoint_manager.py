"""The checkpoints of a run in training: when to write one, which to keep, which to go on from."""

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
    """Writes OUT/checkpoints/epoch-0003-step-000120 and the like; keeps the last two and the best.

    Args:
        output: where the run's files go.
        every_s, every_steps: a checkpoint after so many seconds and so many steps, besides one after each epoch.
    """

    def __init__(self, output: Output, every_s: float, every_steps: int | None) -> None:
        self.output, self.every_s, self.every_steps = output, every_s, every_steps
        self._saved_at = time.monotonic()
        self._names: list[str] = []

    def restore(self, run: Run) -> None:
        """Go on from the last checkpoint, the same on every rank; nothing to do when there is none. Raises BadInput."""
        last = ""
        if run.ranks.is_first:
            for name in self.output.names(CHECKPOINTS):
                if name.endswith((".tmp", ".old")):  # of a process that was killed
                    self.output.remove(f"{CHECKPOINTS}/{name}")
                elif NAME.fullmatch(name) and self.output.holds(f"{CHECKPOINTS}/{name}/{RECORD}"):
                    self._names.append(name)
            last = self._names[-1] if self._names else ""
        if last := run.ranks.from_first(last):
            with self.output.fetched(f"{CHECKPOINTS}/{last}") as folder:
                run.load(folder)

    def due(self, run: Run) -> bool:
        """Whether it is time, after a step, for this rank to save."""
        in_steps = bool(self.every_steps) and run.step % (self.every_steps or 1) == 0
        return run.ranks.is_first and (in_steps or time.monotonic() - self._saved_at >= self.every_s)

    def save(self, run: Run) -> str:
        """Write a checkpoint of the run as it stands, and delete those that are not kept; returns its name.

        Any rank may do it, for all have the same state. Raises RunFailed when it cannot be written; then the ones before stay.
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
        """Write OUT/checkpoint, the trained model. Raises RunFailed when it cannot be written."""
        with self.output.staged(FINAL_CHECKPOINT, last=RECORD) as folder:
            run.save(folder)


def best(run: Run) -> str:
    """The name of the checkpoint after the epoch with the best validation/mean_class_accuracy; "" before the first."""
    values = [(figures[METRIC], int(figures["epoch"])) for figures in run.history]
    return f"epoch-{max(values, key=lambda pair: pair[0])[1]:04d}" if values else ""
