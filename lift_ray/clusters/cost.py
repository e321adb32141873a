"""Estimates for a search on the cluster of a cluster file: trials at a time, hours and price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lift_ray.clusters.model import Cluster, NodeType
from lift_ray.errors import BadInput
from lift_ray.ray_runtime.capacity import Need, need, num_fitting
from lift_ray.settings.space import SpaceFile
from lift_ray.terminal.tables import PlainTable, titled


@dataclass(frozen=True)
class Work:
    """Amount of work of a search, estimated as in `tune --dry-run`.

    Attributes:
        epochs: expected epochs of all trials together, with early stopping.
        longest: epochs of a trial that is not stopped.
        images: training images per epoch; None if unknown.
        images_per_s: images per second and worker; None if unknown.
    """

    epochs: float
    longest: int
    images: int | None
    images_per_s: float | None

    def hours(self, slots: int, workers: int) -> float | None:
        """Return the wall time for a number of concurrent trials with a number of workers each; None if it is unknown.

        It is at least the time of the longest trial.
        """
        if self.images is None or self.images_per_s is None:
            return None
        return max(self.epochs / slots, self.longest) * self.images / (self.images_per_s * workers) / 3600


@dataclass(frozen=True)
class Fleet:
    """Cluster whose workers are all of one type, at its largest size.

    Attributes:
        slots: number of trials at a time.
        machines: number of workers that these trials need.
        hours: wall time of the search; None if unknown.
        price: price of the whole search, machines that wait for the last trials included; None if unknown.
    """

    kind: NodeType
    slots: int
    machines: int
    hours: float | None
    price: float | None


def work(space: SpaceFile) -> Work:
    """Return the work of a search. Data at a URL is not opened: its size is `plan.training_images`."""
    images = space.plan.training_images
    if images is None and "://" not in space.dataset:
        from lift_ray.data.open import open_dataset

        images = open_dataset(space.dataset).split("train").num_samples
    return Work(space.expected_epochs(), space.most_epochs(), images, space.plan.images_per_s)


def fleets(cluster: Cluster, space: SpaceFile, prices: Mapping[str, float]) -> tuple[Need, Work, list[Fleet]]:
    """Return the resources of one trial, the work of the search, and the estimate for each worker type.

    Args:
        prices: price per hour of a machine, by node type; `head` is the head's.

    Raises:
        BadInput: a trial does not fit the cluster, whichever type its workers are of.
    """
    wanted = need(space.scale, any(kind.resources.get("GPU") for kind in cluster.workers))
    todo = work(space)
    found = [_fleet(cluster, space, wanted, todo, kind, prices) for kind in cluster.workers]
    if not any(fleet.slots for fleet in found):
        most = ", ".join(f"{min(kind.most, cluster.most_workers)} x {shown(kind)}" for kind in cluster.workers)
        raise BadInput(
            "scale",
            f"a trial must fit {cluster.source}",
            f"{wanted} for at most {most}",
            "lower scale.workers_per_trial or scale.cpus_per_worker, or take larger machines",
        )
    return wanted, todo, found


def _fleet(
    cluster: Cluster, space: SpaceFile, wanted: Need, todo: Work, kind: NodeType, prices: Mapping[str, float]
) -> Fleet:
    most = min(kind.most, cluster.most_workers)
    fitting = num_fitting(wanted, [cluster.head.resources] + [kind.resources] * most)
    limit = space.num_trials if space.scale.max_concurrent == "auto" else space.scale.max_concurrent
    slots = min(fitting, limit, space.num_trials)
    machines = next(
        n for n in range(most + 1) if num_fitting(wanted, [cluster.head.resources] + [kind.resources] * n) >= slots
    )
    hours = todo.hours(slots, wanted.workers) if slots else None
    price = None
    if hours is not None and {kind.name, "head"} <= prices.keys():
        price = hours * (prices["head"] + machines * prices[kind.name])
    return Fleet(kind, slots, machines, hours, price)


def shown(kind: NodeType) -> str:
    """Return a node's resources as text: `48 CPU + 4 GPU`."""
    cpus, gpus = kind.resources.get("CPU", 0), kind.resources.get("GPU", 0)
    return f"{cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")


def most_gpus(cluster: Cluster) -> tuple[int, int]:
    """Return the number of GPUs of the whole cluster when nothing runs, and the largest number."""
    left, most = cluster.most_workers, cluster.head.resources.get("GPU", 0.0)
    for kind in sorted(cluster.workers, key=lambda kind: -kind.resources.get("GPU", 0.0)):
        number = min(kind.most, left)
        left, most = left - number, most + number * kind.resources.get("GPU", 0.0)
    least = sum(kind.least * kind.resources.get("GPU", 0.0) for kind in (cluster.head, *cluster.workers))
    return math.floor(least), math.floor(most)


def cluster_table(cluster: Cluster, prices: Mapping[str, float]) -> PlainTable:
    """Return a table of the node types."""
    table = titled(f"{cluster.source} ({cluster.provider})", box=None, pad_edge=False)
    for heading in ("node type", "machine", "market", "resources", "min ... max", "requested", "price per hour"):
        table.add_column(heading, no_wrap=True)
    order = {priority: i + 1 for i, priority in enumerate(sorted({k.priority for k in cluster.workers}, reverse=True))}
    for kind in (cluster.head, *cluster.workers):
        is_head = kind is cluster.head
        table.add_row(
            kind.name,
            kind.machine,
            kind.market,
            shown(kind),
            f"{kind.least} ... {kind.most}",
            "always" if is_head else f"{order[kind.priority]}.",
            f"{prices[kind.name]:g}" if kind.name in prices else "-",
        )
    return table


def fleet_table(found: list[Fleet]) -> PlainTable:
    """Return a table of trials at a time, hours and price, if all workers are of one type."""
    table = titled("if all workers are of one type", box=None, pad_edge=False)
    for heading in ("node type", "machines", "trials at a time", "hours, about", "price, about"):
        table.add_column(heading, no_wrap=True)
    for fleet in found:
        hours, price = ("-" if value is None else f"{value:,.1f}" for value in (fleet.hours, fleet.price))
        slots = str(fleet.slots) if fleet.slots else "none: a trial does not fit"
        table.add_row(fleet.kind.name, str(fleet.machines), slots, hours, price)
    return table
