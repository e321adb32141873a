"""Checks of a search-space file beyond the type of each value; they require no cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lift_ray.epoch_metrics import MAIN_METRIC, METRICS, TRAINED_PARAMETERS
from lift_ray.errors import BadInput, did_you_mean
from lift_ray.registry import SAMPLERS, imported
from lift_ray.settings.messages import Path_, dotted, explain, fault, setting_types, walk
from lift_ray.settings.overrides import apply_file_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import batch_fault
from lift_ray.settings.search import NoSchedulerConfig
from lift_ray.settings.shipped import find_space
from lift_ray.settings.space import (
    LARGEST_GRID,
    NAMED,
    RENAMED,
    SpaceFile,
    grid_points,
    is_active,
    listed,
    parents_first,
    replaced,
    section_of,
    seeded_draws,
    setting_of,
)
from lift_ray.settings.yaml_file import SettingsFile
from lift_ray.text import count

OBJECTIVES = (*(f"validation/{name}" for name in METRICS), TRAINED_PARAMETERS)
NUM_CHECK_DRAWS = 64


def problems_of(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    """Return one error for each place of the file that cannot be used: names, `when`, seeded draws, baselines."""
    problems = [*_objective_problems(file, space), *_base_problems(file, space), *_name_problems(file, space)]
    problems += _overridden_problems(file, space)
    if not problems:
        problems = [*_draw_problems(file, space), *_when_problems(file, space), *_baseline_problems(file, space)]
    if not problems:
        problems = _search_problems(file, space)
    first_at_each_place = {problem.place: problem for problem in reversed(problems)}
    return list(reversed(first_at_each_place.values()))


def known_paths() -> set[str]:
    """Return the dotted path of every setting, for all kinds of every section."""
    return set(setting_types(RunConfig))


def _objective_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    out = [
        fault(file.where((section, metric)), f"unknown metric '{metric}'", remedy=did_you_mean(metric, OBJECTIVES))
        for section, metrics in (("objectives", space.objectives), ("constraints", space.constraints))
        for metric in metrics
        if metric not in OBJECTIVES
    ]
    if not out and space.objective[0] == TRAINED_PARAMETERS:
        place = file.where(("objectives", TRAINED_PARAMETERS))
        rule, remedy = "the first objective must be a validation metric", f"put {MAIN_METRIC} before it"
        out.append(fault(place, rule, TRAINED_PARAMETERS, remedy))
    return out


def _search_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    """Requirements of the sampler, the scheduler and per_kind that the space does not meet."""
    search = space.search
    found = [_sampler_problem(space, file.where(("search", "sampler")))]
    if search.per_kind is not None:
        found.append(_per_kind_rule(space, file.where(("search", "per_kind"))))
    return [problem for problem in found if problem] or _epoch_problems(file, space)


def _sampler_problem(space: SpaceFile, place: str) -> BadInput | None:
    problem = SAMPLERS[space.search.sampler].problem
    found: BadInput | None = imported(problem)(space, place) if problem else None
    return found


def grid_problem(space: SpaceFile, place: str) -> BadInput | None:
    """Feature of a space that `grid` does not support, if any."""
    try:
        number = len(grid_points(space.space))
    except ValueError as error:
        rule = "grid requires choices, int, or float with a step"
        return fault(place, rule, f"{error} without a step", "add one, or use random")
    if number > LARGEST_GRID:
        return fault(place, f"grid allows at most {LARGEST_GRID} points", "more", "use larger steps, or use random")
    if (trials := space.search.trials) < number:
        rule = f"grid requires a trial for each of its {count(number, 'point')}"
        return fault(place, rule, f"trials: {trials}", "raise it, or use random")
    if space.baselines:
        return fault(place, "grid already visits every point of the space", "baselines too", "remove them")
    return None


def cmaes_problem(space: SpaceFile, place: str) -> BadInput | None:
    """Feature of a space that `cmaes` does not support, if any."""
    named = next((name for name, param in space.space.items() if param.values is not None or param.when), "")
    if named:
        rule = "cmaes requires int and float settings without `when`"
        return fault(place, rule, named, "use tpe, or move it to base")
    if len(space.space) < 2:
        return fault(place, "cmaes requires at least 2 settings", 1, "use tpe")
    if len(space.objectives) > 1:
        return fault(place, "cmaes requires one objective", len(space.objectives), "use nsga2 or tpe")
    return None


def gp_problem(space: SpaceFile, place: str) -> BadInput | None:
    """Feature of a space that `gp` does not support, if any."""
    named = next((name for name, param in space.space.items() if param.when), "")
    return fault(place, "gp requires settings without `when`", named, "use tpe") if named else None


def nsga2_problem(space: SpaceFile, place: str) -> BadInput | None:
    """Feature of a space that `nsga2` does not support, if any."""
    if len(space.objectives) > 1:
        return None
    return fault(place, "nsga2 requires several objectives", 1, "use tpe, or add one")


def _per_kind_rule(space: SpaceFile, place: str) -> BadInput | None:
    kind = space.space.get("tuner.kind")
    if kind is None or kind.choices is None:
        return fault(place, "must have tuner.kind with choices in the space", "none", "add it, or set trials")
    if any("tuner.kind" not in point for point in space.baselines):
        return fault(place, "requires baselines with a tuner.kind", "one without", "add it")
    if space.search.sampler == "grid":
        return fault(place, "does not work with the sampler grid", remedy="set trials instead")
    return None


def _base_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    try:
        file.validate(RunConfig, space.base, ("base",))
    except BadInput as error:
        return error.faults
    return []


def _overridden_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    """Values of `base` that no trial uses, because the space always sets them."""
    always = {
        setting
        for name, param in space.space.items()
        if not param.when
        for setting in set.intersection(*param.names_set(name))
    }
    return [
        fault(
            file.where(("base", *name.split("."))),
            "has no effect, because the space searches it",
            remedy="remove one of them",
        )
        for name in sorted(replaced(space.base, always))
    ]


def _name_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    """Unknown names of settings, and circular `when`."""
    out: list[BadInput] = []
    paths = known_paths()
    for name, param in space.space.items():
        if param.named is not None:
            out += _named_problems(file, space, name)
        elif name not in paths:
            place = file.where(("space", name))
            out.append(fault(place, f"unknown setting '{name}'", remedy=did_you_mean(name, paths)))
        elif (whole := setting_of(name)) != name and whole in space.space:
            out.append(fault(file.where(("space", name)), f"must not be beside {whole}", remedy="remove one of them"))
        for parent in param.when:
            if parent not in space.space:
                place = file.where(("space", name, "when", parent))
                rule, remedy = "`when` must name a setting of the space", did_you_mean(parent, space.space)
                out.append(fault(place, rule, f"'{parent}'", remedy))
    if not out:
        try:
            parents_first(space.space)
        except ValueError as error:
            out.append(fault(file.where(("space",)), "`when` must not be circular", error, "break the circle"))
    return out


def _named_problems(file: SettingsFile, space: SpaceFile, name: str) -> list[BadInput]:
    """Choices by name of what is no section, or of settings that are searched on their own too."""
    if name not in NAMED:
        place, remedy = file.where(("space", name, "named")), "use choices, or write it for one of these"
        return [fault(place, f"`named` must be for one of {', '.join(NAMED)}", name, remedy)]
    ours = {setting_of(setting) for settings in space.space[name].names_set(name) for setting in settings}
    return [
        fault(file.where(("space", other)), f"must not be beside {name}, which sets it", remedy="remove one of them")
        for other in space.space
        if setting_of(other) in ours
    ]


def _when_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    """Values of `when` that the named setting never takes."""
    return [
        fault(
            file.where(("space", name, "when", parent)),
            f"{parent} never takes the value {value!r}",
            remedy=did_you_mean(value, space.space[parent].values or [str(space.space[parent])]),
        )
        for name, param in space.space.items()
        for parent, wanted in param.when.items()
        for value in listed(wanted)
        if not space.space[parent].holds(value)
    ]


def _draw_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    draws = seeded_draws(space.space, NUM_CHECK_DRAWS)
    return [problem for values in draws for problem in _config_problems(file, space, values, ("space",))]


def _baseline_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    out: list[BadInput] = []
    for index, point in enumerate(space.baseline_values()):
        at: Path_ = ("baselines", index)
        if not point:
            out.append(fault(file.where(at), "must set at least one setting of the space", "none", "add one"))
            continue
        bad = [
            problem
            for name, value in point.items()
            if (problem := _baseline_value_problem(space, point, name, value, file.where((*at, name))))
        ]
        out += bad or _config_problems(file, space, point, at)
    return out


def _baseline_value_problem(
    space: SpaceFile, point: dict[str, Any], name: str, value: Any, place: str
) -> BadInput | None:
    param = space.space.get(name)
    if param is None:
        return fault(place, "must name a setting of the space", f"'{name}'", did_you_mean(name, space.space))
    if not param.holds(value):
        rule, remedy = f"must be inside the space ({param})", "widen the space or change the baseline"
        return fault(place, rule, repr(value), remedy)
    if not is_active(param, point):
        return fault(place, f"has no effect here, because its `when` {param.when} does not hold", remedy="remove it")
    return None


def _config_problems(file: SettingsFile, space: SpaceFile, values: dict[str, Any], at: Path_) -> list[BadInput]:
    """Return the errors of values that do not form a valid run, each at the searched setting that causes it."""
    try:
        config = space.config(values)
    except ValidationError as error:
        return [_value_problem(file, space, values, at, problem) for problem in error.errors()]
    batch = "optim.global_batch_size"
    place = file.where((*at, batch) if batch in values else ("base", *batch.split(".")))
    workers = {space.scale.workers_per_trial, space.scale.refit_workers}
    return [problem for n in sorted(workers) if (problem := batch_fault(config.optim.global_batch_size, n, place))][:1]


def _value_problem(
    file: SettingsFile, space: SpaceFile, values: dict[str, Any], at: Path_, problem: ErrorDetails
) -> BadInput:
    path = walk(RunConfig, problem["loc"])[0] + (("kind",) if problem["type"] == "union_tag_invalid" else ())
    name = dotted(path)
    cause = next((one for one in values if setting_of(one) == setting_of(name) or one.startswith(f"{name}.")), "")
    section = str(path[0]) if path else ""
    if not cause and section in values and space.space[section].named is not None:
        at = ("space", section, "named", values[section], *path[1:])
        return explain(RunConfig, problem, path, file.where(at))
    place = file.where((*at, cause) if cause else at)
    if problem["type"] == "extra_forbidden" and cause:
        kind = f"{section_of(name)}.kind"
        remedy = f"add when: {{{kind}: [the kinds that have it]}}" if kind in space.space else "remove it"
        own = problem["loc"][2 * kind.count(".") - 1]  # the kinds of the sections are in the position too
        return fault(place, f"has no effect with {kind} {own}", remedy=remedy)
    return explain(RunConfig, problem, path, place)


def _epoch_problems(file: SettingsFile, space: SpaceFile) -> list[BadInput]:
    """A scheduler that can never stop a trial."""
    scheduler, most = space.search.scheduler, space.most_epochs()
    if isinstance(scheduler, NoSchedulerConfig) or scheduler.grace_epochs <= most:
        return []
    place = file.where(("search", "scheduler", "grace_epochs"))
    rule, remedy = (
        f"must be at most the {count(most, 'epoch')} of a trial",
        "lower it, or set search.scheduler.kind=none",
    )
    return [fault(place, rule, scheduler.grace_epochs, remedy)]


def read_space(path: str | Path, overrides: dict[str, Any] | None = None) -> SpaceFile:
    """Read and check a search-space file, given by its path or by the name of a shipped one.

    Raises BadInput with every problem found, one line each.
    """
    file = SettingsFile.read(find_space(path))
    for old, new in RENAMED.items():
        file.rename(old, new)
    apply_file_overrides(file, {RENAMED.get(key, key): value for key, value in (overrides or {}).items()}, SpaceFile)
    if "space" not in file.data and file.data.keys() & RunConfig.model_fields.keys():
        raise BadInput(
            file.source,
            "must have a `space` to search",
            but="it is a run file",
            remedy="use python -m lift_ray.train",
        )
    file.expand("dataset", "out")
    file.resolve("dataset")
    return checked_space(file)


def checked_space(file: SettingsFile) -> SpaceFile:
    """Return the space in a file's data. Raises BadInput with every problem found, one line each."""
    space = file.validate(SpaceFile)
    if problems := problems_of(file, space):
        raise BadInput.of(problems)
    return space
