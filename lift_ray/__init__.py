"""lift_ray: searches for the way to fine-tune CLIP that serves the rare classes, on a Ray cluster or a laptop.

    import lift_ray as lr

    study = lr.search(lr.SearchSpace.from_yaml("search_spaces/quickstart.yaml"), out="runs/mine")
    clf = lr.Classifier.load("runs/mine")
    clf.predict(["a.jpg", pillow_image, array], top=3)  # [[("ewer", 0.81), ...], ...]

Importing the package loads neither torch nor Ray; a name loads what it needs when it is used. What is not listed here may change
without notice.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lift_ray.api.data import open_dataset as open_dataset
    from lift_ray.api.finished import FinishedStudy as FinishedStudy
    from lift_ray.api.fit import FitResult as FitResult
    from lift_ray.api.fit import fit as fit
    from lift_ray.api.search import search as search
    from lift_ray.api.space import SearchSpace as SearchSpace
    from lift_ray.api.tuned import add_tuner as add_tuner
    from lift_ray.data.dataset import Dataset as Dataset
    from lift_ray.errors import BadInput as BadInput
    from lift_ray.errors import RunFailed as RunFailed
    from lift_ray.errors import Stopped as Stopped
    from lift_ray.inference.classifier import Classifier as Classifier
    from lift_ray.inference.classifier import EvaluationResult as EvaluationResult
    from lift_ray.model.backbone import load_backbone as load_backbone
    from lift_ray.model.tuners.adapter.config import AdapterConfig as AdapterConfig
    from lift_ray.model.tuners.adaptformer.config import AdaptformerConfig as AdaptformerConfig
    from lift_ray.model.tuners.clip_adapter.config import ClipAdapterConfig as ClipAdapterConfig
    from lift_ray.model.tuners.dora.config import DoraConfig as DoraConfig
    from lift_ray.model.tuners.ia3.config import Ia3Config as Ia3Config
    from lift_ray.model.tuners.lora.config import LoraConfig as LoraConfig
    from lift_ray.model.tuners.own_weights.config import BatchnormConfig as BatchnormConfig
    from lift_ray.model.tuners.own_weights.config import BitfitConfig as BitfitConfig
    from lift_ray.model.tuners.own_weights.config import FullConfig as FullConfig
    from lift_ray.model.tuners.own_weights.config import LayernormConfig as LayernormConfig
    from lift_ray.model.tuners.own_weights.config import PartialConfig as PartialConfig
    from lift_ray.model.tuners.prompt.config import VptDeepConfig as VptDeepConfig
    from lift_ray.model.tuners.prompt.config import VptShallowConfig as VptShallowConfig
    from lift_ray.model.tuners.sparse.config import SparseConfig as SparseConfig
    from lift_ray.model.tuners.ssf.config import SsfConfig as SsfConfig
    from lift_ray.model.tuners.untuned.config import LinearProbeConfig as LinearProbeConfig
    from lift_ray.model.tuners.untuned.config import ZeroShotConfig as ZeroShotConfig
    from lift_ray.settings.run import BackboneConfig as BackboneConfig
    from lift_ray.settings.run import EvaluationConfig as EvaluationConfig
    from lift_ray.settings.run import OptimConfig as OptimConfig
    from lift_ray.settings.run import RunConfig as RunConfig

_HOMES = {
    "api.data": "open_dataset",
    "api.finished": "FinishedStudy",
    "api.fit": "FitResult fit",
    "api.search": "search",
    "api.space": "SearchSpace",
    "api.tuned": "add_tuner",
    "data.dataset": "Dataset",
    "errors": "BadInput RunFailed Stopped",
    "inference.classifier": "Classifier EvaluationResult",
    "model.backbone": "load_backbone",
    "model.tuners.adapter.config": "AdapterConfig",
    "model.tuners.adaptformer.config": "AdaptformerConfig",
    "model.tuners.clip_adapter.config": "ClipAdapterConfig",
    "model.tuners.dora.config": "DoraConfig",
    "model.tuners.ia3.config": "Ia3Config",
    "model.tuners.lora.config": "LoraConfig",
    "model.tuners.own_weights.config": "BatchnormConfig BitfitConfig FullConfig LayernormConfig PartialConfig",
    "model.tuners.prompt.config": "VptDeepConfig VptShallowConfig",
    "model.tuners.sparse.config": "SparseConfig",
    "model.tuners.ssf.config": "SsfConfig",
    "model.tuners.untuned.config": "LinearProbeConfig ZeroShotConfig",
    "settings.run": "BackboneConfig EvaluationConfig OptimConfig RunConfig",
}
"""The names of the public API, by module."""
_MODULES = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lift_ray' has no attribute '{name}'")
    found = globals()[name] = getattr(import_module(f"lift_ray.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
