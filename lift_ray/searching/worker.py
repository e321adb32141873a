"""Process of a slot, which loads the backbone and opens the data once, then runs one job after another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial

import torch

from lift_ray.data.folds import SEARCHED
from lift_ray.ensembles.ensemble import Ensemble, model_of
from lift_ray.epoch_metrics import EpochMetrics, named
from lift_ray.errors import BadInput, RunFailed, one_line
from lift_ray.evaluation.evaluator import Counter, LogitSource, evaluate
from lift_ray.methods.world import Ranks, join_group
from lift_ray.model.device import CPU, accelerator, best_device
from lift_ray.ray_runtime.feature_exchange import FeatureExchange
from lift_ray.ray_runtime.session import meeting_point
from lift_ray.reporting.study_files import predictions_of
from lift_ray.searching.backdoor_trial import BackdoorTrial, trial_of
from lift_ray.searching.jobs import EvaluationJob, IdleJob, Job, Pack, SlotSettings, TrainJob, trial_checkpoints
from lift_ray.searching.logit_writer import LogitWriter, logit_writer
from lift_ray.searching.predictions import prediction_table, write_predictions
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import taus_of
from lift_ray.storage.output import Output
from lift_ray.tracking.prometheus import SlotGauges
from lift_ray.training import checkpoint
from lift_ray.training.checkpoint_manager import CheckpointManager, CheckpointPolicy
from lift_ray.training.events import (
    EpochEnded,
    Event,
    FeaturesDone,
    JobDone,
    OfTrial,
    Replies,
    Reply,
    RunAborted,
    RunDiverged,
    RunStarted,
    StepsDone,
)
from lift_ray.training.heap import return_freed_memory
from lift_ray.training.loop import StepCallback, StopAsked, trained_epochs
from lift_ray.training.run import Diverged, Run
from lift_ray.training.shared_features import SharedFeatures
from lift_ray.training.together import train_together
from lift_ray.training.workspace import Workspace

SHORTEST_IDLE_S, LONGEST_IDLE_S = 0.05, 1.0
POLICY = CheckpointPolicy(keep=1, keep_best=False)  # a trial resumes from its last epoch
NOWHERE = StepsDone(0, 0)  # position of a model that is only evaluated


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
        self._progress = NOWHERE
        self._stop = threading.Event()
        self._views: dict[int, Workspace] = {}  # by fold
        self._shared: SharedFeatures | None = None
        self._warning = ""
        self._fold = SEARCHED  # of the last job
        self._trials: dict[int, Run | BackdoorTrial] = {}  # that the job trains, by number
        self._features_s = 0.0  # seconds of cached features that an epoch has reported, or a job before

    def begin(self, job: Job) -> None:
        """Set the next job, which `next` starts. The previous job must have replied, and is dropped."""
        self._progress = NOWHERE
        self._trials = {}  # so that its memory is free before the next job loads its own
        self._replies = self._run(job)

    def next(self, timeout_s: float) -> Reply:
        """Return the job's next reply, or StepsDone with its progress if there is none within the timeout.

        Raises the job's own errors, except for BadInput and RunFailed, which become the reply RunAborted.
        """
        if self._pending is None:
            self._pending = self._thread.submit(next, self._replies)
        if not wait([self._pending], timeout_s).done:
            warning = self._warning or (self._shared.problem if self._shared else "")
            return replace(self._progress, warning=warning)
        pending, self._pending = self._pending, None
        return pending.result()

    def stop(self, patience_s: float = 5.0) -> None:
        """Stop the job at its next step or evaluation batch, and leave the features that slots share."""
        self._stop.set()
        if self._pending is not None:
            wait([self._pending], patience_s)
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _run(self, job: Job) -> Iterator[Reply]:
        return_freed_memory()  # of the job before
        try:
            workspace = self._view(job.fold)
            self._features_s = workspace.features_s
            if isinstance(job, IdleJob):
                yield from self._idle()
            elif isinstance(job, Pack):
                yield from self._train_together(job, workspace)
            elif isinstance(job, TrainJob):
                yield from self._train(job, workspace)
            else:
                yield from self._evaluate(job, workspace)
        except StopAsked:
            yield self._progress
        except (BadInput, RunFailed) as error:
            yield RunAborted(str(error), isinstance(error, BadInput))

    def _view(self, fold: int) -> Workspace:
        """Return the workspace for a fold; all share the backbone, the open files and the cached features."""
        if not self._views:
            self._whole = self._open()
        if fold not in self._views:
            self._views[fold] = self._whole.on(self.slot.folds.view(self._whole.dataset, fold))
            self._views[fold].watch = self._computing
        if fold != self._fold:
            self._whole.release()
            self._fold = fold
        return self._views[fold]

    def _open(self) -> Workspace:
        """Join the slot's process group and open the dataset. Raises BadInput if that fails."""
        began, need = time.monotonic(), self.slot.need
        ranks = Ranks.on(self._device(), need.cpus)
        if self.address is not None:
            join_group(self.rank, need.workers, *self.address, ranks.device)
            ranks = Ranks(self.rank, need.workers, ranks.device, ranks.num_threads)
        else:
            try:
                self._shared = SharedFeatures(FeatureExchange.named(self.slot.exchange))
            except OSError as error:
                self._warning = f"slots do not share cached features: {one_line(error)}; set LIFT_CACHE to a folder"
        tunings = [RunConfig.model_validate(tuning) for tuning in self.slot.tunings]
        workspace = Workspace(self.slot.dataset, ranks, self._shared, tunings)
        self._output = Output(self.slot.out)
        self._opened_s, self._loaded_s = time.monotonic() - began, 0.0
        return workspace

    def _device(self) -> torch.device:
        """Return the GPU that Ray gave to this process, or the CPU. Ray counts no GPU of Apple, so the only slot takes it."""
        if self.slot.need.gpus:
            return accelerator()
        return found if self.slot.is_only and (found := best_device()).type == "mps" else CPU

    def _idle(self) -> Iterator[Reply]:
        pause_s = SHORTEST_IDLE_S
        yield JobDone({})
        while not self._stop.wait(pause_s):
            yield JobDone({})
            pause_s = min(LONGEST_IDLE_S, 1.2 * pause_s)

    def _train_together(self, pack: Pack, workspace: Workspace) -> Iterator[Reply]:
        """Yield Replies with what the trials reply alone; those of an epoch come together.

        Trials that were interrupted after different epochs first come to the same one.
        """
        trainings = {job.number: self._train(job, workspace) for job in pack.jobs}
        yield Replies({number: next(training) for number, training in trainings.items()})
        runs = {number: self._trials[number] for number in trainings}
        while True:
            first = min(run.epoch for run in runs.values())
            behind = [number for number, run in runs.items() if run.epoch == first]
            # a text head without anything to train has no epochs
            if trained := [run for number in behind if isinstance(run := runs[number], Run) and run.num_epochs]:
                train_together(trained)
            yield Replies({number: next(trainings[number]) for number in behind})

    def _train(self, job: TrainJob, workspace: Workspace) -> Iterator[OfTrial]:
        """Yield RunStarted, then EpochEnded for each epoch, and JobDone unless it is a trial; or RunDiverged."""
        began, features_s = time.monotonic() - self._opened_s, workspace.features_s
        trial = trial_of(RunConfig.model_validate(job.config), workspace, self._output, job.fold)
        trial.callback, self._trials[job.number] = self._callback(workspace), trial
        checkpoints = CheckpointManager(self._output, POLICY, trial_checkpoints(job.number, job.fold))
        times = {"begin_s": 0.0, "load_s": 0.0}

        def complete(metrics: EpochMetrics) -> EpochMetrics:
            seconds = {**metrics.seconds, **times, "features_s": workspace.features_s - self._features_s}
            times.update(begin_s=0.0, load_s=0.0)
            self._features_s = workspace.features_s
            return replace(metrics, seconds=seconds, num_epochs=trial.num_epochs)

        try:
            for event in trained_epochs(trial, checkpoints, complete):
                if isinstance(event, RunStarted):
                    computing_s = workspace.features_s - features_s
                    times.update(
                        begin_s=time.monotonic() - began - computing_s, load_s=workspace.load_s - self._loaded_s
                    )
                    self._opened_s, self._loaded_s = 0.0, workspace.load_s
                    yield event
                    continue
                metrics = replace(event.metrics, seconds={**event.metrics.seconds, "save_s": checkpoints.save_s})
                trial.history[-1] = metrics
                if self._gauges is not None:
                    self._gauges.epoch_done(metrics)
                yield EpochEnded(metrics, event.checkpoint)
        except Diverged as error:
            yield RunDiverged(str(error))
            return
        if job.then == "hold out":
            split = workspace.dataset.split("validation")
            taus = taus_of(trial.config)
            with self._logit_writer(job.number, job.fold, trial.predictor, taus) as writer:
                evaluate(trial.predictor, split, counters=[writer], callback=partial(trial.callback, trial))
            yield JobDone({"parts": self.slot.need.workers, "images": split.num_samples})
        elif job.then:
            found = trial.history[-1]
            if job.then == "test":
                tau = trial.config.evaluation.posthoc_tau if job.tau is None else job.tau
                split, callback = workspace.dataset.split("test"), partial(trial.callback, trial)
                found = replace(found, test=evaluate(trial.predictor, split, [tau], callback=callback).metrics)
            yield JobDone({"trained_parameters": trial.num_trained, **found.flat("validation", "test")})

    def _logit_writer(
        self, number: int, fold: int, model: LogitSource, taus: Sequence[float]
    ) -> AbstractContextManager[LogitWriter]:
        return logit_writer(self._output, number, fold, model.ranks, model.class_counts, taus)

    def _evaluate(self, job: EvaluationJob, workspace: Workspace) -> Iterator[Reply]:
        """Yield one JobDone with the metrics for each tau, and the report of an ensemble."""
        model = model_of(RunConfig.model_validate(job.config), [workspace])
        if job.checkpoint is not None:
            with self._output.fetched(job.checkpoint) as folder:
                checkpoint.load_weights(folder, model)
        split, is_test = workspace.dataset.split(job.split), job.split == "test"
        table = model.gain_table(job.taus[-1]) if isinstance(model, Ensemble) and is_test else None
        counters: list[Counter] = [table] if table else []
        written: dict[str, int] = {}
        with ExitStack() as files:
            if job.out_of_fold is not None:
                writer = self._logit_writer(job.out_of_fold, SEARCHED, model, job.taus)
                counters.append(files.enter_context(writer))
                written = {"parts": self.slot.need.workers, "images": split.num_samples}
            found = evaluate(
                model,
                split,
                job.taus,
                predictions=is_test,
                counters=counters,
                callback=partial(self._callback(workspace), NOWHERE),
            )
        if is_test and self.rank == 0:
            for tau, one in zip(job.taus, found.at_tau, strict=True):
                write_predictions(prediction_table(split.labels, one), self._output, predictions_of(job.model, tau))
        shared = {"trained_parameters": model.num_trained, "time/evaluate_s": found.seconds}
        figures = [named(job.split, one.metrics) | shared for one in found.at_tau]
        report = {}
        if isinstance(model, Ensemble) and table:
            report = {"report": model.report(job.split, found.at_tau[-1].per_class, table)}
        yield JobDone({"figures": figures, **report, **written})

    def _callback(self, workspace: Workspace) -> StepCallback:
        """Return a callback that reports progress and listens for a request to stop."""
        return StepCallback(workspace.ranks, self._heard, lambda: "stopped" if self._stop.is_set() else "")

    def _computing(self, done: FeaturesDone | None) -> None:
        if self._stop.is_set():
            raise StopAsked("stopped")
        self._progress = replace(self._progress, features=done)

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
