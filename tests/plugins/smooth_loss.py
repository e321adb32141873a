"""A loss in one file: cross-entropy with smoothed labels."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from lift_ray.registry import register_loss
from lift_ray.settings.losses import LossConfig


class SmoothConfig(LossConfig):
    """Cross-entropy with smoothed labels (arXiv 1512.00567)."""

    kind: Literal["smooth"] = "smooth"
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that the target spreads over all classes."""


def build(counts: Any, epsilon: float) -> Callable[[Any, Any], Any]:
    """The loss for classes with these numbers of training images, (K,); torch is imported here, in the worker that trains."""
    from torch.nn.functional import cross_entropy

    return lambda logits, labels: cross_entropy(logits, labels, label_smoothing=epsilon)


register_loss(SmoothConfig, build, prior_left=1.0)
