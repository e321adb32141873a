"""The training loop, the same on Ray Train's workers, in a slot of a search and in one process without Ray."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.methods.world import Ranks
from lift_ray.model.device import peak_memory
from lift_ray.training.checkpoint_manager import CheckpointManager
from lift_ray.training.events import EpochEnded, Event, RunStarted, StepsDone, TestEnded
from lift_ray.training.run import Position, Run, Training

TELL_EVERY_S = 1.0
GIB = 2**30
told_to_stop = threading.Event()  # set by SIGTERM in this process


class StopAsked(Exception):
    """Request to stop, raised at a point where the run can be saved. Its text is the reason.

    Attributes:
        checkpoint: name of the checkpoint that was written before stopping.
    """

    checkpoint = ""


def trained_epochs(
    run: Training,
    checkpoints: CheckpointManager,
    complete: Callable[[EpochMetrics], EpochMetrics] = lambda metrics: metrics,
) -> Iterator[RunStarted | EpochEnded]:
    """Train from the last checkpoint to the last epoch, and yield the events; each epoch is saved before its event.

    Args:
        complete: adds to the metrics of an epoch before they are saved.

    Raises:
        BadInput: the checkpoint does not fit.
        Diverged: a loss is not finite.
        RunFailed: a checkpoint cannot be written.
    """
    checkpoints.restore(run)
    yield RunStarted(
        run.ranks.world_size,
        run.num_epochs,
        run.steps_per_epoch,
        run.epoch,
        run.step,
        list(run.history),
        run.num_trained,
    )
    for metrics in run.epochs():
        run.history[-1] = complete(metrics)
        yield EpochEnded(run.history[-1], checkpoints.save(run) if run.ranks.is_first else "")


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
    progress = StepCallback(run.ranks, tell, stop_asked)

    def callback(at: Position, evaluated: float = 0.0) -> None:
        progress(at, evaluated)
        if not evaluated and checkpoints.due(run):
            checkpoints.save(run)

    run.callback = callback
    try:
        for event in trained_epochs(run, checkpoints):
            tell(event)
            if isinstance(event, RunStarted):
                progress.start(run)
        if "test" in run.workspace.dataset.splits:
            found = run.evaluate("test")
            tell(TestEnded(EpochMetrics(run.epoch, test=found.metrics, seconds={"evaluate_s": found.seconds})))
    except StopAsked as asked:
        asked.checkpoint = checkpoints.save(run)
        raise
    if run.ranks.is_first:
        checkpoints.finish(run)


class StepCallback:
    """Callback of a run: it reports progress and raises stop requests.

    Losses are read from the device at most once in TELL_EVERY_S, so that a GPU does not wait for the host.
    """

    def __init__(self, ranks: Ranks, tell: Callable[[Event], None], stop_asked: Callable[[], str]) -> None:
        self.ranks, self.tell, self.stop_asked = ranks, tell, stop_asked
        self._told_at = time.monotonic()
        self._told: tuple[Position, int, int, dict[str, float]] | None = None  # run, epoch, step, seconds

    def start(self, run: Run) -> None:
        """Leave the steps that the run has done so far out of its next event."""
        self._told = (run, run.epoch, run.step, dict(run.seconds))

    def __call__(self, at: Position, evaluated: float = 0.0) -> None:
        """Report progress if it is time to. Raises StopAsked."""
        if reason := self.stop_asked():
            raise StopAsked(reason)
        if self.ranks.is_first and time.monotonic() - self._told_at >= TELL_EVERY_S:
            figures = self._figures(at) if isinstance(at, Run) else {}
            self.tell(StepsDone(at.epoch, at.step, figures, evaluated))
            self._told_at = time.monotonic()

    def _figures(self, run: Run) -> dict[str, float]:
        """Return the figures of this epoch's steps since the last event; none if there were none."""
        first, before = 0, dict.fromkeys(run.seconds, 0.0)
        if self._told is not None and self._told[0] is run and self._told[1] == run.epoch:
            _, _, first, before = self._told
        self.start(run)
        if run.step <= first:
            return {}
        seconds = {name: value - before[name] for name, value in run.seconds.items()}
        loss, right = run.losses[first : run.step].mean(0).tolist()
        images = (run.step - first) * run.config.optim.global_batch_size
        figures = {
            "loss": loss,
            "accuracy": right,
            "lr": run.lr(run.epoch, run.step - 1),
            "images_per_s": images / seconds["train_s"],
            "data_wait_frac": seconds["data_wait_s"] / seconds["train_s"],
        }
        if peak := peak_memory(run.ranks.device):
            figures["gpu_memory_gib"] = peak / GIB
        return figures


def stop_on_sigterm() -> None:
    """Make SIGTERM set `told_to_stop`, as it comes before a spot machine is taken away. Call it in the main thread."""
    told_to_stop.clear()
    signal.signal(signal.SIGTERM, lambda *_: told_to_stop.set())
