"""Small parts that several sections of the settings use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class OneOf:
    """One message for a union of plain types, in place of one for each of its members."""

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The union's own schema with this message."""
        return core_schema.custom_error_schema(handler(source), "one_of", custom_error_message=self.rule)


@dataclass(frozen=True)
class Holds:
    """Marks a mapping that is a settings tree of this model (`base` of a space file holds a run)."""

    model: type[BaseModel]


def dotted(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The single settings of a tree by their dotted paths: `{"optim": {"lr": 0.1}}` has `optim.lr`. An empty section counts as one."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{before}{name}.")
        else:
            yield before + name, value
