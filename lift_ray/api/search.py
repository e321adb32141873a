"""Search for the best settings: `lift_ray.search`, which `python -m lift_ray.tune` calls too."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lift_ray.api.data import open_dataset
from lift_ray.api.finished import FinishedStudy
from lift_ray.api.space import SearchSpace
from lift_ray.data.dataset import Dataset
from lift_ray.data.folds import Folds
from lift_ray.epoch_metrics import MAIN_METRIC
from lift_ray.errors import BadInput, Stopped
from lift_ray.evaluation.metrics import groups_of
from lift_ray.settings.methods import HalfLabelledConfig, check_splits
from lift_ray.settings.run_file import too_large
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.layout import SPACE
from lift_ray.storage.output import Output
from lift_ray.text import count, say

if TYPE_CHECKING:
    from ray.tune import Callback

    from lift_ray.ray_runtime.capacity import Need
    from lift_ray.searching.study import Study


@dataclass(frozen=True)
class SearchOptions:
    """How a search runs, apart from its space.

    Attributes:
        out: folder or URL of the results; None for runs/NAME-DATE-TIME.
        resume: continue the search in `out`.
        storage: database for Optuna; None for a journal file in `out`.
        dashboard: serve Ray's dashboard if Ray is started here.
        live_port: port of the live page on 127.0.0.1, 0 for a free one; None for no page.
        log_to: services that trials are also logged to.
        callbacks: callbacks of Ray Tune, as in `lift_ray.searching.driver.run_search`.
    """

    out: str | None = None
    resume: bool = False
    storage: str | None = None
    dashboard: bool = False
    live_port: int | None = None
    log_to: Sequence[str] = ()
    callbacks: Sequence[Callback] = ()


def search(
    space: SearchSpace,
    data: Dataset | str | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    storage: str | None = None,
    log_to: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
) -> FinishedStudy:
    """Search a space with Optuna on Ray Tune, and compare the best settings with zero-shot and the baselines.

    Uses the Ray that this process is connected to, or the cluster at $RAY_ADDRESS; otherwise it starts Ray on this machine and
    stops it at the end.

    Args:
        space: what to search, and how.
        data: the dataset, or anything that `open_dataset` opens; None for that of the space.
        out: new folder or URL for the results; None for runs/NAME-DATE-TIME.
        resume: continue the search in `out`: finished work is kept. Without a search there, begin one.
        storage: URL of a database for Optuna; None for a journal file in `out`.
        log_to: also log trials to mlflow, wandb or tensorboard.
        callbacks: callbacks of Ray Tune.

    Returns:
        The study, which `FinishedStudy(out)` opens again.

    Raises:
        BadInput: the space, the data or `out` cannot be used.
        RunFailed: no trial finished, or results cannot be written.
        Stopped: Ctrl-C or SIGTERM; call it again with `resume=True` to continue.
    """
    opened = open_dataset(space.on(data).dataset) if not isinstance(data, Dataset) else data
    file = space.on(opened.uri)
    target = os.fspath(out) if out is not None else file.out
    resume = resume and target is not None and Output(target).holds(SPACE)
    options = SearchOptions(target, resume, storage, log_to=log_to, callbacks=callbacks)
    check_data(file, opened)
    return run_space(file, opened, options)


def run_space(space: SpaceFile, data: Dataset, options: SearchOptions) -> FinishedStudy:
    """Start or join Ray, run the search, write and print the results, and write the report. Exceptions as in `search`."""
    from lift_ray.ray_runtime.session import check_temporary_folder, connected
    from lift_ray.reporting.report import kept_up_to_date, try_report
    from lift_ray.searching.driver import run_search
    from lift_ray.searching.driver_lock import study_in
    from lift_ray.searching.interrupts import Interrupts
    from lift_ray.searching.live_page import Status, job_metadata, served, tell_job
    from lift_ray.searching.preflight import backbones_of
    from lift_ray.searching.result_files import write_result
    from lift_ray.searching.result_text import print_result
    from lift_ray.searching.search_data import SearchData
    from lift_ray.terminal.waiting import waiting
    from lift_ray.tracking.services import trackers
    from lift_ray.training.backbone_check import check_weights_file

    for backbone in backbones_of(space):
        check_weights_file(backbone)
    facts = SearchData.of(space, data)
    target = Output(options.out or f"runs/{space.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    began, status = time.monotonic(), Status()
    where = os.environ.get("RAY_ADDRESS")
    if not where:
        check_temporary_folder()  # before anything is written
    say(f"{space.name}: {f'joining the Ray cluster at {where}' if where else 'starting Ray on this machine'} ...")
    with (
        Interrupts() as interrupts,
        trackers(list(options.log_to), space.name, target.folder) as watchers,
        study_in(target, space, data.uri, url=options.storage, resume=options.resume) as study,
        served(space, study.rows, target.folder, options.live_port, status) as page,
        ExitStack() as cluster,
    ):
        with waiting("starting Ray"):
            nodes = cluster.enter_context(connected(dashboard=options.dashboard, metadata=job_metadata(space, page)))
        from lift_ray.ray_runtime.capacity import num_slots, slots_now

        interrupts.listen()
        need, slots = num_slots(space.scale, nodes)
        of_refits = {"workers_per_trial": space.scale.refit_workers}
        num_slots(space.scale.model_copy(update=of_refits), nodes)  # must fit too
        started_s = time.monotonic() - began
        _print_started(study, options.resume, min(slots, space.num_trials), need, target)
        if page:
            say(f"live page: {page}")
            tell_job(page)
        _write_about(space, data, need, target)
        try:
            with kept_up_to_date(target):
                found = run_search(
                    study,
                    data.uri,
                    need,
                    lambda: slots_now(space.scale, need),
                    target,
                    interrupts,
                    data=facts,
                    show=status.show,
                    watchers=watchers,
                    callbacks=options.callbacks,
                )
        except Stopped:
            try_report(target)
            raise
        found.time_s["start"] += started_s
        found.time_s["total"] += started_s
        write_result(space, data, facts, found, target)
    print_result(space, found, facts, target)
    with waiting("writing the report"):
        page = try_report(target)
    if page:
        say(f"report: {page}")
    return FinishedStudy(target.url)


def _write_about(space: SpaceFile, data: Dataset, need: Need, out: Output) -> None:
    """Write OUT/space.json, from which a report on a running search takes what study.json says at the end."""
    from lift_ray.ray_runtime.session import machine
    from lift_ray.reporting.trial_rows import write_json

    about = {
        "name": space.name,
        "dataset": data.uri,
        "space": space.model_dump(mode="json", by_alias=True),
        "each_trial": asdict(need),
        "machine": machine(),
    }
    write_json(about, out.folder / SPACE)


def _print_started(study: Study, resume: bool, at_once: int, need: Need, out: Output) -> None:
    from lift_ray.ray_runtime.session import dashboard_url

    space = study.space
    before = f" ({sum(row.has_ended for row in study.rows.values())} ended before)" if resume else ""
    say(f"{space.name}: {count(space.num_trials, 'trial')}{before}, {at_once} at a time, each {need}; results in {out}")
    if url := dashboard_url():
        say(f"dashboard: {url} (print its token with: ray get-auth-token)")


def check_data(space: SpaceFile, data: Dataset) -> None:
    """Raise BadInput for a dataset that the space cannot be searched on."""
    for split in ("train", "test") if space.test == "split" else ("train",):
        data.split(split)
    check_splits(space.config({}).method, data.uri, data.splits)
    folds = Folds(space.search.folds, space.search.seed)
    views = [folds.view(data, fold) for fold in range(1, folds.number + 1)]
    if empty := [fold for fold, view in enumerate(views, 1) if not view.split("validation").num_samples]:
        raise BadInput(
            "search.folds", "must leave images or groups for each fold", f"none in fold {empty[0]}", "lower it"
        )
    _check_method(space)
    check_objectives(space, views[0])
    frac = min(float(str(value)) for value in _values(space, "optim.data_frac", space.config({}).optim.data_frac))
    _check_batch(space, min(view.split("train").subset(frac).num_samples for view in views))


def _check_method(space: SpaceFile) -> None:
    """Raise BadInput for folds with a method whose unlabeled images include the labeled ones, also those of a fold."""
    method = space.config({}).method
    if space.search.folds > 1 and isinstance(method, HalfLabelledConfig):
        raise BadInput(
            "search.folds",
            f"must be 1 with method {method.kind}, whose unlabeled images include those that a fold holds out",
            space.search.folds,
            "remove it",
        )


def _values(space: SpaceFile, name: str, default: object) -> list[object]:
    """Return the values that bound a setting of the trials: all choices, or both ends, and those of the baselines."""
    searched = space.space.get(name)
    values = [default] if searched is None else list(searched.choices or searched.bounds or ())
    return [*values, *(point[name] for point in space.baseline_values() if name in point)]


def check_objectives(space: SpaceFile, data: Dataset) -> None:
    """Raise BadInput if a metric is of a group without classes, or whose classes have no validation images.

    Every other metric has a value, because a split has at least one image.
    """
    groups = groups_of(data, space.config({}).evaluation.group_bounds)
    measured = groups.names[data.split("validation").class_counts(data.num_classes) > 0]
    wanted = [("objectives", metric) for metric in space.objectives]
    for section, metric in [*wanted, *(("constraints", metric) for metric in space.constraints)]:
        group = metric.removeprefix("validation/")
        if group not in groups.rules or group in measured:
            continue
        what = f"classes with {groups.rules[group]} training images"
        what += ", and validation images of them" if group in groups.names else ""
        raise BadInput(
            section,
            f"{metric} requires {what}",
            but=f"{data.uri} has none",
            remedy=f"choose {MAIN_METRIC}",
        )


def _check_batch(space: SpaceFile, num_images: int) -> None:
    """Raise BadInput if a batch can be larger than the training split."""
    name = "optim.global_batch_size"
    sizes = _values(space, name, space.config({}).optim.global_batch_size)
    kinds = space.space["tuner.kind"].choices if "tuner.kind" in space.space else [space.config({}).tuner.kind]
    if kinds != ["zero_shot"] and (largest := max(int(str(size)) for size in sizes)) > num_images:
        raise too_large(largest, num_images)
