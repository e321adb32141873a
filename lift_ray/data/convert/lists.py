"""Find labeled images in lists of "path label" lines, the format of ImageNet-LT, Places-LT and iNaturalist 2018."""

from __future__ import annotations

from collections.abc import Iterator

from lift_ray.data.convert.groups import group_by_folder
from lift_ray.data.convert.index import ImageIndex, Row, distinct, index_of_files, read_lines
from lift_ray.data.local_files import with_slashes
from lift_ray.errors import BadInput
from lift_ray.text import count

MOST_DIGITS = 9


def scan_list(
    source: str,
    *,
    train: str,
    validation: str | None = None,
    test: str | None = None,
    class_names: str,
    group: str | None = None,
) -> ImageIndex:
    """List the images that text files name.

    Each line has a path inside `source` and a label. The label is the last word, so paths may contain spaces; they may have the
    backslashes of Windows. Empty lines are ignored. Each image may be in one list only: the published splits share none, and an
    image in both training and test would bias the test.

    Args:
        source: folder that the paths are relative to, any fsspec URL.
        train, validation, test: paths or URLs of the lists.
        class_names: file with a class name on each line, in label order.
        group: `folder:N` makes the N-th directory of the listed paths a group.

    Raises BadInput with file and line for a line without path and label, a label outside the class names, a path
    outside the source, an image listed twice, an empty list, a class without a training image, or groups in several splits.
    """
    names, notes = read_class_names(class_names)
    lists = {"train": train, "validation": validation, "test": test}
    rows = (row for split, url in lists.items() if url is not None for row in _rows(url, split, len(names), source))
    index = index_of_files(source, source, names, rows, notes)
    return index if group is None else group_by_folder(index, group)


def read_class_names(url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the class names of a file, one per line in label order, and notes for the user.

    Underscores become spaces. Commas stay: the text tower understands WordNet's "crane, bird", and a converter cannot decide
    which synonym is best. Repeated names get a number.

    Raises BadInput if the file cannot be read, is empty, or has an empty line.
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


def _rows(url: str, split: str, num_classes: int, source: str) -> Iterator[Row]:
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
                f"the label must be 0 to {num_classes - 1} ({count(num_classes, 'class name')})",
                label,
                "check the class names, or count from 0",
            )
        yield where, split, with_slashes(source, path.strip()), int(label)
    if empty:
        raise BadInput(url, "must list images", "none", "check the file")
