"""Read YAML 1.2 files into strict settings; all problems are reported at once, with file, line and dotted path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from lift_ray.errors import BadInput, first_few, one_line
from lift_ray.settings.messages import Path_, _one_line, _short, dotted, explain, walk
from lift_ray.storage.atomic import replacing
from lift_ray.text import say

Model = TypeVar("Model", bound=BaseModel)
START = "start with `dataset: ...`"


class SettingsFile:
    """A YAML file as plain data, with the line of every key.

    Args:
        source: for messages, usually the path.
        data: plain dicts, lists and scalars.
        lines: dotted position -> line number, counted from 1.
        first_line: line for what has no line of its own; 0 for data that is not from a file.

    Attributes:
        overridden: positions that the command line sets.
        base: file whose data this one changes; None if it stands alone.
    """

    def __init__(self, source: str, data: dict[str, Any], lines: dict[Path_, int], first_line: int = 1) -> None:
        self.source, self.data, self.lines, self.first_line = source, data, lines, first_line
        self.overridden: set[Path_] = set()
        self.base: SettingsFile | None = None

    @classmethod
    def read(cls, path: str | Path) -> SettingsFile:
        """Read a file. Raises BadInput when it is missing, is not one YAML document, repeats a key, or is not a mapping."""
        return cls.only(cls.read_all(path))

    @classmethod
    def read_all(cls, path: str | Path, start: str = START) -> list[SettingsFile]:
        """Read every document of a file; `start` is the advice for one that is not a mapping. Raises BadInput like `read`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BadInput(str(path), "must be a YAML file", but="there is none", remedy="check the path") from None
        except IsADirectoryError:
            files = sorted(found.name for found in Path(path).glob("*.yaml"))
            remedy = f"give a file of it: {first_few(files)}" if files else f"give a file; {start}"
            raise BadInput(str(path), "must be a YAML file", but="it is a folder", remedy=remedy) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(str(path), "must be a readable YAML file", one_line(error), "check the path") from None
        return cls.parse_all(text, str(path), start)

    @classmethod
    def parse(cls, text: str, source: str) -> SettingsFile:
        """Read settings from a string. Raises BadInput like `read`."""
        return cls.only(cls.parse_all(text, source))

    @classmethod
    def parse_all(cls, text: str, source: str, start: str = START) -> list[SettingsFile]:
        """Read every document of a string, without empty ones. Raises BadInput like `read`; there is at least one document."""
        try:
            trees = list(YAML(typ="rt").load_all(text))
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise BadInput(
                f"{source}:{line}", f"invalid YAML 1.2: {one_line(error.problem)}", remedy="fix this line"
            ) from None
        except Exception as error:  # ruamel raises several unrelated types for broken input
            raise BadInput(source, f"invalid YAML 1.2: {one_line(error)}", remedy="fix the file") from None
        found = [tree for tree in trees if tree is not None] or [None]
        return [cls._of_tree(tree, source, start, first=tree is found[0]) for tree in found]

    @classmethod
    def _of_tree(cls, tree: Any, source: str, start: str, first: bool) -> SettingsFile:
        line = 1 if first or not isinstance(tree, CommentedMap | CommentedSeq) else tree.lc.line + 1
        if not isinstance(tree, CommentedMap):
            got = "a list" if isinstance(tree, list) else "nothing" if tree is None else _short(tree)
            raise BadInput(f"{source}:{line}", "must be a mapping of settings", got, start)
        lines: dict[Path_, int] = {}
        return cls(source, _plain(tree, (), lines), lines, line)

    @staticmethod
    def only(documents: list[SettingsFile]) -> SettingsFile:
        """Return the one document of a file. Raises BadInput if it has several."""
        if len(documents) > 1:
            place = f"{documents[0].source}:{documents[1].first_line}"
            raise BadInput(place, "must be one YAML document", f"{len(documents)}", "remove the others, and their ---")
        return documents[0]

    def rename(self, old: str, new: str) -> None:
        """Rename a top-level key of an earlier version, with a note to the user. Raises BadInput if the file has both names."""
        if old not in self.data:
            return
        if new in self.data:
            raise BadInput(self.where((old,)), f"is the old name of {new}", "both", "remove one")
        say(f"{self.where((old,))}: renamed to {new}; the old name still works", error=True)
        self.data[new] = self.data.pop(old)
        self.lines |= {(new, *path[1:]): line for path, line in self.lines.items() if path[0] == old}

    def line(self, path: Path_) -> int:
        """Return the line of a position, or of its nearest parent in the file."""
        return self.lines.get(self._nearest(path), self.first_line)

    def _nearest(self, path: Path_) -> Path_:
        while path and path not in self.lines:
            path = path[:-1]
        return path

    def origin(self, path: Path_) -> SettingsFile:
        """Return the file that sets a position: this one, or the base, or the base of that."""
        if self.base is None:
            return self
        below = self.base.origin(path)
        return below if len(below._nearest(path)) > len(self._nearest(path)) else self

    def where(self, path: Path_) -> str:
        """Return `file.yaml:14 tuner.kind`, or `command line tuner.kind` for a setting given there."""
        on_command_line = any(path[: len(setting)] == setting for setting in self.overridden) or (
            path not in self.lines and any(setting[: len(path)] == path != () for setting in self.overridden)
        )
        file = self.origin(path)
        line = file.line(path)
        source = "command line" if on_command_line else f"{file.source}:{line}" if line else file.source
        return f"{source} {_one_line(dotted(path))}".rstrip()

    def validate(self, model: type[Model], data: Any = None, at: Path_ = ()) -> Model:
        """Build `model` from the data at position `at`, or from `data` taken from there.

        Raises BadInput with one line for every problem.
        """
        if data is None:
            data = self.data
            for name in at:
                data = data[name]
        try:
            return model.model_validate(data)
        except ValidationError as error:
            problems = sorted(error.errors(), key=lambda problem: self.line((*at, *walk(model, problem["loc"])[0])))
            raise BadInput.of(self.describe(model, problem, at) for problem in problems) from None

    def describe(self, model: type[BaseModel], problem: ErrorDetails, at: Path_ = ()) -> BadInput:
        """Return the error for one pydantic problem."""
        path = walk(model, problem["loc"])[0]
        if problem["type"] == "union_tag_invalid":
            path = (*path, "kind")
        return explain(model, problem, path, self.where((*at, *path)))

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
                self.where((name,)),
                f"the environment variable {match[1]} must be set",
                but="is not",
                remedy=f"export {match[1]}=... or write ${{{match[1]}:-default}}",
            )
        return value

    def resolve(self, name: str) -> None:
        """Take a relative path from the folder of its file if something is there, else from the working directory.

        If the two differ, a line on stderr says which is used. Absolute paths, URLs, and paths from the command line stay as they are.
        """
        value = self.data.get(name)
        if not isinstance(value, str) or not value or ":" in value or (name,) in self.overridden:
            return
        path = os.path.expanduser(value)
        beside, here = (
            os.path.abspath(os.path.join(folder, path))
            for folder in (Path(self.origin((name,)).source).parent, Path.cwd())
        )
        if beside == here or not (os.path.exists(beside) or os.path.exists(here)):
            return
        used, other = f"{here} (relative to the shell)", beside
        if os.path.exists(beside):
            self.data[name], used, other = beside, f"{beside} (relative to the file)", here
        more = f", not {other}" if os.path.exists(other) else ""
        say(f"{self.where((name,))}: using {used}{more}", error=True)


def dump_yaml(data: Mapping[str, Any], path: Path, header: str = "") -> None:
    """Write a mapping as YAML, whole or not at all."""
    yaml = YAML()
    yaml.default_flow_style = False
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(header)
        yaml.dump(dict(data), file)


def _plain(node: Any, path: Path_, lines: dict[Path_, int]) -> Any:
    """Convert ruamel's round-trip objects to plain Python and record the line of each key; keys become text."""
    if isinstance(node, CommentedMap | CommentedSeq):
        keys = list(node) if isinstance(node, CommentedMap) else list(range(len(node)))
        places = node.lc.data or {}  # keys that come from a merge (<<) have none
        found: dict[Any, Any] = {}
        for key in keys:
            name = key if isinstance(node, CommentedSeq) or isinstance(key, str) else str(key)
            lines[(*path, name)] = (places[key][0] if key in places else node.lc.line or 0) + 1
            found[name] = _plain(node[key], (*path, name), lines)
        return found if isinstance(node, CommentedMap) else list(found.values())
    if isinstance(node, ScalarBoolean):  # a bool with an anchor
        return bool(node)
    if isinstance(node, int) and not -(2**63) <= node < 2**63:
        return hex(node)  # as text it fails with a clear message wherever a number is required
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return None if node is None else str(node)
