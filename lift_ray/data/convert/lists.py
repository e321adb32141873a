"""Finds labelled images in lists of "path label" lines, as ImageNet-LT, Places-LT and iNaturalist 2018 come."""

from __future__ import annotations

from collections.abc import Iterator

from lift_ray.data.convert.index import ImageIndex, Row, distinct, index_of_files, read_lines
from lift_ray.errors import BadInput

MOST_DIGITS = 9


def scan_list(
    source: str, *, train: str, validation: str | None = None, test: str | None = None, class_names: str
) -> ImageIndex:
    """List the images that text files name.

    A line is a path inside `source` and a label; the label is the last word, so that paths may hold spaces. Empty lines
    do not count. An image stands in one list only: the published splits share none, and one that is trained on and
    tested on would flatter the test.

    Args:
        source: folder that the paths are relative to, any fsspec URL.
        train, validation, test: the lists, paths or URLs of their own.
        class_names: file with a class name on each line, in label order.

    Raises BadInput with file and line for a line that is no path and label, a label outside the class names, a path
    outside the source, an image listed twice, an empty list, or a class without a training image.
    """
    names, notes = read_class_names(class_names)
    lists = {"train": train, "validation": validation, "test": test}
    rows = (row for split, url in lists.items() if url is not None for row in _rows(url, split, len(names)))
    return index_of_files(source, source, names, rows, notes)


def read_class_names(url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The class names of a file, one a line in label order, and notes for the user.

    Underscores become spaces. Commas stay: WordNet's "crane, bird" is a name that the text tower understands, and which
    of the synonyms is the best one is not for a converter to decide. A name that came before gets a number.

    Raises BadInput when the file cannot be read, is empty, or has an empty line.
    """
    names = read_lines(url)
    while names and not names[-1].strip():
        names.pop()
    if not names:
        raise BadInput(url, "must contain one class name per line", "none", "check the file")
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise BadInput(f"{url}:{number}", "must be a class name", "an empty line", "remove it or name the class")
    return distinct(names, url)


def _rows(url: str, split: str, num_classes: int) -> Iterator[Row]:
    empty = True
    for number, line in enumerate(read_lines(url), 1):
        words = line.rsplit(maxsplit=1)
        if not words:
            continue
        empty, where = False, f"{url}:{number}"
        if len(words) == 1:
            raise BadInput(where, "must be a path and a label", f"only {words[0]!r}", "add what is missing")
        path, label = words
        if not label.isdecimal() or len(label) > MOST_DIGITS:
            raise BadInput(where, "must end with a label (an integer)", f"{label!r}", "add the label")
        if int(label) >= num_classes:
            raise BadInput(
                where,
                f"the label must be 0 to {num_classes - 1} ({num_classes} class names)",
                label,
                "check the class names, or count from 0",
            )
        yield where, split, path.strip(), int(label)
    if empty:
        raise BadInput(url, "must list images", "none", "check the file")
