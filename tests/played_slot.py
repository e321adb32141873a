"""A slot of Ray Tune that trains nothing."""

from __future__ import annotations

from typing import Any

from played import worker_of

from lift_ray.search.slot import Slot


class PlayedSlot(Slot):
    """As a real one, with another worker."""

    def start_workers(self) -> Any:
        """What plays it."""
        return worker_of(self.slot)
