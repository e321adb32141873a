"""Logging of trials and runs to MLflow, Weights & Biases or TensorBoard, if `--log-to` asks for it."""

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

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.errors import BadInput, Stopped, did_you_mean, one_line
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.settings.base import dotted
from lift_ray.terminal.tables import describe
from lift_ray.text import say
from lift_ray.training.events import EpochEnded, Event, RunStarted, TestEnded

MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "infeasible": "FAILED"}  # all other states: stopped early
LONGEST_NAME = 120  # characters of a folder name
Settings = Mapping[str, Any]
Figures = dict[str, float]  # by flat name, as services show them


class Tracker(Protocol):
    """A service that stores runs under their titles. It is constructed with the name of the search or run, and the result folder."""

    def begin(self, title: str, settings: Settings) -> None: ...

    def log(self, title: str, figures: Figures, epoch: int) -> None: ...

    def end(self, title: str, state: str) -> None: ...


class MLflow:
    """Runs of one MLflow experiment, at $MLFLOW_TRACKING_URI."""

    def __init__(self, name: str, folder: Path) -> None:
        self.client, self.entities = _package("mlflow").MlflowClient(), _package("mlflow.entities")
        experiment = self.client.get_experiment_by_name(name)
        self.experiment = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.runs: dict[str, str] = {}

    def begin(self, title: str, settings: Settings) -> None:
        """Create a run with its settings."""
        run = self.client.create_run(self.experiment, run_name=title).info.run_id
        self.runs[title] = run
        self.client.log_batch(run, params=[self.entities.Param(name, str(value)) for name, value in settings.items()])

    def log(self, title: str, figures: Figures, epoch: int) -> None:
        """Log the metrics of an epoch."""
        now = round(1000 * time.time())
        metrics = [self.entities.Metric(name, value, now, epoch) for name, value in figures.items()]
        self.client.log_batch(self.runs[title], metrics=metrics)

    def end(self, title: str, state: str) -> None:
        """Store the final state of a run."""
        self.client.set_terminated(self.runs.pop(title), MLFLOW_STATUS.get(state, "KILLED"))


class WeightsAndBiases:
    """Runs of one Weights & Biases project, according to `wandb login` and $WANDB_MODE."""

    def __init__(self, name: str, folder: Path) -> None:
        self.wandb, self.project = _package("wandb"), name
        self.runs: dict[str, Any] = {}

    def begin(self, title: str, settings: Settings) -> None:
        """Create a run with its settings."""
        self.runs[title] = self.wandb.init(
            project=self.project,
            name=title,
            config=dict(settings),
            reinit="create_new",
            settings={"console": "off", "silent": True},
        )

    def log(self, title: str, figures: Figures, epoch: int) -> None:
        """Log the metrics of an epoch."""
        self.runs[title].log(figures, step=epoch)

    def end(self, title: str, state: str) -> None:
        """Store the final state of a run."""
        run = self.runs.pop(title)
        run.summary["state"] = state
        run.finish(exit_code=int(state in ("failed", "infeasible")))


class TensorBoard:
    """Folders in OUT/tensorboard, with settings and last metrics under HPARAMS."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        self.runs: dict[str, tuple[Any, Settings, Figures]] = {}

    def begin(self, title: str, settings: Settings) -> None:
        """Create a folder for the events of a run."""
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        place = self.folder / re.sub(r"[^\w.]+", "-", title)[:LONGEST_NAME]
        self.runs[title] = SummaryWriter(str(place)), settings, {}

    def log(self, title: str, figures: Figures, epoch: int) -> None:
        """Log the metrics of an epoch."""
        writer, _, last = self.runs[title]
        last |= figures
        for name, value in figures.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    def end(self, title: str, state: str) -> None:
        """Store settings, final state and last metrics, for comparison with other runs."""
        from tensorboardX.summary import hparams  # type: ignore[import-untyped]

        writer, settings, last = self.runs.pop(title)
        plain = {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()}
        for summary in hparams({**plain, "state": state}, last):  # writer.add_hparams makes a run of its own for them
            writer.file_writer.add_summary(summary)
        writer.close()


class Tracked:
    """Forwarder of trials or runs to a service. After the first failure the service is not used again, and training continues.

    It has the methods of a watcher of a search.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.begun: set[str] = set()
        self.works = True

    def begin(self, title: str, settings: Settings) -> None:
        """Create a run; its title must be unique."""
        self.begun.add(title)
        self._try(lambda: self.tracker.begin(title, settings))

    def log(self, title: str, metrics: EpochMetrics) -> None:
        """Log the finite metrics of an epoch."""
        figures = {name: value for name, value in metrics.flat().items() if name != "epoch" and math.isfinite(value)}
        if title in self.begun:
            self._try(lambda: self.tracker.log(title, figures, metrics.epoch))

    def end(self, title: str, state: str) -> None:
        """Close a run that finished, was stopped, or failed."""
        if title in self.begun:
            self.begun.remove(title)
            self._try(lambda: self.tracker.end(title, state))

    def started(self, row: TrialRow) -> None:
        """Log that a slot started a trial, with the earlier epochs of a trial that continues."""
        self.begin(_title(row), row.values)
        for metrics in row.history:
            self.log(_title(row), metrics)

    def reported(self, row: TrialRow) -> None:
        """Log the last epoch of a trial."""
        self.log(_title(row), row.last)

    def ended(self, row: TrialRow) -> None:
        """Close a trial that finished, was stopped early, or failed."""
        self.end(_title(row), row.state)

    def _try(self, work: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            work()
        except Exception as error:  # each service has its own errors
            self.works = False
            say(f"{self.name} accepts no more metrics ({one_line(error, 200)}); continuing without it")


def _title(row: TrialRow) -> str:
    return f"trial {row.number}: {describe(row.values)}"


@contextmanager
def trackers(names: Sequence[str], name: str, folder: Path) -> Iterator[list[Tracked]]:
    """Open services for the duration of a search or run.

    Args:
        names: keys of SERVICES.
        name: name of the search or run.
        folder: its result folder.

    Raises BadInput for an unknown name, a package that is not installed, or a service that does not answer.
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
                f"--log-to {service}",
                f"does not answer: {one_line(error, 200)}",
                remedy="check its address and login, or leave it out",
            ) from None
    try:
        yield found
    finally:
        for tracked in found:  # runs are left if the search was stopped early
            for title in list(tracked.begun):
                tracked.end(title, "stopped")


def check_service(name: str) -> None:
    """Raise BadInput if a service is unknown or its package is not installed."""
    if name not in SERVICES:
        raise BadInput("--log-to", f"unknown service '{name}'", remedy=did_you_mean(name, SERVICES))
    if find_spec(PACKAGES.get(name, name)) is None:
        raise _not_installed(name)


@contextmanager
def followed(services: Sequence[Tracked], name: str, config: Settings) -> Iterator[Callable[[Event], None]]:
    """Log a run of `train` to each service; yields a function that takes the run's events.

    Args:
        services: the services.
        name: name of the run.
        config: its settings, as a tree.
    """
    for service in services:
        service.begin(name, {path: value for path, value in dotted(config) if value not in (None, {})})
    told = -1

    def tell(message: Event) -> None:
        nonlocal told
        history = message.history if isinstance(message, RunStarted) else []  # of a resumed run, all earlier epochs
        if isinstance(message, EpochEnded | TestEnded):
            history = [message.metrics]
        for metrics in history:
            if metrics.epoch > told or metrics.test:
                for service in services:
                    service.log(name, metrics)
        told = max([told, *(metrics.epoch for metrics in history)])

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
    return BadInput(
        f"--log-to {name}", f"requires the package {name}", but="it is not installed", remedy=f"pip install {name}"
    )


PACKAGES = {"tensorboard": "tensorboardX"}
SERVICES: dict[str, Callable[[str, Path], Tracker]] = {
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
    "tensorboard": TensorBoard,
}
