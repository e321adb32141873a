"""A warm slot: a process group that loads the tower once and then serves one trial after another.

Ray Tune keeps the first worker of a slot as its trial actor (`reuse_actors`) and hands it the next trial's settings; more
workers sit in the other bundles of the same placement group and follow it step by step. So a trial costs no new process,
an early stop needs no clean-up, and Tune's own checkpoints and restarts apply unchanged.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lift_ray.distributed.capacity import Need
from lift_ray.distributed.checkpoint import FOLDER
from lift_ray.errors import BadInput, RunFailed
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import SpaceFile

if TYPE_CHECKING:
    from lift_ray.distributed.run import Run

PROBLEM, DIVERGED = "problem", "diverged"  # keys of a result that is no epoch
WORST = 1e9


class Worker:
    """One rank of a slot.

    torch is imported here and not with the module: the driver, which names Slot, has no use for it.
    """

    def __init__(self, dataset: str, need: Need, rank: int) -> None:
        from lift_ray.distributed.ranks import Ranks
        from lift_ray.distributed.warm import Warm

        self.need, self.rank = need, rank
        self.ranks = Ranks.alone(use_gpu=bool(need.gpus), num_cpus=need.cpus)
        self.warm = Warm(dataset, self.ranks)
        self.run: Run | None = None

    def join(self, address: str, port: int) -> None:
        """Form the slot's process group."""
        from lift_ray.distributed.ranks import Ranks, join_group

        join_group(self.rank, self.need.workers, address, port, self.ranks.device)
        self.ranks = self.warm.ranks = Ranks(self.rank, self.need.workers, self.ranks.device, self.ranks.num_threads)

    def begin(self, config: dict[str, Any]) -> None:
        """Take up a trial."""
        from lift_ray.distributed.run import Run

        self.run = Run(RunConfig.model_validate(config), self.warm)
        self.epochs = self.run.epochs()

    def epoch(self) -> dict[str, float] | None:
        """Train and evaluate one epoch; None after the last."""
        return next(self.epochs, None)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint of this trial."""
        assert self.run is not None
        self.run.load(folder)


class Slot(tune.Trainable):  # type: ignore[misc]
    """Tune's side of a slot: settings in, an epoch's figures out."""

    def setup(self, config: dict[str, Any], space: SpaceFile, dataset: str, need: Need) -> None:
        """Load everything that trials share, then take up the first trial."""
        began = time.monotonic()
        self.space = space
        self.peers: list[Any] = []
        self.problem, self.startup_s = "", 0.0
        try:
            self.worker = Worker(dataset, need, 0)
            if need.workers > 1:
                self._gather(dataset, need)
        except BadInput as error:
            self.problem = str(error)
        self.startup_s = time.monotonic() - began
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take up the next trial in the same processes."""
        if self.problem:
            return True
        began, loaded = time.monotonic(), self.worker.warm.load_s
        values = {name: value for name, value in new_config.items() if name in self.space.space}
        try:
            self._all("begin", self.space.config(values).to_dict())
        except BadInput as error:
            self.problem = str(error)
            return True
        assert self.worker.run is not None
        self.num_epochs = self.worker.run.num_epochs
        self.begin_s = time.monotonic() - began + self.startup_s
        self.load_s = self.worker.warm.load_s - (loaded if not self.startup_s else 0)
        self.startup_s = 0.0
        return True

    def step(self) -> dict[str, Any]:
        """One epoch on every worker; `done` with the last.

        A trial whose loss diverges ends with the worst value, so that the sampler keeps away; input that no trial could
        use is handed to the driver, which ends the search.
        """
        metric, mode = self.space.objective
        ended = {metric: 0.0 if mode == "max" else WORST, "epoch": 0, "done": True}
        if self.problem:
            return ended | {PROBLEM: self.problem}
        try:
            figures = self._all("epoch")
        except RunFailed as error:
            assert self.worker.run is not None
            return ended | {"epoch": self.worker.run.epoch, DIVERGED: str(error)}
        assert figures is not None
        figures |= {
            "time/begin_s": self.begin_s,
            "time/load_s": self.load_s,
            "num_epochs": self.num_epochs,
            "done": figures["epoch"] >= self.num_epochs,
        }
        self.begin_s = self.load_s = 0.0
        return dict(figures)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The trial's trained parameters, optimiser and position."""
        if not self.problem:
            assert self.worker.run is not None
            self.worker.run.save(Path(checkpoint_dir) / FOLDER)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Go on where a lost slot's trial stood."""
        self._all("restore", Path(str(checkpoint)) / FOLDER)

    def _all(self, method: str, *args: Any) -> Any:
        """Call every worker at once; the first worker's answer."""
        waiting = [getattr(peer, method).remote(*args) for peer in self.peers]
        answer = getattr(self.worker, method)(*args)
        ray.get(waiting)
        return answer

    def _gather(self, dataset: str, need: Need) -> None:
        group, port = get_current_placement_group(), _free_port()
        address = ray.util.get_node_ip_address()
        remote = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(Worker)
        self.peers = [
            remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)).remote(
                dataset, need, rank)
            for rank in range(1, need.workers)
        ]  # fmt: skip
        joining = [peer.join.remote(address, port) for peer in self.peers]
        self.worker.join(address, port)
        ray.get(joining)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
