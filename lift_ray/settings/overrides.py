"""Settings given on the command line, and their application to a settings tree."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from lift_ray.errors import BadInput, did_you_mean, one_line
from lift_ray.settings.base import Holds
from lift_ray.settings.messages import Path_, elsewhere
from lift_ray.settings.yaml_file import SettingsFile, _plain

RANGES, RANGE_OPTIONS = ("choices", "named", "int", "float"), ("log", "step", "when")


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Parse `["loss.tau=0.5"]` into {"loss.tau": 0.5}; values are read as YAML 1.2. Raises BadInput."""
    out: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w[\w/]*)*", path):
            raise BadInput(
                "command line", "settings must be written key=value", f"'{word}'", "for example, loss.tau=0.5"
            )
        try:
            out[path] = _plain(YAML(typ="rt").load(text), (), {})
        except Exception as error:  # ruamel raises several unrelated types for broken input
            problem = error.problem if isinstance(error, MarkedYAMLError) else error
            raise BadInput(
                f"command line {path}", "must be a YAML value", f"'{text}' ({one_line(problem)})", "quote it"
            ) from None
    return out


def apply_file_overrides(file: SettingsFile, overrides: dict[str, Any], model: type[BaseModel]) -> None:
    """Set command-line overrides in a file's data; the first name must be one of the model's. Raises BadInput.

    Keys of `space` contain dots: `space.tuner.bottleneck.int=[4, 64]` sets `int` of `tuner.bottleneck`.
    """
    for path in overrides:
        first = path.split(".")[0]
        if first not in model.model_fields:
            remedy = elsewhere(model, path) or did_you_mean(first, model.model_fields)
            if path.rpartition(".")[2] in RANGES and "space" in model.model_fields:
                remedy = f"did you mean 'space.{path}'?"
            raise BadInput(f"command line {path}", f"unknown key '{first}'", remedy=remedy)
    searched = {
        path: value for path, value in overrides.items() if path.startswith("space.") and "space" in model.model_fields
    }
    plain = {path: value for path, value in overrides.items() if path not in searched}
    file.overridden |= {tuple(path.split(".")) for path in plain}
    file.data = apply_overrides(file.data, plain, model)
    for path, value in searched.items():
        file.overridden.add(_set_searched(file.data, path.removeprefix("space."), value))


def _set_searched(data: dict[str, Any], path: str, value: Any) -> Path_:
    """Set one option of a searched setting, or all of them if the last name is not an option; return its position."""
    name, _, word = path.rpartition(".")
    if not name or word not in (*RANGES, *RANGE_OPTIONS):
        name, word = path, ""
    space = data["space"] = dict(data["space"]) if isinstance(data.get("space"), dict) else {}
    if not word:
        space[name] = value
        return "space", name
    before = space.get(name)
    kept = before if isinstance(before, dict) else {}
    if word in RANGES:  # a setting has one range: the new one replaces it
        kept = {k: v for k, v in kept.items() if k not in RANGES and (k == "when" or word not in ("choices", "named"))}
    space[name] = kept | {word: value}
    return "space", name


def apply_overrides(tree: dict[str, Any], overrides: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return a copy of a settings tree with dotted overrides (`{"loss.tau": 0.5}`) applied.

    Changing the `kind` of a section drops the section's other keys, which belong to the old kind. Kinds are therefore
    set first.

    Args:
        model: model of the tree; its defaults give the kind of a section without `kind`.
    """
    out = copy.deepcopy(tree)
    for path in sorted(overrides, key=lambda p: (not p.endswith(".kind"), p)):
        *parents, leaf = path.split(".")
        node = out
        for name in parents:
            child = {"kind": node[name]} if isinstance(node.get(name), str) else node.get(name)
            node[name] = child if isinstance(child, dict) else {}
            node = node[name]
        if leaf == "kind" and node.get("kind", _default_kind(model, parents)) != overrides[path]:
            node.clear()
        node[leaf] = overrides[path]
    return out


def merged(
    base: Mapping[str, Any], changes: Mapping[str, Any], model: type[BaseModel], at: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return a settings tree with the changes of another one. A section of another kind replaces that of the base.

    Args:
        model: model of the tree; its defaults give the kind of a section without `kind`.
        at: position in the tree.
    """
    out = dict(base)
    for name, value in changes.items():
        before = base.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            kind = before.get("kind", _default_kind(model, [*at, name]))
            out[name] = merged(before, value, model, (*at, name)) if value.get("kind", kind) == kind else value
        else:
            out[name] = value
    return out


def _default_kind(model: type[BaseModel], section: list[str]) -> str | None:
    """Return the default kind of a section."""
    for name in section:
        field = model.model_fields.get(name)
        default = field.default if field else None
        held = [mark.model for mark in field.metadata if isinstance(mark, Holds)] if field else []
        model = type(default) if isinstance(default, BaseModel) else next(iter(held), BaseModel)
    kind = model.model_fields.get("kind")
    return kind.default if kind else None
