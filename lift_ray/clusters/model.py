"""What a cluster file makes: node types, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeType:
    """One kind of machine or pod.

    Attributes:
        machine: the cloud's name of it; "" where there is none.
        market: spot, on-demand or "".
        resources: what Ray counts on one ({"CPU": 48, "GPU": 4}).
        least, most: how many are up when nothing runs, and at most.
    """

    name: str
    machine: str
    market: str
    resources: dict[str, float]
    least: int
    most: int
    priority: int = 0


@dataclass(frozen=True)
class Cluster:
    """What a cluster file makes.

    Attributes:
        source: the file.
        most_workers: of all worker types together.
        unchecked: what could not be looked at here, a line each.
    """

    source: str
    provider: str
    head: NodeType
    workers: tuple[NodeType, ...]
    most_workers: int
    unchecked: tuple[str, ...] = ()
