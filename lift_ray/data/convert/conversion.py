"""Convert labeled images to shuffled, stratified Parquet shards; interrupted conversions can be continued."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

from filelock import lock_descriptor
from fsspec.implementations.local import LocalFileSystem

from lift_ray.data.bit_depth import AS_STORED, Rendering, Window, nominal_range
from lift_ray.data.convert.images import Encoding
from lift_ray.data.convert.index import ImageIndex, valid_text
from lift_ray.data.convert.shards import (
    PLAN,
    ROW_GROUP_ROWS,
    ROWS_PER_SHARD,
    RULE,
    ShardRecord,
    SplitRecord,
    discard,
    publish,
    shard_name,
    sizes,
    write_file,
)
from lift_ray.data.convert.splitting import Divided, Division, divide
from lift_ray.data.convert.tasks import Job, RunTasks, ShardTask, in_memory, record_name, run_here, value_range_of
from lift_ray.data.layout import MANIFEST, SPLITS, shard_names
from lift_ray.data.open import FORMAT_VERSION
from lift_ray.errors import BadInput
from lift_ray.storage.store import join, locate, reached

SKIPPED, LEFT_OUT = "skipped.txt", "left_out.txt"
WINDOW_IMAGES = 256  # that `--window auto` looks at


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    Attributes:
        splits: record of each split.
        class_names: names of the K classes.
        skipped: one line for each skipped image.
        validation: `drawn` from the training images, `separate`, or None without a validation split.
        labelled_counts: labeled training images of each class before any were held out, (K,).
        has_groups: no group of images is in two splits.
        rendering: how images with more than 8 bits, several pages or transparency were made 8-bit RGB.
    """

    splits: dict[str, SplitRecord]
    class_names: tuple[str, ...]
    skipped: tuple[str, ...]
    validation: Literal["drawn", "separate"] | None
    labelled_counts: tuple[int, ...]
    has_groups: bool
    rendering: Rendering = AS_STORED

    @property
    def num_paged(self) -> int:
        """Number of images whose source has several pages."""
        return sum(shard.num_paged for record in self.splits.values() for shard in record.shards)

    @property
    def unseen(self) -> tuple[int, ...]:
        """Labels of the classes without a validation image, which a search on the validation split does not see."""
        record = self.splits.get("validation")
        counts = record.class_counts if record else (0,) * len(self.class_names)
        return tuple(label for label, count in enumerate(counts) if count == 0)


def convert(
    index: ImageIndex,
    destination: str,
    *,
    division: Division | None = None,
    encoding: Encoding | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    row_group_rows: int = ROW_GROUP_ROWS,
    skip_bad: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    run_tasks: RunTasks | None = None,
) -> Converted:
    """Check every image, and write a dataset that `open_dataset` opens.

    The shard of each image is fixed before any image is read, so shards are independent. If a conversion is interrupted at any
    time, calling it again with the same arguments writes the missing shards; the files are the same as without the interruption.
    `overwrite` is then not required. With other arguments, the conversion starts from scratch.

    Args:
        index: the images.
        destination: folder, any fsspec URL. Only one conversion at a time may write to a folder of this machine.
        division: selection of images and their splits; None for the defaults.
        encoding: storage format of the images; None keeps their bytes.
        rows_per_shard, row_group_rows: layout of the files. A bad image makes its shard shorter.
        skip_bad: skip images that cannot be decoded, and list them in skipped.txt.
        overwrite: replace an existing dataset at the destination.
        workers: number of images processed at the same time; None for one per core.
        progress: called with (done, total) images; first with those of an earlier, interrupted call.
        run_tasks: runs the shards elsewhere (on a cluster); default: processes of this machine, or threads for data in memory.

    Raises:
        BadInput: an image is bad, a class has no training image, or the destination is in use or not writable.
        RunFailed: a process was killed. Finished shards are kept in both cases.
    """
    divided = divide(index, division or Division())
    splits = divided.splits
    job = Job(
        destination,
        index.source,
        index.class_names,
        index.read,
        encoding or Encoding(),
        row_group_rows,
        skip_bad,
        index.groups is not None,
        index.root,
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
    job = _with_window(job, [row[0] for rows in splits.values() for row in rows], workers or os.cpu_count() or 1)
    with _claimed(destination):
        records = _begin(job, tasks, _digest(job, tasks, divided), overwrite)
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
        _write_list(destination, LEFT_OUT, [f"{name}: {reason}" for name, reason in index.left_out])
        return _finish(job, divided, [*records.values(), *new])


def _with_window(job: Job, references: Sequence[str], workers: int) -> Job:
    """Return the job with the range of `--window auto`: one for all images, found from some of them, evenly spread.

    Raises BadInput if one range cannot hold their values, or the source fails.
    """
    encoding = job.encoding
    if encoding.rendering.window is None or not encoding.rendering.window.is_open:
        return job
    chosen = references[:: -(-len(references) // WINDOW_IMAGES)]
    with ThreadPoolExecutor(workers) as pool:
        found = nominal_range(each for each in pool.map(partial(value_range_of, job), chosen) if each is not None)
    if found is None:
        return job
    rendering = replace(encoding.rendering, window=Window("auto", *found))
    return replace(job, encoding=replace(encoding, rendering=rendering))


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
    """Create the folder and lock it against other conversions of this machine; a new folder that stays empty is removed.

    The lock belongs to the kernel and is on the folder itself, so it is released when this process ends, even if it is killed.
    """
    file_system, path = locate(destination)
    with reached(destination, RULE, "check the path"):
        is_new = not file_system.exists(path)
        file_system.makedirs(path, exist_ok=True)
    if not isinstance(file_system, LocalFileSystem):
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not support locks
            if not lock_descriptor(folder, blocking=False):
                raise BadInput(
                    destination,
                    "must not be in use",
                    but="another conversion is writing there",
                    remedy="wait, or choose another folder",
                )
        yield
    finally:
        if is_new:
            with suppress(OSError):
                os.rmdir(path)
        os.close(folder)


def _begin(job: Job, tasks: Sequence[ShardTask], digest: str, overwrite: bool) -> dict[str, ShardRecord]:
    """Return the shards that an earlier call with the same plan has finished, by the name of their record."""
    there = sizes(job.destination)
    if PLAN in there and _load(job.destination, PLAN).get("digest") == digest:
        return _finished(job, tasks, there)
    if PLAN not in there:
        discard(job.destination)  # left by a conversion that was killed at the very end
    if not overwrite and (MANIFEST in there or shard_names(there)):
        raise BadInput(
            job.destination, "must not contain a dataset", "one", "pass --overwrite or choose another folder"
        )
    discard(job.destination)
    write_file(job.destination, PLAN, json.dumps({"digest": digest, "shards": len(tasks)}).encode())
    return {}


def _digest(job: Job, tasks: Sequence[ShardTask], divided: Divided) -> str:
    """Hash everything that determines the bytes. `skip_bad` does not: a shard finished without it is the same with it."""
    versions = [FORMAT_VERSION, *(version(name) for name in ("lift_ray", "pyarrow", "pillow"))]
    images = [job.source, repr(job.read), asdict(job.encoding), job.class_names, job.row_group_rows]
    digest = hashlib.sha256(json.dumps([versions, images, divided.from_training]).encode())
    for task in tasks:
        digest.update(json.dumps([task.split, task.number, task.rows]).encode())
    return digest.hexdigest()


def _finished(job: Job, tasks: Sequence[ShardTask], there: Mapping[str, int]) -> dict[str, ShardRecord]:
    """Return the records of complete shards, under a temporary or final name; other temporary files are removed."""
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
    """Return the content of a JSON file of a conversion."""
    file_system, folder = locate(destination)
    with reached(join(destination, name), "must be unchanged since it was written", "remove it"):
        content: dict[str, Any] = json.loads(file_system.cat_file(join(folder, name)))
        return content


def _leave(destination: str, tasks: Sequence[ShardTask]) -> None:
    """Clean up after a failure: keep finished shards for the next call; if there are none, leave nothing behind."""
    with suppress(BadInput):
        if not sizes(destination).keys() & {record_name(task) for task in tasks}:
            discard(destination)


def _finish(job: Job, divided: Divided, shards: Sequence[ShardRecord]) -> Converted:
    """Check that every class has a training image, and publish. A split without any readable image is dropped."""
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
    _write_list(job.destination, SKIPPED, skipped)
    labelled = (records[split].class_counts for split in divided.from_training if split in records)
    drawn: Literal["drawn", "separate"] = "drawn" if "validation" in divided.from_training else "separate"
    validation = drawn if "validation" in records else None
    converted = Converted(
        records,
        job.class_names,
        skipped,
        validation,
        tuple(map(sum, zip(*labelled, strict=True))),
        job.has_groups,
        job.encoding.rendering,
    )
    publish(job.destination, job.class_names, records, _about(converted))
    return converted


def _about(converted: Converted) -> dict[str, object]:
    """Return what the manifest says beside the shards."""
    about: dict[str, object] = {"labelled_counts": converted.labelled_counts}
    if converted.validation:
        about["validation"] = converted.validation
    if rendering := converted.rendering.to_dict():
        about["rendering"] = rendering
    return about | ({"groups": True} if converted.has_groups else {})


def _write_list(destination: str, name: str, lines: Sequence[str]) -> None:
    """Write lines to a file beside the dataset, or remove the file of an earlier conversion if there are none."""
    if lines:
        write_file(destination, name, valid_text("".join(f"{line}\n" for line in lines)).encode())
        return
    file_system, folder = locate(destination)
    with reached(destination, RULE, "check the disk and your permissions"):
        if file_system.exists(join(folder, name)):
            file_system.rm_file(join(folder, name))
