"""SSF: a scale and a shift after each projection (arXiv 2210.08823)."""

from __future__ import annotations

from typing import Any, Literal

from lift_ray.model.tuners.config import Blocks
from lift_ray.registry import TunerConfig, register_tuner


class SsfConfig(TunerConfig):
    """Scale and shift after every projection (arXiv 2210.08823)."""

    kind: Literal["ssf"] = "ssf"
    norms: bool = False
    """After both layer norms too."""
    blocks: Blocks = None


def build(tower: Any, block: int, norms: bool = False) -> Any:
    """The tuner of one block; a convolutional tower makes its own."""
    from lift_ray.model.tuners.ssf.module import Ssf

    return tower.make_ssf(block, norms=norms) if tower.family == "resnet" else Ssf(tower.shape, norms)


register_tuner(SsfConfig, build)
