"""python -m lift_ray.report: HTML report on the results of searches."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from lift_ray import cli
from lift_ray.errors import run_and_exit
from lift_ray.text import say


@cli.app.command(short_help="Write an HTML report on the results of searches.")
@cli.with_json("report")
def report(
    outs: Annotated[list[str], typer.Argument(metavar="OUT", help="Result folders or URLs of tune.")],
    out: Annotated[
        str | None, typer.Option(help="Folder or URL for the page.  [OUT/report; for several searches ./report]")
    ] = None,
    png: Annotated[
        bool, typer.Option("--png", help="Also write each figure as PNG (requires kaleido and Chrome).")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> dict[str, object]:
    """Write an HTML report: the best settings, their gain over the baselines, and how certain it is.

    The page needs no network. It can be written while a search is still running.

    \b
    Examples:
      python -m lift_ray.report runs/quickstart --open
      python -m lift_ray.report runs/bottleneck runs/heavy runs/tau --out runs/together
      python -m lift_ray.report s3://bucket/inat --out inat-report
    """
    from lift_ray.terminal.waiting import waiting

    with waiting("writing the report"):
        from lift_ray.reporting.report import write_report

        where = write_report(outs, out, png=png)
    say(f"report: {where}")
    if open_page and "://" not in where:
        import webbrowser
        from pathlib import Path

        webbrowser.open(Path(where).absolute().as_uri())
    return {"page": where}


main = partial(cli.run, "lift_ray.report")

if __name__ == "__main__":
    run_and_exit(main)
