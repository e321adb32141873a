"""python -m lift_ray.tune: search for the settings that serve the rare classes best."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray.errors import BadInput, exit_codes, run_verb

if TYPE_CHECKING:
    from lift_ray.data.catalog import Dataset
    from lift_ray.distributed.study import Found
    from lift_ray.results.output import Output
    from lift_ray.settings.space import SpaceFile

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def tune(
    space_file: Annotated[str, typer.Argument(metavar="SPACE.yaml", help="The search space.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Change the file.")] = None,
    out: Annotated[
        str | None, typer.Option(help="New folder for the results, or s3:// or gs:// URL.  [runs/NAME-DATE-TIME]")
    ] = None,
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
    from lift_ray.distributed.study import run_study, write_found
    from lift_ray.results.output import Output

    target = Output(out or space.out or f"runs/{space.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    target.must_be_new()
    began = time.monotonic()
    with connected(dashboard=dashboard) as nodes:
        from lift_ray.distributed.capacity import num_slots

        need, slots = num_slots(space.scale, nodes)
        slots = min(slots, space.search.trials)
        started_s = time.monotonic() - began
        print(f"{space.name}: {space.search.trials} trials, {slots} at a time, each {need}; results in {target}")
        if url := dashboard_url():
            print(f"dashboard: {url} (for the token it asks for: ray get-auth-token)")
        found = run_study(space, dataset, need, slots, target)
    found.time_s["start"] += started_s
    found.time_s["total"] += started_s
    write_found(space, dataset, found, target)
    _print_found(space, found, target)


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


def _print_found(space: SpaceFile, found: Found, out: Output) -> None:
    from lift_ray.results.rows import describe
    from lift_ray.results.tables import accuracy_table, console

    screen = console()
    states = [row.state for row in found.rows]
    screen.print(
        f"\n{len(states)} trials: {states.count('finished')} finished, {states.count('pruned')} stopped early, "
        f"{states.count('failed')} failed"
    )
    print(f"best settings: {describe(found.best.values)}")
    screen.print(accuracy_table("validation (the search saw this), accuracy in %", "validation", found.compared))
    screen.print(accuracy_table("test (it did not), accuracy in %", "test", found.compared))
    times = dict(found.time_s)
    total = times.pop("total")
    print(f"time: {total:.0f} s = " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items()))
    print(f"files: {out}/best.yaml (settings), {out}/best/ (checkpoint), {out}/trials.csv, {out}/study.json")


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "tune", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
