"""Turns labelled images that are somewhere into shuffled, stratified Parquet shards; what was cut short goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from lift_ray.data.convert.images import Encoding
from lift_ray.data.convert.index import ImageIndex
from lift_ray.data.convert.shards import (
    PLAN,
    RULE,
    ShardRecord,
    SplitRecord,
    discard,
    publish,
    shard_name,
    sizes,
    write_file,
)
from lift_ray.data.convert.splitting import Division, divide
from lift_ray.data.convert.tasks import Job, RunTasks, ShardTask, in_memory, record_name, run_here
from lift_ray.data.layout import MANIFEST, SPLITS, shard_names
from lift_ray.data.open import FORMAT_VERSION
from lift_ray.errors import BadInput
from lift_ray.storage.store import join, locate, reached

SKIPPED = "skipped.txt"


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: a record of each split, the class names, and one line for every image left out."""

    splits: dict[str, SplitRecord]
    class_names: tuple[str, ...]
    skipped: tuple[str, ...]


def convert(
    index: ImageIndex,
    destination: str,
    *,
    division: Division | None = None,
    encoding: Encoding | None = None,
    rows_per_shard: int = 4096,
    row_group_rows: int = 256,
    skip_bad: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    run_tasks: RunTasks | None = None,
) -> Converted:
    """Check every image, and write them as a data set that `open_dataset` opens.

    Which image goes into which shard is fixed before any is read, so shards are independent, and a conversion that was
    cut short at any moment goes on with the missing ones when it is called again with the same arguments: the files
    become those of one that ran through. It then needs `overwrite` no more. With other arguments it begins anew.

    Args:
        index: the images.
        destination: folder, any fsspec URL. A second conversion to the same folder of this machine is refused.
        division: which images are kept, for which split; None takes its defaults.
        encoding: how they are stored; None keeps the bytes.
        rows_per_shard, row_group_rows: layout of the files. A bad image makes its shard shorter.
        skip_bad: leave images out that cannot be decoded, and list them in skipped.txt.
        overwrite: replace a data set at the destination.
        workers: images in work at once; None means one for each core.
        progress: called with (done, total) images; first with what was there already.
        run_tasks: runs the shards elsewhere (a cluster); by default processes of this machine, unless data is in memory.

    Raises:
        BadInput: a bad image, a class left without a training image, or a destination that is taken or unwritable.
        RunFailed: a process was killed. Finished shards stay in both cases.
    """
    splits = divide(index, division or Division())
    job = Job(
        destination, index.source, index.class_names, index.read, encoding or Encoding(), row_group_rows, skip_bad
    )
    tasks = [
        ShardTask(split, number, rows[start : start + rows_per_shard])
        for split, rows in splits.items()
        for number, start in enumerate(range(0, len(rows), rows_per_shard))
    ]
    total, done = sum(map(len, splits.values())), 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress(done, total)

    _check_outside(index.source, destination)
    with _claimed(destination):
        records = _begin(job, tasks, overwrite)
        missing = [task for task in tasks if record_name(task) not in records]
        advance(total - sum(len(task.rows) for task in missing))
        run: RunTasks = partial(run_here, workers=workers or os.cpu_count() or 1)
        if run_tasks is not None and not in_memory(job):
            run = run_tasks
        try:
            new = run(job, missing, advance) if missing else []
        except BaseException:
            _leave(destination, tasks)
            raise
        return _finish(job, [*records.values(), *new])


def _check_outside(source: str, destination: str) -> None:
    (file_system, path), (source_system, source_path) = locate(destination), locate(source)
    path = path.rstrip("/")
    if file_system == source_system and f"{path}/".startswith(f"{source_path.rstrip('/')}/"):
        raise BadInput(destination, "must be outside the source", f"a folder in {source}", "choose another folder")
    with reached(destination, RULE, "check the path"):
        if file_system.exists(path) and not file_system.isdir(path):
            raise BadInput(destination, "must be a folder", "a file", "choose another name")


@contextmanager
def _claimed(destination: str) -> Iterator[None]:
    """Make the folder, and keep other conversions of this machine out of it; one that stays empty goes again.

    The lock is the kernel's, on the folder itself: it ends with this process, however that ends.
    """
    file_system, path = locate(destination)
    with reached(destination, RULE, "check the path"):
        is_new = not file_system.exists(path)
        file_system.makedirs(path, exist_ok=True)
    if not isinstance(file_system, LocalFileSystem):
        yield
        return
    import fcntl

    folder = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(
                    destination,
                    "must not be in use",
                    but="another conversion is writing there",
                    remedy="wait, or choose another folder",
                ) from None
        yield
    finally:
        if is_new:
            with suppress(OSError):
                os.rmdir(path)
        os.close(folder)


def _begin(job: Job, tasks: Sequence[ShardTask], overwrite: bool) -> dict[str, ShardRecord]:
    """The shards that an earlier call with the same plan has finished, by the name of their record."""
    digest = _digest(job, tasks)
    there = sizes(job.destination)
    if PLAN in there and _load(job.destination, PLAN).get("digest") == digest:
        return _finished(job, tasks, there)
    if PLAN not in there:
        discard(job.destination)  # what a conversion that was killed at its very end left
    if not overwrite and (MANIFEST in there or shard_names(there)):
        raise BadInput(
            job.destination, "must not contain a dataset", "one", "pass --overwrite or choose another folder"
        )
    discard(job.destination)
    write_file(job.destination, PLAN, json.dumps({"digest": digest, "shards": len(tasks)}).encode())
    return {}


def _digest(job: Job, tasks: Sequence[ShardTask]) -> str:
    """Of all that decides the bytes. `skip_bad` does not: a shard that is finished without it is so with it."""
    versions = [FORMAT_VERSION, *(version(name) for name in ("lift_ray", "pyarrow", "pillow"))]
    images = [job.source, repr(job.read), asdict(job.encoding), job.class_names, job.row_group_rows]
    digest = hashlib.sha256(json.dumps([versions, images]).encode())
    for task in tasks:
        digest.update(json.dumps([task.split, task.number, task.rows]).encode())
    return digest.hexdigest()


def _finished(job: Job, tasks: Sequence[ShardTask], there: Mapping[str, int]) -> dict[str, ShardRecord]:
    """The records whose shard is there as a whole, waiting or in its place; other temporary files are removed."""
    totals = {task.split: task.number + 1 for task in tasks}
    found: dict[str, ShardRecord] = {}
    for name in there.keys() & {record_name(task) for task in tasks}:
        content = _load(job.destination, name)
        if content.get("skipped") and not job.skip_bad:
            continue
        record = ShardRecord.of(content)
        final = shard_name(record.split, record.number, totals[record.split])
        if record.bytes == there.get(record.partial, there.get(final)):
            found[name] = record
    discard(job.destination, keep={PLAN, *found, *(record.partial for record in found.values())})
    return found


def _load(destination: str, name: str) -> dict[str, Any]:
    """What a small file of ours holds."""
    file_system, folder = locate(destination)
    with reached(join(destination, name), "must be unchanged since it was written", "remove it"):
        content: dict[str, Any] = json.loads(file_system.cat_file(join(folder, name)))
        return content


def _leave(destination: str, tasks: Sequence[ShardTask]) -> None:
    """After a failure: keep finished shards to go on with; without any, leave nothing behind."""
    with suppress(BadInput):
        if not sizes(destination).keys() & {record_name(task) for task in tasks}:
            discard(destination)


def _finish(job: Job, shards: Sequence[ShardRecord]) -> Converted:
    """Check that every class can be trained, and publish. A split without a good image is left out."""
    shards = sorted(shards, key=lambda shard: shard.number)
    records = {split: SplitRecord(tuple(shard for shard in shards if shard.split == split)) for split in SPLITS}
    skipped = tuple(line for record in records.values() for shard in record.shards for line in shard.skipped)
    records = {split: record for split, record in records.items() if record.rows}
    counts = records["train"].class_counts if "train" in records else (0,)
    if 0 in counts:
        discard(job.destination)
        name = job.class_names[counts.index(0)]
        raise BadInput(
            job.source, "every class must keep a training image", but=f"{name!r} has no readable one", remedy="add one"
        )
    _list_skipped(job.destination, skipped)
    publish(job.destination, job.class_names, records)
    return Converted(records, job.class_names, skipped)


def _list_skipped(destination: str, skipped: Sequence[str]) -> None:
    if skipped:
        write_file(destination, SKIPPED, "".join(f"{line}\n" for line in skipped).encode())
        return
    file_system, folder = locate(destination)
    with reached(destination, RULE, "check the disk and your permissions"):
        if file_system.exists(join(folder, SKIPPED)):
            file_system.rm_file(join(folder, SKIPPED))
