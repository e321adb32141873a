"""A slot that notes which chunks of features it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from noting import note_chunks

from lift_ray.searching.slot import Slot


class NotingSlot(Slot):
    """Real slot, for which each chunk takes a second longer."""

    def start_workers(self) -> Any:
        """Return the real worker."""
        note_chunks(Path(self.slot.out) / "chunks", 1.0)
        return super().start_workers()
