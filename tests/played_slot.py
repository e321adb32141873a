"""A slot of Ray Tune that trains nothing."""

from __future__ import annotations

from typing import Any

from played import worker_of

from lift_ray.searching.slot import Slot


class PlayedSlot(Slot):
    """Real slot with a worker that trains nothing."""

    def start_workers(self) -> Any:
        """Return the worker that trains nothing."""
        return worker_of(self.slot)
