"""A search in MLflow or Weights & Biases, for those who keep all their runs there: off unless --log-to asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

from lift_ray.errors import BadInput, did_you_mean
from lift_ray.results.rows import TrialRow, describe
from lift_ray.settings.space import SpaceFile

Figures = dict[str, float]
MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "infeasible": "FAILED"}  # all else was cut short


class Tracker(Protocol):
    """A service that keeps a run for each trial."""

    def begin(self, row: TrialRow) -> None: ...

    def log(self, row: TrialRow, figures: Figures) -> None: ...

    def end(self, row: TrialRow) -> None: ...


class MLflow:
    """An experiment of the search's name, where $MLFLOW_TRACKING_URI says; a run for each trial."""

    def __init__(self, space: SpaceFile) -> None:
        self.client = _package("mlflow").MlflowClient()
        experiment = self.client.get_experiment_by_name(space.name)
        self.experiment = experiment.experiment_id if experiment else self.client.create_experiment(space.name)
        self.runs: dict[int, str] = {}

    def begin(self, row: TrialRow) -> None:
        """A run with the trial's settings."""
        run = self.client.create_run(self.experiment, run_name=f"trial {row.number}").info.run_id
        self.runs[row.number] = run
        for name, value in row.values.items():
            self.client.log_param(run, name, value)

    def log(self, row: TrialRow, figures: Figures) -> None:
        """The figures of an epoch."""
        for name, value in figures.items():
            self.client.log_metric(self.runs[row.number], name, value, step=int(row.last["epoch"]))

    def end(self, row: TrialRow) -> None:
        """How it ended."""
        self.client.set_terminated(self.runs.pop(row.number), MLFLOW_STATUS.get(row.state, "KILLED"))


class WeightsAndBiases:
    """A project of the search's name, as `wandb login` and $WANDB_MODE say; a run for each trial."""

    def __init__(self, space: SpaceFile) -> None:
        self.wandb, self.project = _package("wandb"), space.name
        self.runs: dict[int, Any] = {}

    def begin(self, row: TrialRow) -> None:
        """A run with the trial's settings."""
        self.runs[row.number] = self.wandb.init(
            project=self.project, name=f"trial {row.number}: {describe(row.values)}", config=row.values,
            reinit="create_new", settings={"console": "off", "silent": True},
        )  # fmt: skip

    def log(self, row: TrialRow, figures: Figures) -> None:
        """The figures of an epoch."""
        self.runs[row.number].log(figures, step=int(row.last["epoch"]))

    def end(self, row: TrialRow) -> None:
        """How it ended."""
        run = self.runs.pop(row.number)
        run.summary["state"] = row.state
        run.finish(exit_code=int(row.state in ("failed", "infeasible")))


class Tracked:
    """A watcher that passes trials on to a service; one that fails is left alone from then on, and the search goes on."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.begun: dict[int, TrialRow] = {}
        self.works = True

    def started(self, row: TrialRow) -> None:
        """A trial was handed to a slot."""
        self.begun[row.number] = row
        self._try(lambda: self.tracker.begin(row))

    def reported(self, row: TrialRow) -> None:
        """An epoch is done."""
        figures = {name: value for name, value in row.last.items() if math.isfinite(value)}
        if row.number in self.begun:
            self._try(lambda: self.tracker.log(row, figures))

    def ended(self, row: TrialRow) -> None:
        """A trial ran to its end, was stopped early, or failed."""
        if self.begun.pop(row.number, None) is not None:
            self._try(lambda: self.tracker.end(row))

    def _try(self, work: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            work()
        except Exception as error:  # each service raises its own
            self.works = False
            print(
                f"{self.name} takes no more figures ({' '.join(str(error).split())[:200]}); the search goes on without it"
            )


@contextmanager
def trackers(names: Sequence[str], space: SpaceFile) -> Iterator[list[Tracked]]:
    """The services by their names in SERVICES, for the time of a search.

    Raises BadInput: an unknown name, a package that is not installed, a service that does not answer.
    """
    found = []
    for name in dict.fromkeys(names):
        if name not in SERVICES:
            raise BadInput(f"--log-to: unknown service '{name}'; {did_you_mean(name, SERVICES)}")
        try:
            found.append(Tracked(name, SERVICES[name](space)))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"--log-to {name}: must answer, but says: {' '.join(str(error).split())[:200]}; check its address "
                           "and login, or leave it out") from None  # fmt: skip
    try:
        yield found
    finally:
        for tracked in found:  # of a search that was cut short
            for row in list(tracked.begun.values()):
                tracked.ended(row)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise BadInput(
            f"--log-to {name}: needs the package {name}, but it is not installed; pip install {name}"
        ) from None


SERVICES: dict[str, Callable[[SpaceFile], Tracker]] = {"mlflow": MLflow, "wandb": WeightsAndBiases}
