"""State of a search, independent of Ray: trials from the study, early stopping, and the final comparison.

Each step writes to the study first, so a driver that is killed between any two steps loses no trial and repeats none.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from lift_ray.epoch_metrics import TRAINED_PARAMETERS, EpochMetrics
from lift_ray.errors import RunFailed
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching import final_comparison
from lift_ray.searching.confirmation import Choice, candidates, choose, fold_jobs
from lift_ray.searching.final_comparison import SearchResult
from lift_ray.searching.jobs import EvaluationJob, Job, Loaded, TrainJob, first_fitting, trial_checkpoints
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.stopping import decide
from lift_ray.searching.study import Study
from lift_ray.storage.output import Output
from lift_ray.training.events import EpochEnded, JobDone, Reply, RunDiverged, RunStarted, StepsDone


class Watcher(Protocol):
    """Observer of the trials."""

    def started(self, row: TrialRow) -> None: ...

    def reported(self, row: TrialRow) -> None: ...

    def ended(self, row: TrialRow) -> None: ...


class Search:
    """State of a search: hands out jobs and takes the replies of slots. It knows nothing about Ray.

    Args:
        out: contains the trials' checkpoints.
        data: facts about the dataset.

    Attributes:
        watchers: notified about every trial that starts, reports or ends.
        running: the jobs that slots work on, by key.
        progress: the last progress of each running job.
        began: the first reply of each running job that trains.
        done: the finished jobs of the final comparison, in order.
        num_ended: number of trials that have ended. Counted as they end, because Tune asks at each of its steps whether the
            search is over.
    """

    def __init__(self, study: Study, out: Output, data: SearchData) -> None:
        self.study, self.space, self.out, self.data = study, study.space, out, data
        self.watchers: list[Watcher] = []
        self.running: dict[str, Job] = {}
        self.progress: dict[str, StepsDone] = {}
        self.began: dict[str, RunStarted] = {}
        self.done: list[Job] = []
        self._told: set[int] = set()  # trials whose start the watchers know about
        self._final: list[Job] | None = None  # cache of final_jobs; None when outdated
        self._choice: Choice | None = None
        self.num_ended = sum(row.has_ended for row in study.rows.values())
        # The last driver may have been killed between storing an epoch and deciding about its trial: decide now.
        for row in self.study.rows.values():
            if not row.has_ended and row.history and not self._after_epoch(row):
                self._trial_ended(row)

    @property
    def trials_are_over(self) -> bool:
        """True once the requested number of trials have ended."""
        return self.num_ended >= self.space.num_trials

    @property
    def is_over(self) -> bool:
        """True once nothing is left to do, the final comparison included."""
        return self.trials_are_over and not self.running and not self.final_jobs()

    def next_job(self, loaded: Collection[Loaded] = ()) -> Job | None:
        """Return the next job: an interrupted trial, else a new one, else a job of the final comparison; None if there is none.

        Of several that wait, one whose backbone is loaded comes first. What is drawn does not depend on that.
        """
        if (row := self._next_row(loaded)) is not None:
            row.state = "running"
            job: Job = self._training(row)
        elif waiting := self._waiting():
            job = first_fitting(waiting, loaded)
        else:
            return None
        self.running[job.key] = job
        return job

    @property
    def num_waiting(self) -> int:
        """Number of jobs that `next_job` could hand out now."""
        return max(0, self._num_to_start()) + len(self._waiting())

    def take(self, job: Job, reply: Reply) -> bool:
        """Store a slot's reply and act on it. Returns whether the slot continues with this job."""
        if isinstance(reply, StepsDone):
            self.progress[job.key] = reply
            return True
        self.progress.pop(job.key, None)
        if isinstance(reply, RunStarted):
            self.began[job.key] = reply
        row = self._row(job)
        continues = self._later(job, reply) if row is None else self._trial(row, reply)
        if not continues:
            if row is not None:
                self._trial_ended(row)
            self._ended(job)
        return continues

    def interrupted(self, job: Job) -> None:
        """Note that a job has lost its slot and waits for another one."""
        self.progress.pop(job.key, None)
        if (row := self._row(job)) is not None:
            row.state = "waiting"

    def put_back(self, job: Job) -> None:
        """Take a job back, to hand it out again."""
        self.interrupted(job)
        self._ended(job)

    def failed(self, job: Job, error: str) -> None:
        """Give up a job that failed too often. Raises RunFailed if the job is part of the final comparison."""
        if (row := self._row(job)) is None:
            raise RunFailed(f"the final comparison failed: {error}; add --resume to try again")
        self._tell_started(row)
        self.study.end(row, "failed", error)
        self._trial_ended(row)
        self._ended(job)

    def _row(self, job: Job) -> TrialRow | None:
        return self.study.rows.get(job.number) if isinstance(job, TrainJob) and not job.then else None

    def _ended(self, job: Job) -> None:
        self.running.pop(job.key, None)
        self.progress.pop(job.key, None)
        self.began.pop(job.key, None)
        self._final = None

    def _num_to_start(self) -> int:
        running = sum(self._row(job) is not None for job in self.running.values())
        return self.space.num_trials - self.num_ended - running

    def _training(self, row: TrialRow) -> TrainJob:
        return TrainJob(row.number, self.space.config(row.values).to_dict())

    def _next_row(self, loaded: Collection[Loaded]) -> TrialRow | None:
        """Return a trial to resume or start; None if as many run or have ended as were requested."""
        if self._num_to_start() <= 0:
            return None
        rows = (row for row in self.study.rows.values() if row.state == "waiting")
        free = {row.number: row for row in rows if TrainJob(row.number, {}).key not in self.running}
        if not free:
            return self.study.next()
        job = first_fitting([self._training(row) for row in free.values()], loaded)
        return free[job.number]

    def final_jobs(self) -> list[Job]:
        """Return the known jobs of the final comparison for slots that are not done; determined again when a job has ended."""
        if self._final is None:
            is_over, rows, results = self.trials_are_over, self.rows(), self.study.results
            self._final = final_comparison.final_jobs(
                self.space, rows, results, self.data, self.choice(), is_over=is_over
            )
        refits = self.refits
        return [job for job in self._final if job not in refits]

    @property
    def refits(self) -> list[TrainJob]:
        """The jobs of the final comparison that Ray Train runs and not a slot (scale.refit_workers), as `final_jobs` knows them."""
        if self.space.scale.refit_workers == 1:
            return []
        return [job for job in self._final or [] if isinstance(job, TrainJob) and job.is_refit]

    def refitted(self, job: TrainJob, result: dict[str, Any]) -> None:
        """Store the result of a job that Ray Train ran."""
        self.study.store_result(job.key, result)
        self.done.append(job)
        self._final = None

    def choice(self) -> Choice | None:
        """Return the winner; None before all out-of-fold predictions are there, or if no trial has finished."""
        if self._choice is None and self.trials_are_over:
            rows, results = self.rows(), self.study.results
            confirmed = candidates(self.space, rows)
            if confirmed and all(job.key in results for row in confirmed for job in fold_jobs(self.space, row)):
                self._choice = choose(self.space, rows, results, self.data, self.out)
        return self._choice

    def _waiting(self) -> list[Job]:
        """Return the jobs of the final comparison that can start now.

        Jobs whose model and split another slot evaluates, with other taus, are left out.
        """
        busy = {(job.model, job.split) for job in self.running.values() if isinstance(job, EvaluationJob)}
        free = (job for job in self.final_jobs() if job.key not in self.running)
        return [job for job in free if not isinstance(job, EvaluationJob) or (job.model, job.split) not in busy]

    def _trial(self, row: TrialRow, reply: Reply) -> bool:
        if isinstance(reply, RunStarted):
            return self._began(row, reply)
        if isinstance(reply, RunDiverged):
            self.study.end(row, "failed", reply.reason, diverged=True)
            return False
        assert isinstance(reply, EpochEnded)
        self._reported(row, reply.metrics)
        return self._after_epoch(row)

    def _began(self, row: TrialRow, reply: RunStarted) -> bool:
        row.state, row.num_epochs = "running", reply.epochs
        self._tell_started(row)
        number, limit = reply.trained_parameters, self.space.constraints.get(TRAINED_PARAMETERS)
        if limit and limit.excess(number) > 0:
            known = EpochMetrics(0, trained_parameters=number)
            self.study.end(row, "infeasible", f"{TRAINED_PARAMETERS} is {number:,.0f}", known=known)
            return False
        for metrics in reply.history[len(row.history) :]:  # saved by a slot whose driver died before it got the reply
            self._reported(row, metrics)
        return self._after_epoch(row)

    def _tell_started(self, row: TrialRow) -> None:
        if row.number not in self._told:
            self._told.add(row.number)
            for watcher in self.watchers:
                watcher.started(row)

    def _reported(self, row: TrialRow, metrics: EpochMetrics) -> None:
        self.study.report(row, metrics)
        for watcher in self.watchers:
            watcher.reported(row)

    def _after_epoch(self, row: TrialRow) -> bool:
        """End a trial that is done or that early stopping ends. Returns whether it continues."""
        if row.is_done:
            self.study.end(row, "finished")
        elif decide(self.space, row, list(self.study.rows.values())) == "stop":
            self.study.end(row, "pruned")
        return not row.has_ended

    def _trial_ended(self, row: TrialRow) -> None:
        self.num_ended += 1
        if row.state != "finished" and row.history:
            self.out.remove(f"checkpoints/{row.number:04d}")
        for watcher in self.watchers:
            watcher.ended(row)

    def _later(self, job: Job, reply: Reply) -> bool:
        """Store the reply of a job of the final comparison. Returns whether the slot continues with it."""
        if isinstance(reply, RunStarted | EpochEnded):
            return True
        if isinstance(job, EvaluationJob):
            assert isinstance(reply, JobDone)
            for key, value in final_comparison.results_of(job, reply.value).items():
                self.study.store_result(key, value)
        else:  # the result of a training that diverged is empty
            self.study.store_result(job.key, reply.value if isinstance(reply, JobDone) else {})
            if isinstance(job, TrainJob) and job.then == "hold out":
                self.out.remove(trial_checkpoints(job.number, job.fold))
        self.done.append(job)
        return False

    def result(self, time_s: dict[str, float]) -> SearchResult | None:
        """Return the result, with seconds of wall time by activity, once the search is over; None if no trial has finished."""
        if (choice := self.choice()) is None:
            return None
        return final_comparison.conclude(self.space, self.rows(), self.study.results, self.data, choice, time_s)

    def rows(self) -> list[TrialRow]:
        """Return the trials in the order of their numbers."""
        return [self.study.rows[number] for number in sorted(self.study.rows)]
