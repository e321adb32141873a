"""Groups of images (location, sequence, individual, patient): which images belong together, and their numbers in the shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from lift_ray.data.convert.index import ImageIndex
from lift_ray.errors import BadInput

LEVEL = re.compile(r"folder:([1-9][0-9]*)")


def folder_level(group: str) -> int | None:
    """Return N for the option `folder:N`; None for other text, which names a column."""
    match = LEVEL.fullmatch(group)
    return int(match[1]) if match else None


def group_by_folder(index: ImageIndex, group: str, first: int = 0) -> ImageIndex:
    """Return the index with the name of each image's N-th directory as its group; an image with fewer is a group of its own.

    Only the name of that directory counts, so directories of the same name in different classes are one group.

    Args:
        group: `folder:N`.
        first: number of directories before the first that counts, for example the class directory.

    Raises BadInput for other text, if no image has an N-th directory, or if a group is in two splits of the source.
    """
    level = folder_level(group)
    if level is None:
        raise BadInput("group", "must be folder:N, because there are no columns", f"{group!r}", "for example, folder:1")
    groups = {}
    for reference in _references(index):
        directories = reference.split("/")[first:-1]
        if len(directories) >= level:
            groups[reference] = directories[level - 1]
    if not groups:
        below = " below the class directory" if first else ""
        raise BadInput(
            "group", f"{group} requires images {level} directories deep{below}", but="there are none", remedy="check N"
        )
    return with_groups(index, groups)


def with_groups(index: ImageIndex, groups: Mapping[str, str]) -> ImageIndex:
    """Return the index with these groups, by reference. Raises BadInput if a group is in two splits of the source."""
    split_of: dict[str, str] = {}
    for split, rows in index.splits.items():
        for name in filter(None, (groups.get(reference) for reference, _ in rows)):
            if split_of.setdefault(name, split) != split:
                raise BadInput(
                    index.source,
                    "each group must be in one split",
                    f"{name!r} in {split_of[name]} and {split}",
                    "move its images to one split, or leave out --group",
                )
    alone = sum(reference not in groups for reference in _references(index))
    note = (f"images without a group: {alone}; each is a group of its own",) if alone else ()
    return replace(index, groups=groups, notes=(*index.notes, *note))


def group_numbers(index: ImageIndex) -> dict[str, int]:
    """Return the number of each reference's group: named groups by name, then single images by reference."""
    assert index.groups is not None
    numbers = {name: number for number, name in enumerate(sorted(set(index.groups.values())))}
    alone = sorted(reference for reference in _references(index) if reference not in index.groups)
    named = {reference: numbers[name] for reference, name in index.groups.items()}
    return named | {reference: len(numbers) + number for number, reference in enumerate(alone)}


def _references(index: ImageIndex) -> list[str]:
    return [reference for rows in index.splits.values() for reference, _ in rows]
