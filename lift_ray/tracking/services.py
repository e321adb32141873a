"""Trials and runs in MLflow, Weights & Biases or TensorBoard, for those who keep all they do there: off unless --log-to asks for it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lift_ray.errors import BadInput, Stopped, did_you_mean
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.settings.base import dotted
from lift_ray.terminal.tables import describe
from lift_ray.training.events import EpochEnded, Event, Figures, RunStarted, TestEnded

MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "infeasible": "FAILED"}  # all else was cut short
LONGEST_NAME = 120  # of a folder
Settings = Mapping[str, Any]


class Tracker(Protocol):
    """A service that keeps runs, known by their titles. Its arguments: the name of the search or run, and the result folder."""

    def begin(self, title: str, settings: Settings) -> None: ...

    def log(self, title: str, figures: Figures, epoch: int) -> None: ...

    def end(self, title: str, state: str) -> None: ...


class MLflow:
    """Runs of one experiment, where $MLFLOW_TRACKING_URI says."""

    def __init__(self, name: str, folder: Path) -> None:
        self.client, self.entities = _package("mlflow").MlflowClient(), _package("mlflow.entities")
        experiment = self.client.get_experiment_by_name(name)
        self.experiment = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.runs: dict[str, str] = {}

    def begin(self, title: str, settings: Settings) -> None:
        """A run with its settings."""
        run = self.client.create_run(self.experiment, run_name=title).info.run_id
        self.runs[title] = run
        self.client.log_batch(run, params=[self.entities.Param(name, str(value)) for name, value in settings.items()])

    def log(self, title: str, figures: Figures, epoch: int) -> None:
        """The figures of an epoch."""
        now = round(1000 * time.time())
        metrics = [self.entities.Metric(name, value, now, epoch) for name, value in figures.items()]
        self.client.log_batch(self.runs[title], metrics=metrics)

    def end(self, title: str, state: str) -> None:
        """How it ended."""
        self.client.set_terminated(self.runs.pop(title), MLFLOW_STATUS.get(state, "KILLED"))


class WeightsAndBiases:
    """Runs of one project, as `wandb login` and $WANDB_MODE say."""

    def __init__(self, name: str, folder: Path) -> None:
        self.wandb, self.project = _package("wandb"), name
        self.runs: dict[str, Any] = {}

    def begin(self, title: str, settings: Settings) -> None:
        """A run with its settings."""
        self.runs[title] = self.wandb.init(
            project=self.project,
            name=title,
            config=dict(settings),
            reinit="create_new",
            settings={"console": "off", "silent": True},
        )

    def log(self, title: str, figures: Figures, epoch: int) -> None:
        """The figures of an epoch."""
        self.runs[title].log(figures, step=epoch)

    def end(self, title: str, state: str) -> None:
        """How it ended."""
        run = self.runs.pop(title)
        run.summary["state"] = state
        run.finish(exit_code=int(state in ("failed", "infeasible")))


class TensorBoard:
    """Folders in OUT/tensorboard, with settings and last figures under HPARAMS."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        self.runs: dict[str, tuple[Any, Settings, Figures]] = {}

    def begin(self, title: str, settings: Settings) -> None:
        """A folder for its events."""
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        place = self.folder / re.sub(r"[^\w.]+", "-", title)[:LONGEST_NAME]
        self.runs[title] = SummaryWriter(str(place)), settings, {}

    def log(self, title: str, figures: Figures, epoch: int) -> None:
        """The figures of an epoch."""
        writer, _, last = self.runs[title]
        last |= figures
        for name, value in figures.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    def end(self, title: str, state: str) -> None:
        """Settings and last figures, side by side with the others'."""
        from tensorboardX.summary import hparams  # type: ignore[import-untyped]

        writer, settings, last = self.runs.pop(title)
        plain = {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()}
        for summary in hparams({**plain, "state": state}, last):  # writer.add_hparams makes a run of its own for them
            writer.file_writer.add_summary(summary)
        writer.close()


class Tracked:
    """Passes trials or runs on to a service; one that fails is left alone from then on, and the work goes on.

    To a search it is a watcher.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.begun: set[str] = set()
        self.works = True

    def begin(self, title: str, settings: Settings) -> None:
        """A run, of which nothing else is called so."""
        self.begun.add(title)
        self._try(lambda: self.tracker.begin(title, settings))

    def log(self, title: str, figures: Figures) -> None:
        """The figures of an epoch, those that are numbers."""
        numbers = {name: value for name, value in figures.items() if name != "epoch" and math.isfinite(value)}
        if title in self.begun:
            self._try(lambda: self.tracker.log(title, numbers, int(figures["epoch"])))

    def end(self, title: str, state: str) -> None:
        """It ran to its end, was stopped, or failed."""
        if title in self.begun:
            self.begun.remove(title)
            self._try(lambda: self.tracker.end(title, state))

    def started(self, row: TrialRow) -> None:
        """A trial was handed to a slot; of one that goes on, the epochs before are told too."""
        self.begin(_title(row), row.values)
        for figures in row.history:
            self.log(_title(row), figures)

    def reported(self, row: TrialRow) -> None:
        """An epoch is done."""
        self.log(_title(row), row.last)

    def ended(self, row: TrialRow) -> None:
        """A trial ran to its end, was stopped early, or failed."""
        self.end(_title(row), row.state)

    def _try(self, work: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            work()
        except Exception as error:  # each service raises its own
            self.works = False
            print(f"{self.name} takes no more figures ({' '.join(str(error).split())[:200]}); going on without it")


def _title(row: TrialRow) -> str:
    return f"trial {row.number}: {describe(row.values)}"


@contextmanager
def trackers(names: Sequence[str], name: str, folder: Path) -> Iterator[list[Tracked]]:
    """The services by their names in SERVICES, for the time of a search or a run.

    Args:
        name: of the search or run.
        folder: where its results go.

    Raises BadInput: an unknown name, a package that is not installed, a service that does not answer.
    """
    found = []
    for service in dict.fromkeys(names):
        check_service(service)
        try:
            found.append(Tracked(service, SERVICES[service](name, folder)))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(
                f"--log-to {service}: must answer, but says: {' '.join(str(error).split())[:200]}; check its "
                "address and login, or leave it out"
            ) from None
    try:
        yield found
    finally:
        for tracked in found:  # of a search that was cut short
            for title in list(tracked.begun):
                tracked.end(title, "stopped")


def check_service(name: str) -> None:
    """Raises BadInput for a service that is not known, or whose package is not installed."""
    if name not in SERVICES:
        raise BadInput(f"--log-to: unknown service '{name}'; {did_you_mean(name, SERVICES)}")
    if find_spec(PACKAGES.get(name, name)) is None:
        raise _not_installed(name)


@contextmanager
def followed(services: Sequence[Tracked], name: str, config: Settings) -> Iterator[Callable[[Event], None]]:
    """A run of `train` in each service; yields what is to be told of its messages.

    Args:
        name: of the run.
        config: its settings, as a tree.
    """
    for service in services:
        service.begin(name, {path: value for path, value in dotted(config) if value not in (None, {})})
    told = -1

    def tell(message: Event) -> None:
        nonlocal told
        history = message.history if isinstance(message, RunStarted) else []  # all of it, of a run that was resumed
        if isinstance(message, EpochEnded):
            history = [message.figures]
        new = [figures for figures in history if figures["epoch"] > told]
        told = max([told, *(int(figures["epoch"]) for figures in new)])
        for figures in [*new, *([message.figures] if isinstance(message, TestEnded) else [])]:
            for service in services:
                service.log(name, figures)

    state = "failed"
    try:
        yield tell
        state = "finished"
    except (Stopped, KeyboardInterrupt):
        state = "stopped"
        raise
    finally:
        for service in services:
            service.end(name, state)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise _not_installed(name) from None


def _not_installed(name: str) -> BadInput:
    return BadInput(f"--log-to {name}: needs the package {name}, but it is not installed; pip install {name}")


PACKAGES = {"tensorboard": "tensorboardX"}


SERVICES: dict[str, Callable[[str, Path], Tracker]] = {
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
    "tensorboard": TensorBoard,
}
