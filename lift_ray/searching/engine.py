"""Engine of a search: Ray Tune's scheduler, stopper and source of jobs in one class. tune_run.py starts it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from lift_ray.errors import BadInput, RunFailed, last_line
from lift_ray.searching.jobs import IdleJob, Job, Loaded, SlotSettings, backbone_of
from lift_ray.searching.slot import REPLY, SLOT
from lift_ray.training.events import Reply, RunAborted, StepsDone

MAX_FAILURES = (
    2  # tolerated failures of a job, and failed starts of slots in a row; one more ends the job or the search
)
LOOK_S = 5.0  # seconds between two queries of the cluster's size


class JobSource(Protocol):
    """Source of an engine's jobs, which takes their results: a search, or fixed runs."""

    @property
    def is_over(self) -> bool:
        """True once nothing is left to do."""

    @property
    def num_waiting(self) -> int:
        """Number of jobs that `next_job` could hand out now."""

    def next_job(self, loaded: Collection[Loaded] = (), num_slots: int = 1) -> Job | None:
        """Return the next job, if possible one whose backbone is among these; None if there is none now.

        Args:
            num_slots: number of slots that share the jobs that are left.
        """

    def take(self, job: Job, reply: Reply) -> bool:
        """Store a slot's reply. Returns whether the slot continues with this job."""

    def interrupted(self, job: Job) -> Job:
        """Note that a job has lost its slot. Returns the job that is to wait for another one."""

    def put_back(self, job: Job) -> None:
        """Take a job back, to hand it out again."""

    def failed(self, job: Job, error: str) -> None:
        """Give up a job that failed too often."""


class Engine(TrialScheduler, tune.Stopper):  # type: ignore[misc]
    """Tracks which slot works on which job, and forwards everything else between Tune and the search.

    A job of ours is a trial of Tune. A slot is a Trainable of Tune that is reused for one job after another.

    Args:
        size: returns the number of slots that fit the cluster now.
        should_stop: returns True once the search is to stop as soon as possible.
        on_step: called many times a second.
        keeps_slots: give slots without a job an IdleJob while the search runs. Otherwise Tune ends all but one of them, and
            new ones would load everything again for the final comparison. False on a cluster that scales down, because idle
            slots would keep their nodes.

    Attributes:
        error: the error that ended the search.
        lost: number of slots that ended unexpectedly.
        jobs: the jobs by the id of their Tune trial.
        open_slots: numbers of the slots that have loaded the backbone and the data.
    """

    def __init__(
        self,
        search: JobSource,
        slot: SlotSettings,
        size: Callable[[], int],
        *,
        should_stop: Callable[[], bool],
        on_step: Callable[[], None],
        keeps_slots: bool,
    ) -> None:
        super().__init__()
        self.search, self.slot, self.size = search, slot, size
        self.should_stop, self.on_step, self.keeps_slots = should_stop, on_step, keeps_slots
        self.error: Exception | None = None
        self.lost = 0
        self.jobs: dict[str, Job] = {}
        self.open_slots: set[int] = set()
        self._opening: set[str] = set()  # ids of Tune's trials that wait for a new slot
        self._numbers: dict[str, int] = {}  # slot of each of Tune's trials, running or to be started
        self._free: list[int] = []  # open slots without a job, in the order in which Tune uses them again
        self._loaded: dict[int, set[Loaded]] = {}  # backbones of the jobs that each slot has run
        self._waiting: list[Any] = []  # Tune's trials that no slot runs yet, oldest first
        self._errors: dict[str, str] = {}
        self._failures: Counter[str] = Counter()  # by the job's key
        self._failed_starts = 0  # in a row
        self._room, self._looked_at = 0, float("-inf")

    @property
    def num_slots(self) -> int:
        """Number of open slots."""
        return len(self.open_slots)

    # Source of jobs

    def next_config(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the config of a new Tune trial; None if there is nothing to do now, FINISHED at the end.

        A job is only handed out when an open slot is free. The job is then the newest waiting one, so that slot takes it (see
        `choose_trial_to_run`). Otherwise an IdleJob opens another slot, if there is room and work for it.
        """
        if self.error is not None or self.should_stop() or self.search.is_over:
            return str(Searcher.FINISHED)
        if len(self.jobs) >= self._slots_now():
            return None
        opens = len(self.jobs) - len(self._opening) >= self.num_slots
        if opens:
            job: Job | None = IdleJob() if self.search.num_waiting > len(self._opening) else None
        else:
            self._free = [slot for slot in self._free if slot in self.open_slots]
            loaded = self._loaded.get(self._free[0], set()) if self._free else set()
            job = self.search.next_job(loaded, self._slots_now()) or (
                IdleJob() if self.keeps_slots and not self._pending() else None
            )
        if job is None:
            if not opens:  # Tune keeps one slot without a job and ends the others
                self.open_slots = set(sorted(self.open_slots)[: len(self.jobs) - len(self._opening) + 1])
            return None
        if opens:
            self._opening.add(trial_id)
        elif self._free:
            del self._free[0]
        # A new slot gets the lowest free number; an open one that takes the job keeps its own.
        number = min(set(range(len(self.jobs) + 1)) - set(self._numbers.values()))
        if opens:
            self._loaded.pop(number, None)
        self.jobs[trial_id], self._numbers[trial_id] = job, number
        return {"slot": replace(self.slot, number=number), "job": job}

    def _slots_now(self) -> int:
        if time.monotonic() - self._looked_at >= LOOK_S:
            self._room, self._looked_at = max(1, self.size()), time.monotonic()
        return self._room

    def _pending(self) -> list[Any]:
        """Return Tune's trials that wait for an open slot; those that wait for a new one are left out."""
        self._waiting = [trial for trial in self._waiting if trial.status == "PENDING" and trial.trial_id in self.jobs]
        return [trial for trial in self._waiting if trial.trial_id not in self._opening]

    def gave_up(self, trial_id: str) -> None:
        """Handle a job for which Tune starts no further slot.

        Raises:
            RunFailed: slots do not start, or the search requires this job.
        """
        job = self.jobs[trial_id]
        self._forget(trial_id)
        if isinstance(job, IdleJob):
            if self._failed_starts > MAX_FAILURES:
                raise RunFailed(
                    f"{self._failed_starts} slots in a row failed to start; the last error: {self._errors[trial_id]}"
                )
        elif self._failures[job.key] > MAX_FAILURES:
            self.search.failed(job, self._errors[trial_id])
        else:  # a slot died between two jobs, which Tune counts as two failures
            self.search.put_back(job)

    def put_all_back(self) -> None:
        """Return all jobs to the search and forget the slots, because a new Tuner follows."""
        for job in self.jobs.values():
            if not isinstance(job, IdleJob):
                self.search.put_back(job)
        for known in (
            self.jobs,
            self._numbers,
            self._opening,
            self.open_slots,
            self._waiting,
            self._free,
            self._loaded,
        ):
            known.clear()

    # TrialScheduler

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accept any settings: Tune's own metric is not used."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Queue a job that waits for a slot, for the first time or after it lost one."""
        self._waiting.append(trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Store a slot's reply, then decide whether it continues with its job."""
        with self.errors_kept():
            if self._take(trial.trial_id, result):
                return str(self.CONTINUE)
        return str(self.STOP)

    def _take(self, trial_id: str, result: dict[str, Any]) -> bool:
        if (job := self.jobs.get(trial_id)) is None:  # the job was returned to the search
            return False
        reply = result[REPLY]
        self._numbers[trial_id] = int(result[SLOT])
        if isinstance(reply, RunAborted):
            raise (BadInput if reply.is_bad_input else RunFailed)(reply.line)
        if isinstance(reply, StepsDone) and trial_id in self._opening:
            return True
        self._opening.discard(trial_id)
        self.open_slots.add(self._numbers[trial_id])
        self._failed_starts = 0
        if (backbone := backbone_of(job)) is not None:
            self._loaded.setdefault(self._numbers[trial_id], set()).add(backbone)
        if isinstance(job, IdleJob):
            return not (self.search.num_waiting or self._pending())
        return self.search.take(job, reply)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Free the slot."""
        self._forget(trial.trial_id)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a job that was dropped before a slot ran it."""
        self._forget(trial.trial_id)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Handle a lost slot. Tune starts another one with the same number for its job, or tells the searcher that it gives up."""
        job = self.jobs.get(trial.trial_id)
        if job is None or trial.status == "PENDING":  # the second report of a slot that died between two jobs
            return
        self.lost += 1
        self._errors[trial.trial_id] = _error_line(trial)
        number = self._numbers[trial.trial_id]
        with self.errors_kept():
            self.jobs[trial.trial_id] = job = self.search.interrupted(job)
        if trial.trial_id in self._opening:
            self._failed_starts += 1
        else:
            self._failures[job.key] += 1
        self.open_slots.discard(number)
        self._loaded.pop(number, None)
        self._opening.add(trial.trial_id)  # now the job waits for a slot of its own
        trial.set_config({**trial.config, "slot": replace(self.slot, number=number), "job": job})

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return the newest waiting trial.

        A slot that became free then takes the job that was just handed out. With an older one, whose own slot is still
        starting, Tune would end that slot.
        """
        self._pending()
        return self._waiting[-1] if self._waiting else None

    def debug_string(self) -> str:
        """Return nothing, because Tune's own table is not shown."""
        return ""

    def _forget(self, trial_id: str) -> None:
        self.jobs.pop(trial_id, None)
        if (number := self._numbers.pop(trial_id, None)) in self.open_slots and number not in self._free:
            self._free.append(number)
        self._opening.discard(trial_id)

    # Stopper

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: `on_trial_result` stops single jobs."""
        return False

    def stop_all(self) -> bool:
        """Return True once the search is over. Tune calls this after each of its steps.

        Slots that are still opening when the search is over end with it.
        """
        with self.errors_kept():
            self.on_step()
            return self.error is not None or self.should_stop() or self.search.is_over
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its Stopper into snapshots that are never read."""
        return {}

    @contextmanager
    def errors_kept(self) -> Iterator[None]:
        """Keep an error until the fit has ended. Tune would turn it into a TuneError with a traceback."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error


def _error_line(trial: Any) -> str:
    """Return why a slot ended: the last line of its error, or that its processes were lost."""
    with suppress(OSError):
        text = Path(trial.error_file).read_text()
        text = text[text.rindex("Failure # ") :]  # the file has one section for each failure of the job
        if "ray::" in text and "The actor is dead" not in text:
            return last_line(RuntimeError(text))
    return "its processes were lost"
