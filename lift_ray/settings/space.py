"""Search-space files: the vocabulary of Optuna (choices, int, float, log, step), plus `named`, `when` and `baselines`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lift_ray.epoch_metrics import MAIN_METRIC
from lift_ray.registry import SAMPLERS, Config
from lift_ray.settings.base import Holds, OneOf, dotted
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import Constraint, PlanConfig, ScaleConfig, SearchConfig, expected_epochs

if TYPE_CHECKING:
    import optuna

RENAMED = {"start": "baselines"}  # keys of earlier versions, still read
LARGEST_GRID = 10_000
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
LARGEST_BOUND = 1e15  # above this, samplers lose integer precision
NAMED = ("backbone", "augment", "head", "loss")  # sections whose settings `named` chooses together
TOWER = ("backbone", "backbone.model", "backbone.pretrained", "backbone.quickgelu", "backbone.resolution_px")


def _unpacked(value: Any) -> Any:
    """Return the list or mapping that a text of a choice stands for; other values as they are."""
    return json.loads(value) if isinstance(value, str) and _PACKED.fullmatch(value) else value


_INTEGER = "-?(?:0|[1-9][0-9]*)"
_PACKED = re.compile(rf'\[{_INTEGER}(?:, {_INTEGER})*\]|{{"last": {_INTEGER}}}')
if TYPE_CHECKING:
    Value = bool | int | float | str | None
    Values = Value | list[Value]
else:  # a list or a mapping becomes text, because Optuna's categories, tables of trials and `when` hold plain values
    _Plain = bool | int | float | str | None
    _List = Annotated[list[int], Field(min_length=1), AfterValidator(json.dumps)]
    _Last = Annotated[dict[Literal["last"], int], Field(min_length=1), AfterValidator(json.dumps)]
    _RULE = "text, a number, true, false, null, a list of integers or {last: K}"
    Value = Annotated[_Plain | _List | _Last, OneOf(_RULE)]
    Values = Annotated[_Plain | _Last | list[Value], OneOf("one value or a list of values")]


class Param(Config):
    """Range of a searched setting: exactly one of choices, named, int and float."""

    choices: Annotated[list[Value], Field(min_length=1)] | None = None
    """Values to choose from."""
    named: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] | None = None
    """Settings of a section that belong together, to choose from by name: `backbone: {named: {clip: {model: ViT-B-16, pretrained:
    openai}, dinov3: {...}}}`. `when`, baselines and tables have the names. What a choice does not set is that of `base`. Possible
    for backbone, augment, head and loss."""
    ints: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(None, alias="int")
    """[LOW, HIGH] of an integer, both included."""
    floats: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(None, alias="float")
    """[LOW, HIGH] of a number."""
    log: bool = False
    """Draw on a logarithmic scale, which suits rates and widths."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Distance of the values, counted from LOW."""
    when: dict[str, Values] = {}
    """Search this setting only if other settings have one of these values."""

    @model_validator(mode="after")
    def _one_range(self) -> Param:
        ranges = {"choices": self.choices, "named": self.named, "int": self.ints, "float": self.floats}
        given = [name for name, value in ranges.items() if value is not None]
        if len(given) != 1:
            got = f"{given}; keep one" if given else "none; add one"
            raise ValueError(f"must have exactly one of choices, named, int, float, but got {got}")
        if strange := next((name for name in self.named or {} if not re.fullmatch(NAME, name)), ""):
            raise ValueError(f"names must be letters, digits, '.', '_' and '-', but got {strange!r}; rename it")
        if self.values is not None and (self.log or self.step):
            raise ValueError(f"log and step require int or float, but got {given[0]}; remove them")
        if self.log and self.step:
            raise ValueError("must not have both log and step, but got both; remove one")
        bounds = self.bounds
        if bounds and max(map(abs, bounds)) > LARGEST_BOUND:
            raise ValueError(f"bounds must be within -1e15 ... 1e15, but got {list(bounds)}; narrow them")
        if bounds and bounds[0] > bounds[1]:
            raise ValueError(f"low must be at most high, but got {list(bounds)}; swap them")
        if bounds and self.log and bounds[0] <= 0:
            raise ValueError(f"log requires low > 0, but got {bounds[0]}; raise it")
        if self.ints and self.step and self.step % 1:
            raise ValueError(f"step must be an integer for int, but got {self.step}; round it")
        if bounds and not self._on_step(bounds[1]):
            raise ValueError(
                f"high - low must be a whole number of steps, but got {list(bounds)} with step {self.step:g}; change one"
            )
        return self

    def _on_step(self, value: Any) -> bool:
        """Return True if the value is a whole number of steps above low, with Optuna's tolerance for rounding."""
        steps = (value - self.bounds[0]) / self.step if self.bounds and self.step else 0.0
        return bool(abs(steps - round(steps)) < 1e-8)

    @property
    def values(self) -> list[Value] | None:
        """The values to choose from, or their names; None for int and float."""
        return list(self.named) if self.named is not None else self.choices

    def settings(self, name: str, value: Value) -> dict[str, Any]:
        """Return the settings that a value stands for, by dotted name: itself, or those of a named choice.

        Args:
            name: what is searched.
        """
        if self.named is None:
            return {name: _unpacked(value)}
        return {f"{name}.{key}": one for key, one in dotted(self.named[str(value)])}

    def names_set(self, name: str) -> list[set[str]]:
        """Return the settings that are set by each named choice; a single setting is its own."""
        return [set(self.settings(name, one)) for one in self.named] if self.named is not None else [{name}]

    @property
    def bounds(self) -> tuple[Any, Any] | None:
        """(low, high), both inclusive; None for choices."""
        pair = self.ints or self.floats
        return (pair[0], pair[1]) if pair else None

    def holds(self, value: Any) -> bool:
        """Return True if the setting can take this value."""
        if self.values is not None:
            return value in self.values
        number = isinstance(value, int) if self.ints else isinstance(value, int | float)
        low, high = self.bounds  # type: ignore[misc]
        return number and not isinstance(value, bool) and low <= value <= high and self._on_step(value)

    def options(self) -> list[Value] | None:
        """Return every value if they can be enumerated (choices, integers, steps), else None."""
        if self.values is not None:
            return list(self.values)
        low, high = self.bounds  # type: ignore[misc]
        step = self.step or (1 if self.ints else None)
        if step is None:
            return [low] if low == high else None
        number = min(LARGEST_GRID + 1, round((high - low) / step) + 1)
        return [round(low + i * step) if self.ints else low + i * step for i in range(number)]

    def suggest(self, trial: optuna.trial.BaseTrial, name: str) -> Value:
        """Suggest a value with Optuna."""
        if self.values is not None:
            return trial.suggest_categorical(name, self.values)
        low, high = self.bounds  # type: ignore[misc]
        if self.ints:
            return trial.suggest_int(name, low, high, log=self.log, step=round(self.step or 1))
        return trial.suggest_float(name, low, high, log=self.log, step=self.step)

    def __str__(self) -> str:
        text = (
            ", ".join(map(str, self.values))
            if self.values is not None
            else " ... ".join(f"{b:g}" for b in self.bounds or ())
        )
        return text + (" (log)" if self.log else "")


class SpaceFile(Config):
    """Search-space file: what is searched, how, and with which resources."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    """Name of the search, which is part of the default output folder."""
    dataset: str
    """Path or fsspec URL of Parquet shards, or embedded:NAME."""
    out: str | None = None
    """New folder or URL for the results, as --out; by default runs/NAME-DATE-TIME."""
    objectives: Annotated[dict[str, Literal["max", "min"]], Field(min_length=1)] = {MAIN_METRIC: "max"}
    """Metrics to optimize; several make a Pareto search. Early stopping and `best` use the first."""
    constraints: dict[str, Constraint] = {}
    """Bounds on metrics. A trial that violates one before training (trained_parameters) is reported to the sampler, not trained."""
    base: Annotated[dict[str, Any], Holds(RunConfig)] = {}
    """Run settings that all trials share."""
    space: Annotated[dict[str, Param], Field(min_length=1)]
    """Range of each searched setting, by dotted name."""
    baselines: list[dict[str, Value]] = []
    """Settings to compare the search with, trained first and never stopped early; `name` is the label in tables. Of several with one
    name, the best on validation is compared: the same method with other rates, for example."""
    test: Literal["split", "none"] = "split"
    """none: compare on validation only, for datasets without a test split; the result is then not held out from the search."""
    search: SearchConfig = SearchConfig()
    """How to search."""
    scale: ScaleConfig = ScaleConfig()
    """Resources of a trial."""
    plan: PlanConfig = PlanConfig()
    """Estimates for --dry-run."""

    @property
    def objective(self) -> tuple[str, Literal["max", "min"]]:
        """The first objective: (metric, max or min)."""
        return next(iter(self.objectives.items()))

    def baseline_values(self) -> list[dict[str, Value]]:
        """Return the settings of each baseline, without its name."""
        return [{key: value for key, value in point.items() if key != "name"} for point in self.baselines]

    def baseline_labels(self) -> list[str]:
        """Return the label of each baseline in tables."""
        return [str(point.get("name", f"baseline {index}")) for index, point in enumerate(self.baselines, 1)]

    def kinds(self) -> list[str]:
        """Return the tuner kinds with their own trials (search.per_kind); otherwise one group with an empty name."""
        if self.search.per_kind is None:
            return [""]
        return [str(kind) for kind in self.space["tuner.kind"].choices or []]

    def of_kind(self, kind: str) -> dict[str, Param]:
        """Return the space with tuner.kind fixed to one of `kinds`."""
        return self.space | {"tuner.kind": Param(choices=[kind])} if kind else self.space

    @property
    def num_trials(self) -> int:
        """Total number of trials; at most the number of points of a grid."""
        number = (self.search.per_kind or 0) * len(self.kinds()) or self.search.trials
        return min(number, len(grid_points(self.space))) if self.search.sampler == "grid" else number

    def most_epochs(self) -> int:
        """Return the maximum number of epochs of a trial."""
        searched = self.space.get("optim.epochs")
        if searched is None:
            return self.config({}).optim.epochs
        return int(max(searched.choices or searched.bounds or ()))

    def expected_epochs(self) -> float:
        """Return the epochs of all trials together: of baselines, which are never stopped early, and on average of the others."""
        most, drawn = self.most_epochs(), max(0, self.num_trials - len(self.baselines))
        return (self.num_trials - drawn) * most + drawn * expected_epochs(self.search.scheduler, most)

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that the values of a trial stand for, by dotted name."""
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= self.space[name].settings(name, value) if name in self.space else {name: _unpacked(value)}
        return found

    def config(self, values: dict[str, Any]) -> RunConfig:
        """Return the run settings for the values of a trial. Raises pydantic's ValidationError."""
        return RunConfig.model_validate(apply_overrides(self.base, self.settings(values), RunConfig))


def backbones(space: SpaceFile) -> dict[str, dict[str, Any]]:
    """Return the values that choose each backbone of a search, by a label; one with an empty label if none is searched.

    Settings that are searched in a range without steps are left out.
    """
    chosen = {name: param for name, param in space.space.items() if name in TOWER and param.options() is not None}
    with_parents = dict(chosen)
    while parents := {
        name: space.space[name]
        for param in with_parents.values()
        for name in param.when
        if name in space.space and name not in with_parents and space.space[name].options() is not None
    }:
        with_parents |= parents
    found: dict[str, dict[str, Any]] = {}
    for point in grid_points(with_parents):
        values = {name: value for name, value in point.items() if name in chosen}
        found.setdefault(", ".join(map(str, values.values())), values)
    return found


def grid_points(space: dict[str, Param]) -> list[dict[str, Value]]:
    """Return all combinations of values that satisfy `when`, at most LARGEST_GRID + 1. Raises ValueError for a range without steps."""
    points: list[dict[str, Value]] = [{}]
    for name in parents_first(space):
        options = space[name].options()
        if options is None:
            raise ValueError(name)
        points = [
            new
            for point in points
            for new in ([point | {name: value} for value in options] if is_active(space[name], point) else [point])
        ][: LARGEST_GRID + 1]
    return points


class Draw:
    """Search space as a define-by-run function of Optuna."""

    def __init__(self, space: dict[str, Param]) -> None:
        self.space = {name: space[name] for name in parents_first(space)}

    def __call__(self, trial: optuna.trial.BaseTrial) -> dict[str, Value]:
        """Return the suggested values; settings whose `when` does not hold are omitted."""
        values: dict[str, Value] = {}
        for name, param in self.space.items():
            if is_active(param, values):
                values[name] = param.suggest(trial, name)
        return values


def seeded_draws(space: dict[str, Param], number: int) -> list[dict[str, Value]]:
    """Return the first draws of a random search with a fixed seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, draw = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), Draw(space)
    return [draw(study.ask()) for _ in range(number)]


def replaced(base: dict[str, Any], always: Collection[str]) -> set[str]:
    """Return the dotted settings of `base` that no trial uses.

    The kind of a section with other keys counts as used, because it says which kind they belong to.

    Args:
        always: settings that the space sets in every trial.
    """
    names, searched = [name for name, _ in dotted(base)], {setting_of(name) for name in always}
    with_keys = {name.rpartition(".")[0] for name in names if not name.endswith(".kind")}
    return {
        name
        for name in names
        if setting_of(name) in searched and not (name.endswith(".kind") and name.rpartition(".")[0] in with_keys)
    }


NESTED = "head.tuner"  # the only section with kinds inside another one


def section_of(name: str) -> str:
    """Return the section of a dotted setting: `tuner` of `tuner.blocks.last`, `head.tuner` of `head.tuner.blocks`."""
    return NESTED if name.startswith(f"{NESTED}.") else name.split(".")[0]


def setting_of(name: str) -> str:
    """Return the setting of which a dotted name is all or a part: `tuner.blocks` of `tuner.blocks.last`."""
    return ".".join(name.split(".")[: section_of(name).count(".") + 2])


def is_active(param: Param, values: dict[str, Any]) -> bool:
    """Return True if every `when` of a setting holds for the values drawn so far."""
    return all(name in values and values[name] in listed(wanted) for name, wanted in param.when.items())


def listed(wanted: Value | list[Value]) -> list[Value]:
    """Return one value or a list of values as a list."""
    return wanted if isinstance(wanted, list) else [wanted]


def parents_first(space: dict[str, Param]) -> list[str]:
    """Sort names so that `when` parents come first. Raises ValueError with the circle if `when` is circular."""
    order: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [name for name in waiting if all(parent in order for parent in space[name].when if parent in space)]
        if not ready:
            circle = [waiting[0]]
            while circle.count(circle[-1]) == 1:
                circle.append(next(parent for parent in space[circle[-1]].when if parent in waiting))
            raise ValueError(" -> ".join(circle[circle.index(circle[-1]) :]))
        order += ready
        waiting = [name for name in waiting if name not in ready]
    return order


def _follow() -> None:
    """Accept samplers that were registered after this module was imported."""
    SearchConfig.model_fields["sampler"].annotation = SAMPLERS.names()
    SearchConfig.model_rebuild(force=True)
    SpaceFile.model_rebuild(force=True)


SAMPLERS.followers.append(_follow)
