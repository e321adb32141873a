"""The kinds that settings can name: tuners, heads, losses, methods and samplers, those of the package and those of others.

A kind is registered once, with the class of its settings and what builds it. The settings accept every registered kind, so `kind:
mine` works in files, on the command line and in search spaces. Nothing here imports torch or Ray: what a kind builds is imported when a
worker builds it. `docs/how-to/own-tuner.md` shows a tuner from start to end.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lift_ray.errors import BadInput, one_line

PLUGINS = (
    "LIFT_RAY_PLUGINS"  # modules that register kinds, separated by commas; the processes of a local Ray inherit it
)
GROUP = "lift_ray.plugins"  # entry points of installed packages, each a module that registers kinds


class Config(BaseModel):
    """A section of the settings: strict, frozen, no unknown keys."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, data: Any) -> Any:
        """Give a section without `kind` the default kind: `loss: {tau: 0.5}` is enough."""
        if not isinstance(data, dict):
            return data
        missing = {
            name: {"kind": field.default.kind, **data[name]}
            for name, field in cls.model_fields.items()
            if hasattr(field.default, "kind") and isinstance(data.get(name), dict) and "kind" not in data[name]
        }
        return {**data, **missing}


class TunerConfig(Config):
    """The settings of a tuner. A kind with `blocks: Blocks = None` tunes all blocks, or those that are named."""

    kind: str

    def derived(self, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        """Return values for settings that were not given, for K classes, a number of tuned blocks and a tower of width D."""
        return {}

    def problem(self, num_blocks: int) -> str:
        """Return `setting: rule, but got value; remedy` if a tower with that many blocks does not allow these settings, else ""."""
        return ""

    def options(self, num_blocks: int) -> dict[str, Any]:
        """Return the arguments of `build` from resolved settings; `blocks` are the tuned ones."""
        return self.model_dump(exclude={"kind"})


@dataclass(frozen=True)
class Kind:
    """A kind of something.

    Attributes:
        config: the class of its settings, with `kind: Literal[NAME] = NAME`.
        build: the function that builds it, or its import path `module:name`.
    """

    config: type[Config]
    build: Callable[..., Any] | str

    @property
    def name(self) -> str:
        """The kind's name in settings."""
        return str(get_args(self.config.model_fields["kind"].annotation)[0])


@dataclass(frozen=True)
class TunerKind(Kind):
    """A kind of tuner.

    Attributes:
        build: (tower, block number, **options) -> a model.tuners.base.BlockTuner for one block. It imports torch itself.
        trains: (name, whether it belongs to a norm) -> whether a parameter of the tower in a tuned block is trained itself.
        prepare: (tower with modules of its own, **options) changes that tower; or an import path.
        behind: (tower, **options) -> a module from features (B, D) to features (B, D) behind the tower; or an import path.
        owns: a claim that only one of two tuners may make; the words after "both" in the error message.
        not_in_text: the remedy in the error message if it has no places in the blocks of a text tower; "" if it has.
    """

    build: Callable[..., Any] | str = ""
    trains: Callable[[str, bool], bool] | None = None
    prepare: Callable[..., None] | str = ""
    behind: Callable[..., Any] | str = ""
    owns: str = ""
    not_in_text: str = ""

    @property
    def changes_tower(self) -> bool:
        """True if the kind tunes anything in the tower."""
        return bool(self.build or self.trains or self.prepare)

    @property
    def changes_features(self) -> bool:
        """True if the kind tunes anything before the classifier."""
        return self.changes_tower or bool(self.behind)


@dataclass(frozen=True)
class HeadKind(Kind):
    """A kind of classifier.

    Attributes:
        build: (weights (K, D), **options) -> a model.heads.Head; with `from_text`, (backbone, class names, config, torch's type of
            its products) -> a module from features (B, D) to logits (B, K).
        from_text: it classifies by texts, so that it requires a text tower.
    """

    from_text: bool = False


@dataclass(frozen=True)
class LossKind(Kind):
    """A kind of loss.

    Attributes:
        build: (counts (K,), **options) -> a function of logits (B, K) and labels (B,) to a scalar.
        prior_left: fraction of the log prior of training that a model trained with this loss leaves in its logits: 1 for
            cross-entropy, 0 for a loss that removes it; or a function of the config.
    """

    prior_left: float | Callable[[Any], float] = 1.0


@dataclass(frozen=True)
class SamplerKind:
    """A sampler of Optuna.

    Attributes:
        build: seed -> optuna.samplers.BaseSampler; or an import path.
        problem: (space file, place for messages) -> an error if the sampler does not support the space; or an import path; "" if
            it supports every space.
        package: the name of a package that it needs.
    """

    name: str
    build: Callable[[int], Any] | str
    problem: Callable[[Any, str], BadInput | None] | str = ""
    package: str = ""


AnyKind = TypeVar("AnyKind", bound="Kind | SamplerKind")


@dataclass
class Kinds(Mapping[str, AnyKind], Generic[AnyKind]):
    """The registered kinds of one sort, by name, in the order of registration.

    Attributes:
        sort: name of the sort, for error messages.
        load: registers those of the package; called on first use.
        followers: called after each registration: settings that were built from the kinds before.
    """

    sort: str
    load: Callable[[], object]
    followers: list[Callable[[], None]] = field(default_factory=list)
    _kinds: dict[str, AnyKind] = field(default_factory=dict)
    _is_loaded: bool = False

    def __getitem__(self, name: str) -> AnyKind:
        return self._known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def _known(self) -> dict[str, AnyKind]:
        if not self._is_loaded:
            self._is_loaded = True
            self.load()
        return self._kinds

    def build(self, name: str, *args: Any, **options: Any) -> Any:
        """Build the kind of this name."""
        return imported(self[name].build)(*args, **options)

    def add(self, kind: AnyKind) -> None:
        """Register a kind. Raises BadInput when another one has its name."""
        before = self._kinds.get(kind.name)
        if before is not None and before != kind:
            raise BadInput(f"{self.sort} {kind.name}", "must be registered once", "two of that name", "rename one")
        self._kinds[kind.name] = kind
        for follow in self.followers:
            follow()

    def default(self, name: str) -> Any:
        """Return the default settings of this kind."""
        kind = self[name]
        assert isinstance(kind, Kind)
        return kind.config()

    def union(self) -> Any:
        """Return the type of a field for the settings of any of them, with `kind` as the discriminator."""
        configs = tuple(kind.config for kind in self.values() if isinstance(kind, Kind))
        return Annotated[Union[configs], Field(discriminator="kind")]  # noqa: UP007

    def names(self) -> Any:
        """Return the type of a field for one of their names."""
        return Literal[tuple(self)]


def register_tuner(
    config: type[Config],
    build: Callable[..., Any] | str = "",
    *,
    trains: Callable[[str, bool], bool] | None = None,
    prepare: Callable[..., None] | str = "",
    behind: Callable[..., Any] | str = "",
    owns: str = "",
    not_in_text: str = "",
) -> None:
    """Register a kind of tuner; TunerKind says what the arguments are."""
    TUNERS.add(TunerKind(config, build, trains, prepare, behind, owns, not_in_text))


def register_head(config: type[Config], build: Callable[..., Any] | str, *, from_text: bool = False) -> None:
    """Register a kind of classifier: `build(weights (K, D), **options)` returns a model.heads.Head; HeadKind says more."""
    HEADS.add(HeadKind(config, build, from_text))


def register_loss(
    config: type[Config], build: Callable[..., Any] | str, *, prior_left: float | Callable[[Any], float] = 1.0
) -> None:
    """Register a kind of loss; LossKind says what the arguments are."""
    LOSSES.add(LossKind(config, build, prior_left))


def register_sampler(
    name: str,
    build: Callable[[int], Any] | str,
    *,
    problem: Callable[[Any, str], BadInput | None] | str = "",
    package: str = "",
) -> None:
    """Register a sampler; SamplerKind says what the arguments are."""
    SAMPLERS.add(SamplerKind(name, build, problem, package))


def imported(what: Callable[..., Any] | str) -> Callable[..., Any]:
    """Return a function, imported if it is given as `module:name`."""
    if not isinstance(what, str):
        return what
    module, _, name = what.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def load_plugins() -> None:
    """Import the modules that register kinds from outside.

    These are the entry points of the group `lift_ray.plugins`, and the modules that $LIFT_RAY_PLUGINS names.

    Raises BadInput, naming the plugin, when one cannot be imported.
    """
    modules = [point.value.partition(":")[0] for point in entry_points(group=GROUP)]
    modules += [name.strip() for name in os.environ.get(PLUGINS, "").split(",") if name.strip()]
    for module in dict.fromkeys(modules):
        try:
            importlib.import_module(module)
        except BadInput:
            raise
        except Exception as error:  # whatever the code of others raises
            got = f"{type(error).__name__}: {one_line(error)}"
            raise BadInput(
                f"plugin {module}", "must be importable", got, f"fix it, or remove it from {PLUGINS}"
            ) from None


def _load_tuners() -> None:
    """Each folder of lift_ray/model/tuners has a config.py that registers its kinds."""
    package = importlib.import_module("lift_ray.model.tuners")
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if found.ispkg:
            importlib.import_module(f"{found.name}.config")


TUNERS: Kinds[TunerKind] = Kinds("tuner", _load_tuners)
HEADS: Kinds[HeadKind] = Kinds("head", partial(importlib.import_module, "lift_ray.settings.heads"))
LOSSES: Kinds[LossKind] = Kinds("loss", partial(importlib.import_module, "lift_ray.settings.losses"))
METHODS: Kinds[Kind] = Kinds("method", partial(importlib.import_module, "lift_ray.settings.methods"))
SAMPLERS: Kinds[SamplerKind] = Kinds("sampler", partial(importlib.import_module, "lift_ray.settings.search"))
