"""python -m lift_ray.cluster: check a cluster file before it costs money."""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, did_you_mean, run_and_exit
from lift_ray.text import count, say

if TYPE_CHECKING:
    from lift_ray.clusters.model import Cluster

commands = typer.Typer()
cli.app.add_typer(commands, name="cluster")
PLACEHOLDER = re.compile(r"ami-0{17}|YOUR-ORG|\bmy-(?:bucket|project|container)\b|\bmystorageaccount\b|\b0{8}-0{4}-")


@commands.callback()
def cluster() -> None:
    """Check a cluster file before it costs money.

    \b
    Examples:
      python -m lift_ray.cluster check clusters/aws.yaml
      python -m lift_ray.cluster check clusters/aws.yaml --for search_spaces/inat.yaml --price head=0.4 --price gpu-spot=1.9
    """


@commands.command()
@cli.with_json("cluster")
def check(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="For `ray up`, KubeRay, Slurm, Prometheus or Grafana; or a name: aws.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings of the search space to change, e.g. plan.images_per_s=900."
        ),
    ] = None,
    space_file: Annotated[
        str | None,
        typer.Option("--for", metavar="SPACE", help="Search space to estimate: trials at a time, hours and price."),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE_TYPE=PRICE", help="Price of a machine per hour, in any currency; may be repeated."),
    ] = None,
) -> dict[str, object]:
    """Report every fault of a cluster file with its line, then describe its cluster. Needs no network and no cloud account.

    \b
    Examples:
      python -m lift_ray.cluster check clusters/kuberay/rayjob.yaml
      python -m lift_ray.cluster check clusters/gcp.yaml --for search_spaces/inat.yaml plan.images_per_s=900
    """
    from lift_ray.clusters.monitoring import check_monitoring, is_monitoring
    from lift_ray.clusters.read import read_cluster, read_documents
    from lift_ray.settings.shipped import find_cluster

    file = find_cluster(file)
    if settings and space_file is None:
        raise BadInput(
            "command line", "settings require a search space", f"'{settings[0]}' without --for", "add --for SPACE"
        )
    if not file.endswith(".sh") and is_monitoring((read := read_documents(file)[0]).data):
        if space_file is not None or price:
            raise BadInput(
                file,
                "--for and --price require the file of a cluster",
                but="this file describes none",
                remedy="leave them out",
            )
        summary = check_monitoring(read)
        say(summary, "checked: no errors found")
        return {"file": file, "monitoring": summary}
    found = read_cluster(file)
    prices = _prices(price or [], found)
    results = {"file": file, **_shown_cluster(found, prices), "search": None}
    if space_file is not None:
        results["search"] = _shown_search(found, space_file, settings or [], prices)
    say("checked: no errors found")
    return results


@commands.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="aws, azure, gcp, onprem, slurm, kuberay/rayjob ...")],
) -> None:
    """Print a cluster file that comes with lift_ray, to be saved and filled in.

    \b
    Example:
      python -m lift_ray.cluster show aws > aws.yaml
    """
    from lift_ray.settings.shipped import CLUSTERS, find_shipped

    say(find_shipped(name, CLUSTERS).read_text(encoding="utf-8").rstrip("\n"))


def _prices(words: list[str], found: Cluster) -> dict[str, float]:
    known = [kind.name for kind in (found.head, *found.workers)]
    prices = {}
    for word in words:
        name, _, amount = word.partition("=")
        if name not in known:
            raise BadInput("--price", f"unknown node type '{name}'", remedy=did_you_mean(name, known))
        try:
            prices[name] = float(amount)
        except ValueError:
            prices[name] = -1.0
        if not 0 <= prices[name] < float("inf"):
            raise BadInput(
                "--price", "must be NODE_TYPE=PRICE with a price of at least 0", f"'{word}'", f"write {name}=1.9"
            )
    return prices


def _shown_cluster(found: Cluster, prices: dict[str, float]) -> dict[str, object]:
    """Print the node types of a cluster and what to do before it can run, and return them."""
    from lift_ray.clusters.cost import cluster_table, most_gpus
    from lift_ray.terminal.tables import console

    console().print(cluster_table(found, prices))
    least, most = most_gpus(found)
    say(f"GPUs: {least} when nothing runs, at most {most}, in at most {count(found.most_workers, 'worker')}")
    for what in found.unchecked:
        say(f"not checked: {what}")
    lines = Path(found.source).read_text(encoding="utf-8").splitlines()
    open_lines = [i for i, line in enumerate(lines, 1) if PLACEHOLDER.search(line.split(" #")[0])]
    if open_lines:
        say(f"placeholders to fill in before it can run: line {', '.join(map(str, open_lines))}")
    kinds = [asdict(kind) | {"price_per_h": prices.get(kind.name)} for kind in (found.head, *found.workers)]
    return {
        "provider": found.provider,
        "node_types": kinds,
        "most_workers": found.most_workers,
        "gpus": {"least": least, "most": most},
        "unchecked": found.unchecked,
        "placeholders": open_lines,
    }


def _shown_search(found: Cluster, space_file: str, settings: list[str], prices: dict[str, float]) -> dict[str, object]:
    """Print what a search takes on a cluster, and return it."""
    from lift_ray.clusters.cost import fleet_table, fleets
    from lift_ray.settings.checks import read_space
    from lift_ray.settings.overrides import parse_overrides
    from lift_ray.terminal.tables import console

    space = read_space(space_file, parse_overrides(settings))
    try:
        wanted, todo, fits = fleets(found, space, prices)
    except BadInput as error:
        raise BadInput(f"{space_file} {error}") from None
    say(
        f"\n{space.name}: {count(space.num_trials, 'trial')}, each {wanted}; about {todo.epochs:.0f} epochs with early stopping"
    )
    if todo.images is not None and todo.images_per_s is not None:
        say(
            f"work: {todo.epochs * todo.images:,.0f} training images at {todo.images_per_s:g} images/s per worker (plan)"
        )
    else:
        missing = "plan.training_images" if todo.images is None else "plan.images_per_s"
        say(f"hours: unknown without {missing}; add {missing}=...")
    console().print(fleet_table(fits))
    unpriced = [kind.name for kind in (found.head, *found.workers) if kind.name not in prices]
    if unpriced and prices:
        say(f"price: unknown without --price {unpriced[0]}=...")
    return {
        "name": space.name,
        "trials": space.num_trials,
        "each_trial": asdict(wanted),
        "epochs": todo.epochs,
        "images_per_epoch": todo.images,
        "images_per_s": todo.images_per_s,
        "fleets": [asdict(fleet) | {"kind": fleet.kind.name} for fleet in fits],
    }


main = partial(cli.run, "lift_ray.cluster")

if __name__ == "__main__":
    run_and_exit(main)
