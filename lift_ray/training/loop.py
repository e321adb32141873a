"""The training loop, the same on Ray Train's workers and in one process without Ray."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import torch

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.training.checkpoint_manager import CheckpointManager
from lift_ray.training.events import EpochEnded, Event, RunStarted, StepsDone, TestEnded
from lift_ray.training.run import Run

TELL_EVERY_S = 1.0
GIB = 2**30
told_to_stop = threading.Event()  # set by SIGTERM in this process


class StopAsked(Exception):
    """Request to stop, raised at a point where the run can be saved. Its text is the reason.

    Attributes:
        checkpoint: name of the checkpoint that was written before stopping.
    """

    checkpoint = ""


def train(
    run: Run, checkpoints: CheckpointManager, tell: Callable[[Event], None], stop_asked: Callable[[], str]
) -> None:
    """Train from the last checkpoint to the end of the run, then test.

    Args:
        tell: receives the events; on ranks other than the first it may ignore them.
        stop_asked: returns the reason to stop now, or "" to continue.

    Raises:
        StopAsked: after a checkpoint was written.
        BadInput, RunFailed: errors that no retry can fix.
    """
    checkpoints.restore(run)
    history = [EpochMetrics.of(figures) for figures in run.history]
    tell(
        RunStarted(
            run.ranks.world_size,
            run.num_epochs,
            run.steps_per_epoch,
            run.epoch,
            run.step,
            history,
        )
    )
    run.pulse = StepCallback(run, tell, stop_asked)
    try:
        if not run.trained:
            figures = run.validate_untrained()
            if run.ranks.is_first:
                tell(EpochEnded(EpochMetrics.of(figures), checkpoints.save(run)))
        while run.epoch < run.num_epochs:
            for batch in run.batches():
                run.train_step(batch)
                if checkpoints.due(run):
                    checkpoints.save(run)
            figures = run.end_epoch()
            if run.ranks.is_first:
                tell(EpochEnded(EpochMetrics.of(figures), checkpoints.save(run)))
        if "test" in run.warm.dataset.splits:
            tell(TestEnded(EpochMetrics.of({"epoch": run.epoch, **run.evaluate("test")})))
    except StopAsked as asked:
        asked.checkpoint = checkpoints.save(run)
        raise
    if run.ranks.is_first:
        checkpoints.finish(run)


class StepCallback:
    """Callback after every training step and evaluation batch: it reports progress and raises stop requests.

    Losses are read from the device at most once in TELL_EVERY_S, so that a GPU does not wait for the host.
    """

    def __init__(self, run: Run, tell: Callable[[Event], None], stop_asked: Callable[[], str]) -> None:
        self.run, self.tell, self.stop_asked = run, tell, stop_asked
        self._told_at = time.monotonic()
        self._remember()

    def __call__(self) -> None:
        """Report progress if it is time to. Raises StopAsked."""
        if reason := self.stop_asked():
            raise StopAsked(reason)
        if self.run.ranks.is_first and time.monotonic() - self._told_at >= TELL_EVERY_S:
            self.tell(StepsDone(self.run.epoch, self.run.step, self._figures(), self.run.evaluated))
            self._told_at = time.monotonic()
            self._remember()

    def _remember(self) -> None:
        self._epoch, self._step, self._seconds = self.run.epoch, self.run.step, dict(self.run.seconds)

    def _figures(self) -> dict[str, float]:
        """Return the figures of this epoch's steps since the last event; none during evaluation."""
        run, same = self.run, self.run.epoch == self._epoch
        first = self._step if same else 0
        if run.step <= first:
            return {}
        seconds = {name: value - (self._seconds[name] if same else 0.0) for name, value in run.seconds.items()}
        loss, right = run.losses[first : run.step].mean(0).tolist()
        images = (run.step - first) * run.config.optim.global_batch_size
        figures = {
            "loss": loss,
            "accuracy": right,
            "lr": run.lr(run.epoch, run.step - 1),
            "images_per_s": images / seconds["time/train_s"],
            "data_wait_frac": seconds["time/data_wait_s"] / seconds["time/train_s"],
        }
        if run.ranks.device.type == "cuda":
            figures["gpu_memory_gib"] = torch.cuda.max_memory_allocated(run.ranks.device) / GIB
        return figures


def stop_on_sigterm() -> None:
    """Make SIGTERM set `told_to_stop`, as it comes before a spot machine is taken away. Call it in the main thread."""
    told_to_stop.clear()
    signal.signal(signal.SIGTERM, lambda *_: told_to_stop.set())
