"""The search-space file: Optuna's words (choices, int, float, log, step) plus `when` and `start`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from lift_ray.errors import BadInput, did_you_mean
from lift_ray.settings.files import Path_, SettingsFile, _models_of, apply_file_overrides, explain
from lift_ray.settings.run import RunConfig, Settings, apply_overrides

if TYPE_CHECKING:
    import optuna

METRICS = ("mean_class_accuracy", "accuracy", "many", "medium", "few", "loss")
NUM_CHECK_DRAWS = 64
Value = bool | int | float | str | None


class Param(Settings):
    """One searched setting: exactly one of choices, int, float."""

    choices: Annotated[list[Value], Field(min_length=1)] | None = None
    ints: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(None, alias="int")
    floats: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(None, alias="float")
    log: bool = False
    step: Annotated[float, Field(gt=0)] | None = None
    when: dict[str, Value | list[Value]] = {}
    """Draw this setting only when these others have one of these values."""

    @model_validator(mode="after")
    def _one_range(self) -> Param:
        ranges = {"choices": self.choices, "int": self.ints, "float": self.floats}
        given = [name for name, value in ranges.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"must have exactly one of choices, int, float, but got {given or 'none'}; keep one")
        if self.choices is not None and (self.log or self.step):
            raise ValueError("log and step go with int or float, but got choices; remove them")
        if self.log and self.step:
            raise ValueError("must not have both log and step, but got both; remove one")
        bounds = self.bounds
        if bounds and bounds[0] > bounds[1]:
            raise ValueError(f"low <= high must hold, but got {list(bounds)}; swap them")
        if bounds and self.log and bounds[0] <= 0:
            raise ValueError(f"log needs low > 0, but got {bounds[0]}; raise it")
        return self

    @property
    def bounds(self) -> tuple[Any, Any] | None:
        """(low, high), both possible; None for choices."""
        pair = self.ints or self.floats
        return (pair[0], pair[1]) if pair else None

    def holds(self, value: Any) -> bool:
        """Is the value one that this setting can take?"""
        if self.choices is not None:
            return value in self.choices
        number = isinstance(value, int) if self.ints else isinstance(value, int | float)
        low, high = self.bounds  # type: ignore[misc]
        return number and not isinstance(value, bool) and low <= value <= high

    def suggest(self, trial: optuna.trial.BaseTrial, name: str) -> Value:
        """Ask Optuna for a value."""
        if self.choices is not None:
            return trial.suggest_categorical(name, self.choices)
        low, high = self.bounds  # type: ignore[misc]
        if self.ints:
            return trial.suggest_int(name, low, high, log=self.log, step=round(self.step or 1))
        return trial.suggest_float(name, low, high, log=self.log, step=self.step)

    def __str__(self) -> str:
        text = (
            ", ".join(map(str, self.choices))
            if self.choices is not None
            else " ... ".join(f"{b:g}" for b in self.bounds or ())
        )
        return text + (" (log)" if self.log else "")


class NoScheduler(Settings):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class Asha(Settings):
    """Stop the worse trials early (arXiv 1810.05934). Start points always run to their end: they are the yardstick."""

    kind: Literal["asha"] = "asha"
    grace_epochs: Annotated[int, Field(ge=1)] = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class Search(Settings):
    """How the space is searched."""

    trials: Annotated[int, Field(ge=1)] = 32
    sampler: Literal["tpe", "random"] = "tpe"
    scheduler: Annotated[NoScheduler | Asha, Field(discriminator="kind")] = Asha()
    seed: Annotated[int, Field(ge=0)] = 0


class Scale(Settings):
    """What a trial may use of the cluster."""

    workers_per_trial: Annotated[int, Field(ge=1)] = 1
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    use_gpu: Literal["auto"] | bool = "auto"
    max_concurrent: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"


class SpaceFile(Settings):
    """A search-space file, checked as far as it can be without a cluster."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    dataset: str
    out: str | None = None
    objectives: Annotated[dict[str, Literal["max", "min"]], Field(min_length=1, max_length=1)] = {
        "validation/mean_class_accuracy": "max"
    }
    base: dict[str, Any] = {}
    space: Annotated[dict[str, Param], Field(min_length=1)]
    start: list[dict[str, Value]] = []
    """Tried first and never stopped early; `name` labels a point in the tables."""
    search: Search = Search()
    scale: Scale = Scale()

    @property
    def objective(self) -> tuple[str, Literal["max", "min"]]:
        """(metric, max or min)."""
        return next(iter(self.objectives.items()))

    def start_points(self) -> list[dict[str, Value]]:
        """The start points without their names."""
        return [{key: value for key, value in point.items() if key != "name"} for point in self.start]

    def start_labels(self) -> list[str]:
        """What tables call the start points."""
        return [str(point.get("name", f"start point {index}")) for index, point in enumerate(self.start, 1)]

    def most_epochs(self) -> int:
        """The longest that a trial of this space trains."""
        searched = self.space.get("optim.epochs")
        if searched is None:
            return self.config({}).optim.epochs
        return int(max(searched.choices or searched.bounds or ()))

    def config(self, values: dict[str, Any]) -> RunConfig:
        """The run that a trial's values describe. Raises pydantic's ValidationError."""
        return RunConfig.model_validate(apply_overrides(self.base, values))


class Draw:
    """The space as Optuna's define-by-run function; an object, because Ray pickles it with the search's state."""

    def __init__(self, space: dict[str, Param]) -> None:
        self.space = {name: space[name] for name in _parents_first(space)}

    def __call__(self, trial: optuna.trial.BaseTrial) -> dict[str, Value]:
        """All values drawn; settings whose `when` does not hold are left out."""
        values: dict[str, Value] = {}
        for name, param in self.space.items():
            if is_active(param, values):
                values[name] = param.suggest(trial, name)
        return values


def is_active(param: Param, values: dict[str, Any]) -> bool:
    """Does every `when` of a setting hold for the values drawn so far?"""
    return all(name in values and values[name] in _listed(wanted) for name, wanted in param.when.items())


def read_space(path: str | Path, overrides: dict[str, Any] | None = None) -> SpaceFile:
    """Read and check a search-space file. Raises BadInput with every problem found, one line each."""
    file = SettingsFile.read(path)
    apply_file_overrides(file, overrides or {}, SpaceFile)
    file.expand("dataset", "out")
    space = file.validate(SpaceFile)
    problems = [*_objective_problems(file, space), *_base_problems(file, space), *_name_problems(file, space)]
    if not problems:
        problems = [*_draw_problems(file, space), *_when_problems(file, space), *_start_problems(file, space)]
    if problems:
        first_at_each_place = {line.split(": ")[0]: line for line in reversed(problems)}
        raise BadInput("\n".join(reversed(first_at_each_place.values())))
    return space


def known_paths(model: Any = RunConfig, prefix: str = "") -> set[str]:
    """Every dotted path to a single setting, over all kinds of every section."""
    out: set[str] = set()
    for name, field in model.model_fields.items():
        below = _models_of(field.annotation)
        out |= {path for option in below for path in known_paths(option, f"{prefix}{name}.")} or {prefix + name}
    return out


def _listed(wanted: Value | list[Value]) -> list[Value]:
    return wanted if isinstance(wanted, list) else [wanted]


def _parents_first(space: dict[str, Param]) -> list[str]:
    """Names ordered so that every `when` parent comes first. Raises ValueError on a cycle."""
    order: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [name for name in waiting if all(parent in order for parent in space[name].when if parent in space)]
        if not ready:
            raise ValueError(" -> ".join([*waiting, waiting[0]]))
        order += ready
        waiting = [name for name in waiting if name not in ready]
    return order


def _objective_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    metric, options = space.objective[0], [f"validation/{name}" for name in METRICS]
    if metric in options:
        return []
    return [f"{file.where(('objectives', metric))}: unknown metric '{metric}'; {did_you_mean(metric, options)}"]


def _base_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    try:
        file.validate(RunConfig, space.base, ("base",))
    except BadInput as error:
        return str(error).splitlines()
    return []


def _name_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    """Names that nothing in the settings or the space bears, and circles of `when`."""
    out: list[str] = []
    paths = known_paths()
    for name, param in space.space.items():
        if name not in paths:
            out.append(f"{file.where(('space', name))}: unknown setting '{name}'; {did_you_mean(name, paths)}")
        out += [
            f"{file.where(('space', name, 'when', parent))}: `when` must name a setting of the space, but got '{parent}'; "
            f"{did_you_mean(parent, space.space)}"
            for parent in param.when
            if parent not in space.space
        ]
    if not out:
        try:
            _parents_first(space.space)
        except ValueError as error:
            out.append(f"{file.where(('space',))}: `when` must not go in a circle, but got {error}; break it")
    return out


def _when_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    """Values of `when` that the named setting never takes."""
    return [
        f"{file.where(('space', name, 'when', parent))}: {parent} never takes the value {value!r}; "
        f"{did_you_mean(value, space.space[parent].choices or [str(space.space[parent])])}"
        for name, param in space.space.items()
        for parent, wanted in param.when.items()
        for value in _listed(wanted)
        if not space.space[parent].holds(value)
    ]


def _draw_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draw = Draw(space.space)
    return [
        line for _ in range(NUM_CHECK_DRAWS) for line in _config_problems(file, space, draw(study.ask()), ("space",))
    ]


def _start_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    out: list[str] = []
    for index, point in enumerate(space.start_points()):
        at: Path_ = ("start", index)
        bad = False
        for name, value in point.items():
            if name not in space.space:
                problem = f"must name a setting of the space, but got '{name}'; {did_you_mean(name, space.space)}"
            elif not space.space[name].holds(value):
                problem = f"must lie inside the space ({space.space[name]}), but got {value!r}; widen the space or move the point"
            elif not is_active(space.space[name], point):
                problem = f"has no effect here, because its `when` {space.space[name].when} does not hold; remove it"
            else:
                continue
            bad = True
            out.append(f"{file.where((*at, name))}: {problem}")
        if not bad:
            out += _config_problems(file, space, point, at)
    return out


def _config_problems(file: SettingsFile, space: SpaceFile, values: dict[str, Any], at: Path_) -> list[str]:
    """Lines for a set of values that does not build a valid run; each says which searched setting is to blame."""
    try:
        space.config(values)
    except ValidationError as error:
        out = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]) + (
                ".kind" if problem["type"] == "union_tag_invalid" else ""
            )
            blamed = next(
                (
                    v
                    for v in values
                    if v.split(".")[0] == name.split(".")[0] and v.split(".")[-1] == name.split(".")[-1]
                ),
                "",
            )
            kind = f"{name.split('.')[0]}.kind"
            if problem["type"] == "extra_forbidden" and blamed:
                out.append(
                    f"{file.where((*at, blamed))}: has no effect with {kind} {values.get(kind)}; "
                    f"add when: {{{kind}: [the kinds it belongs to]}}"
                )
            else:
                out.append(
                    f"{file.where((*at, blamed) if blamed else at)}: {explain(RunConfig, problem, tuple(name.split('.')))}"
                )
        return out
    return []
