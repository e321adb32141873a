"""python -m lift_ray.reproduce: run published recipes, and compare their results with the claims."""

from __future__ import annotations

import shlex
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray import cli
from lift_ray.errors import run_and_exit
from lift_ray.text import say

if TYPE_CHECKING:
    from lift_ray.api.reproduce import Planned
    from lift_ray.reporting.reproduction import Measured


@cli.app.command(short_help="Run published recipes, and compare them with the claims.")
@cli.with_json("reproduce")
def reproduce(
    table: Annotated[
        str | None,
        typer.Argument(metavar="[TABLE]", help="imagenet-lt, places-lt, inat2018, cifar100-lt, or all."),
    ] = None,
    show: Annotated[
        bool,
        typer.Option(
            "--list", help="List the claims, which data and weights are there, and commands that bring the rest."
        ),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Number of seeds of each recipe.")] = 3,
    data: Annotated[str, typer.Option(metavar="FOLDER", help="Folder or URL with the datasets by name.")] = "data",
    out: Annotated[
        str | None, typer.Option(help="Folder or URL for the results.  [runs/reproduce, runs/reproduce-stand-in]")
    ] = None,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Try the command on embedded images and model; this verifies nothing.")
    ] = False,
) -> dict[str, object]:
    """Run the recipes of published values whose dataset and weights are there, and write claimed beside measured.

    If interrupted, rerun the same command: finished runs are kept, and the others continue.

    \b
    Examples:
      python -m lift_ray.reproduce --list
      python -m lift_ray.reproduce places-lt --data s3://bucket/data --out s3://bucket/reproduce
      python -m lift_ray.reproduce places-lt --stand-in --seeds 2
    """
    if table is None and not show:
        raise typer.BadParameter("give a TABLE, all, or --list.")
    from lift_ray.api.reproduce import Reproduction, planned
    from lift_ray.storage.output import Output

    say(f"checking {'the recipes' if stand_in else f'the recipes, {data} and the weights'} ...")
    plan = planned(None if table == "all" else table, data, stand_in=stand_in)
    if show:
        _list(plan)
        return {"claims": [one.for_json() for one in plan]}
    target = out or ("runs/reproduce-stand-in" if stand_in else "runs/reproduce")
    given = {"--seeds": seeds, "--data": None if stand_in else data, "--out": target}
    words = [str(table), *(f"{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)]
    command = " ".join(["python -m lift_ray.reproduce", *words, *(["--stand-in"] if stand_in else [])])
    found = Reproduction(plan, seeds, Output(target), stand_in, command)
    page = found.run()
    rows = found.measured()
    _print(rows, stand_in)
    _print_missing(plan)
    say(f"page: {page}")
    claims = [row.for_json() for row in rows]
    return {"out": target, "page": page, "stand_in": stand_in, "about": found.about(), "claims": claims}


def _list(plan: list[Planned]) -> None:
    from lift_ray.terminal.tables import console, titled

    table = titled("Published values (%), and what is there to measure them")
    table.add_column("claim", overflow="fold")
    table.add_column("claimed", justify="right")
    for heading in ("source", "recipe", "data", "weights"):
        table.add_column(heading, overflow="fold")
    for one in plan:
        claim = one.claim
        there = ["-" if one.config is None else "no" if problem else "yes" for problem in one.problems]
        name = f"{claim.dataset}, {claim.model}, {claim.method}: {claim.measure}"
        table.add_row(name, f"{claim.value:g}", claim.origin, claim.recipe or claim.note, *there)
    console().print(table)
    _print_missing(plan)


def _print(rows: list[Measured], stand_in: bool) -> None:
    from lift_ray.reporting.reproduction import STAND_IN
    from lift_ray.terminal.tables import console, titled

    table = titled("Claimed and measured")
    for heading in (
        "dataset",
        "model",
        "method",
        "metric (%)",
        "claimed",
        "measured (interval)",
        "difference",
        "status",
    ):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row.cells()[:8])
    console().print(table)
    if stand_in:
        say(STAND_IN)


def _print_missing(plan: list[Planned]) -> None:
    """Print what is missing, and the commands that bring it."""
    missing = list(dict.fromkeys(problem for one in plan for problem in one.problems if problem))
    commands = list(dict.fromkeys(command for one in plan for command in one.commands))
    if commands:
        say("missing:", *(f"  {problem}" for problem in missing))
        say("run these commands to bring it:", *(f"  {command}" for command in commands))


main = partial(cli.run, "lift_ray.reproduce")

if __name__ == "__main__":
    run_and_exit(main)
