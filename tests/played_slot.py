"""A slot of Ray Tune that trains nothing."""

from __future__ import annotations

from typing import Any

from played import worker_of

from lift_ray.distributed.slot import Slot


class PlayedSlot(Slot):
    """As a real one, with another worker."""

    def setup(self, config: dict[str, Any]) -> None:
        self.slot = config["slot"]
        self.workers = worker_of(self.slot)  # type: ignore[assignment]
        self.reset_config(config)
