"""A search: Ray Tune drives warm slots, Optuna chooses the settings."""

from __future__ import annotations

import logging
import os
import platform
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

import lift_ray
from lift_ray.distributed.capacity import Need
from lift_ray.distributed.checkpoint import FOLDER, keep, read_record
from lift_ray.distributed.monitor import Monitor, trial_number
from lift_ray.distributed.slot import PROBLEM, Slot
from lift_ray.errors import BadInput, RunFailed
from lift_ray.results.output import Output
from lift_ray.results.rows import TrialRow, best_row, write_json
from lift_ray.settings.files import dump_yaml
from lift_ray.settings.run import apply_overrides
from lift_ray.settings.space import Asha, Draw, SpaceFile

MAX_FAILURES = 2


@dataclass
class Found:
    """What a search found.

    Args:
        best: the finished trial with the best objective.
        checkpoint: Tune's, of the best trial.
        compared: (label, metrics of validation and test) for zero-shot, the start points and the best.
    """

    rows: list[TrialRow]
    best: TrialRow
    checkpoint: Any
    compared: list[tuple[str, dict[str, float]]]
    time_s: dict[str, float]


class Search(OptunaSearch):  # type: ignore[misc]
    """Ray's Optuna search, but trials that were stopped early reach Optuna as pruned with their last value.

    Ray tells them as complete, which makes the sampler take one epoch's value for the final one.
    """

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended."""
        # Tune sets `done` itself, so the epochs tell whether the trial came to its end.
        early = (result or {}).get("epoch", 0) < (result or {}).get("num_epochs", 0)
        if result and early and not error and trial_id not in self._completed_trials:
            trial = self._ot_trials[trial_id]
            trial.report(result[self.metric], result["training_iteration"])  # Tune hands the last result only to us
            self._ot_study.tell(trial, state=TrialState.PRUNED)
            self._completed_trials.add(trial_id)
        else:
            super().on_trial_complete(trial_id, result, error)


class KeepStart(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA that lets the start points run to their end: they are what the search is compared with."""

    def __init__(self, start: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(**options)
        self.start = start

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """ASHA's decision, unless this is a start point that is not done."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if matching_start(self.start, trial.config) is not None else action


def matching_start(start: list[dict[str, Any]], values: dict[str, Any]) -> int | None:
    """The number of the start point that these values are; None for a drawn trial."""
    return next((i for i, point in enumerate(start) if all(values.get(k) == v for k, v in point.items())), None)


def run_study(space: SpaceFile, dataset: str, need: Need, slots: int, out: Output) -> Found:
    """Search, then compare the best with zero-shot and the start points on the test split.

    Args:
        dataset: URI, absolute.
        slots: trials at a time.
        out: for Tune's state, Optuna's journal and the trials table.

    Raises:
        BadInput: settings that only a worker could find wrong (a backbone that cannot be loaded, for example).
        RunFailed: no trial finished.
    """
    logging.getLogger("ray.tune").setLevel(
        logging.CRITICAL
    )  # what fails is in the table, and in each trial's error.txt
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # TPE's `group`
    metric, mode = space.objective
    began = time.monotonic()
    monitor = Monitor(space, out)
    bundles = tune.PlacementGroupFactory([need.bundle()] * need.workers)
    trainable = tune.with_resources(tune.with_parameters(Slot, space=space, dataset=dataset, need=need), bundles)
    stopper = StopOnProblem()
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=space.search.trials, max_concurrent_trials=slots, reuse_actors=True, metric=metric, mode=mode,
            search_alg=searcher(space, out.folder), scheduler=scheduler(space),
            trial_dirname_creator=lambda trial: f"trial-{trial_number(trial):04d}",
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=out.url, verbose=0, callbacks=[monitor],
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES), stop=stopper,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, checkpoint_at_end=True, num_to_keep=1),
        ),
    )  # fmt: skip
    with monitor:
        grid = tuner.fit()
    if stopper.problem:
        raise BadInput(stopper.problem)
    rows = list(monitor.rows.values())
    best = best_row(rows, metric, mode)
    if best is None:
        errors = [row.error for row in rows if row.error]
        raise RunFailed(
            f"{out}: at least one trial must finish, but none of {len(rows)} did"
            + (f"; the last error: {errors[-1]}" if errors else "")
            + f"; see {out.url}/tune"
        )
    searched_s = time.monotonic() - began
    checkpoints = {r.metrics["trial_id"]: r.checkpoint for r in grid if r.checkpoint and r.metrics}
    compared = compare(space, dataset, need, slots, rows, best, checkpoints)
    times = where_time_went(rows, monitor, slots, searched_s, time.monotonic() - began)
    return Found(rows, best, checkpoints[best.trial_id], compared, times)


def searcher(space: SpaceFile, out: Path) -> Search:
    """Optuna behind Ray's interface; every report is in the journal the moment it is made."""
    seed = space.search.seed
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    metric, mode = space.objective
    return Search(
        Draw(space.space), metric=metric, mode=mode, sampler=samplers[space.search.sampler](), study_name=space.name,
        storage=JournalStorage(JournalFileBackend(str(out / "optuna.journal"))),
        points_to_evaluate=[dict(point) for point in space.start_points()] or None,
    )  # fmt: skip


def scheduler(space: SpaceFile) -> Any:
    """The rule that stops trials early."""
    chosen = space.search.scheduler
    if not isinstance(chosen, Asha):
        return FIFOScheduler()
    return KeepStart(space.start_points(), time_attr="epoch", max_t=space.most_epochs(), grace_period=chosen.grace_epochs,
                     reduction_factor=chosen.reduction_factor)  # fmt: skip


class StopOnProblem(tune.Stopper):  # type: ignore[misc]
    """Ends the search at once when a slot finds the user's input bad: every other trial would fail the same way."""

    def __init__(self) -> None:
        self.problem = ""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tune asks this of every result."""
        self.problem = result.get(PROBLEM, "") or self.problem
        return bool(self.problem)

    def stop_all(self) -> bool:
        """Tune asks this between results."""
        return bool(self.problem)


def compare(
    space: SpaceFile,
    dataset: str,
    need: Need,
    slots: int,
    rows: list[TrialRow],
    best: TrialRow,
    checkpoints: dict[str, Any],
) -> list[tuple[str, dict[str, float]]]:
    """Validation and test metrics of zero-shot, of every start point, and of the best."""
    shown: list[tuple[str, TrialRow]] = []
    for index, label in enumerate(space.start_labels()):
        shown += [(label, row) for row in rows if matching_start(space.start_points(), row.values) == index][:1]
    shown = [(label, row) for label, row in shown if row.state == "finished"] + [("best found", best)]
    jobs: list[tuple[dict[str, Any], Any, list[str]]] = [
        (apply_overrides(space.base, {"tuner.kind": "zero_shot", "extra_tuner": None}), None, ["validation", "test"])
    ]
    unique = list({row.trial_id: row for _, row in shown}.values())
    jobs += [(space.config(row.values).to_dict(), checkpoints[row.trial_id], ["test"]) for row in unique]
    # The slots are gone, so on a CPU their cores are free.
    num_cpus = need.cpus if need.gpus else need.cpus * min(slots, int(os.cpu_count() or 1) // need.cpus or 1)
    task = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(_evaluate)
    zero_shot, *tested = ray.get(task.remote(dataset, bool(need.gpus), num_cpus, jobs))
    by_trial = {row.trial_id: figures for row, figures in zip(unique, tested, strict=True)}
    validated = {row.trial_id: {k: v for k, v in row.last.items() if k.startswith("validation/")} for row in unique}
    return [("zero-shot", zero_shot)] + [
        (label, validated[row.trial_id] | by_trial[row.trial_id]) for label, row in shown
    ]


def _evaluate(
    dataset: str, use_gpu: bool, num_cpus: int, jobs: list[tuple[dict[str, Any], Any, list[str]]]
) -> list[dict[str, float]]:
    """evaluate_all in a worker; checkpoints are fetched from where Tune stored them."""
    from lift_ray.distributed.evaluation import evaluate_all  # brings torch, which the driver does not need

    with ExitStack() as fetched:
        local = [
            (config, Path(fetched.enter_context(stored.as_directory())) / FOLDER if stored else None, splits)
            for config, stored, splits in jobs
        ]
        return evaluate_all(dataset, use_gpu, num_cpus, local)


def where_time_went(
    rows: list[TrialRow], monitor: Monitor, slots: int, searched_s: float, total_s: float
) -> dict[str, float]:
    """Seconds of wall time; the slots' own time is divided by their number."""
    search_s = max(0.0, monitor.last_result_s - (monitor.first_step_s or 0.0))
    per_slot = {
        name: sum(row.seconds(name) for row in rows) / slots for name in ("train_s", "data_wait_s", "evaluate_s")
    }
    first_loads = sum(row.seconds("load_s") for row in rows) / slots
    return {
        "start": monitor.first_step_s or 0.0,
        "of which loading": first_loads,
        "training steps": per_slot["train_s"] - per_slot["data_wait_s"],
        "waiting for data": per_slot["data_wait_s"],
        "evaluation": per_slot["evaluate_s"],
        "between trials and idle": max(0.0, search_s - per_slot["train_s"] - per_slot["evaluate_s"]),
        "final comparison": total_s - searched_s,
        "total": total_s,
    }


def write_found(space: SpaceFile, dataset: str, found: Found, out: Output) -> None:
    """best/, best.yaml and study.json; the trials table is there already. study.json comes last: its presence means done."""
    best = out.folder / "best"
    keep(found.checkpoint, best)
    record = read_record(best)
    write_json(dict(found.compared[-1][1]), best / "metrics.json")
    header = f"# Best of the search {space.name} (trial {found.best.number}); python -m lift_ray.train best.yaml trains it again.\n"
    dump_yaml({"name": f"{space.name}-best", "dataset": dataset, **record.config}, out.folder / "best.yaml", header)
    about: dict[str, Any] = {
        "name": space.name, "dataset": dataset, "space": space.model_dump(mode="json", by_alias=True),
        "best": {"trial": found.best.number, "values": found.best.values, "digest": record.digest, "config": record.config},
        "compared": [{"label": label, **figures} for label, figures in found.compared],
        "time_s": {name: round(seconds, 2) for name, seconds in found.time_s.items()},
        "versions": {"lift_ray": lift_ray.__version__, "ray": ray.__version__, "optuna": optuna.__version__,
                     "python": platform.python_version()},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
    }  # fmt: skip
    write_json(about, out.folder / "study.json")
    out.publish()
