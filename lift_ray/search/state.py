"""The course of a search, whoever runs its jobs: trials from the study, early stopping, and the final comparison.

Each step writes to the study first. A driver that is killed between any two steps loses no trial, and repeats none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lift_ray.errors import RunFailed
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.search import final_comparison
from lift_ray.search.jobs import EvaluationJob, Job, TrainJob
from lift_ray.search.stopping import decide
from lift_ray.search.study import Study
from lift_ray.storage.output import Output
from lift_ray.training.events import EpochEnded, JobDone, Reply, RunDiverged, RunStarted, StepsDone


class Watcher(Protocol):
    """Anything that is told what happens to the trials."""

    def started(self, row: TrialRow) -> None: ...

    def reported(self, row: TrialRow) -> None: ...

    def ended(self, row: TrialRow) -> None: ...


class Search:
    """The state of a search. It hands out jobs and takes what slots reply; it knows nothing of Ray.

    Args:
        out: holds the trials' checkpoints.

    Attributes:
        watchers: told of every trial that starts, reports or ends.
        running: the jobs that slots work on, by key.
        progress: what each of them replied last.
        began: what each of those that train began with.
        done: the jobs of the final comparison that are done, in order.
        num_ended: trials that have ended. Counted as they end: Tune asks at each of its steps whether the search is over.
    """

    def __init__(self, study: Study, out: Output) -> None:
        self.study, self.space, self.out = study, study.space, out
        self.watchers: list[Watcher] = []
        self.running: dict[str, Job] = {}
        self.progress: dict[str, StepsDone] = {}
        self.began: dict[str, RunStarted] = {}
        self.done: list[Job] = []
        self._told: set[int] = set()  # trials whose start was told by this driver
        self._final: list[Job] | None = None  # None: to be looked up again
        self.num_ended = sum(row.has_ended for row in study.rows.values())
        for row in self.study.rows.values():  # what was reported, but not decided, when the last driver was killed
            if not row.has_ended and row.history:
                self._after_epoch(row)

    @property
    def trials_are_over(self) -> bool:
        """Whether as many trials have ended as were asked for."""
        return self.num_ended >= self.space.num_trials

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, the final comparison included."""
        return self.trials_are_over and not self.running and not self.final_jobs()

    def next_job(self) -> Job | None:
        """A trial that was interrupted, else a new one, else a part of the final comparison; None when there is nothing now."""
        if (row := self._next_row()) is not None:
            row.state = "running"
            job: Job = TrainJob(row.number, self.space.config(row.values).to_dict())
        elif waiting := self._waiting():
            job = waiting[0]
        else:
            return None
        self.running[job.key] = job
        return job

    @property
    def num_waiting(self) -> int:
        """How many jobs `next_job` could hand out now."""
        return max(0, self._num_to_start()) + len(self._waiting())

    def take(self, job: Job, reply: Reply) -> bool:
        """Store and act on what a slot replied; returns whether the slot continues with this job. Raises RunFailed."""
        if isinstance(reply, StepsDone):
            self.progress[job.key] = reply
            return True
        self.progress.pop(job.key, None)
        if isinstance(reply, RunStarted):
            self.began[job.key] = reply
        row = self._row(job)
        continues = self._later(job, reply) if row is None else self._trial(row, reply)
        if not continues:
            self._ended(job)
        return continues

    def interrupted(self, job: Job) -> None:
        """A job lost its slot, and waits for another one."""
        self.progress.pop(job.key, None)
        if (row := self._row(job)) is not None:
            row.state = "waiting"

    def put_back(self, job: Job) -> None:
        """A job is to be handed out again."""
        self.interrupted(job)
        self._ended(job)

    def failed(self, job: Job, error: str) -> None:
        """A job failed as often as it may. Raises RunFailed for one that the search cannot do without."""
        if (row := self._row(job)) is None:
            raise RunFailed(f"the final comparison must finish, but {error}; add --resume to try again")
        self._tell_started(row)
        self._end(row, "failed", error)
        self._ended(job)

    def _row(self, job: Job) -> TrialRow | None:
        return self.study.rows.get(job.number) if isinstance(job, TrainJob) else None

    def _ended(self, job: Job) -> None:
        self.running.pop(job.key, None)
        self.progress.pop(job.key, None)
        self.began.pop(job.key, None)
        self._final = None

    def _num_to_start(self) -> int:
        running = sum(self._row(job) is not None for job in self.running.values())
        return self.space.num_trials - self.num_ended - running

    def _next_row(self) -> TrialRow | None:
        """A trial to start or resume, no more than were asked for."""
        if self._num_to_start() <= 0:
            return None
        rows = self.study.rows.values()
        free = (r for r in rows if r.state == "waiting" and TrainJob(r.number, {}).key not in self.running)
        return next(free, None) or self.study.next()

    def final_jobs(self) -> list[Job]:
        """The known jobs of the final comparison that are not done; looked up again whenever a job has ended."""
        if self._final is None:
            is_over = self.trials_are_over
            self._final = final_comparison.final_jobs(self.space, self.rows(), self.study.results, is_over=is_over)
        return self._final

    def _waiting(self) -> list[Job]:
        """Jobs of the final comparison that no slot works on, nor on the same model and split with other taus."""
        busy = {(job.model, job.split) for job in self.running.values() if isinstance(job, EvaluationJob)}
        free = (job for job in self.final_jobs() if job.key not in self.running)
        return [job for job in free if not isinstance(job, EvaluationJob) or (job.model, job.split) not in busy]

    def _trial(self, row: TrialRow, reply: Reply) -> bool:
        if isinstance(reply, RunStarted):
            return self._began(row, reply)
        if isinstance(reply, RunDiverged):
            self._end(row, "failed", reply.reason, diverged=True)
            return False
        assert isinstance(reply, EpochEnded)
        self._reported(row, reply.figures)
        return self._after_epoch(row)

    def _began(self, row: TrialRow, reply: RunStarted) -> bool:
        row.state, row.num_epochs = "running", reply.epochs
        self._tell_started(row)
        known = {"trained_parameters": reply.trained_parameters}
        broken = {n: v for n, v in known.items() if (limit := self.space.constraints.get(n)) and limit.excess(v) > 0}
        if broken:
            error = ", ".join(f"{name} is {value:,.0f}" for name, value in broken.items())
            self._end(row, "infeasible", error, known=known)
            return False
        for figures in reply.history[len(row.history) :]:  # saved, but the driver was gone before it heard
            self._reported(row, figures)
        return self._after_epoch(row)

    def _tell_started(self, row: TrialRow) -> None:
        if row.number not in self._told:
            self._told.add(row.number)
            for watcher in self.watchers:
                watcher.started(row)

    def _reported(self, row: TrialRow, figures: Mapping[str, Any]) -> None:
        self.study.report(row, {name: value for name, value in figures.items() if isinstance(value, int | float)})
        for watcher in self.watchers:
            watcher.reported(row)

    def _after_epoch(self, row: TrialRow) -> bool:
        """End a trial that is done, or that early stopping ends; returns whether it continues."""
        if row.is_done:
            self._end(row, "finished")
        elif decide(self.space, row, list(self.study.rows.values())) == "stop":
            self._end(row, "pruned")
        return not row.has_ended

    def _end(
        self,
        row: TrialRow,
        state: str,
        error: str = "",
        *,
        diverged: bool = False,
        known: Mapping[str, float] | None = None,
    ) -> None:
        self.study.end(row, state, error, diverged=diverged, known=known)
        self.num_ended += 1
        if row.state != "finished" and row.history:
            self.out.remove(f"checkpoints/{row.number:04d}")
        for watcher in self.watchers:
            watcher.ended(row)

    def _later(self, job: Job, reply: Reply) -> bool:
        """The reply of a job of the final comparison."""
        if isinstance(reply, RunStarted | EpochEnded):
            return True
        if isinstance(job, EvaluationJob):
            assert isinstance(reply, JobDone)
            for key, value in final_comparison.results_of(job, reply.value).items():
                self.study.store_result(key, value)
        else:  # a repeat with another seed; nothing is known of one that diverged
            self.study.store_result(job.key, reply.value if isinstance(reply, JobDone) else {})
        self.done.append(job)
        return False

    def rows(self) -> list[TrialRow]:
        """The trials in the order of their numbers."""
        return [self.study.rows[number] for number in sorted(self.study.rows)]
