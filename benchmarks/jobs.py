"""Many runs in two processes for a benchmark: each finished run is a line of a JSONL file, and is not run again.

Each process has one torch thread and keeps the tower and the data from run to run; cached features are shared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lift_ray.epoch_metrics import MAIN, MAIN_METRIC, named
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig

DATASET = "embedded:caltech101-lt"
PROCESSES = 2

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run: its name in the table, seed, epochs, rate (None: the settings' own), what else differs from LIFT+, and the data."""

    name: str
    seed: int
    epochs: int
    rate: float | None
    overrides: dict[str, Any]
    dataset: str = DATASET

    def config(self) -> RunConfig:
        """Its settings, derived values not filled in."""
        own = {"seed": self.seed, "optim.epochs": self.epochs} | ({"optim.lr": self.rate} if self.rate else {})
        return RunConfig.model_validate(apply_overrides({}, {**self.overrides, **own}, RunConfig))

    @property
    def key(self) -> str:
        """What tells its line in the file."""
        return f"{self.name} {self.config().digest()}"


@dataclass
class Stopwatch:
    """Wall and processor seconds while it runs."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    laps_s: list[float] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        yield
        self.laps_s.append(time.monotonic() - wall)
        self.wall_s += self.laps_s[-1]
        self.cpu_s += time.process_time() - cpu


_workspaces: list[Any] = []  # the Workspace of a worker process


def measure(job: Job, cold: bool, keep: Callable[[Job, Any], None] | None = None) -> Row:
    """Run a job in this process.

    Args:
        cold: start without anything kept of the runs before, and look at validation after every epoch, not only at the end.
        keep: takes the job and its finished Run, for what the row does not hold.

    Returns:
        What the job is, its digest, metrics of validation and test, `curve` (validation mean class accuracy of each epoch),
        `pseudo_labels` (their figures of each epoch), `seconds` and `cpu_s` from building the model to the last step (loading,
        validation and test left out), `laps_s` (building, then each epoch); or `failed`, the reason.
    """
    from lift_ray.errors import RunFailed
    from lift_ray.methods.world import Ranks
    from lift_ray.training.run import Run
    from lift_ray.training.shared_features import SharedFeatures
    from lift_ray.training.workspace import Workspace

    if cold or not _workspaces or _workspaces[0].dataset.uri != job.dataset:
        shared = None if cold else SharedFeatures()
        _workspaces[:] = [Workspace(job.dataset, Ranks.alone(num_cpus=1), shared)]
    workspace, watch, curve, pseudo_labels = _workspaces[0], Stopwatch(), [], []
    row: Row = {"key": job.key, "name": job.name, "seed": job.seed, "epochs": job.epochs, "rate": job.rate}
    workspace.backbone(job.config())
    try:
        with watch.running():
            run = Run(job.config(), workspace)
        while run.epoch < run.num_epochs:
            with watch.running():
                figures = run.train_epoch()
            pseudo_labels.append(named("unlabelled", figures.unlabelled))
            if cold or run.epoch == run.num_epochs:
                curve.append(run.evaluate("validation").metrics[MAIN])
    except RunFailed as error:
        return row | {"failed": str(error)}
    metrics = named("validation", run.evaluate("validation").metrics) if not curve else {MAIN_METRIC: curve[-1]}
    metrics |= named("test", run.evaluate("test").metrics)
    if keep is not None:
        keep(job, run)
    return row | {
        "digest": run.config.digest(),
        "trained_parameters": run.num_trained,
        "seconds": watch.wall_s,
        "cpu_s": watch.cpu_s,
        "laps_s": watch.laps_s,
        "curve": curve,
        "metrics": metrics,
        "pseudo_labels": [found for found in pseudo_labels if found],
    }


def end_with_parent() -> None:
    """A worker ends when the process that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def read(path: Path) -> list[Row]:
    """The rows of a JSONL file; a last line that was cut off is taken out of it."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def work_through(
    path: Path,
    possible: Iterable[Job],
    choose: Callable[[list[Row]], list[Job]],
    *,
    cold: bool,
    minutes: float,
    keep: Callable[[Job, Any], None] | None = None,
) -> list[Row]:
    """Run the jobs that `choose` asks for, two at a time, until it asks for nothing new; returns the rows of `possible`.

    Args:
        path: where rows are appended, and read from.
        choose: from the rows so far, all jobs that should have been run by then, in order.
        minutes: no run starts after these.
        keep: as in `measure`; called in the process of the run.
    """
    began, keys = time.monotonic(), {job.key for job in possible}
    rows = [row for row in read(path) if row["key"] in keys]
    done = {row["key"] for row in rows}
    running: dict[Future[Row], str] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,  # features of earlier searches are not found there
        patch.dict(os.environ, LIFT_CACHE=cache),
        ProcessPoolExecutor(PROCESSES, context, end_with_parent) as pool,
        path.open("a") as file,
    ):
        while True:
            todo = [job for job in choose(rows) if job.key not in done and job.key not in running.values()]
            late = time.monotonic() - began > 60 * minutes
            if todo and late and not running:
                print(f"{minutes:g} minutes are over and runs are left: go on with --resume")
            for job in [] if late else todo[: PROCESSES - len(running)]:
                running[pool.submit(measure, job, cold, keep)] = job.key
            if not running:
                return rows
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                row = future.result()
                file.write(json.dumps(row) + "\n")
                file.flush()
                done.add(running.pop(future))
                rows.append(row)
                left = sum(job.key not in done for job in choose(rows))
                print(f"{time.monotonic() - began:5.0f} s  {told(row)}  ({left} left so far)", flush=True)


def told(row: Row) -> str:
    """One run in a line."""
    what = f"{row['name']}, {row['epochs']} epochs, rate {row['rate'] or 'of the settings'}, seed {row['seed']}"
    if "failed" in row:
        return f"{what}: {row['failed']}"
    return f"{what}: validation {100 * final(row):.1f}%, {row['seconds']:.0f} s"


def final(row: Row) -> float:
    """Validation mean class accuracy at the end; -1 for a run that failed."""
    return -1.0 if "failed" in row else float(row["metrics"][MAIN_METRIC])


def mean_std(values: Iterable[float]) -> dict[str, float]:
    """Mean, and sample standard deviation (0 for one value)."""
    found = list(values)
    return {"mean": statistics.fmean(found), "std": statistics.stdev(found) if len(found) > 1 else 0.0}


def plus_minus(value: dict[str, float] | None) -> str:
    """Percent: 12.3 ± 0.4."""
    return "-" if value is None else f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


def parser(description: str | None, epochs: int, minutes: float) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--epochs", type=int, default=epochs)
    out.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    out.add_argument("--minutes", type=float, default=minutes, help="no run starts after these (default %(default)g)")
    out.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "lift-ray-benchmarks", help="a folder")
    out.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    out.add_argument("--record", action="store_true", help="append the result to benchmarks/results")
    return out


def file_of(args: argparse.Namespace, name: str) -> Path:
    """Where the rows go. Exits when runs are there and --resume is not given."""
    path: Path = args.out / f"{name}.jsonl"
    if path.exists() and not args.resume:
        print(f"--out: must hold no {path.name}, but got {path}; give --resume, or another folder", file=sys.stderr)
        sys.exit(2)
    return path
