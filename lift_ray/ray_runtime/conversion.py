"""Conversion of shards as Ray tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, nullcontext
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from lift_ray.data.convert.shards import ShardRecord, sizes
from lift_ray.data.convert.tasks import Job, ShardTask, convert_shard
from lift_ray.errors import BadInput, RunFailed

THREADS = 4  # per task, on its one core: reading overlaps with decoding
TRIES = 5


def on_cluster(
    job: Job, tasks: Sequence[ShardTask], advance: Callable[[int], None], *, at_once: int | None = None
) -> list[ShardRecord]:
    """Convert shards on the connected Ray cluster. If a node is lost, its shards are converted elsewhere.

    Args:
        job: the conversion.
        tasks: the shards.
        advance: called with the number of images of each finished shard.
        at_once: shards that are converted at once; None means one for each core of the cluster.

    Raises:
        BadInput: a mistake that a task finds, or a destination that not every node can reach.
        RunFailed: nodes were lost too often.
    """
    limit = at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
    work = ray.remote(_convert).options(num_cpus=1, max_retries=TRIES, scheduling_strategy="SPREAD")
    shared = ray.put((job, os.getcwd()))
    rest: Iterator[ShardTask] = iter(tasks)
    running: dict[Any, ShardTask] = {}
    records: list[ShardRecord] = []
    try:
        while True:
            running |= {work.remote(shared, task): task for task in islice(rest, limit - len(running))}
            if not running:
                return records
            for done in ray.wait(list(running), num_returns=1)[0]:
                task = running.pop(done)
                records.append(_checked(job, ray.get(done)))
                advance(len(task.rows))
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, BadInput | RunFailed) else error) from None
    except RayError as error:
        raise RunFailed(
            f"{job.destination}: a node of the cluster was lost {TRIES + 1} times ({type(error).__name__}); "
            "rerun the same command: finished shards are reused"
        ) from None
    finally:
        for reference in running:
            ray.cancel(reference)


def _convert(shared: tuple[Job, str], task: ShardTask) -> ShardRecord:
    job, folder = shared
    with chdir(folder) if os.path.isdir(folder) else nullcontext():  # the user's paths are relative to it
        return convert_shard(job, task, THREADS, lambda: None)


def _checked(job: Job, record: ShardRecord) -> ShardRecord:
    """Check that this node sees a shard that another node wrote, so the folder is shared."""
    if record.partial not in sizes(job.destination):
        raise BadInput(
            job.destination,
            "must be a folder that every node of the cluster can reach",
            but="a shard that another node wrote is missing",
            remedy="use a shared folder or a URL",
        )
    return record
