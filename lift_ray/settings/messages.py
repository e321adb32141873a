"""Error messages for settings: pydantic problems in plain English."""

from __future__ import annotations

import re
import types
import typing
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lift_ray.errors import BadInput, did_you_mean
from lift_ray.settings.base import Holds

Path_ = tuple[str | int, ...]
RANGES = ("choices", "named", "int", "float")  # what the space may say of a setting


def dotted(path: Path_) -> str:
    """`('optim', 'lr')` -> `optim.lr`."""
    return ".".join(str(part) for part in path)


def fault(place: str, rule: str, got: object = None, remedy: str = "", *, but: str = "") -> BadInput:
    """Return a BadInput whose parts are one line each: keys and values of a file may contain line breaks."""
    return BadInput(
        place, _one_line(rule), None if got is None else _one_line(got), _one_line(remedy), but=_one_line(but)
    )


def explain(model: type[BaseModel], problem: ErrorDetails, path: Path_, place: str) -> BadInput:
    """Return the error for one pydantic problem: the rule, the value and the remedy.

    Args:
        model: the validated model.
        path: position of the problem as the user wrote it.
        place: the same for the message.
    """
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        known = allowed_keys(model, problem["loc"][:-1])
        remedy = (elsewhere(model, str(path[-1])) if len(path) == 1 else "") or did_you_mean(path[-1], known)
        return fault(place, f"unknown key '{path[-1]}'", remedy=remedy)
    if kind == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in str(context["expected_tags"]).split(",")]
        return fault(place, f"unknown value '{context['tag']}'", remedy=did_you_mean(context["tag"], tags))
    if kind == "union_tag_not_found":
        return fault(place, "must have a kind", _short(value), "add `kind: ...`")
    if kind == "literal_error":
        options = [part.strip(" '") for part in re.split(r", | or ", str(context["expected"]))]
        return fault(place, f"unknown value {_short(value)}", remedy=did_you_mean(value, options))
    if kind == "missing":
        return fault(place, "is required", but="missing", remedy="add it")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return fault(place, "must be a mapping", _short(value), _as_mapping(model, path, value, kind))
    rule = (
        problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("Assertion failed, ")
    )
    if kind in ("value_error", "assertion_error"):  # our own validators: the text has its value and remedy
        return fault(place, rule)
    if wrong_size := re.match(r"(?:Dictionary|List|String) should (have at (?:least|most) \d+ items?|match .*)", rule):
        rule = wrong_size[1].removesuffix(" after validation")
        return fault(place, f"must {rule}", _short(value), "change it")
    return fault(place, f"must be {rule}", _short(value), "change it")


def _as_mapping(model: type[BaseModel], path: Path_, value: Any, kind: str) -> str:
    """Return the remedy for a value that must be a mapping: what it stands for, written as one."""
    if kind == "model_attributes_type" and isinstance(value, str):
        return f"write {{kind: {value}}}"
    if len(path) != 2 or path[0] != "space" or "base" not in model.model_fields:
        return "write {key: value}"
    known = {
        name.removeprefix("base."): types for name, types in setting_types(model).items() if name.startswith("base.")
    }
    setting, _, kind_of_range = str(path[1]).rpartition(".")
    if setting in known and path[1] not in known:  # from the command line: space.loss.tau.float=[0, 2]
        return did_you_mean(kind_of_range, RANGES)
    if path[1] not in known:
        return did_you_mean(path[1], known)
    if not isinstance(value, list):
        return (
            f"set base.{path[1]} to keep it fixed, or write {{choices: [...]}} or {{float: [low, high]}} to search it"
        )
    numbers = [one for one in value if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) != 2 or len(value) != 2:
        return f"write {{choices: {_listed(value)}}}"
    whole = int in known[path[1]] and float not in known[path[1]]
    return f"write {{{'int' if whole else 'float'}: {_listed(sorted(numbers))}}}"


def _listed(values: list[Any]) -> str:
    return f"[{', '.join(map(str, values))}]"


def setting_types(model: type[BaseModel], prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """Return the types of every setting of a file by dotted path, for all kinds of every section."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, field in model.model_fields.items():
        held = [mark.model for mark in field.metadata if isinstance(mark, Holds)]
        below = [*models_of(field.annotation), *held]
        types_ = tuple(one for one in _plain_types(field.annotation) if not issubclass(one, BaseModel))
        for option in below:
            found |= setting_types(option, f"{prefix}{name}.")
        if not below or (not held and set(types_) - {types.NoneType}):  # `blocks` is a list or a mapping
            found[prefix + name] = found.get(prefix + name, ()) + types_
    return found


def _plain_types(annotation: Any) -> tuple[Any, ...]:
    """Return the types in an annotation: `Annotated[int, ...] | None` has int and NoneType."""
    inner = [found for part in typing.get_args(annotation) for found in _plain_types(part)]
    return (annotation, *inner) if isinstance(annotation, type) else tuple(inner)


def elsewhere(model: type[BaseModel], path: str) -> str:
    """Return the remedy for a setting that was given without its section, or with one too many; "" if there is none."""
    known = setting_types(model)
    sections = {name.rpartition(".")[0] for name in known}
    found = [
        name
        for name in (*known, *sorted(sections - known.keys()))
        if name and (name.endswith(f".{path}") or path.endswith(f".{name}"))
    ]
    outermost = min((name.count(".") for name in found), default=0)
    found = [name for name in found if name.count(".") == outermost]
    return f"did you mean {' or '.join(map(repr, found))}?" if 0 < len(found) <= 3 else ""


def explain_first(model: type[BaseModel], error: ValidationError) -> str:
    """Return `loss.tau: must be ..., but got ...` for the first problem of a tree that has no file of its own."""
    problem = error.errors()[0]
    path = walk(model, problem["loc"])[0]
    return str(explain(model, problem, path, dotted(path)))


def check_json(kind: type[object], text: str) -> None:
    """Raise ValueError, in one line, unless a JSON text has the fields and types of a dataclass."""
    try:
        TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{dotted(problem['loc'])}: {problem['msg']}") from None


def allowed_keys(model: type[BaseModel], loc: Path_) -> list[str]:
    """Return the field names of the model at a pydantic error position (tags of unions included)."""
    return [
        field.alias or name for found in models_of(walk(model, loc)[1]) for name, field in found.model_fields.items()
    ]


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field of this type can contain."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [found for part in typing.get_args(annotation) for found in models_of(part)]
    return []


def walk(model: type[BaseModel], loc: Path_) -> tuple[Path_, Any]:
    """Return a pydantic error position as the user wrote it, and the type at that position.

    pydantic includes the tag of a union of kinds in the position (tuner, lora, blocks); users do not write it.
    """
    path: list[str | int] = []
    here: Any = model
    for name in loc:
        options = models_of(here)
        if len(options) > 1:
            here = next(o for o in options if name in typing.get_args(o.model_fields["kind"].annotation))
            continue
        path.append(name)
        if options:
            here = next((f.annotation for n, f in options[0].model_fields.items() if name in (n, f.alias)), None)
        else:
            here = typing.get_args(here)[-1] if typing.get_origin(here) in (list, dict) else None
    return tuple(path), here


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
