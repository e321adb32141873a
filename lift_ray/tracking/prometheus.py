"""Prometheus metrics of a search, exported by Ray as `ray_lift_ray_study_NAME`."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from ray.util.metrics import Gauge

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.reporting.trial_rows import TrialRow, best_row
from lift_ray.settings.space import SpaceFile
from lift_ray.training.events import Event, StepsDone

STATES = ("to_come", "waiting", "running", "finished", "pruned", "infeasible", "failed")
STUDY_GAUGES = {
    "trials": ("number of trials in each state", "state"),
    "best": ("first objective of the best finished trial", "objective"),
    "slots": ("process groups that trials run in", None),
    "slot_restarts": ("slots lost and replaced since this driver started", None),
}
TELL_EVERY_S = 2.0  # more often than Ray and Prometheus read them
SLOT_GAUGES = {
    "images_per_s": "training images per second of a slot, over the last second or epoch",
    "data_wait_frac": "fraction of training time that a slot waited for data",
    "gpu_memory_gib": "peak GPU memory of tensors in a slot's first process",
}


class SlotCounts(Protocol):
    """Object that counts the slots of a search, and those that were lost."""

    @property
    def num_slots(self) -> int: ...

    lost: int


class StudyMetrics:
    """Ray metrics of the state of a search.

    Args:
        space: the search.
        rows: trials by number; the search updates them.
        slots: counts of slots.
    """

    def __init__(self, space: SpaceFile, rows: Mapping[int, TrialRow], slots: SlotCounts) -> None:
        self.space, self.rows, self.slots = space, rows, slots
        self._gauges = {
            name: Gauge(f"lift_ray_study_{name}", text, tag_keys=("study", tag) if tag else ("study",))
            for name, (text, tag) in STUDY_GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"study": space.name})
        self._told_at = -math.inf

    def tick(self) -> None:
        """Set all values if TELL_EVERY_S have passed; Ray drops a value that was not set since its last export."""
        if time.monotonic() - self._told_at >= TELL_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        states = Counter(row.state for row in self.rows.values())
        states["to_come"] = self.space.num_trials - len(self.rows)
        for state in STATES:
            self._gauges["trials"].set(states[state], {"state": state})
        if best := best_row(self.rows.values(), *self.space.objective):
            metric = self.space.objective[0]
            self._gauges["best"].set(best.last[metric], {"objective": metric})
        self._gauges["slots"].set(self.slots.num_slots)
        self._gauges["slot_restarts"].set(self.slots.lost)


class SlotGauges:
    """Ray metrics of the speed of a slot, set by its first process."""

    def __init__(self, study: str, slot: int) -> None:
        self._gauges = {
            name: Gauge(f"lift_ray_study_slot_{name}", text, tag_keys=("study", "slot"))
            for name, text in SLOT_GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"study": study, "slot": str(slot)})

    def take(self, message: Event) -> None:
        """Set the figures of steps in the middle of an epoch."""
        if isinstance(message, StepsDone):
            self._set(message.figures)

    def epoch_done(self, metrics: EpochMetrics) -> None:
        """Set the figures of a whole epoch, if it had training steps."""
        if metrics.train:
            wait = metrics.seconds["data_wait_s"] / metrics.seconds["train_s"]
            self._set({"images_per_s": metrics.train["images_per_s"], "data_wait_frac": wait})

    def _set(self, figures: Mapping[str, float]) -> None:
        for name, gauge in self._gauges.items():
            if name in figures:
                gauge.set(figures[name])
