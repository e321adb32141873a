"""Process of a slot, which loads the backbone and opens the data once, then runs one job after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from lift_ray.ensembles.ensemble import Ensemble, run_of
from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.errors import BadInput, RunFailed
from lift_ray.methods.world import Ranks, join_group
from lift_ray.ray_runtime.session import meeting_point
from lift_ray.reporting.study_files import predictions_of
from lift_ray.search.backdoor_trial import BackdoorTrial, trial_of
from lift_ray.search.jobs import EvaluationJob, IdleJob, Job, SlotSettings, TrainJob, trial_checkpoint_path
from lift_ray.search.predictions import evaluate_each, write_predictions
from lift_ray.search.trial import Trial
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import RECORD
from lift_ray.storage.output import Output
from lift_ray.tracking.prometheus import SlotGauges
from lift_ray.training import checkpoint
from lift_ray.training.events import EpochEnded, Event, JobDone, Reply, RunAborted, RunDiverged, RunStarted, StepsDone
from lift_ray.training.loop import StepCallback, StopAsked
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

SHORTEST_IDLE_S, LONGEST_IDLE_S = 0.05, 1.0


class Worker:
    """Rank of a slot.

    Jobs run in a thread of their own, so that the progress of a long epoch can be queried, and the epoch stopped. It is the same
    thread for all jobs, because the number of threads of torch and OpenMP is a setting of the thread that sets it.

    Args:
        slot: settings that all jobs share.
        rank: rank of this process in the slot.

    Attributes:
        address: rendezvous address of the slot's process group; None for a slot of one process.
    """

    def __init__(self, slot: SlotSettings, rank: int = 0) -> None:
        self.slot, self.rank = slot, rank
        self.address: tuple[str, int] | None = None
        self._gauges = SlotGauges(slot.study, slot.number) if rank == 0 else None
        self._thread = ThreadPoolExecutor(1, "lift-job")
        self._pending: Future[Reply] | None = None
        self._replies: Iterator[Reply] = iter(())
        self._progress = StepsDone(0, 0)
        self._stop = threading.Event()
        self._warm: Workspace | None = None

    def begin(self, job: Job) -> None:
        """Set the next job, which `next` starts. The previous job must have replied, and is dropped."""
        self._progress = StepsDone(0, 0)
        self._replies = self._run(job)

    def next(self, timeout_s: float) -> Reply:
        """Return the job's next reply, or StepsDone with its progress if there is none within the timeout.

        Raises the job's own errors, except for BadInput and RunFailed, which become the reply RunAborted.
        """
        if self._pending is None:
            self._pending = self._thread.submit(next, self._replies)
        if not wait([self._pending], timeout_s).done:
            return self._progress
        pending, self._pending = self._pending, None
        return pending.result()

    def stop(self, patience_s: float = 5.0) -> None:
        """Stop the job at its next step or evaluation batch."""
        self._stop.set()
        if self._pending is not None:
            wait([self._pending], patience_s)

    def _run(self, job: Job) -> Iterator[Reply]:
        try:
            warm = self._warm = self._warm or self._open()
            if isinstance(job, IdleJob):
                yield from self._idle()
            else:
                yield from self._train(job, warm) if isinstance(job, TrainJob) else self._evaluate(job, warm)
        except StopAsked:
            yield self._progress
        except (BadInput, RunFailed) as error:
            yield RunAborted(str(error), isinstance(error, BadInput))

    def _open(self) -> Workspace:
        """Join the slot's process group and open the dataset. Raises BadInput if that fails."""
        began, need = time.monotonic(), self.slot.need
        ranks = Ranks.alone(use_gpu=bool(need.gpus), num_cpus=need.cpus)
        if self.address is not None:
            join_group(self.rank, need.workers, *self.address, ranks.device)
            ranks = Ranks(self.rank, need.workers, ranks.device, ranks.num_threads)
        self._output, warm = Output(self.slot.out), Workspace(self.slot.dataset, ranks)
        self._opened_s, self._loaded_s = time.monotonic() - began, 0.0
        return warm

    def _idle(self) -> Iterator[Reply]:
        pause_s = SHORTEST_IDLE_S
        yield JobDone({})
        while not self._stop.wait(pause_s):
            yield JobDone({})
            pause_s = min(LONGEST_IDLE_S, 1.2 * pause_s)

    def _train(self, job: TrainJob, warm: Workspace) -> Iterator[Reply]:
        """Yield RunStarted, then EpochEnded for each epoch, and JobDone if the test split is requested; or RunDiverged."""
        began = time.monotonic() - self._opened_s
        trial = trial_of(RunConfig.model_validate(job.config), warm, self._output)
        self._restore(trial, job.number)
        self._watch(trial)
        epochs = trial.epochs()
        times = {"time/begin_s": time.monotonic() - began, "time/load_s": warm.load_s - self._loaded_s}
        self._opened_s, self._loaded_s = 0.0, warm.load_s
        yield RunStarted(
            num_workers=self.slot.need.workers,
            epochs=trial.num_epochs,
            steps_per_epoch=trial.steps_per_epoch,
            epoch=trial.epoch,
            step=trial.step,
            history=[EpochMetrics.of(figures) for figures in trial.history],
            trained_parameters=trial.num_trained,
        )
        while True:
            try:
                figures = next(epochs, None)
            except RunFailed as error:
                yield RunDiverged(str(error))
                return
            if figures is None:
                break
            figures |= {**times, "num_epochs": trial.num_epochs}
            times = dict.fromkeys(times, 0.0)
            saved = self._save(trial, job.number, figures) if self.rank == 0 else ""
            yield EpochEnded(EpochMetrics.of(figures), saved)
        if job.then_test:
            ((figures, _),) = evaluate_each(trial, "test")
            known = {name: value for name, value in trial.history[-1].items() if name.startswith("validation/")}
            yield JobDone({"trained_parameters": trial.num_trained, **known, **figures})

    def _restore(self, trial: Trial | BackdoorTrial, number: int) -> None:
        """Continue from the trial's last complete checkpoint, if there is one."""
        folder = f"checkpoints/{number:04d}"
        names = [
            name for name in self._output.names(folder) if name[-4:].isdigit()
        ]  # others are leftovers of killed processes
        whole = [name for name in names if self._output.holds(f"{folder}/{name}/{RECORD}")]
        if whole:
            with self._output.fetched(f"{folder}/{max(whole)}") as path:
                trial.load(path)

    def _save(self, trial: Trial | BackdoorTrial, number: int, figures: dict[str, float]) -> str:
        """Write the checkpoint of an epoch, then delete the previous one. Raises RunFailed if the storage refuses."""
        began, epoch = time.monotonic(), int(figures["epoch"])
        path = trial_checkpoint_path(number, epoch)
        with self._output.staged(path, RECORD) as folder:
            trial.save(folder)
        if epoch > 1:
            self._output.remove(trial_checkpoint_path(number, epoch - 1))
        figures["time/save_s"] = time.monotonic() - began
        if self._gauges is not None:
            self._gauges.epoch_done(EpochMetrics.of(figures))
        return path

    def _evaluate(self, job: EvaluationJob, warm: Workspace) -> Iterator[Reply]:
        """Yield one JobDone with the metrics for each tau, and the report of an ensemble."""
        run = run_of(RunConfig.model_validate(job.config), [warm])
        if job.checkpoint is not None:
            with self._output.fetched(job.checkpoint) as folder:
                checkpoint.load_weights(folder, run.model)
        self._watch(run)
        began = time.monotonic()
        found = evaluate_each(run, job.split, job.taus)
        seconds = {"trained_parameters": run.num_trained, "time/evaluate_s": time.monotonic() - began}
        if job.split == "test" and self.rank == 0:
            for tau, (_, table) in zip(job.taus, found, strict=True):
                write_predictions(table, self._output, predictions_of(job.model, tau))
        report = {"report": run.report(job.split)} if isinstance(run, Ensemble) and job.split == "test" else {}
        yield JobDone({"figures": [figures | seconds for figures, _ in found], **report})

    def _watch(self, run: Run) -> None:
        """Let a run and the members of an ensemble report their progress and listen for a request to stop."""
        for each in (run, *(run.runs.values() if isinstance(run, Ensemble) else ())):
            each.pulse = StepCallback(each, self._heard, lambda: "stopped" if self._stop.is_set() else "")

    def _heard(self, message: Event) -> None:
        if isinstance(message, StepsDone):
            self._progress = message
            if self._gauges is not None:
                self._gauges.take(message)


class RankWorker(Worker):
    """Rank of a slot with several processes, as an actor in the slot's placement group."""

    def meeting_point(self) -> tuple[str, int]:
        """Return an address of this node where the slot's process group can meet."""
        return meeting_point()

    def meet(self, address: tuple[str, int]) -> None:
        """Set the address where the process group meets when the first job starts."""
        self.address = address

    def __repr__(self) -> str:
        """Return the name that Ray's dashboard shows."""
        return f"{self.slot.study}: slot {self.slot.number}, rank {self.rank}"
