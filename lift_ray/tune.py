"""python -m lift_ray.tune: search for the settings that serve the rare classes best."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lift_ray.errors import BadInput, exit_codes, run_verb

if TYPE_CHECKING:
    from lift_ray.data.catalog import Dataset
    from lift_ray.distributed.study import Found
    from lift_ray.settings.space import SpaceFile

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def tune(
    space_file: Annotated[str, typer.Argument(metavar="SPACE.yaml", help="The search space.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Change the file.")] = None,
    out: Annotated[str | None, typer.Option(help="New folder for the results.  [runs/NAME-DATE-TIME]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; train nothing.")
    ] = False,
    dashboard: Annotated[bool, typer.Option(help="Serve Ray's dashboard when Ray is started here.")] = True,
) -> None:
    """Search a space of LIFT settings with Optuna on Ray, and compare the best with the published recipe.

    Starts Ray on this machine, or uses the cluster at $RAY_ADDRESS (`ray job submit` sets it).

    \b
    Examples:
      python -m lift_ray.tune search_spaces/quickstart.yaml
      python -m lift_ray.tune search_spaces/inat.yaml search.trials=24 --dry-run
    """
    from lift_ray.settings.files import parse_overrides
    from lift_ray.settings.space import read_space

    space = read_space(space_file, parse_overrides(settings or []))
    dataset, data = _open(space, dry_run)
    if dry_run:
        _print_plan(space, dataset, data)
        return
    from lift_ray.distributed.cluster import connected, dashboard_url
    from lift_ray.distributed.study import prepare_out, run_study

    folder = Path(out or space.out or f"runs/{space.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    prepare_out(folder)
    began = time.monotonic()
    with connected(dashboard=dashboard) as nodes:
        from lift_ray.distributed.capacity import num_slots

        need, slots = num_slots(space.scale, nodes)
        slots = min(slots, space.search.trials)
        started_s = time.monotonic() - began
        print(
            f"{space.name}: {space.search.trials} trials, {slots} at a time, each {need}; results in {_shown(folder)}"
        )
        if url := dashboard_url():
            print(f"dashboard: {url}")
        found = run_study(space, dataset, need, slots, folder)
    found.time_s["start"] += started_s
    found.time_s["total"] += started_s
    _write(space, dataset, found, folder)
    _print_found(space, found, folder)


def _open(space: SpaceFile, dry_run: bool) -> tuple[str, Dataset | None]:
    """The data set's absolute URI, and its index; a dry run does not reach for remote data."""
    from lift_ray.data.catalog import open_dataset

    if dry_run and "://" in space.dataset and not space.dataset.startswith("file://"):
        return space.dataset, None
    data = open_dataset(space.dataset)
    for split in ("train", "validation", "test"):
        data.split(split)
    _check_objective(space, data)
    return data.uri, data


def _check_objective(space: SpaceFile, data: Dataset) -> None:
    """A group without classes has no accuracy to search for."""
    from lift_ray.results.metrics import RULES, class_groups

    metric = space.objective[0]
    group = metric.split("/")[-1]
    if group in RULES and group not in class_groups(data.split("train").class_counts(data.num_classes)):
        raise BadInput(f"objectives: {metric} needs classes with {RULES[group]} training images, but {data.uri} has none; "
                       "choose validation/mean_class_accuracy")  # fmt: skip


def _print_plan(space: SpaceFile, dataset: str, data: Dataset | None) -> None:
    import os

    from rich.table import Table

    from lift_ray.distributed.capacity import need, num_fitting
    from lift_ray.results.tables import console

    out = console()
    table = Table(title=f"{space.name}: the plan", title_justify="left", box=None, show_header=False)
    metric, mode = space.objective
    if data is None:
        table.add_row("data", f"{dataset} (remote: not opened in a dry run)")
    else:
        counts = data.split("train").class_counts(data.num_classes)
        table.add_row("data", f"{dataset}: {data.num_classes} classes, {counts.sum():,} training images, {counts.max()} ... "
                              f"{counts.min()} a class")  # fmt: skip
    config = space.config({})
    table.add_row(
        "backbone", f"{config.backbone.model} {config.backbone.pretrained or ''} in {config.backbone.precision}"
    )
    table.add_row("objective", f"{metric}, {mode}")
    for name, param in space.space.items():
        when = f"   when {', '.join(f'{k} is {v}' for k, v in param.when.items())}" if param.when else ""
        table.add_row(name, f"{param}{when}")
    search = space.search
    table.add_row("search", f"{search.trials} trials, {len(space.start)} given at the start, then {search.sampler}; "
                            f"stops early: {search.scheduler.kind}")  # fmt: skip
    table.add_row("epochs", f"at most {search.trials} x {space.most_epochs()} = {search.trials * space.most_epochs()}")
    wanted = need(space.scale, has_gpu=False)
    here = {"CPU": float(os.cpu_count() or 1)}
    fitting = num_fitting(wanted, [here])
    table.add_row("each trial", str(wanted))
    table.add_row("this machine", f"{int(here['CPU'])} CPU: fits {fitting} trials at a time" if fitting else
                  f"{int(here['CPU'])} CPU: too small for a trial; run on a cluster (clusters/) or change scale")  # fmt: skip
    out.print(table)
    print("checked: the file is in order")


def _write(space: SpaceFile, dataset: str, found: Found, folder: Path) -> None:
    """study.json, best.yaml and best/; the trials table is there already. study.json comes last: its presence means done."""
    import os
    import platform

    import optuna
    import ray

    import lift_ray
    from lift_ray.distributed.checkpoint import read_record
    from lift_ray.distributed.study import keep_best
    from lift_ray.results.rows import write_json
    from lift_ray.settings.files import dump_yaml

    best = keep_best(found, folder)
    record = read_record(best)
    write_json(dict(found.compared[-1][1]), best / "metrics.json")
    header = f"# Best of the search {space.name} (trial {found.best.number}); python -m lift_ray.train best.yaml trains it again.\n"
    dump_yaml({"name": f"{space.name}-best", "dataset": dataset, **record.config}, folder / "best.yaml", header)
    about: dict[str, Any] = {
        "name": space.name, "dataset": dataset, "space": space.model_dump(mode="json", by_alias=True),
        "best": {"trial": found.best.number, "values": found.best.values, "digest": record.digest, "config": record.config},
        "compared": [{"label": label, **figures} for label, figures in found.compared],
        "time_s": {name: round(seconds, 2) for name, seconds in found.time_s.items()},
        "versions": {"lift_ray": lift_ray.__version__, "ray": ray.__version__, "optuna": optuna.__version__,
                     "python": platform.python_version()},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
    }  # fmt: skip
    write_json(about, folder / "study.json")


def _print_found(space: SpaceFile, found: Found, folder: Path) -> None:
    from lift_ray.results.rows import describe
    from lift_ray.results.tables import accuracy_table, console

    out = console()
    states = [row.state for row in found.rows]
    out.print(
        f"\n{len(states)} trials: {states.count('finished')} finished, {states.count('pruned')} stopped early, "
        f"{states.count('failed')} failed"
    )
    out.print(f"best settings: {describe(found.best.values)}")
    out.print(accuracy_table("validation (the search saw this), accuracy in %", "validation", found.compared))
    out.print(accuracy_table("test (it did not), accuracy in %", "test", found.compared))
    times = dict(found.time_s)
    total = times.pop("total")
    out.print(f"time: {total:.0f} s = " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items()))
    where = _shown(folder)
    out.print(
        f"files: {where}/best.yaml (settings), {where}/best/ (checkpoint), {where}/trials.csv, {where}/study.json"
    )


def _shown(folder: Path) -> str:
    """The folder as the user would type it."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "tune", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
