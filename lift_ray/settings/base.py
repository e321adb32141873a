"""Small parts that several sections of the settings use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class OneOf:
    """A single message for a union of plain types, instead of one per member."""

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the union's schema with this message."""
        return core_schema.custom_error_schema(handler(source), "one_of", custom_error_message=self.rule)


@dataclass(frozen=True)
class Holds:
    """Marks a mapping as a settings tree of a model (`base` of a space file contains run settings)."""

    model: type[BaseModel]


def dotted(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a settings tree by dotted path: `{"optim": {"lr": 0.1}}` has `optim.lr`. An empty section is a leaf."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{before}{name}.")
        else:
            yield before + name, value


def settings_given(config: BaseModel) -> dict[str, Any]:
    """Return the settings that were given to a section and those below it, with the kind of each section: no defaults."""
    tree: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name in config.model_fields_set or name == "kind":
            tree[name] = settings_given(value) if isinstance(value, BaseModel) else value
    return tree


MOST_CHANGES = 4  # changes shown in one error message


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two settings by dotted path, as `optim.lr: 0.02 -> 0.1, ...`; "" if nothing does."""
    paths = [path for path in dict.fromkeys((*before, *now)) if before.get(path) != now.get(path)]
    shown = [f"{path}: {_shown(before, path)} -> {_shown(now, path)}" for path in paths[:MOST_CHANGES]]
    return ", ".join(shown) + (f" and {len(paths) - len(shown)} more" if len(paths) > len(shown) else "")


def _shown(values: Mapping[str, Any], path: str) -> str:
    return "(not set)" if path not in values else json.dumps(values[path])
