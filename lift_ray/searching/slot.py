"""Slot: a Trainable of Ray Tune whose process stays for the whole search and runs one job after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lift_ray.ray_runtime.capacity import Need
from lift_ray.searching.jobs import Job, SlotSettings
from lift_ray.training.events import EpochEnded, Reply, RunAborted, StepsDone

if TYPE_CHECKING:
    from lift_ray.searching.worker import Worker

REPLY, SLOT = "reply", "slot"
TICK_S = 2.0  # longest time between two results of an epoch, which bounds the delay of a stop and of the progress shown


class Slot(tune.Trainable):  # type: ignore[misc]
    """Trainable with the config keys `slot` (SlotSettings) and `job`.

    Each result has a Reply under `reply`, and at the end of an epoch of a trial that trains alone also its metrics. Nothing is loaded
    before the first step, because while a new slot starts, Tune may give its job to one that became free and end the new one.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Return the placement group of a slot. With several workers, the Trainable itself takes no resources."""
        need: Need = config["slot"].need
        bundles = [need.bundle()] * need.workers
        return tune.PlacementGroupFactory(bundles if need.workers == 1 else [{}, *bundles])

    def setup(self, config: dict[str, Any]) -> None:
        """Store the settings, whose number the slot keeps, and the first job."""
        self.slot: SlotSettings = config["slot"]
        self.workers: Worker | Ranks | None = None
        self.job: Job | None = config["job"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next job. Returns True, which tells Tune to reuse the process."""
        self.job = new_config["job"]
        return True

    def start_workers(self) -> Worker | Ranks:
        """Start the slot's worker, or the workers of several ranks, which load torch."""
        if self.slot.need.workers > 1:
            return Ranks(self.slot)
        from lift_ray.searching.worker import Worker

        return Worker(self.slot)

    def step(self) -> dict[str, Any]:
        """Return the job's next reply, or its progress if there is none yet."""
        self.workers = self.workers or self.start_workers()
        if self.job is not None:
            self.workers.begin(self.job)
            self.job = None
        reply = self.workers.next(TICK_S)
        figures = reply.metrics.flat() if isinstance(reply, EpochEnded) else {}
        return {REPLY: reply, SLOT: self.slot.number, **figures}

    def cleanup(self) -> None:
        """Stop the job and end the processes."""
        if self.workers is not None:
            self.workers.stop()

    def __repr__(self) -> str:
        """Return the name that Ray's dashboard shows."""
        return f"{self.slot.study}: slot {self.slot.number}"


class Ranks:
    """Workers of a slot with several processes: actors in its placement group, one per bundle."""

    def __init__(self, slot: SlotSettings) -> None:
        from lift_ray.searching.worker import RankWorker

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
        """Start a job in all processes."""
        self.busy, self.reply = list(self.workers), None
        for worker in self.workers:
            worker.begin.remote(job)

    def next(self, timeout_s: float) -> Reply:
        """Return the first rank's reply once all ranks have replied, RunAborted of any rank, or the first rank's progress.

        Raises Ray's error for a lost process.
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
            return StepsDone(0, 0)  # the first rank has replied and waits for the others
        return self.reply

    def stop(self) -> None:
        """Kill the processes. If a rank stopped at a step, the others would wait for it in a collective."""
        for worker in self.workers:
            ray.kill(worker)
