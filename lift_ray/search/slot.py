"""A slot as Ray Tune sees it: a Trainable whose process stays for the whole search and does one job after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lift_ray.ray_runtime.capacity import Need
from lift_ray.search.jobs import Job, SlotSettings
from lift_ray.training.events import EpochEnded, Reply, RunAborted, StepsDone

if TYPE_CHECKING:
    from lift_ray.search.worker import Worker

REPLY, SLOT = "reply", "slot"
TICK_S = 2.0  # between two results of a long epoch: how soon a stop is heard, and how often progress is shown


class Slot(tune.Trainable):  # type: ignore[misc]
    """Its config: `slot` (SlotSettings) and `job`. Each of its results has a Reply under `reply`, and the figures of an epoch.

    Nothing is loaded before the first step: while a new slot starts, Tune may give its job to one that became free, and end it.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """The placement group of a slot; with several workers, the Trainable itself takes nothing."""
        need: Need = config["slot"].need
        bundles = [need.bundle()] * need.workers
        return tune.PlacementGroupFactory(bundles if need.workers == 1 else [{}, *bundles])

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing but the number: a slot keeps the one it was started with."""
        self.slot: SlotSettings = config["slot"]
        self.workers: Worker | Ranks | None = None
        self.job: Job | None = config["job"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next job."""
        self.job = new_config["job"]
        return True

    def start_workers(self) -> Worker | Ranks:
        """The slot's process, or processes; torch is loaded with them."""
        if self.slot.need.workers > 1:
            return Ranks(self.slot)
        from lift_ray.search.worker import Worker

        return Worker(self.slot)

    def step(self) -> dict[str, Any]:
        """The job's next reply, or its progress."""
        self.workers = self.workers or self.start_workers()
        if self.job is not None:
            self.workers.begin(self.job)
            self.job = None
        reply = self.workers.next(TICK_S)
        figures = reply.figures if isinstance(reply, EpochEnded) else {}
        return {REPLY: reply, SLOT: self.slot.number, **figures}

    def cleanup(self) -> None:
        """Stop the job, and end the processes."""
        if self.workers is not None:
            self.workers.stop()

    def __repr__(self) -> str:
        """The name that Ray's dashboard shows."""
        return f"{self.slot.study}: slot {self.slot.number}"


class Ranks:
    """The processes of a slot that has several: actors in its placement group, one in each bundle."""

    def __init__(self, slot: SlotSettings) -> None:
        from lift_ray.search.worker import RankWorker

        group = ray.util.get_current_placement_group()
        remote = ray.remote(num_cpus=slot.need.cpus, num_gpus=slot.need.gpus)(RankWorker)
        self.workers = [
            remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote(slot, rank)
            for rank in range(slot.need.workers)
        ]
        address = self.workers[0].meeting_point.remote()
        self.busy = list(self.workers)
        self.reply: Reply | None = None
        for worker in self.workers:
            worker.meet.remote(address)

    def begin(self, job: Job) -> None:
        """Take up a job in all processes."""
        self.busy, self.reply = list(self.workers), None
        for worker in self.workers:
            worker.begin.remote(job)

    def next(self, timeout_s: float) -> Reply:
        """The first rank's reply once all ranks have theirs, the problem of any rank, or how far the first one is.

        Raises Ray's error for a process that was lost.
        """
        replies: list[Reply] = ray.get([worker.next.remote(timeout_s) for worker in self.busy])
        for worker, reply in zip(list(self.busy), replies, strict=True):
            if isinstance(reply, RunAborted):
                return reply
            if worker is self.workers[0]:
                self.reply = reply
            if not isinstance(reply, StepsDone):
                self.busy.remove(worker)
        assert self.reply is not None
        if not self.busy:
            self.busy = list(self.workers)
        elif self.workers[0] not in self.busy:
            return StepsDone(0, 0)  # the first rank waits for the others, for a moment
        return self.reply

    def stop(self) -> None:
        """End the processes. A rank that stops at a step would leave the others waiting for it."""
        for worker in self.workers:
            ray.kill(worker)
