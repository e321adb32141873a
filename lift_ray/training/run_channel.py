"""Where the workers of a run and its driver meet: an actor that holds messages, signs of life, and the wish to stop."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lift_ray.training.events import Event, RunAborted, StepsDone, WorkersLost
from lift_ray.training.progress import STEP_FIGURES


class RunChannel:
    """An actor on the driver's node. Step figures are also Ray metrics, `ray_lift_ray_train_NAME` in Prometheus.

    Args:
        run: its name, the metrics' tag.
    """

    def __init__(self, run: str) -> None:
        self._messages: list[Event] = []
        self._workers: list[Any] = []
        self._heard_at: float | None = None
        self._stop, self._hung, self._problem = "", "", False
        self._gauges = {
            name: Gauge(f"lift_ray_train_{name}", description=text, tag_keys=("run",))
            for name, text in STEP_FIGURES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def join(self, worker: Any) -> bool:
        """A worker is there; whether it has anything to do."""
        self._workers.append(worker)
        return not self._problem

    def tell(self, message: Event) -> str:
        """Takes a worker's message; answers why it is to stop, "" to go on."""
        self._messages.append(message)
        self._heard_at = time.monotonic()
        self._problem = self._problem or isinstance(message, RunAborted)
        if isinstance(message, StepsDone):
            for name, value in message.figures.items():
                self._gauges[name].set(value)
        return self._stop

    def failed(self, reason: str) -> None:
        """Workers were lost; Ray Train starts others, or gives up."""
        self._workers, self._heard_at = [], None
        if not (self._stop or self._problem):
            self._messages.append(WorkersLost(self._hung or reason))
        self._hung = ""

    def take(self) -> tuple[list[Event], float]:
        """The messages since the last call, and for how many seconds the workers have been silent."""
        messages, self._messages = self._messages, []
        return messages, 0.0 if self._heard_at is None else time.monotonic() - self._heard_at

    def ask_stop(self, reason: str) -> bool:
        """Pass on, with the next answer, that the run is to stop; whether there is a run to hear it."""
        self._stop = reason
        return self._heard_at is not None

    def kill_workers(self, reason: str) -> None:
        """End workers that hang, so that Ray Train starts others."""
        for worker in self._workers:
            ray.kill(worker)
        self._hung, self._heard_at = reason, None


def new_channel(run: str) -> Any:
    """A RunChannel on the node of this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(RunChannel).options(scheduling_strategy=here).remote(run)
