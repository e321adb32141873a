"""A slot that notes which backbones it loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lift_ray.searching.slot import Slot


class LoadingSlot(Slot):
    """Real slot that writes its process and the backbone's name to OUT/loads each time that it loads one."""

    def start_workers(self) -> Any:
        """Return the real worker."""
        from lift_ray.training import workspace

        load = workspace.load_backbone

        def noted(model: str, *args: Any, **options: Any) -> Any:
            with (Path(self.slot.out) / "loads").open("a") as file:
                file.write(f"{os.getpid()} {model}\n")
            return load(model, *args, **options)

        workspace.load_backbone = noted
        return super().start_workers()
