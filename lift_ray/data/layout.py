"""File layouts of datasets: the shard names that Hugging Face and this project use."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lift_ray.errors import BadInput
from lift_ray.storage.store import Entry, entries, is_remote, join, locate
from lift_ray.text import count

SPLITS = ("train", "validation", "test", "unlabelled")
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "unlabelled": "unlabelled",
}
MANIFEST = "manifest.json"
SAVED_DICT, SAVED_STATE = "dataset_dict.json", "state.json"  # written by save_to_disk of `datasets`
SHARD_NAME = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:-(\d{{5,}})-of-(\d{{5,}})(?:-[0-9a-f]+)?)?\.parquet")
PART_NAME = re.compile(r"(\d{4,})\.parquet")

CONVERT = "make it with python -m lift_ray.convert"
RECONVERT = "run convert again"
RULE = "must be a folder of Parquet shards"


@dataclass(frozen=True)
class Listing:
    """The shards in a folder.

    Attributes:
        url: folder that the names are relative to.
        shards: the files of each split in order; a name may contain a folder (`train/0000.parquet`).
        manifest: the entry of manifest.json, if it exists.
    """

    url: str
    shards: dict[str, tuple[Entry, ...]]
    manifest: Entry | None

    @property
    def fingerprint(self) -> str:
        """Hash that changes with any of the files; "" for local files, and for stores that do not report changes."""
        files = [entry for split in self.shards.values() for entry in split]
        files += [self.manifest] if self.manifest else []
        if not is_remote(locate(self.url)[0]) or not all(entry.identity for entry in files):
            return ""
        return hashlib.sha256(json.dumps([(entry.name, entry.identity) for entry in files]).encode()).hexdigest()


def shard_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the sorted shard names among `names`, by split."""
    matches = [match for match in map(SHARD_NAME.fullmatch, sorted(names)) if match]
    return {split: here for split in SPLITS if (here := [m[0] for m in matches if SPLIT_NAMES[m[1]] == split])}


def is_saved(names: Collection[str]) -> bool:
    """Return True for the names in a folder that `datasets` wrote with save_to_disk (a DatasetDict or a Dataset)."""
    return SAVED_DICT in names or {SAVED_STATE, "dataset_info.json"} <= set(names)


def find_shards(uri: str, url: str, patience_s: float) -> Listing:
    """List the shards of a dataset by file name.

    The folder, or its subfolder `data/`, contains `<split>-00000-of-0000N.parquet`, `<split>.parquet`, or `<split>/0000.parquet`,
    `<split>/0001.parquet` and so on. val, valid and dev are names of the validation split.

    Args:
        uri: name of the dataset in messages.
        url: the folder.

    Raises:
        BadInput: the folder does not exist, it has no shards, or their numbers have gaps.
    """
    here = {entry.name: entry for entry in entries(url, uri, RULE, patience_s)}
    names = list(here)
    shards = _flat(uri, here) or _folders(uri, url, here, patience_s)
    if not shards and is_saved(here):
        got = "one that datasets wrote with save_to_disk"
        raise BadInput(uri, RULE, got, "convert it with python -m lift_ray.convert arrow")
    if not shards and "data" in here:
        url = join(url, "data")
        here = {entry.name: entry for entry in entries(url, uri, RULE, patience_s)}
        shards = _flat(uri, here) or _folders(uri, url, here, patience_s)
    if not shards:
        got = f"{len(names)} other names ({', '.join(names[:3])})" if names else "an empty folder"
        raise BadInput(uri, "must contain shards named train-00000-of-00001.parquet", got, CONVERT)
    return Listing(url, {split: shards[split] for split in SPLITS if split in shards}, here.get(MANIFEST))


def _flat(uri: str, here: dict[str, Entry]) -> dict[str, tuple[Entry, ...]]:
    """Find `train-00000-of-00002.parquet` or `train.parquet`."""
    by_split = shard_names(here)
    for split, there in by_split.items():
        matches = [match for match in map(SHARD_NAME.fullmatch, there) if match]
        totals = {int(match[3] or 1) for match in matches}
        if totals != {len(there)} or [int(match[2] or 0) for match in matches] != list(range(len(there))):
            raise BadInput(
                join(uri, split),
                f"the names say {' or '.join(count(total, 'shard') for total in sorted(totals))}",
                _counted(there),
                f"copy the missing ones, or {RECONVERT}",
            )
    return {split: tuple(here[name] for name in there) for split, there in by_split.items()}


def _folders(uri: str, url: str, here: dict[str, Entry], patience_s: float) -> dict[str, tuple[Entry, ...]]:
    """Find `train/0000.parquet`."""
    shards: dict[str, tuple[Entry, ...]] = {}
    for folder, split in SPLIT_NAMES.items():
        if folder not in here or not here[folder].is_folder:
            continue
        if parts := _parts(join(uri, folder), join(url, folder), folder, patience_s):
            if split in shards:
                other = shards[split][0].name.partition("/")[0]
                raise BadInput(uri, f"must have one folder for {split}", f"{other} and {folder}", "move one elsewhere")
            shards[split] = parts
    return shards


def _parts(uri: str, url: str, folder: str, patience_s: float) -> tuple[Entry, ...]:
    found = [
        (int(match[1]), entry)
        for entry in entries(url, uri, RULE, patience_s)
        if (match := PART_NAME.fullmatch(entry.name))
    ]
    found.sort(key=lambda pair: pair[0])
    if [number for number, _ in found] != list(range(len(found))):
        raise BadInput(
            uri,
            "the shards must be numbered from 0000 without gaps",
            _counted([entry.name for _, entry in found]),
            "copy the missing ones",
        )
    return tuple(Entry(f"{folder}/{entry.name}", False, entry.num_bytes, entry.identity) for _, entry in found)


def _counted(names: Sequence[str]) -> str:
    """Return a number of shards with the first and the last name."""
    return f"{count(len(names), 'shard')} ({' to '.join(dict.fromkeys([names[0], names[-1]]))})"
