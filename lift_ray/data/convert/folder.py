"""Find labeled images in class directories, at any fsspec URL."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

from lift_ray.data.convert.groups import group_by_folder
from lift_ray.data.convert.index import FilesIn, ImageIndex, absolute, notes_on_names, one_spelling
from lift_ray.data.convert.lists import read_class_names
from lift_ray.data.decode import IMAGE_SUFFIXES
from lift_ray.data.walk import Walked, walk
from lift_ray.errors import BadInput
from lift_ray.storage.store import locate, reached

SPLIT_DIRECTORIES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def scan_folder(
    source: str, *, group: str | None = None, class_names: str | None = None, similar_names: str | None = None
) -> ImageIndex:
    """List the images in class directories, either directly in `source` or in its train, val(idation) and test directories.

    A class has the name of its directory, with spaces for underscores; labels follow the sorted directory names. Subdirectories
    belong to their class. Symbolic links are followed; hidden files and system directories are ignored (`walk`).

    Args:
        source: the folder, any fsspec URL.
        group: `folder:N` makes the N-th directory below the class directory a group.
        class_names: file with a class name per line, in the order of the sorted class directories.
        similar_names: directories whose names differ only in case or spaces: "merge" them, "keep" them apart, or None to refuse
            them.

    Raises BadInput if the directory does not exist or has no class directories, if class names are not unique, if a class has no
    training image, or if groups do not exist or are in several splits.
    """
    file_system, root = locate(source)
    root = root.rstrip("/")
    with reached(source, "must be a folder of class directories", "check the path"):
        if not file_system.exists(root):
            raise FileNotFoundError(root)
        walked = walk(file_system, root)
    top = [name for name in walked.folders if "/" not in name]
    inner = {split: _inside(split, walked.folders) for split in top if _is_split(split)}
    if not top:
        raise BadInput(source, "must be a folder of class directories", "none", "give each class a directory")
    has_splits = bool(inner) and all(inner.values())
    directories = _split_directories(source, top, inner) if has_splits else {"": top}
    index = _index(source, directories, walked, class_names, similar_names)
    return index if group is None else group_by_folder(index, group, first=2 if has_splits else 1)


def _split_directories(source: str, top: list[str], inner: dict[str, list[str]]) -> dict[str, list[str]]:
    others = [name for name in top if name not in inner]
    splits = [SPLIT_DIRECTORIES[name.lower()] for name in inner]
    if others:
        raise BadInput(
            source, "must contain nothing next to train, val and test", f"{others[0]!r}", "move it elsewhere"
        )
    if len(set(splits)) < len(splits):
        raise BadInput(source, "must contain one directory per split", ", ".join(inner), "merge them")
    if "train" not in splits:
        raise BadInput(source, "must contain a train directory", f"only {', '.join(inner)}", "add train")
    return inner


def _index(
    source: str,
    directories: dict[str, list[str]],
    walked: Walked,
    names_file: str | None,
    similar_names: str | None,
) -> ImageIndex:
    """Index the images. `directories` maps split directories, or "" if there are none, to their class directories."""
    train = next((split for split in directories if SPLIT_DIRECTORIES.get(split.lower()) == "train"), "")
    names_of = _names_of(source, [name for here in directories.values() for name in here], similar_names)
    class_names = tuple(dict.fromkeys(names_of[name] for name in sorted(directories[train])))
    label_of = {name: label for label, name in enumerate(class_names)}
    for split, here in directories.items():
        if extra := [name for name in here if names_of[name] not in label_of]:
            raise BadInput(
                f"{source}/{split}", f"must contain only classes of {train}", f"{extra[0]!r}", f"add it to {train}"
            )
    labels = {name: label_of[own] for name, own in names_of.items()}
    notes = notes_on_names(class_names) if names_file is None else ()
    if names_file is not None:
        num_classes = len(class_names)
        class_names, notes = read_class_names(names_file)
        if len(class_names) != num_classes:
            rule = f"must name the {num_classes} classes in the order of their directories"
            raise BadInput(names_file, rule, f"{len(class_names)} names", "add or remove names")
    splits: dict[str, list[tuple[str, int]]] = {_split_name(split): [] for split in directories}
    left_out = list(walked.left_out)
    for name in walked.files:
        parts = PurePosixPath(name).parts
        split, inside = (parts[0], parts[1:]) if "" not in directories else ("", parts)
        if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
            left_out.append((name, "no image suffix"))
        elif split not in directories or len(inside) < 2:
            left_out.append((name, "in no class directory"))
        else:
            splits[_split_name(split)].append((name, labels[inside[0]]))
    if not any(splits.values()):
        raise BadInput(source, f"must contain images ({' '.join(sorted(IMAGE_SUFFIXES))})", "none", "check the path")
    held = {name: rows for name, rows in splits.items() if rows}
    return ImageIndex(
        source, class_names, held, FilesIn(absolute(source)), sorted(left_out), walked.num_links, notes=notes
    )


def _names_of(source: str, directories: list[str], similar_names: str | None) -> dict[str, str]:
    """Return the class name of each directory. Raises BadInput for two directories of the same name."""
    names_of = one_spelling(directories, source, similar_names)
    spelled: dict[str, str] = {}
    for name in sorted(names_of):
        plain = unicodedata.normalize("NFC", name)
        if spelled.setdefault(names_of[name], plain) != plain and similar_names != "merge":
            raise BadInput(source, "class names must be unique", f"{names_of[name]!r} twice", "rename a directory")
    return names_of


def _inside(split: str, folders: list[str]) -> list[str]:
    inner = [name.removeprefix(f"{split}/") for name in folders if name.startswith(f"{split}/")]
    return [name for name in inner if "/" not in name]


def _is_split(name: str) -> bool:
    return name.lower() in SPLIT_DIRECTORIES


def _split_name(directory: str) -> str:
    return SPLIT_DIRECTORIES.get(directory.lower(), "train")
