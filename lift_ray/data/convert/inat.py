"""Find the images of iNaturalist 2018, 2019 and 2021, with any rank of the taxonomy as the label."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from lift_ray.data.convert.index import ImageIndex, Row, index_of_files
from lift_ray.errors import BadInput, did_you_mean
from lift_ray.storage.store import PATIENCE_S, fetch, join, locate, reached

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")
PARTS = ("images", "annotations", "categories")
USED = frozenset({*PARTS, *RANKS, "id", "name", "file_name", "image_id", "category_id"})

Lineage = tuple[str, ...]


def scan_inat(
    source: str,
    *,
    rank: str = "species",
    train: str = "train2018.json",
    test: str | None = "val2018.json",
    categories: str = "categories.json",
) -> ImageIndex:
    """List the images of an iNaturalist competition.

    The published validation images become the test split, as in the long-tail literature; a conversion draws validation
    images from the training images. Labels follow the order of the category ids, so species labels are the published ones. Species
    have binomial names. Names that occur several times in the taxonomy (Iris is a plant and a mantis) are different classes, with the
    parent in parentheses.

    Args:
        source: folder with the images at their `file_name`, any fsspec URL.
        rank: rank of the label, one of RANKS.
        train, test: annotation files (COCO style), in `source` unless they are absolute paths or URLs.
        categories: file with the taxonomy, a list of categories, in `source` unless it is an absolute path or URL. 2018 requires it,
            because its annotation files hide the names. If it does not exist, the categories of `train` must contain the taxonomy, as
            in 2019 and 2021.

    Raises BadInput for an unknown rank, a file of another form, an image without exactly one category, a path outside
    the source, an image listed twice, or a class without a training image.
    """
    if rank not in RANKS:
        raise BadInput("rank", f"must be one of {', '.join(RANKS)}", f"{rank!r}", did_you_mean(rank, RANKS))
    files = {"train": train} if test is None else {"train": train, "test": test}
    urls = {split: _url(source, name) for split, name in files.items()}
    contents = {split: _annotations(url) for split, url in urls.items()}
    lineages = _lineages(_url(source, categories), urls["train"], contents["train"]["categories"], rank)
    labels = {lineage: label for label, lineage in enumerate(dict.fromkeys(lineages.values()))}
    label_of = {category: labels[lineage] for category, lineage in lineages.items()}
    rows = (row for split, url in urls.items() for row in _rows(url, split, contents[split], label_of))
    return index_of_files(source, source, _names(list(labels)), rows)


def _url(source: str, name: str) -> str:
    return name if "://" in name or name.startswith(("/", "~")) else join(source, name)


def _read(url: str) -> Any:
    """Read the JSON of a file, without unused keys: the annotations of 2018 contain 10 million more values."""
    data = fetch(url, 0, None, PATIENCE_S)
    with reached(url, "must be iNaturalist JSON", "download it again"):
        return json.loads(data, object_hook=lambda item: {k: item[k] for k in USED & item.keys()})


def _annotations(url: str) -> dict[str, list[Any]]:
    content = _read(url)
    held = [part for part in PARTS if isinstance(content, dict) and isinstance(content.get(part), list)]
    if missing := [part for part in PARTS if part not in held]:
        raise BadInput(url, f"must contain the lists {', '.join(PARTS)}", f"no {missing[0]}", "check the file")
    if not content["images"]:
        raise BadInput(url, "must list images", "none", "check the file")
    return content  # type: ignore[no-any-return]


def _lineages(url: str, train_url: str, own: list[Any], rank: str) -> dict[int, Lineage]:
    """Return the lineage of each category id, sorted by id, from the kingdom down to the rank."""
    file_system, path = locate(url)
    with reached(url, "must be a readable file", "check the path"):
        there = file_system.exists(path)
    if not there and not all(isinstance(item, dict) and {"id", "name", "genus"} <= item.keys() for item in own):
        raise BadInput(
            url, f"must contain the taxonomy that {train_url} leaves out", but="nothing is there", remedy="download it"
        )
    where, items = (url, _read(url)) if there else (train_url, own)
    if not isinstance(items, list) or not items:
        raise BadInput(where, "must be a list of categories", f"{str(items)[:60]!r}", "check the file")
    lineages: dict[int, Lineage] = {}
    for item in items:
        lineage = tuple(_field(where, item, "name" if each == "species" else each, str) for each in RANKS)
        number = _field(where, item, "id", int)
        if number in lineages:
            raise BadInput(where, "category ids must be unique", f"{number} twice", "check the file")
        lineages[number] = lineage[: RANKS.index(rank) + 1]
    return dict(sorted(lineages.items()))


def _rows(url: str, split: str, content: dict[str, list[Any]], label_of: dict[int, int]) -> Iterator[Row]:
    category_of: dict[int, int] = {}
    for item in content["annotations"]:
        image, category = _field(url, item, "image_id", int), _field(url, item, "category_id", int)
        if category not in label_of:
            raise BadInput(url, f"image {image} must have a known category", category, "check the categories")
        if category_of.setdefault(image, category) != category:
            first = category_of[image]
            raise BadInput(url, f"image {image} must have one category", f"{first} and {category}", "remove one")
    for item in content["images"]:
        image, path = _field(url, item, "id", int), _field(url, item, "file_name", str)
        if image not in category_of:
            raise BadInput(url, f"image {image} must have a category", "none", "add an annotation")
        yield f"{url}: image {image}", split, path, label_of[category_of[image]]


def _field(where: str, item: Any, name: str, kind: type) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if type(value) is not kind:
        article = {int: "an integer", str: "text"}[kind]
        raise BadInput(where, f"{name} must be {article} in every entry", str(item)[:60], "check the file")
    return value


def _names(lineages: list[Lineage]) -> tuple[str, ...]:
    """Return the last name of each lineage, with the nearest ancestor that distinguishes it from others of that name."""
    alike: dict[str, list[Lineage]] = defaultdict(list)
    for lineage in lineages:
        alike[lineage[-1]].append(lineage)
    return tuple(_name(lineage, alike[lineage[-1]]) for lineage in lineages)


def _name(lineage: Lineage, alike: list[Lineage]) -> str:
    if len(alike) == 1:
        return lineage[-1]
    telling = (
        each for each in reversed(range(len(lineage) - 1)) if len({other[each] for other in alike}) == len(alike)
    )
    ancestor = next(telling, None)
    return f"{lineage[-1]} ({', '.join(lineage[:-1]) if ancestor is None else lineage[ancestor]})"
