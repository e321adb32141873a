"""What can be wrong with a search-space file beyond the type of each value, found without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lift_ray.errors import BadInput, did_you_mean
from lift_ray.registry import SAMPLERS, imported
from lift_ray.settings.messages import Path_, explain, models_of
from lift_ray.settings.overrides import apply_file_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import check_global_batch
from lift_ray.settings.search import NoSchedulerConfig
from lift_ray.settings.space import (
    LARGEST_GRID,
    RENAMED,
    SpaceFile,
    grid_points,
    is_active,
    listed,
    parents_first,
    seeded_draws,
)
from lift_ray.settings.yaml_file import SettingsFile

METRICS = (
    "mean_class_accuracy",
    "accuracy",
    "many",
    "medium",
    "few",
    "worst_class",
    "harmonic_mean",
    "geometric_mean",
    "macro_f1",
    "calibration_error",
    "loss",
)
COUNT = "trained_parameters"
NUM_CHECK_DRAWS = 64


def problems_of(file: SettingsFile, space: SpaceFile) -> list[str]:
    """One line for every place where the file cannot be used: names, `when`, seeded draws, baselines."""
    problems = [*_objective_problems(file, space), *_base_problems(file, space), *_name_problems(file, space)]
    if not problems:
        problems = [*_draw_problems(file, space), *_when_problems(file, space), *_baseline_problems(file, space)]
    if not problems:
        problems = _search_problems(file, space)
    first_at_each_place = {line.split(": ")[0]: " ".join(line.split()) for line in reversed(problems)}
    return list(reversed(first_at_each_place.values()))


def known_paths(model: Any = RunConfig, prefix: str = "") -> set[str]:
    """Every dotted path to a single setting, over all kinds of every section."""
    out: set[str] = set()
    for name, field in model.model_fields.items():
        below = models_of(field.annotation)
        out |= {path for option in below for path in known_paths(option, f"{prefix}{name}.")} or {prefix + name}
    return out


def _objective_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    options = [f"validation/{name}" for name in METRICS]
    out = [
        f"{file.where((section, metric))}: unknown metric '{metric}'; {did_you_mean(metric, [*options, COUNT])}"
        for section, metrics in (("objectives", space.objectives), ("constraints", space.constraints))
        for metric in metrics
        if metric not in (*options, COUNT)
    ]
    if not out and space.objective[0] == COUNT:
        out.append(
            f"{file.where(('objectives', COUNT))}: the first objective must be a metric of validation, but got {COUNT}; "
            "name validation/mean_class_accuracy before it"
        )
    return out


def _search_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    """What the sampler, the scheduler and per_kind ask of the space."""
    search = space.search
    rules: list[tuple[Path_, str]] = [(("search", "sampler"), _sampler_problem(space))]
    if search.per_kind is not None:
        rules.append((("search", "per_kind"), _per_kind_rule(space)))
    return [f"{file.where(at)}: {problem}" for at, problem in rules if problem] or _epoch_problems(file, space)


def _sampler_problem(space: SpaceFile) -> str:
    problem = SAMPLERS[space.search.sampler].problem
    return str(imported(problem)(space)) if problem else ""


def grid_problem(space: SpaceFile) -> str:
    """What of a space `grid` does not support."""
    try:
        number = len(grid_points(space.space))
    except ValueError as error:
        return f"grid needs choices, int, or float with a step, but got {error} without; give it a step, or use random"
    if number > LARGEST_GRID:
        return f"grid needs at most {LARGEST_GRID} points, but got more; give larger steps, or use random"
    if space.search.trials < number:
        return f"grid needs a trial for each of its {number} points, but got trials: {space.search.trials}; raise it, or use random"
    if space.baselines:
        return "grid has all points of the space, but got baselines too; remove baselines"
    return ""


def cmaes_problem(space: SpaceFile) -> str:
    """What of a space `cmaes` does not support."""
    named = next((name for name, param in space.space.items() if param.choices is not None or param.when), "")
    if named:
        return f"cmaes needs int and float settings without `when`, but got {named}; use tpe, or move it to base"
    if len(space.space) < 2:
        return "cmaes needs at least 2 settings, but got 1; use tpe"
    if len(space.objectives) > 1:
        return f"cmaes needs one objective, but got {len(space.objectives)}; use nsga2 or tpe"
    return ""


def gp_problem(space: SpaceFile) -> str:
    """What of a space `gp` does not support."""
    named = next((name for name, param in space.space.items() if param.when), "")
    return f"gp needs settings without `when`, but got {named}; use tpe" if named else ""


def nsga2_problem(space: SpaceFile) -> str:
    """What of a space `nsga2` does not support."""
    return "" if len(space.objectives) > 1 else "nsga2 needs several objectives, but got 1; use tpe, or add one"


def _per_kind_rule(space: SpaceFile) -> str:
    kind = space.space.get("tuner.kind")
    if kind is None or kind.choices is None:
        return "must have tuner.kind with choices in the space, but got none; add it, or set trials"
    if any("tuner.kind" not in point for point in space.baselines):
        return "needs baselines that name their tuner.kind, but got one that does not; add it"
    if space.search.sampler == "grid":
        return "does not go with sampler grid; set trials"
    return ""


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
            parents_first(space.space)
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
        for value in listed(wanted)
        if not space.space[parent].holds(value)
    ]


def _draw_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    draws = seeded_draws(space.space, NUM_CHECK_DRAWS)
    return [line for values in draws for line in _config_problems(file, space, values, ("space",))]


def _baseline_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    out: list[str] = []
    for index, point in enumerate(space.baseline_values()):
        at: Path_ = ("baselines", index)
        bad = not point
        if not point:
            out.append(f"{file.where(at)}: must set at least one setting of the space, but got none; add them")
        for name, value in point.items():
            if name not in space.space:
                problem = f"must name a setting of the space, but got '{name}'; {did_you_mean(name, space.space)}"
            elif not space.space[name].holds(value):
                problem = f"must lie inside the space ({space.space[name]}), but got {value!r}; widen the space or change the baseline"
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
    batch = "optim.global_batch_size"
    try:
        check_global_batch(space.config(values).optim.global_batch_size, space.scale.workers_per_trial)
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
                todo = f"add when: {{{kind}: [the kinds it belongs to]}}" if kind in space.space else "remove it"
                out.append(f"{file.where((*at, blamed))}: has no effect with {kind} {problem['loc'][1]}; {todo}")
            else:
                out.append(
                    f"{file.where((*at, blamed) if blamed else at)}: {explain(RunConfig, problem, tuple(name.split('.')))}"
                )
        return out
    except ValueError as error:
        place = (*at, batch) if batch in values else ("base", *batch.split("."))
        return [f"{file.where(place)}: {str(error).removeprefix(batch + ': ')}"]
    return []


def _epoch_problems(file: SettingsFile, space: SpaceFile) -> list[str]:
    """A scheduler that could stop nothing."""
    scheduler, most = space.search.scheduler, space.most_epochs()
    if isinstance(scheduler, NoSchedulerConfig) or scheduler.grace_epochs <= most:
        return []
    return [
        f"{file.where(('search', 'scheduler', 'grace_epochs'))}: must be at most the {most} epochs of a trial, "
        f"but got {scheduler.grace_epochs}; lower it, or set search.scheduler.kind=none"
    ]


def read_space(path: str | Path, overrides: dict[str, Any] | None = None) -> SpaceFile:
    """Read and check a search-space file. Raises BadInput with every problem found, one line each."""
    file = SettingsFile.read(path)
    for old, new in RENAMED.items():
        file.rename(old, new)
    apply_file_overrides(file, {RENAMED.get(key, key): value for key, value in (overrides or {}).items()}, SpaceFile)
    file.expand("dataset", "out")
    space = file.validate(SpaceFile)
    if problems := problems_of(file, space):
        raise BadInput("\n".join(problems))
    return space
