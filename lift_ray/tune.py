"""python -m lift_ray.tune: search for the settings that work best for rare classes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, Stopped, run_and_exit
from lift_ray.text import count, say

if TYPE_CHECKING:
    from lift_ray.data.dataset import Dataset
    from lift_ray.ray_runtime.capacity import Need
    from lift_ray.search.final_comparison import SearchResult
    from lift_ray.search.search_data import SearchData
    from lift_ray.search.study import Study
    from lift_ray.settings.space import SpaceFile
    from lift_ray.storage.output import Output


def _write_schema(path: str | None) -> None:
    """Write the JSON schema of search-space files, which editors use for completion and checks (--schema FILE)."""
    if path is None:
        return
    from lift_ray.settings.schema import write_schema

    write_schema(path)
    raise typer.Exit


@cli.app.command(short_help="Search for the settings that work best for rare classes.")
def tune(
    space_file: Annotated[str, typer.Argument(metavar="SPACE.yaml", help="The search space.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings to change in the file.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="New folder for the results, or an s3:// or gs:// URL.  [runs/NAME-DATE-TIME]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the search in --out; finished work is kept.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(help="Database for Optuna (postgresql://, mysql://, sqlite://).  [a journal file in --out]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; train nothing.")
    ] = False,
    dashboard: Annotated[bool, typer.Option(help="Serve Ray's dashboard if Ray is started on this machine.")] = True,
    live: Annotated[bool, typer.Option(help="Serve a live page of the search on 127.0.0.1.")] = True,
    live_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the live page; 0 for a free one.")] = 0,
    log_to: Annotated[
        list[str] | None,
        typer.Option(metavar="SERVICE", help="Also log trials to mlflow, wandb or tensorboard; may be repeated."),
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=_write_schema,
            help="Write the JSON schema of search-space files and exit.",
        ),
    ] = None,
) -> None:
    """Search a space of LIFT settings with Optuna on Ray Tune, and compare the best with the published recipe.

    Starts Ray on this machine, or uses the cluster at $RAY_ADDRESS (`ray job submit` sets it). Ctrl-C stops at the next step and
    writes the best trial so far; --resume continues.

    \b
    Examples:
      python -m lift_ray.tune search_spaces/quickstart.yaml
      python -m lift_ray.tune search_spaces/quickstart.yaml space.loss.tau.float=[0.5,1.5]
      python -m lift_ray.tune search_spaces/inat.yaml search.trials=24 --dry-run
      python -m lift_ray.tune search_spaces/inat.yaml --out s3://bucket/inat --resume
    """
    if not dry_run:
        say(f"reading {space_file} ...")  # the imports below take seconds on a slow machine
    from lift_ray.settings.checks import read_space
    from lift_ray.settings.overrides import parse_overrides

    space = read_space(space_file, parse_overrides(settings or []))
    if resume and not (out or space.out):
        raise BadInput(
            "--resume",
            "requires the folder of the search to continue",
            but="--out is missing",
            remedy="add --out FOLDER",
        )
    dataset, data = _open(space, dry_run)
    if dry_run:
        from lift_ray.search.preflight import check_before_start

        check_before_start(space, dataset, out=out or space.out, storage=storage, resume=resume, log_to=log_to or [])
        _print_plan(space, dataset, data)
        return
    assert data is not None
    _search(
        space,
        dataset,
        data,
        out or space.out,
        storage=storage,
        resume=resume,
        dashboard=dashboard,
        live_port=live_port if live else None,
        log_to=log_to or [],
    )


def _search(
    space: SpaceFile,
    dataset: str,
    data: Dataset,
    out: str | None,
    *,
    storage: str | None,
    resume: bool,
    dashboard: bool,
    live_port: int | None,
    log_to: list[str],
) -> None:
    """Start or join Ray, run the search, then write and print the results."""
    from lift_ray.ray_runtime.session import check_temporary_folder, connected, machine
    from lift_ray.reporting.report import kept_up_to_date, try_report
    from lift_ray.reporting.trial_rows import write_json
    from lift_ray.search.driver import run_search
    from lift_ray.search.driver_lock import study_in
    from lift_ray.search.interrupts import Interrupts
    from lift_ray.search.live_page import Status, job_metadata, served, tell_job
    from lift_ray.search.result_files import write_result
    from lift_ray.search.search_data import SearchData
    from lift_ray.storage.layout import SPACE
    from lift_ray.storage.output import Output
    from lift_ray.terminal.waiting import waiting
    from lift_ray.tracking.services import trackers

    facts = SearchData.of(space, data)
    target = Output(out or f"runs/{space.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    began, status = time.monotonic(), Status()
    where = os.environ.get("RAY_ADDRESS")
    if not where:
        check_temporary_folder()  # before anything is written
    say(f"{space.name}: {f'joining the Ray cluster at {where}' if where else 'starting Ray on this machine'} ...")
    with (
        Interrupts() as interrupts,
        trackers(log_to, space.name, target.folder) as watchers,
        study_in(target, space, dataset, url=storage, resume=resume) as study,
        served(space, study.rows, target.folder, live_port, status) as page,
        ExitStack() as cluster,
    ):
        with waiting("starting Ray"):
            nodes = cluster.enter_context(connected(dashboard=dashboard, metadata=job_metadata(space, page)))
        from lift_ray.ray_runtime.capacity import num_slots, slots_now

        interrupts.listen()
        need, slots = num_slots(space.scale, nodes)
        num_slots(
            space.scale.model_copy(update={"workers_per_trial": space.scale.refit_workers}), nodes
        )  # must fit too
        started_s = time.monotonic() - began
        _print_started(study, resume, min(slots, space.num_trials), need, target)
        if page:
            say(f"live page: {page}")
            tell_job(page)
        about = {
            "name": space.name,
            "dataset": dataset,
            "space": space.model_dump(mode="json", by_alias=True),
            "each_trial": asdict(need),
            "machine": machine(),
        }
        write_json(about, target.folder / SPACE)
        try:
            with kept_up_to_date(target):
                found = run_search(
                    study,
                    dataset,
                    need,
                    lambda: slots_now(space.scale, need),
                    target,
                    interrupts,
                    data=facts,
                    show=status.show,
                    watchers=watchers,
                )
        except Stopped:
            try_report(target)
            raise
        found.time_s["start"] += started_s
        found.time_s["total"] += started_s
        write_result(space, data, facts, found, target)
    _print_found(space, found, facts, target)
    with waiting("writing the report"):
        page = try_report(target)
    if page:
        say(f"report: {page}")


def _print_started(study: Study, resume: bool, at_once: int, need: Need, out: Output) -> None:
    from lift_ray.ray_runtime.session import dashboard_url

    space = study.space
    before = f" ({sum(row.has_ended for row in study.rows.values())} ended before)" if resume else ""
    say(f"{space.name}: {count(space.num_trials, 'trial')}{before}, {at_once} at a time, each {need}; results in {out}")
    if url := dashboard_url():
        say(f"dashboard: {url} (print its token with: ray get-auth-token)")


def _open(space: SpaceFile, dry_run: bool) -> tuple[str, Dataset | None]:
    """Return the dataset's absolute URI, and its index; None in a dry run on remote data, which is not opened."""
    from lift_ray.data.folds import Folds
    from lift_ray.data.open import open_dataset
    from lift_ray.settings.methods import check_splits

    if dry_run and "://" in space.dataset and not space.dataset.startswith("file://"):
        return space.dataset, None
    data = open_dataset(space.dataset)
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
    _check_objectives(space, views[0])
    frac = min(float(str(value)) for value in _values(space, "optim.data_frac", space.config({}).optim.data_frac))
    _check_batch(space, min(view.split("train").subset(frac).num_samples for view in views))
    return data.uri, data


def _check_method(space: SpaceFile) -> None:
    """Raise BadInput for folds with a method whose unlabeled images include the labeled ones, also those of a fold."""
    from lift_ray.settings.methods import HalfLabelledConfig

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


def _check_objectives(space: SpaceFile, data: Dataset) -> None:
    """Raise BadInput if a metric is of a group without classes, or whose classes have no validation images.

    Every other metric has a value, because a split has at least one image.
    """
    from lift_ray.epoch_metrics import MAIN_METRIC
    from lift_ray.evaluation.metrics import groups_of

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
    from lift_ray.settings.run_file import too_large

    name = "optim.global_batch_size"
    sizes = _values(space, name, space.config({}).optim.global_batch_size)
    kinds = space.space["tuner.kind"].choices if "tuner.kind" in space.space else [space.config({}).tuner.kind]
    if kinds != ["zero_shot"] and (largest := max(int(str(size)) for size in sizes)) > num_images:
        raise too_large(largest, num_images)


def _print_plan(space: SpaceFile, dataset: str, data: Dataset | None) -> None:
    from lift_ray.search.plan import plan
    from lift_ray.terminal.tables import console, titled

    table = titled(f"{space.name}: plan", box=None, show_header=False)
    for name, text in plan(space, dataset, data):
        table.add_row(name, text)
    console().print(table)
    say("checked: no errors found")


def _print_found(space: SpaceFile, found: SearchResult, data: SearchData, out: Output) -> None:
    from lift_ray.search.result_files import label_of
    from lift_ray.search.tables import candidate_table, curve_table, pareto_table
    from lift_ray.terminal.evaluation_tables import crossed_table, together_table
    from lift_ray.terminal.tables import accuracy_table, console, describe, seeds_table

    screen = console()
    states, best = [row.state for row in found.rows], found.choice.row
    say()
    if best.baseline is not None:
        say(f"The baseline {label_of(space, best)} is best: the search found nothing better.")
    ended = sum(row.has_ended for row in found.rows)
    screen.print(
        f"{count(ended, 'trial')}: {states.count('finished')} finished, {states.count('pruned')} stopped early, "
        + (f"{states.count('infeasible')} outside the constraints, " if space.constraints else "")
        + f"{states.count('failed')} failed"
        + (f"; {len(states) - ended} begun and left out" if ended < len(states) else "")
    )
    if space.search.sampler == "grid":
        screen.print(curve_table(found.rows, list(space.space)))
    if found.front:
        screen.print(pareto_table(found.front, space.objectives))
    say(f"best settings: {describe(best.values)}")
    screen.print(accuracy_table("Validation accuracy (%), used by the search", "validation", found.compared))
    if len(found.choice.candidates) > 1:
        screen.print(candidate_table(found.choice, [label_of(space, one.row) for one in found.choice.candidates]))
    if space.test == "split":
        screen.print(accuracy_table("Test accuracy (%), held out from the search", "test", found.compared))
    if found.together:
        screen.print(together_table(found.together))
        screen.print(crossed_table(next(one["report"] for one in found.together if one["trial"] == best.number)))
    if found.seeds:
        screen.print(seeds_table(found.seeds))
    for line in _notes(space, found, data):
        say(line)
    times = dict(found.time_s)
    total = times.pop("total")
    say(f"time: {total:.0f} s = " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items()))
    say(f"files: {out}/best.yaml (settings), {out}/best/ (checkpoint), {out}/trials.csv, {out}/study.json")


def _notes(space: SpaceFile, found: SearchResult, data: SearchData) -> Iterator[str]:
    """Yield a line for each thing to know about the result: test split, post-hoc tau, training images, unseen classes, groups."""
    from lift_ray.search.search_data import unseen_line
    from lift_ray.search.tables import measure, points

    choice, posthoc = found.choice, found.choice.posthoc
    if space.test == "none":
        yield "There is no test split, so this result is not held out from the search: expect lower accuracy on new images."
    gain, bias = (points(value, choice.metric) for value in (posthoc.gain, posthoc.bias))
    if posthoc.is_recommended:
        yield (
            f"Post-hoc tau {posthoc.tau:g} is used: it improves out-of-fold {measure(choice.metric)} by {gain}, about {bias} of it "
            "selection bias"
        )
    elif posthoc.gain > 0:
        yield (
            f"No post-hoc tau is used: the best one, {posthoc.best:g}, improves out-of-fold {measure(choice.metric)} by {gain}, "
            f"but the selection bias is about {bias}"
        )
    if any(label.endswith(", TTE") for label, _ in found.compared):
        yield "TTE: test-time ensembling, the mean over five crops of each image; best/ uses it only with evaluation.tte=true"
    if found.final.refit is not None:
        yield f"best/ was trained again on {count(data.final_images, 'image')} ({data.train_on.replace('+', ' and ')})"
    if data.unseen:
        yield unseen_line(data.unseen, len(data.groups.names))
    if data.groups.note:
        yield data.groups.note


main = partial(cli.run, "lift_ray.tune")

if __name__ == "__main__":
    run_and_exit(main)
