"""Everything of lift_ray that reads what users bring, each as a function of a few bytes, in a process of its own.

A target returns, or raises BadInput. Any other exception is a bug, and so is a process that ends, hangs or takes gigabytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lift_ray.errors import BadInput
from lift_ray.storage.layout import RECORD, WEIGHTS

HANGS_S = 60  # a child that is killed by this alarm ran for too long
TOWER = "fuzz-tower"
TOWER_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
}
MORE_BYTES = 3 * 2**30  # address space beyond that of the loaded program, after which memory runs out


@dataclass(frozen=True)
class Reply:
    """What became of an input: the traceback of an unexpected exception or "", the time, and the growth of the peak memory."""

    error: str
    seconds: float
    num_bytes: int


def image(checkpoint: Path, data: bytes, folder: Path) -> None:
    """Decode an image as all verbs do. Those that `convert` accepts must be readable everywhere."""
    from lift_ray.data.augment import Preprocessing, any_crop, corners_and_centre, evaluation_image, training_image
    from lift_ray.data.bad_image import BadImage
    from lift_ray.data.bit_depth import Rendering
    from lift_ray.data.convert.images import Encoding
    from lift_ray.data.decode import decode, has_pages

    draw, to = np.array([0.5, 0.2, 0.9]), Preprocessing(32)

    def is_accepted(read: Callable[[bytes], object]) -> bool:
        try:
            read(data)
        except BadImage:
            return False
        return True

    stored, shrunk = (is_accepted(Encoding(short_side_px=side)) for side in (None, 24))
    readers: list[Callable[[bytes], object]] = [
        partial(evaluation_image, preprocessing=to),
        lambda data: corners_and_centre(decode(data), to),
        *(
            partial(training_image, preprocessing=to, find=partial(any_crop, draw=draw), reduced=reduced)
            for reduced in (False, True)
        ),
    ]
    read = [is_accepted(reader) for reader in readers]
    assert [shrunk, *read] == [stored] * 5, f"convert {stored}, --short-side {shrunk}, the other readers {read}"
    rendering = Rendering.parse("minmax", 1 + has_pages(data), "white")
    encoding = Encoding(rendering=rendering)
    encoding.value_range(data)
    kept = is_accepted(encoding)
    assert is_accepted(partial(decode, rendering=rendering)) == kept, f"convert {kept} with {rendering}"
    if kept:
        converted, expected = encoding(data), decode(data, rendering=rendering)
        for found in (decode(converted), decode(converted, rendering=rendering)):
            assert np.array_equal(found, expected), f"{rendering}"


def parquet(checkpoint: Path, data: bytes, folder: Path) -> None:
    """Open a shard as a dataset, as images for predict, and as a table for convert, and read all images."""
    from lift_ray.data.convert.tables import scan_table
    from lift_ray.data.open import open_dataset
    from lift_ray.data.reader import RowReader
    from lift_ray.inference.image_files import ImageReader, find_images
    from lift_ray.inference.predict import Job

    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(data)

    def as_dataset() -> None:
        split = open_dataset(str(folder)).split("train")
        with RowReader(split) as reader:
            reader.read(np.arange(split.num_samples))

    def as_images() -> None:
        job = Job("", find_images([str(path)]))
        reader = ImageReader(job.images)
        for start, stop in [job.span(number) for number in range(job.num_parts)]:
            deque(reader.read(start, stop), maxlen=0)
        reader.close()

    def as_table() -> None:
        index = scan_table(str(path), kind="parquet")
        for rows in index.splits.values():
            for row in rows:
                with suppress(ValueError):  # a bad image
                    index.read(row[0])

    for use in (as_dataset, as_images, as_table):
        _or_bad_input(use)


def csv(checkpoint: Path, data: bytes, folder: Path) -> None:
    """List the images of a CSV table."""
    from lift_ray.data.convert.tables import scan_table

    (folder / "table.csv").write_bytes(data)
    scan_table(str(folder / "table.csv"), kind="csv")


def settings(checkpoint: Path, data: bytes, folder: Path) -> None:
    """Read a YAML file as a space, as a run, and as a cluster."""
    from lift_ray.clusters.monitoring import check_monitoring, is_monitoring
    from lift_ray.clusters.read import read_cluster
    from lift_ray.settings.checks import read_space
    from lift_ray.settings.run_file import read_run
    from lift_ray.settings.yaml_file import SettingsFile

    path = folder / "file.yaml"
    path.write_bytes(data)

    def as_monitoring() -> None:
        if is_monitoring((read := SettingsFile.read(path)).data):
            check_monitoring(read)

    for use in (partial(read_space, path), partial(read_run, path), partial(read_cluster, path), as_monitoring):
        _or_bad_input(use)


def record(checkpoint: Path, data: bytes, folder: Path) -> None:
    """Load a checkpoint whose JSON is the input."""
    _load(checkpoint, folder, RECORD, data)


def weights(checkpoint: Path, data: bytes, folder: Path) -> None:
    """Load a checkpoint whose tensors are the input, and the same bytes as pretrained weights of a backbone."""
    from lift_ray.model.backbone import load_backbone

    for suffix in ("safetensors", "pt"):
        path = folder / f"own.{suffix}"
        path.write_bytes(data)
        _or_bad_input(partial(load_backbone, TOWER, str(path)))
    _load(checkpoint, folder, WEIGHTS, data)


def http(checkpoint: Path, data: bytes, folder: Path) -> None:
    """Send a body, whose first line has the path with its query and the content type, to the server's front."""
    from starlette.requests import Request

    first, _, body = data.partition(b"\n")
    target, _, kind = first.partition(b" ")
    path, _, query = target.partition(b"?")
    pieces = [body[start : start + 4096] for start in range(0, len(body), 4096)] or [b""]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False
    waiting = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(waiting)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path.decode("latin-1"),
        "query_string": query,
        "headers": [(b"content-type", kind), (b"host", b"localhost")],
    }
    response = asyncio.run(_front(checkpoint)(Request(scope, receive)))
    assert response.status_code in (200, 400, 404, 405, 413, 415), response.status_code


TARGETS = {
    "image": image,
    "parquet": parquet,
    "csv": csv,
    "settings": settings,
    "record": record,
    "weights": weights,
    "http": http,
}


def _or_bad_input(use: Callable[[], object]) -> None:
    with suppress(BadInput):
        use()


def _load(checkpoint: Path, folder: Path, name: str, data: bytes) -> None:
    from lift_ray.inference.classifier import Classifier
    from lift_ray.methods.world import Ranks
    from lift_ray.training.checkpoint import opened

    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(data if file.name == name else file.read_bytes())
    with opened(str(folder)) as there:
        Classifier(there, Ranks.alone())


_FRONTS: dict[Path, Any] = {}


def _front(checkpoint: Path) -> Any:
    """Return the server's front before a model in this process, which decodes as a replica does and answers with the shape."""
    from lift_ray.inference.serve_http import HttpFront, Options
    from lift_ray.inference.serve_model import ModelReplica

    if checkpoint in _FRONTS:
        return _FRONTS[checkpoint]
    replica = ModelReplica(Options(str(checkpoint), temperature=1.0))

    class Model:
        classify = property(lambda self: self)

        async def remote(self, body: bytes, top: int) -> tuple[int, dict[str, Any]]:
            status, found = replica._decoded(body)
            return status, {"found": found if isinstance(found, str) else found.shape}

    _FRONTS[checkpoint] = HttpFront(Model(), Options(str(checkpoint), max_mb=1.0))
    return _FRONTS[checkpoint]


def add_tower() -> None:
    """Register the architecture TOWER with open_clip."""
    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{TOWER}.json"
        path.write_text(json.dumps(TOWER_CONFIG))
        open_clip.add_model_config(path)


def serve(pipe: Connection, checkpoint: Path) -> None:
    """Answer each (target, data) that comes through the pipe, in a child process, until it is closed."""
    import torch

    torch.set_num_threads(1)
    add_tower()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name in TARGETS:  # what is loaded once does not count as memory of an input
        _answer(name, checkpoint, b"")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MORE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send("ready")
    while True:
        try:
            name, data = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(name, checkpoint, data))


def _answer(name: str, checkpoint: Path, data: bytes) -> Reply:
    before, began, error = _status("VmRSS"), time.monotonic(), ""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    signal.alarm(HANGS_S)
    with tempfile.TemporaryDirectory() as folder:
        try:
            TARGETS[name](checkpoint, data, Path(folder))
        except BadInput as bad:
            error = "" if str(bad).strip() else "a message without words"
        except BaseException:
            error = traceback.format_exc()
    signal.alarm(0)
    return Reply(error, time.monotonic() - began, _status("VmHWM") - before)


def _status(name: str) -> int:
    """Return a size of this process in bytes."""
    [line] = [line for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])
