"""Actor that relays events, heartbeats and stop requests between the workers of a run and its driver."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lift_ray.training.events import Event, RunAborted, StepsDone, WorkersLost
from lift_ray.training.progress import STEP_FIGURES


class RunChannel:
    """Actor on the driver's node. It also exports step figures as Ray metrics, `ray_lift_ray_train_NAME` in Prometheus.

    Args:
        run: name of the run, the tag of its metrics.
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
        """Register a worker. Returns False if the run was aborted and there is nothing to do."""
        self._workers.append(worker)
        return not self._problem

    def tell(self, message: Event) -> str:
        """Store an event of a worker. Returns the reason to stop, or "" to continue."""
        self._messages.append(message)
        self._heard_at = time.monotonic()
        self._problem = self._problem or isinstance(message, RunAborted)
        if isinstance(message, StepsDone):
            for name, value in message.figures.items():
                self._gauges[name].set(value)
        return self._stop

    def failed(self, reason: str) -> None:
        """Note that workers were lost; Ray Train starts new ones or gives up."""
        self._workers, self._heard_at = [], None
        if not (self._stop or self._problem):
            self._messages.append(WorkersLost(self._hung or reason))
        self._hung = ""

    def take(self) -> tuple[list[Event], float]:
        """Return the events since the last call, and the seconds since the workers were last heard."""
        messages, self._messages = self._messages, []
        return messages, 0.0 if self._heard_at is None else time.monotonic() - self._heard_at

    def ask_stop(self, reason: str) -> bool:
        """Request a stop with the next reply. Returns True if there are workers to receive it."""
        self._stop = reason
        return self._heard_at is not None

    def kill_workers(self, reason: str) -> None:
        """Kill workers that hang, so that Ray Train starts new ones."""
        for worker in self._workers:
            ray.kill(worker)
        self._hung, self._heard_at = reason, None


def new_channel(run: str) -> Any:
    """Start a RunChannel on the node of this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(RunChannel).options(scheduling_strategy=here).remote(run)
