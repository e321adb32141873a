"""Independent tasks, one per shard of a conversion, and their execution on the cores of this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

from lift_ray.data.bad_image import NeedsWindow, RequiresExtra
from lift_ray.data.bit_depth import WINDOWS, ValueRange
from lift_ray.data.convert.images import Encoding
from lift_ray.data.convert.index import ReadImage
from lift_ray.data.convert.shards import PARTIAL, Sample, ShardRecord, write_file, write_shard
from lift_ray.data.convert.splitting import Row
from lift_ray.data.decode import has_pages
from lift_ray.errors import BadInput, RunFailed, one_line
from lift_ray.storage.store import PATIENCE_S, is_remote, join, locate, may_pass, reached, retried
from lift_ray.text import count

FEW_IMAGES = 2000  # below this, starting processes takes longer than it saves
POLL_S = 0.2
EIGHT_BIT, NEEDED = "must be an 8-bit image", f"convert with --window {WINDOWS}"
MESSAGE_IMAGES = 64  # of a shard, whose range of values a message gives
SUSPICIOUS = 100  # this many bad images without a good one mean that the source is gone


@dataclass(frozen=True)
class Job:
    """Options shared by all shards of a conversion, sent to other processes. Fields as in `conversion.convert` and `ImageIndex`."""

    destination: str
    source: str
    class_names: tuple[str, ...]
    read: ReadImage
    encoding: Encoding
    row_group_rows: int
    skip_bad: bool
    has_groups: bool
    root: str = ""

    def place(self, reference: str) -> str:
        """Return the URL of an image, for messages."""
        return join(self.root or self.source, reference)


@dataclass(frozen=True)
class ShardTask:
    """The images of one shard, in order; they are chosen before any image is read."""

    split: str
    number: int
    rows: Sequence[Row]


RunTasks = Callable[[Job, Sequence[ShardTask], Callable[[int], None]], list[ShardRecord]]
"""Function that runs tasks in any order, and calls back with the number of images done since the last call."""


class Stopped(Exception):
    """Another task failed, or the user stopped the conversion."""


def convert_shard(job: Job, task: ShardTask, num_threads: int, step: Callable[[], None]) -> ShardRecord:
    """Check the images of a shard, write it, then write its record: a shard with a record is finished.

    Args:
        num_threads: number of images processed at the same time.
        step: called before each image is written; its exceptions are not caught, and the unfinished shard is removed.

    Raises BadInput for the first bad image unless bad images are skipped, and if the source or the destination fails; a large shard
    with only bad images also counts as a failing source.
    """
    bad: list[BadInput] = []
    num_paged = 0

    def good(pool: ThreadPoolExecutor) -> Iterator[Sample]:
        nonlocal num_paged
        for row, image in _in_order(pool, lambda row: _checked(job, row[0]), task.rows, 4 * num_threads):
            step()
            if isinstance(image, _Checked):
                num_paged += image.paged
                yield image.stored, *row
            elif job.skip_bad:
                bad.append(image)
            elif image.rule == EIGHT_BIT:
                raise BadInput(image.place, image.rule, f"{image.got}{_range_of_some(job, task, pool)}", NEEDED)
            else:
                raise BadInput(image.place, image.rule, image.got, f"{image.remedy or 'remove it'} or pass --skip-bad")
        if len(bad) == len(task.rows) >= SUSPICIOUS:
            first, got = bad[0], f"{bad[0].got}, like all of the shard ({count(len(bad), 'image')})"
            raise BadInput(first.place, first.rule, got, "check that every machine can access the source")

    with ThreadPoolExecutor(num_threads) as pool:
        record = write_shard(
            job.destination,
            task.split,
            task.number,
            good(pool),
            job.class_names,
            row_group_rows=job.row_group_rows,
            has_groups=job.has_groups,
        )
    record = replace(record, skipped=tuple(map(str, bad)), num_paged=num_paged)
    write_file(job.destination, record_name(task), json.dumps(asdict(record)).encode())
    return record


def record_name(task: ShardTask) -> str:
    """Return the name of the file that marks a shard as finished."""
    return f".{task.split}-{task.number:05d}.json{PARTIAL}"


def run_here(
    job: Job, tasks: Sequence[ShardTask], advance: Callable[[int], None], *, workers: int
) -> list[ShardRecord]:
    """Run tasks with `workers` images at the same time: in one process per core, or in threads if there are few images.

    Raises the exceptions of `convert_shard`, and RunFailed if a process was killed from outside.
    """
    processes = min(workers, os.cpu_count() or 1, len(tasks))
    small = sum(len(task.rows) for task in tasks) < FEW_IMAGES
    if processes <= 1 or small or in_memory(job):
        return [convert_shard(job, task, workers, lambda: advance(1)) for task in tasks]
    return _in_processes(job, tasks, advance, processes, -(-workers // processes))


def in_memory(job: Job) -> bool:
    """Return True if the data is only in the memory of this process."""
    return "memory://" in job.source + job.root + job.destination


def _in_processes(
    job: Job, tasks: Sequence[ShardTask], advance: Callable[[int], None], processes: int, num_threads: int
) -> list[ShardRecord]:
    context = multiprocessing.get_context("spawn")
    # without locks, which a killed process would never release
    counters, stop = context.RawArray("q", len(tasks)), context.RawValue("b", 0)
    pool = ProcessPoolExecutor(processes, context, _begin, (job, num_threads, counters, stop))
    records: list[ShardRecord] = []
    seen = 0
    try:
        waiting = {pool.submit(_run, number, task) for number, task in enumerate(tasks)}
        while waiting:
            ready, waiting = wait(waiting, POLL_S, FIRST_EXCEPTION)
            seen, before = sum(counters), seen
            advance(seen - before)
            records += [future.result() for future in ready]
    except BrokenProcessPool:
        raise RunFailed(
            f"{job.destination}: a conversion process was killed, perhaps because memory ran out; start it again with "
            "a lower --at-once: finished shards are reused"
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)
    return records


_worker: Any = None  # in a process of the pool: job, num_threads, counters, stop


def _begin(*given: Any) -> None:
    global _worker
    _worker = given
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _run(number: int, task: ShardTask) -> ShardRecord:
    job, num_threads, counters, stop = _worker

    def step() -> None:
        if stop.value:
            raise Stopped
        counters[number] += 1

    return convert_shard(job, task, num_threads, step)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Row], _Checked | BadInput], rows: Sequence[Row], ahead: int
) -> Iterator[tuple[Row, _Checked | BadInput]]:
    """Yield results of `work` in the order of `rows`, with a bounded number of images in memory."""
    rest = iter(rows)
    window: deque[tuple[Row, Future[_Checked | BadInput]]] = deque()
    for row in islice(rest, ahead):
        window.append((row, pool.submit(work, row)))
    while window:
        row, future = window.popleft()
        yield row, future.result()
        for following in islice(rest, 1):
            window.append((following, pool.submit(work, following)))


@dataclass(frozen=True)
class _Checked:
    """The bytes to store of an intact image, and whether its source has several pages."""

    stored: bytes
    paged: bool


def _checked(job: Job, reference: str) -> _Checked | BadInput:
    """Return the bytes to store, or the BadInput that says what is wrong with the image."""
    where, remedy = job.place(reference), ""
    try:
        data = read_image(job, reference)
        return _Checked(job.encoding(data), has_pages(data))
    except NeedsWindow as error:
        return BadInput(where, EIGHT_BIT, error.seen, NEEDED)
    except FileNotFoundError:
        reason = "no file"
    except RequiresExtra as error:
        reason, remedy = one_line(error), "install it"
    except (ValueError, LookupError, OSError) as error:
        reason = one_line(error)
    return BadInput(where, "must be an intact image", reason, remedy)


def _range_of_some(job: Job, task: ShardTask, pool: ThreadPoolExecutor) -> str:
    """Return, for a message, the range of the values of some images of a shard that have more than 8 bits; "" if it is one image."""
    some = pool.map(lambda row: value_range_of(job, row[0]), task.rows[:MESSAGE_IMAGES])
    found = [each for each in some if each is not None]
    if len(found) < 2:
        return ""
    low, high = min(each.low for each in found), max(each.high for each in found)
    return f" ({len(found)} such images have {low:.10g} to {high:.10g})"


def value_range_of(job: Job, reference: str) -> ValueRange | None:
    """Return the range of an image with more than 8 bits; None for others and for bad ones, which the conversion reports."""
    with suppress(ValueError, LookupError, OSError):
        return job.encoding.value_range(read_image(job, reference))
    return None


def read_image(job: Job, reference: str) -> bytes:
    """Return the bytes of an image. Raises BadInput if the source fails, because no image may be skipped for that."""
    where = job.place(reference)
    rule, remedy = "must be readable", "check the source, and start again"
    try:
        return job.read(reference)
    except Exception as error:
        if is_remote(locate(job.root or job.source)[0]) and may_pass(error):
            return retried(lambda _: job.read(reference), where, rule, remedy, PATIENCE_S)
        broken = isinstance(error, ValueError | LookupError | FileNotFoundError)
        if broken or (isinstance(error, OSError) and error.errno is None and not isinstance(error, PermissionError)):
            raise
        with reached(where, rule, remedy):
            raise
