"""Kinds that leave the tower as it is."""

from __future__ import annotations

from typing import Literal

from lift_ray.registry import TunerConfig, register_tuner


class LinearProbeConfig(TunerConfig):
    """Nothing in the tower is trained, only the classifier."""

    kind: Literal["linear_probe"] = "linear_probe"


class ZeroShotConfig(TunerConfig):
    """Nothing is trained: CLIP's own classifier, cosines with the class names in the shared space."""

    kind: Literal["zero_shot"] = "zero_shot"


register_tuner(LinearProbeConfig)
register_tuner(ZeroShotConfig)
