"""Installed packages that lift_ray needs: its dependencies, those of some of its extras, and theirs in turn."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ON_NODES = ("s3", "gcs", "azure", "search", "serve", "export")  # extras that a node of a cluster may have


def direct(extras: Iterable[str]) -> list[Requirement]:
    """Return the requirements that pyproject.toml names, for the package and these extras."""
    optional = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in optional[extra])]
    return [Requirement(text) for text in texts]


def closure(extras: Iterable[str]) -> tuple[dict[str, Distribution], list[str]]:
    """Return the installed packages by name, sorted, and the names of the missing ones."""
    found: dict[str, Distribution] = {}
    missing: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = direct(extras)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            missing.add(requirement.name)
            continue
        for extra in {"", *requirement.extras} - {had for seen_name, had in seen if seen_name == name}:
            seen.add((name, extra))
            waiting += _required_by(found[name], extra)
    return dict(sorted(found.items())), sorted(missing)


def _required_by(package: Distribution, extra: str) -> Iterator[Requirement]:
    """Yield what a package requires on this machine, for one of its extras or (extra "") for none."""
    for requirement in map(Requirement, package.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement
