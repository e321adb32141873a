"""Cluster that a cluster file describes: its node types, and how many nodes of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NodeType:
    """One kind of machine or pod.

    Attributes:
        machine: the cloud's name for it; "" if it has none.
        market: spot, on-demand or "".
        resources: what Ray counts on one node ({"CPU": 48, "GPU": 4}).
        least: number of nodes when nothing runs.
        most: largest number of nodes.
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
    """Cluster that a file describes.

    Attributes:
        source: the file.
        most_workers: largest number of workers of all types together.
        unchecked: parts of the file that could not be checked here, a line each.
    """

    source: str
    provider: str
    head: NodeType
    workers: tuple[NodeType, ...]
    most_workers: int
    unchecked: tuple[str, ...] = ()
