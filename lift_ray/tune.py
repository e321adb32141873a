"""python -m lift_ray.tune: search for the settings that work best for rare classes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, run_and_exit
from lift_ray.text import say

if TYPE_CHECKING:
    from lift_ray.api.finished import FinishedStudy
    from lift_ray.data.dataset import Dataset
    from lift_ray.settings.space import SpaceFile


# The keys of study.json whose figures the verb prints.
PRINTED = (
    "name",
    "dataset",
    "best",
    "choice",
    "posthoc",
    "compared",
    "tte",
    "together",
    "seeds",
    "pareto",
    "unseen",
    "time_s",
)


def _write_schema(path: str | None) -> None:
    """Write the JSON schema of search-space files, which editors use for completion and checks (--schema FILE)."""
    if path is None:
        return
    from lift_ray.settings.schema import write_schema

    write_schema(path)
    raise typer.Exit


@cli.app.command(short_help="Search for the settings that work best for rare classes.")
@cli.with_json("tune")
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
) -> cli.Results:
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
    from lift_ray.api.search import SearchOptions, check_data, run_space
    from lift_ray.data.open import open_dataset

    data = None
    if not (dry_run and "://" in space.dataset and not space.dataset.startswith("file://")):
        data = open_dataset(space.dataset)  # a dry run does not open remote data
        check_data(space, data)
    if data is None or dry_run:
        from lift_ray.searching.preflight import check_before_start

        dataset = data.uri if data else space.dataset
        check_before_start(space, dataset, out=out or space.out, storage=storage, resume=resume, log_to=log_to or [])
        return _plan(space, dataset, data)
    options = SearchOptions(
        out or space.out,
        resume,
        storage,
        dashboard=dashboard,
        live_port=live_port if live else None,
        log_to=log_to or [],
    )
    return partial(_results, run_space(space, data, options))


def _results(study: FinishedStudy) -> dict[str, object]:
    """Return the files of a study, and what study.json has of the printed tables."""
    from lift_ray.storage.layout import BEST, BEST_SETTINGS, PAGE, REPORT, STUDY, TRIALS
    from lift_ray.storage.output import Output

    out = Output(study.out)
    page = f"{REPORT}/{PAGE}"
    return {
        "out": str(out),
        "best_settings": f"{out}/{BEST_SETTINGS}",
        "checkpoint": f"{out}/{BEST}",
        "trials": f"{out}/{TRIALS}",
        "study": f"{out}/{STUDY}",
        "report": f"{out}/{page}" if out.holds(page) else None,
        "states": Counter(study.trials_dataframe()["state"]),
        **{name: study.summary[name] for name in PRINTED},
    }


def _plan(space: SpaceFile, dataset: str, data: Dataset | None) -> dict[str, object]:
    """Print the plan of a search, and return it."""
    from lift_ray.searching.plan import plan
    from lift_ray.terminal.tables import console, titled

    table = titled(f"{space.name}: plan", box=None, show_header=False)
    lines = list(plan(space, dataset, data))
    for name, text in lines:
        table.add_row(name, text)
    console().print(table)
    say("checked: no errors found")
    return {"name": space.name, "dataset": dataset, "plan": lines}


main = partial(cli.run, "lift_ray.tune")

if __name__ == "__main__":
    run_and_exit(main)
