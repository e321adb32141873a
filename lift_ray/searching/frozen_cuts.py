"""Tuners that a search can choose, which tell the lowest block that any of its runs changes."""

from __future__ import annotations

from typing import Any

from lift_ray.settings.space import SpaceFile, grid_points

SECTIONS = ("tuner", "extra_tuner", "augment")
MOST_POINTS = 1000


def tunings(space: SpaceFile) -> tuple[dict[str, Any], ...]:
    """Return the settings of the tuners of all trials and baselines whose training images come again, each once.

    None are returned if they cannot be told: if the choice depends on settings with too many values.
    """
    names = {name for name in space.space if _decides(name)}
    while parents := {parent for name in names for parent in space.space[name].when if parent in space.space} - names:
        names |= parents
    try:
        points = grid_points({name: space.space[name] for name in names})
        if len(points) > MOST_POINTS:
            return ()
        configs = [space.config(point) for point in (*points, *space.baseline_values())]
    except ValueError:  # a range without steps; values that need others
        return ()
    found: list[dict[str, Any]] = []
    for config in configs:
        for run in config.members().values() or [config]:
            one = run.model_dump(mode="json", include={"tuner", "extra_tuner"})
            if run.augment.is_fixed and one not in found:
                found.append(one)
    return tuple(found)


def _decides(name: str) -> bool:
    """Return True if a setting decides which blocks are tuned, or whether the images change."""
    section, _, key = name.partition(".")
    return section in SECTIONS and key.split(".")[0] in ("", "kind", "blocks", "last", "views")
