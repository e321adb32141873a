"""Fixed runs: given settings that are trained, each with several seeds, and tested. Nothing is searched.

They run in the slots of a search. Its results come from Optuna's storage, those of fixed runs from one file in OUT, which is
rewritten after each job.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lift_ray.data.folds import EVERYTHING
from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.errors import RunFailed
from lift_ray.reporting.trial_rows import write_json
from lift_ray.searching.final_comparison import TTE
from lift_ray.searching.jobs import (
    FIRST_REPEAT,
    EvaluationJob,
    Job,
    Loaded,
    TrainJob,
    first_fitting,
    trial_checkpoint_path,
)
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import RESULTS
from lift_ray.storage.output import Output
from lift_ray.training.events import EpochEnded, JobDone, Reply, RunDiverged, RunStarted, StepsDone

SPENT = ("begin_s", "features_s", "train_s", "evaluate_s", "save_s")  # parts of an epoch that exclude each other


@dataclass(frozen=True)
class FixedRun:
    """Settings to train once, on all training images of the dataset, and to test.

    Args:
        name: name in results.
        dataset: name of the dataset, which no setting holds.
        config: the settings. Test-time ensembling has no part in the training, so `ensembling` replaces it.
        ensembling: test with test-time ensembling, without, or both.
    """

    name: str
    dataset: str
    config: RunConfig
    ensembling: tuple[bool, ...] = (True,)

    @cached_property
    def digest(self) -> str:
        """Eight hex digits that name dataset and settings."""
        return hashlib.sha256(f"{self.dataset} {self._plain.digest()}".encode()).hexdigest()[:8]

    @cached_property
    def training(self) -> TrainJob:
        """The job that trains it. Its number names the checkpoints."""
        return TrainJob(FIRST_REPEAT + int(self.digest, 16), self._plain.to_dict(), EVERYTHING, then="keep")

    @cached_property
    def tests(self) -> list[EvaluationJob]:
        """The jobs that test the trained model, as `ensembling`."""
        return [self.test(ensembling) for ensembling in self.ensembling]

    def test(self, ensembling: bool) -> EvaluationJob:
        """Return the job that tests the trained model."""
        config = self.config if ensembling else self._plain
        path = trial_checkpoint_path(self.training.number, config.optim.epochs, EVERYTHING)
        model = f"{self.name}-{self.digest}{TTE if ensembling else ''}"
        taus = (config.evaluation.posthoc_tau,)
        return EvaluationJob(model, config.to_dict(), path, "test", taus, fold=EVERYTHING)

    @property
    def jobs(self) -> list[Job]:
        """All its jobs, in order."""
        return [self.training, *self.tests]

    @cached_property
    def _plain(self) -> RunConfig:
        """The settings without test-time ensembling."""
        plain = {"tte": "off", "expand_px": None}
        return self.config.model_copy(update={"evaluation": self.config.evaluation.model_copy(update=plain)})


@dataclass
class FixedRuns:
    """Source of jobs for an engine: trains runs and tests them as soon as they are trained.

    Runs with the same dataset and settings are trained once.

    Args:
        runs: the runs.
        out: receives the checkpoints, the predictions and the results.
        about: facts that are stored with each result.
        changed: called after each result.

    Attributes:
        results: result of each finished job by its key; a training that diverged has the reason under `diverged`.
        running: the jobs that slots work on, by key.
        progress: the last progress of each running job.
    """

    runs: Sequence[FixedRun]
    out: Output
    about: Mapping[str, Any] = field(default_factory=dict)
    changed: Callable[[], object] = lambda: None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: dict[str, Job] = field(default_factory=dict)
    progress: dict[str, StepsDone] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.results |= stored_results(self.out)
        self._spent: dict[str, float] = {}  # seconds of running jobs in their finished epochs
        self._since: dict[str, float] = {}  # when a running job began, or finished its last epoch

    @property
    def num_jobs(self) -> int:
        """Number of different jobs."""
        return len({job.key for run in self.runs for job in run.jobs})

    @property
    def num_done(self) -> int:
        """Number of these jobs that are done."""
        return len({job.key for run in self.runs for job in run.jobs} & self.results.keys())

    @property
    def is_over(self) -> bool:
        """True once nothing is left to do."""
        return not self.running and not self._waiting()

    @property
    def num_waiting(self) -> int:
        """Number of jobs that could start now."""
        return len(self._waiting())

    def _waiting(self) -> list[Job]:
        """Return the jobs that could start now: tests of trained models first."""
        tests: dict[str, Job] = {}
        trainings: dict[str, Job] = {}
        for run in self.runs:
            if (trained := self.results.get(run.training.key)) is None:
                trainings[run.training.key] = run.training
            elif "diverged" not in trained:
                tests |= {job.key: job for job in run.tests}
        return [job for key, job in {**tests, **trainings}.items() if key not in {*self.results, *self.running}]

    def next_job(self, loaded: Collection[Loaded] = (), num_slots: int = 1) -> Job | None:
        """Return the next job, if possible one whose backbone is loaded; None if there is none."""
        if not (waiting := self._waiting()):
            return None
        job = first_fitting(waiting, loaded)
        self.running[job.key] = job
        self._spent[job.key], self._since[job.key] = 0.0, time.monotonic()
        return job

    def take(self, job: Job, reply: Reply) -> bool:
        """Store a slot's reply. Returns whether the slot continues with this job."""
        if isinstance(reply, StepsDone):
            self.progress[job.key] = reply
            return True
        self.progress.pop(job.key, None)
        if isinstance(reply, RunStarted | EpochEnded):
            history = reply.history if isinstance(reply, RunStarted) else [reply.metrics]
            self._count(job, history)
            return True
        assert isinstance(reply, JobDone | RunDiverged)
        found: dict[str, Any] = {"diverged": reply.reason} if isinstance(reply, RunDiverged) else reply.value
        if isinstance(job, EvaluationJob):
            found = found["figures"][0]
        spent = self._spent[job.key] + time.monotonic() - self._since[job.key]
        self.results[job.key] = {**found, "seconds": round(spent, 1), **self.about}
        write_json(self.results, self.out.folder / RESULTS)
        self.put_back(job)
        self.changed()
        return False

    def _count(self, job: Job, epochs: Sequence[EpochMetrics]) -> None:
        self._spent[job.key] += sum(metrics.seconds.get(name, 0.0) for metrics in epochs for name in SPENT)
        self._since[job.key] = time.monotonic()

    def interrupted(self, job: Job) -> Job:
        """Note that a job has lost its slot, and waits for another one. Returns the job."""
        self.progress.pop(job.key, None)
        self._spent[job.key], self._since[job.key] = 0.0, time.monotonic()
        return job

    def put_back(self, job: Job) -> None:
        """Forget that a job is running."""
        for known in (self.running, self.progress, self._spent, self._since):
            known.pop(job.key, None)

    def failed(self, job: Job, error: str) -> None:
        """Raise RunFailed for a job that failed too often."""
        raise RunFailed(f"{self.title(job)} failed: {error}; run the same command again to try again")

    def title(self, job: Job) -> str:
        """Return a job in words, for the display of progress."""
        if isinstance(job, EvaluationJob):
            return f"testing {job.model}"
        return f"training {next((run.name for run in self.runs if run.training.key == job.key), job.key)}"


def stored_results(out: Output) -> dict[str, dict[str, Any]]:
    """Return the results of finished jobs in a folder, by the keys of the jobs."""
    if not out.holds(RESULTS):
        return {}
    with out.fetched(RESULTS) as path:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found
