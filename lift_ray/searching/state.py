"""State of a search, independent of Ray: trials from the study, early stopping, and the final comparison.

Each step writes to the study first, so a driver that is killed between any two steps loses no trial and repeats none.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from typing import Any, Protocol

from lift_ray.epoch_metrics import TRAINED_PARAMETERS, EpochMetrics
from lift_ray.errors import RunFailed
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching import final_comparison, packs
from lift_ray.searching.confirmation import Choice, candidates, choose, fold_jobs
from lift_ray.searching.final_comparison import SearchResult
from lift_ray.searching.jobs import EvaluationJob, Job, Loaded, Pack, TrainJob, first_fitting, parts, trial_checkpoints
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.stopping import Stopping
from lift_ray.searching.study import Study
from lift_ray.storage.output import Output
from lift_ray.training.events import EpochEnded, JobDone, Replies, Reply, RunDiverged, RunStarted, StepsDone


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
    """

    def __init__(self, study: Study, out: Output, data: SearchData) -> None:
        self.study, self.space, self.out, self.data = study, study.space, out, data
        self.watchers: list[Watcher] = []
        self.running: dict[str, Job] = {}
        self.progress: dict[str, StepsDone] = {}
        self.began: dict[str, RunStarted] = {}
        self.done: list[Job] = []
        self._told: set[int] = set()  # trials whose start the watchers know about
        self._alone: set[int] = set()  # trials that train in no pack any more
        self._final: list[Job] | None = None  # cache of final_jobs; None when outdated
        self._choice: Choice | None = None
        self._stopping = Stopping(self.space, study.rows.values())
        # Trials that have not ended: Tune asks at each of its steps whether the search is over, and a free slot for those that wait.
        self._going = {number: row for number, row in study.rows.items() if not row.has_ended}
        # The last driver may have been killed between storing an epoch and deciding about its trial: decide now.
        for row in [*self._going.values()]:
            if row.history and not self._after_epoch(row):
                self._trial_ended(row)

    @property
    def num_ended(self) -> int:
        """Number of trials that have ended."""
        return len(self.study.rows) - len(self._going)

    @property
    def trials_are_over(self) -> bool:
        """True once the requested number of trials have ended."""
        return self.num_ended >= self.space.num_trials

    @property
    def is_over(self) -> bool:
        """True once nothing is left to do, the final comparison included."""
        return self.trials_are_over and not self.running and not self.final_jobs()

    def next_job(self, loaded: Collection[Loaded] = (), num_slots: int = 1) -> Job | None:
        """Return the next job: an interrupted trial, else a new one, else a job of the final comparison; None if there is none.

        Of several that wait, one whose backbone is loaded comes first. What is drawn does not depend on that. Trials that can
        train in one pass with it come along, if there are enough for all slots.
        """
        job: Job | None = self._next_training(loaded, num_slots)
        if job is None and (waiting := self._waiting()):
            job = first_fitting(waiting, loaded)
        if job is not None:
            self.running[job.key] = job
        return job

    @property
    def num_waiting(self) -> int:
        """Number of jobs that `next_job` could hand out now."""
        return max(0, self._num_to_start()) + len(self._waiting())

    def take(self, job: Job, reply: Reply) -> bool:
        """Store a slot's reply and act on it. Returns whether the slot continues with this job.

        A pack ends with the first of its trials. The others wait, and make the next pack.
        """
        if isinstance(reply, StepsDone):
            self.progress[job.key] = reply
            return True
        self.progress.pop(job.key, None)
        first: Reply
        if isinstance(reply, Replies):
            going = [self._trial(self.study.rows[number], one) for number, one in reply.of.items()]
            continues, first = all(going), next(iter(reply.of.values()))
        else:
            first, row = reply, self._row(job)
            continues = self._later(job, reply) if row is None else self._trial(row, reply)
        if not continues:
            self.put_back(job)
        elif isinstance(first, RunStarted):
            self.began[job.key] = first
        return continues

    def interrupted(self, job: Job) -> Job:
        """Note that a job has lost its slot. Returns the job to run on the next slot; of a pack, its first trial.

        A trial of a pack may be what ended the slot, so from now on each trains alone.
        """
        self.progress.pop(job.key, None)
        if isinstance(job, Pack):
            self._alone |= {each.number for each in job.jobs}
            self.put_back(job)
            job = job.jobs[0]
            self.running[job.key] = job
        elif (row := self._row(job)) is not None:
            row.state = "waiting"
        return job

    def put_back(self, job: Job) -> None:
        """Take a job back, to hand it out again."""
        for each in parts(job):
            if (row := self._row(each)) is not None and not row.has_ended:
                row.state = "waiting"
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
        return self.space.num_trials - self.num_ended - len(self._training_now())

    def _training_now(self) -> set[int]:
        """Return the numbers of the trials that slots work on."""
        jobs = chain.from_iterable(map(parts, self.running.values()))
        return {row.number for job in jobs if (row := self._row(job)) and not row.has_ended}

    def _training(self, row: TrialRow) -> TrainJob:
        return TrainJob(row.number, self.space.config(row.values).to_dict())

    def _next_training(self, loaded: Collection[Loaded], num_slots: int) -> TrainJob | Pack | None:
        """Return the next trial or pack; None if as many run or have ended as were requested."""
        with self.study.at_once():
            if (row := self._next_row(loaded)) is None:
                return None
            return self._with_others(row, packs.size_of(self.space, self.space.num_trials - self.num_ended, num_slots))

    def _next_row(self, loaded: Collection[Loaded]) -> TrialRow | None:
        """Return a trial to resume or start; None if as many run or have ended as were requested."""
        if self._num_to_start() <= 0:
            return None
        if not (free := self._free_rows()):
            return self._new_row()
        job = first_fitting([self._training(row) for row in free.values()], loaded)
        return free[job.number]

    def _free_rows(self) -> dict[int, TrialRow]:
        """Return the trials that wait for a slot."""
        running = self._training_now()
        return {number: row for number, row in self._going.items() if row.state == "waiting" and number not in running}

    def _new_row(self) -> TrialRow | None:
        """Return a new trial; None if there are as many as requested."""
        if (row := self.study.next()) is not None:
            self._going[row.number] = row
        return row

    def _with_others(self, row: TrialRow, most: int) -> TrainJob | Pack:
        """Return the job of a trial, or of a pack of at most as many: trials that wait, then new ones as long as they fit."""
        jobs = [self._training(row)]
        row.state = "running"
        shared = packs.shared_by(jobs[0]) if most > 1 and row.number not in self._alone else None
        if shared is None:
            return jobs[0]
        waiting = iter([*self._free_rows().values()])
        while len(jobs) < most:
            if (other := next(waiting, None)) is None and not row.history and not self._free_rows():
                other = self._new_row()
            if other is None:
                break
            job = self._training(other)
            fits = other.number not in self._alone and len(other.history) == len(row.history)
            if fits and packs.shared_by(job) == shared:
                other.state = "running"
                jobs.append(job)
        return jobs[0] if len(jobs) == 1 else Pack(tuple(jobs))

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
        """Store the reply of a trial. Returns whether it continues."""
        if isinstance(reply, RunStarted):
            continues = self._began(row, reply)
        elif isinstance(reply, RunDiverged):
            self.study.end(row, "failed", reply.reason, diverged=True)
            continues = False
        else:
            assert isinstance(reply, EpochEnded)
            self._reported(row, reply.metrics)
            continues = self._after_epoch(row)
        if not continues:
            self._trial_ended(row)
        return continues

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
        self._stopping.reported(row)
        for watcher in self.watchers:
            watcher.reported(row)

    def _after_epoch(self, row: TrialRow) -> bool:
        """End a trial that is done or that early stopping ends. Returns whether it continues."""
        if row.is_done:
            self.study.end(row, "finished")
        elif self._stopping.decide(row) == "stop":
            self.study.end(row, "pruned")
        return not row.has_ended

    def _trial_ended(self, row: TrialRow) -> None:
        del self._going[row.number]
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
