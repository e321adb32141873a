"""lift_ray: searches for the way to fine-tune CLIP that serves the rare classes, on a Ray cluster or a laptop.

    import lift_ray as lr

    clf = lr.Classifier.load("runs/mine")
    clf.predict(["a.jpg", pillow_image, array], top=3)  # [[("ewer", 0.81), ...], ...]

Importing the package loads neither torch nor Ray; its names load what they need when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BadInput": "lift_ray.errors",
    "Classifier": "lift_ray.inference.classifier",
    "Dataset": "lift_ray.data.dataset",
    "EvaluationResult": "lift_ray.inference.classifier",
    "RunFailed": "lift_ray.errors",
}
"""The public names, and the module of each. Everything else may change without notice."""

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from lift_ray.data.dataset import Dataset as Dataset
    from lift_ray.errors import BadInput as BadInput
    from lift_ray.errors import RunFailed as RunFailed
    from lift_ray.inference.classifier import Classifier as Classifier
    from lift_ray.inference.classifier import EvaluationResult as EvaluationResult


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lift_ray' has no attribute '{name}'")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
