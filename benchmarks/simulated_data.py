"""A dataset of millions of made-up images, for simulation.py: index, conversion, opening, and the order of an epoch.

The images are one byte each and are not decoded: the time to read and check images is left out, it is that of benchmarks/data.py
and of a conversion's own rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from process_memory import memory

Figures = dict[str, Any]


class Stages:
    """Wall and processor seconds of each stage, and memory of the process at its end."""

    def __init__(self) -> None:
        self.found: Figures = {"before_mib": memory("VmRSS") >> 20}
        self._began, self._worked = time.monotonic(), time.process_time()

    def done(self, name: str) -> None:
        """Note the end of a stage. Its peak is that of the process so far."""
        self.found[name] = {
            "seconds": round(time.monotonic() - self._began, 2),
            "cpu_s": round(time.process_time() - self._worked, 2),
            "mib": memory("VmRSS") >> 20,
            "peak_mib": memory("VmHWM") >> 20,
        }
        self._began, self._worked = time.monotonic(), time.process_time()


def long_tail(images: int, classes: int) -> NDArray[np.int64]:
    """Return labels of a long tail, (images,): the largest class has about 500 times the images of the smallest."""
    shares = 500.0 ** -(np.arange(classes) / (classes - 1))
    more = np.random.default_rng(0).choice(classes, images - 4 * classes, p=shares / shares.sum())
    return np.concatenate([np.repeat(np.arange(classes), 4), more]).astype(np.int64)


def convert(folder: str, images: int, classes: int) -> Figures:
    """Index made-up paths and convert them. Shards are written by the real function, but their images are not looked at."""
    from lift_ray.data.convert.conversion import convert
    from lift_ray.data.convert.index import index_of_files
    from lift_ray.data.convert.shards import ShardRecord, write_file, write_shard
    from lift_ray.data.convert.tasks import Job, ShardTask, record_name
    from lift_ray.storage.output import Output

    def rows() -> Iterator[tuple[str, str, str, int]]:
        for number, label in enumerate(long_tail(images, classes).tolist()):
            yield f"list.txt:{number + 1}", "train", f"train_val/{label:05d}/{number:032x}.jpg", label

    def shards(job: Job, tasks: Sequence[ShardTask], advance: Callable[[int], None]) -> list[ShardRecord]:
        stages.done("divide and plan")
        found = []
        for task in tasks:
            samples = ((b"x", *row) for row in task.rows)
            record = write_shard(
                job.destination, task.split, task.number, samples, job.class_names, row_group_rows=job.row_group_rows
            )
            write_file(job.destination, record_name(task), json_bytes(asdict(record)))
            found.append(record)
        stages.done("shards of one byte an image")
        return found

    stages = Stages()
    source, names = str(Path(folder) / "photos"), tuple(f"class {label}" for label in range(classes))
    index = index_of_files(source, source, names, rows())
    stages.done("index")
    converted = convert(index, str(Path(folder) / "made"), run_tasks=shards)
    stages.done("manifest")
    out = Output(str(Path(folder) / "made"))
    files = [path.stat().st_size for path in out.folder.iterdir()]
    return stages.found | {
        "images": images,
        "classes": classes,
        "shards": sum(len(record.shards) for record in converted.splits.values()),
        "files_bytes": sum(files),
        "manifest_bytes": (out.folder / "manifest.json").stat().st_size,
    }


def json_bytes(content: Figures) -> bytes:
    """Return JSON as bytes."""
    import json

    return json.dumps(content).encode()


def opened(folder: str) -> Figures:
    """Open the dataset, store and load its index as for remote data, and make the order of an epoch."""
    from lift_ray.data.cache import load_index, store_index
    from lift_ray.data.open import _from_arrays, _to_arrays, open_dataset
    from lift_ray.data.order import epoch_order

    stages, made = Stages(), str(Path(folder) / "made")
    dataset = open_dataset(made)
    stages.done("open")
    store_index(made, "1", _to_arrays(dataset))
    stages.done("store the index")
    arrays = load_index(made, "1")
    assert arrays is not None
    again = _from_arrays(made, arrays)
    assert again.split("train").num_samples == dataset.split("train").num_samples
    stages.done("load the index")
    del again, arrays
    train = dataset.split("train")
    order = epoch_order(train, 0, 0)
    assert len(order) == train.num_samples
    stages.done("order of an epoch")
    epoch_order(train, 0, 1, power=0.5)
    stages.done("order of an epoch, classes balanced")
    index = next((Path(folder) / "cache" / "index").iterdir())
    return stages.found | {"train_images": train.num_samples, "index_bytes": index.stat().st_size}
