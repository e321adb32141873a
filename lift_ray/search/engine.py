"""The engine of a search: Ray Tune's scheduler, stopper and source of jobs in one. tuner.py starts it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from lift_ray.errors import BadInput, RunFailed, last_line
from lift_ray.search.jobs import IdleJob, Job, SlotSettings
from lift_ray.search.slot import REPLY, SLOT
from lift_ray.search.state import Search
from lift_ray.training.events import RunAborted, StepsDone

MAX_FAILURES = 2  # of a job, or of slots in a row that do not start; one more ends it
LOOK_S = 5.0  # between two looks at the cluster's size


class Engine(TrialScheduler, tune.Stopper):  # type: ignore[misc]
    """Keeps track of which slot has which job, and passes the rest of what Tune asks and tells on to the search.

    Args:
        size: number of slots that the cluster can hold now.
        should_stop: whether the search is to stop as soon as it can.
        on_step: called many times a second.
        keeps_slots: give slots without a job an IdleJob while the search runs. Tune would end all but one of them, and they
            would load everything again for the final comparison. Not on a cluster that shrinks: their nodes are to go.

    Attributes:
        error: what ended the search.
        lost: number of slots that ended and should not have.
        jobs: by Tune's id of the trial.
        open_slots: numbers of the slots that have loaded what they need.
    """

    def __init__(
        self,
        search: Search,
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
        self._opening: set[str] = set()  # Tune's ids of the jobs that are to open a slot, and have not yet
        self._numbers: dict[str, int] = {}  # of the slots that work on jobs, or will be started for them
        self._waiting: list[Any] = []  # Tune's trials that no slot has taken up yet, oldest first
        self._errors: dict[str, str] = {}
        self._failures: Counter[str] = Counter()  # by the job's key
        self._failed_starts = 0  # in a row
        self._room, self._looked_at = 0, float("-inf")

    @property
    def num_slots(self) -> int:
        """Open slots."""
        return len(self.open_slots)

    # As the source of jobs

    def next_config(self, trial_id: str) -> dict[str, Any] | str | None:
        """The config of a new Tune trial; None when there is nothing to do now, or FINISHED.

        A job is handed out when an open slot is free. It is then the newest that waits, so that slot takes it. Otherwise an
        IdleJob opens another slot, if there is room and work for it.
        """
        if self.error is not None or self.should_stop() or self.search.is_over:
            return str(Searcher.FINISHED)
        if len(self.jobs) >= self._slots_now():
            return None
        opens = len(self.jobs) - len(self._opening) >= self.num_slots
        if opens:
            job: Job | None = IdleJob() if self.search.num_waiting > len(self._opening) else None
        else:
            job = self.search.next_job() or (IdleJob() if self.keeps_slots and not self._pending() else None)
        if job is None:
            if not opens:  # Tune keeps one slot without a job, and ends the others
                self.open_slots = set(sorted(self.open_slots)[: len(self.jobs) - len(self._opening) + 1])
            return None
        if opens:
            self._opening.add(trial_id)
        # A new slot gets the lowest free number; an open one that takes the job keeps its own.
        number = min(set(range(len(self.jobs) + 1)) - set(self._numbers.values()))
        self.jobs[trial_id], self._numbers[trial_id] = job, number
        return {"slot": replace(self.slot, number=number), "job": job}

    def _slots_now(self) -> int:
        if time.monotonic() - self._looked_at >= LOOK_S:
            self._room, self._looked_at = max(1, self.size()), time.monotonic()
        return self._room

    def _pending(self) -> list[Any]:
        """Jobs, as Tune's trials, that wait for a slot and are not to open one."""
        self._waiting = [trial for trial in self._waiting if trial.status == "PENDING" and trial.trial_id in self.jobs]
        return [trial for trial in self._waiting if trial.trial_id not in self._opening]

    def gave_up(self, trial_id: str) -> None:
        """Tune starts no other slot for a job. Raises RunFailed when slots do not start, or for a job that cannot be done without."""
        job = self.jobs[trial_id]
        self._forget(trial_id)
        if isinstance(job, IdleJob):
            if self._failed_starts > MAX_FAILURES:
                raise RunFailed(
                    f"slots must start, but {self._failed_starts} in a row did not; "
                    f"the last error: {self._errors[trial_id]}"
                )
        elif self._failures[job.key] > MAX_FAILURES:
            self.search.failed(job, self._errors[trial_id])
        else:  # Tune counted a slot twice that died between two jobs
            self.search.put_back(job)

    def put_all_back(self) -> None:
        """Start again with no slots: a new Tuner follows."""
        for job in self.jobs.values():
            if not isinstance(job, IdleJob):
                self.search.put_back(job)
        for known in (self.jobs, self._numbers, self._opening, self.open_slots, self._waiting):
            known.clear()

    # TrialScheduler

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Tune's own metric is not used."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A job waits for a slot: for the first time, or again after it lost one."""
        self._waiting.append(trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Store what a slot replied, then decide."""
        with self.kept():
            if self._take(trial.trial_id, result):
                return str(self.CONTINUE)
        return str(self.STOP)

    def _take(self, trial_id: str, result: dict[str, Any]) -> bool:
        if (job := self.jobs.get(trial_id)) is None:  # it was put back
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
        if isinstance(job, IdleJob):
            return not (self.search.num_waiting or self._pending())
        return self.search.take(job, reply)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """The slot is free."""
        self._forget(trial.trial_id)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """A job that no slot had taken up was dropped."""
        self._forget(trial.trial_id)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A slot was lost. Tune starts another one for the job, which keeps the number, or tells the searcher that it gives up."""
        job = self.jobs.get(trial.trial_id)
        if job is None or trial.status == "PENDING":  # told a second time, of a slot that died between two jobs
            return
        self.lost += 1
        self._errors[trial.trial_id] = _error_line(trial)
        number = self._numbers[trial.trial_id]
        if trial.trial_id in self._opening:
            self._failed_starts += 1
        else:
            self._failures[job.key] += 1
        self.open_slots.discard(number)
        self._opening.add(trial.trial_id)  # the job waits for a slot of its own now
        trial.set_config({**trial.config, "slot": replace(self.slot, number=number)})
        with self.kept():
            self.search.interrupted(job)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The newest that waits. A slot that became free then takes the job that was just handed out, and not one whose own
        slot is starting, which Tune would end."""
        self._pending()
        return self._waiting[-1] if self._waiting else None

    def debug_string(self) -> str:
        """Nothing for Tune's own table, which is not shown."""
        return ""

    def _forget(self, trial_id: str) -> None:
        self.jobs.pop(trial_id, None)
        self._numbers.pop(trial_id, None)
        self._opening.discard(trial_id)

    # Stopper

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Single jobs are stopped by `on_trial_result`."""
        return False

    def stop_all(self) -> bool:
        """Tune asks this after each of its steps. Slots that are still opening when the search is over are ended with it."""
        with self.kept():
            self.on_step()
            return self.error is not None or self.should_stop() or self.search.is_over
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its Stopper into a snapshot, which is never read."""
        return {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep an error for after the fit: Tune would make it a TuneError with a traceback."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error


def _error_line(trial: Any) -> str:
    """Why a slot ended: the last line of its error, or that its processes were lost."""
    with suppress(OSError):
        text = Path(trial.error_file).read_text()
        text = text[text.rindex("Failure # ") :]  # one for each time that the job failed
        if "ray::" in text and "The actor is dead" not in text:
            return last_line(RuntimeError(text))
    return "its processes were lost"
