"""YAML 1.2 files into strict settings, with every problem reported at once by file, line and dotted path."""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from lift_ray.errors import BadInput, did_you_mean
from lift_ray.settings.run import RunFile, apply_overrides

Model = TypeVar("Model", bound=BaseModel)
Path_ = tuple[str | int, ...]
RANGES, RANGE_OPTIONS = ("choices", "int", "float"), ("log", "step", "when")


class SettingsFile:
    """A YAML file as plain data plus the line of every key.

    Args:
        source: for messages, usually the path.
        data: plain dicts, lists and scalars.
        lines: dotted position -> line number, counted from 1.
    """

    def __init__(self, source: str, data: dict[str, Any], lines: dict[Path_, int]) -> None:
        self.source, self.data, self.lines = source, data, lines
        self.overridden: set[Path_] = set()

    @classmethod
    def read(cls, path: str | Path) -> SettingsFile:
        """Read a file. Raises BadInput when it is missing, is not YAML, repeats a key, or is not a mapping."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BadInput(f"{path}: must be a YAML file, but there is none; check the path") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"{path}: must be a readable YAML file, but got {_one_line(error)}; check the path"
            ) from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> SettingsFile:
        """The same from a string."""
        yaml = YAML(typ="rt")
        try:
            tree = yaml.load(text)
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise BadInput(
                f"{source}:{line}: must be YAML 1.2, but got: {_one_line(error.problem)}; mend this line"
            ) from None
        except Exception as error:  # ruamel raises several unrelated types for broken input
            raise BadInput(f"{source}: must be YAML 1.2, but got: {_one_line(error)}; mend the file") from None
        if not isinstance(tree, CommentedMap):
            got = "a list" if isinstance(tree, list) else "nothing" if tree is None else _short(tree)
            raise BadInput(f"{source}:1: must be a mapping of settings, but got {got}; start with `dataset: ...`")
        lines: dict[Path_, int] = {}
        return cls(source, _plain(tree, (), lines), lines)

    def line(self, path: Path_) -> int:
        """The line of a position, or of the nearest one above it that the file holds."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def where(self, path: Path_) -> str:
        """`file.yaml:14 tuner.kind`, or `command line tuner.kind` for what was set there."""
        on_command_line = any(path[: len(setting)] == setting for setting in self.overridden) or (
            path not in self.lines and any(setting[: len(path)] == path != () for setting in self.overridden)
        )
        source = "command line" if on_command_line else f"{self.source}:{self.line(path)}"
        return f"{source} {_one_line(dotted(path))}".rstrip()

    def validate(self, model: type[Model], data: Any = None, at: Path_ = ()) -> Model:
        """Build `model` from the data at position `at` (or from `data` that came from there).

        Raises BadInput with one line for every problem.
        """
        if data is None:
            data = self.data
            for name in at:
                data = data[name]
        try:
            return model.model_validate(data)
        except ValidationError as error:
            problems = sorted(error.errors(), key=lambda problem: self.line((*at, *_walk(model, problem["loc"])[0])))
            raise BadInput("\n".join(self.describe(model, problem, at) for problem in problems)) from None

    def describe(self, model: type[BaseModel], problem: ErrorDetails, at: Path_ = ()) -> str:
        """One line for one pydantic problem."""
        path = _walk(model, problem["loc"])[0]
        if problem["type"] == "union_tag_invalid":
            path = (*path, "kind")
        return f"{self.where((*at, *path))}: {_one_line(explain(model, problem, path))}"

    def expand(self, *names: str) -> None:
        """Replace `${NAME}` and `${NAME:-default}` in the named top-level texts. Raises BadInput when NAME is not set."""
        for name in names:
            value = self.data.get(name)
            if isinstance(value, str):
                fill = partial(self._variable, name)
                self.data[name] = re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", fill, value)

    def _variable(self, name: str, match: re.Match[str]) -> str:
        value = os.environ.get(match[1]) or match[2]
        if value is None:
            raise BadInput(
                f"{self.where((name,))}: the environment variable {match[1]} must be set, but is not; "
                f"export {match[1]}=... or write ${{{match[1]}:-default}}"
            )
        return value


def read_run(path: str | Path, overrides: dict[str, Any] | None = None) -> RunFile:
    """Read and check a run file. Raises BadInput with every problem found, one line each."""
    file = SettingsFile.read(path)
    apply_file_overrides(file, overrides or {}, RunFile)
    file.expand("dataset", "out")
    return file.validate(RunFile)


def dotted(path: Path_) -> str:
    """`('optim', 'lr')` -> `optim.lr`."""
    return ".".join(str(part) for part in path)


def explain(model: type[BaseModel], problem: ErrorDetails, path: Path_) -> str:
    """What rule was broken, what came, and what to do."""
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        return f"unknown key '{path[-1]}'; {did_you_mean(path[-1], allowed_keys(model, problem['loc'][:-1]))}"
    if kind == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in str(context["expected_tags"]).split(",")]
        return f"unknown value '{context['tag']}'; {did_you_mean(context['tag'], tags)}"
    if kind == "union_tag_not_found":
        return f"must name its kind, but got {_short(value)}; add `kind: ...`"
    if kind == "literal_error":
        options = [part.strip(" '") for part in re.split(r", | or ", str(context["expected"]))]
        return f"unknown value {_short(value)}; {did_you_mean(value, options)}"
    if kind == "missing":
        return "must be given, but is missing; add it"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        write = f"{{kind: {value}}}" if kind == "model_attributes_type" and isinstance(value, str) else "{key: value}"
        return f"must be a mapping, but got {_short(value)}; write {write}"
    rule = (
        problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("Assertion failed, ")
    )
    if kind in ("value_error", "assertion_error"):
        return rule
    if wrong_size := re.match(r"(?:Dictionary|List|String) should (have at (?:least|most) \d+ items?|match .*)", rule):
        return f"must {wrong_size[1].removesuffix(' after validation')}, but got {_short(value)}; change it"
    return f"must be {rule}, but got {_short(value)}; change it"


def explain_first(model: type[BaseModel], error: ValidationError) -> str:
    """`loss.tau: must be ..., but got ...`: the first problem of a tree that stands in no file of its own."""
    problem = error.errors()[0]
    path = _walk(model, problem["loc"])[0]
    return f"{dotted(path)}: {explain(model, problem, path)}"


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["loss.tau=0.5"]` from a command line -> {"loss.tau": 0.5}, values read as YAML 1.2. Raises BadInput."""
    out: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w[\w/]*)*", path):
            raise BadInput(
                f"command line: settings must be written key=value, but got '{word}'; for example loss.tau=0.5"
            )
        try:
            out[path] = _plain(YAML(typ="rt").load(text), (), {})
        except Exception as error:  # ruamel raises several unrelated types for broken input
            problem = error.problem if isinstance(error, MarkedYAMLError) else error
            raise BadInput(
                f"command line {path}: must be a YAML value, but got '{text}' ({_one_line(problem)}); quote it"
            ) from None
    return out


def dump_yaml(data: Mapping[str, Any], path: Path, header: str = "") -> None:
    """Write a mapping as YAML, to a temporary name first."""
    yaml = YAML()
    yaml.default_flow_style = False
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(header)
        yaml.dump(dict(data), file)
    temporary.replace(path)


def allowed_keys(model: type[BaseModel], loc: Path_) -> list[str]:
    """The field names of the model that sits at a pydantic error position (tags of unions included)."""
    return [
        field.alias or name for found in models_of(_walk(model, loc)[1]) for name, field in found.model_fields.items()
    ]


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field of this type can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [found for part in typing.get_args(annotation) for found in models_of(part)]
    return []


def _walk(model: type[BaseModel], loc: Path_) -> tuple[Path_, Any]:
    """A pydantic error position as the user wrote it, and the type of what stands there.

    pydantic puts the tag of a union of kinds into the position (tuner, lora, blocks); users do not write it.
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


def _plain(node: Any, path: Path_, lines: dict[Path_, int]) -> Any:
    """ruamel's round-trip objects to plain Python, noting where each key stands; keys become text."""
    if isinstance(node, CommentedMap | CommentedSeq):
        keys = list(node) if isinstance(node, CommentedMap) else list(range(len(node)))
        places = node.lc.data or {}  # keys that a merge (<<) brought in have none
        found: dict[Any, Any] = {}
        for key in keys:
            name = key if isinstance(node, CommentedSeq) or isinstance(key, str) else str(key)
            lines[(*path, name)] = (places[key][0] if key in places else node.lc.line or 0) + 1
            found[name] = _plain(node[key], (*path, name), lines)
        return found if isinstance(node, CommentedMap) else list(found.values())
    if isinstance(node, ScalarBoolean):  # a bool with an anchor
        return bool(node)
    if isinstance(node, int) and not -(2**63) <= node < 2**63:
        return hex(node)  # as text it fails with a plain message wherever a number is wanted
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return None if node is None else str(node)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def apply_file_overrides(file: SettingsFile, overrides: dict[str, Any], model: type[BaseModel]) -> None:
    """Set command-line overrides in a file's data; the first name must be one of the model's. Raises BadInput.

    Keys of `space` have dots in them: `space.tuner.bottleneck.int=[4, 64]` sets `int` of `tuner.bottleneck`.
    """
    for path in overrides:
        first = path.split(".")[0]
        if first not in model.model_fields:
            raise BadInput(f"command line {path}: unknown key '{first}'; {did_you_mean(first, model.model_fields)}")
    searched = {
        path: value for path, value in overrides.items() if path.startswith("space.") and "space" in model.model_fields
    }
    plain = {path: value for path, value in overrides.items() if path not in searched}
    file.overridden |= {tuple(path.split(".")) for path in plain}
    file.data = apply_overrides(file.data, plain, model)
    for path, value in searched.items():
        file.overridden.add(_set_searched(file.data, path.removeprefix("space."), value))


def _set_searched(data: dict[str, Any], path: str, value: Any) -> Path_:
    """Set one word of a searched setting, or all of them when the last name is no such word; returns the position."""
    name, _, word = path.rpartition(".")
    if not name or word not in (*RANGES, *RANGE_OPTIONS):
        name, word = path, ""
    space = data["space"] = dict(data["space"]) if isinstance(data.get("space"), dict) else {}
    if not word:
        space[name] = value
        return "space", name
    before = space.get(name)
    kept = before if isinstance(before, dict) else {}
    if word in RANGES:  # a setting has one range: another takes its place
        kept = {k: v for k, v in kept.items() if k not in RANGES and (k == "when" or word != "choices")}
    space[name] = kept | {word: value}
    return "space", name
