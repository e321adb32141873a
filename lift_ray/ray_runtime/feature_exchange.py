"""Features of frozen blocks that nodes compute for each other: which node computes which chunk, and Ray's object store in between.

The nodes of a search ask one actor for each chunk. It names a chunk that no node computes, or one that is there, which the
node then fetches from Ray's object store and writes into its own file. Ray spills to disk what its memory does not hold, and all of
it is freed when the search ends.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lift_ray.ray_runtime.autoscaler import cluster_nodes

LEASE_S = 60.0  # a chunk of which nothing is heard for so long is computed by another node
ANSWER_S, FETCH_S = 30.0, 60.0
Bytes = NDArray[np.uint8]


@dataclass
class _Chunk:
    """A chunk that a node computes or has computed: reference to its bytes (none yet), and when its lease ends."""

    reference: list[Any]
    until: float = 0.0


class Chunks:
    """The chunks of all files, by file and number.

    Args:
        now: a clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._files: defaultdict[str, dict[int, _Chunk]] = defaultdict(dict)

    def choose(self, file: str, lacking: Sequence[int]) -> tuple[int, bool] | None:
        """Return a chunk for a node that lacks these, and whether it is there or the node is to compute it.

        None if other nodes compute all of them.
        """
        known = self._files[file]
        for number in lacking:
            if number in known and known[number].reference:
                return number, True
        for number in lacking:
            if number not in known or known[number].until < self._now():
                known[number] = _Chunk([], self._now() + LEASE_S)
                return number, False
        return None

    def reference(self, file: str, number: int) -> list[Any]:
        """Return the reference to the bytes of a chunk; none if they were lost."""
        chunk = self._files[file].get(number)
        return [] if chunk is None else chunk.reference

    def renew(self, file: str, number: int) -> None:
        """Note that a chunk is still being computed."""
        if (chunk := self._files[file].get(number)) is not None:
            chunk.until = self._now() + LEASE_S

    def give(self, file: str, number: int, reference: list[Any]) -> None:
        """Note where the bytes of a chunk are."""
        self._files[file][number] = _Chunk(reference)

    def drop(self, file: str, number: int) -> None:
        """Forget a chunk that was not computed after all, or whose bytes are lost with their node."""
        self._files[file].pop(number, None)


class FeatureExchange:
    """The exchange of a search, for a process that computes features; as `shared_features.Exchange`.

    Where the actor does not answer, the node computes for itself.

    Args:
        actor: with `Chunks`.
    """

    def __init__(self, actor: ActorHandle[Chunks]) -> None:
        self._actor: Any = actor
        self._renewed_at = time.monotonic()

    @classmethod
    def named(cls, name: str) -> FeatureExchange | None:
        """Return the exchange of this name; None without a name, or if its actor has been lost with its node."""
        try:
            return cls(ray.get_actor(name)) if name else None
        except ValueError:
            return None

    def choose(self, file: str, lacking: Sequence[int]) -> tuple[int, bool] | None:
        """Return a chunk of these, and whether it is there or is to be computed; None if other nodes compute all of them."""
        self._renewed_at = time.monotonic()
        try:
            found: tuple[int, bool] | None = ray.get(self._actor.choose.remote(file, list(lacking)), timeout=ANSWER_S)
        except RayError:
            return lacking[0], False
        return found

    def fetch(self, file: str, number: int) -> Bytes | None:
        """Return the bytes of a chunk that is there; None if they were lost."""
        try:
            reference = ray.get(self._actor.reference.remote(file, number), timeout=ANSWER_S)
            found: Bytes | None = ray.get(reference[0], timeout=FETCH_S) if reference else None
        except RayError:
            self.drop(file, number)
            return None
        return found

    def renew(self, file: str, number: int) -> None:
        """Note now and then that this process is still computing a chunk."""
        if time.monotonic() - self._renewed_at > LEASE_S / 6:
            self._renewed_at = time.monotonic()
            self._actor.renew.remote(file, number)

    def give(self, file: str, number: int, data: Bytes) -> None:
        """Offer the bytes of a chunk to the other nodes."""
        with suppress(RayError):  # the object store is full
            self._actor.give.remote(file, number, [ray.put(data)])

    def drop(self, file: str, number: int) -> None:
        """Leave a chunk to other nodes."""
        self._actor.drop.remote(file, number)


def start_exchange() -> tuple[str, ActorHandle[Chunks] | None]:
    """Start the exchange of a search if the cluster has several nodes, or may get some: its name, and its actor.

    It is on the node of the driver, and ends when the actor is no longer referred to.
    """
    if len(cluster_nodes()) < 2:
        return "", None
    name = f"lift_ray features {secrets.token_hex(4)}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return name, ray.remote(num_cpus=0)(Chunks).options(name=name, scheduling_strategy=here).remote()
