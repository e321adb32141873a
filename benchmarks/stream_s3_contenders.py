"""The loaders that benchmarks/stream_s3.py compares, and the process that each of them runs in.

A contender writes the images in its own format into a folder (`write`), opens them in a bucket (`__init__`), and gives the float
batches of an epoch (`batches`). Shards of all formats have the same size, and what shuffles in a buffer has one of SHUFFLE images.
Peers decode in the workers of a DataLoader, which stay for all epochs, and this project in its decoding processes; with none, each does
all in its one process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import data_contenders
import torch
from data_contenders import SEED, SHUFFLE, TRANSFORMS, Contender, Labelled, Sample, Setup, whole_epoch
from torch.utils.data import DataLoader

SHARD_BYTES = 8 * 2**20
BUCKET = "images"


@dataclass(frozen=True)
class Source(Setup):
    """Images to load, and the server that has them.

    Args:
        endpoint: URL of the S3 server.
        copies: an empty folder of this machine.
        tars: shards of WebDataset's format.
    """

    endpoint: str = ""
    copies: str = ""
    tars: int = 0


def workers(setup: Setup) -> dict[str, Any]:
    """The arguments of a peer's DataLoader."""
    return {"num_workers": setup.processes, "persistent_workers": setup.processes > 0}


class LiftRay(data_contenders.LiftRay):
    """lift_ray's stream: byte ranges of row groups."""

    imports = (*data_contenders.LiftRay.imports, "s3fs")
    copies_gb = 0

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        from lift_ray.data.convert.shards import publish, write_split

        at = folder / "parquet"
        if not at.exists():
            rows = SHARD_BYTES * len(samples) // sum(len(data) for data, _, _ in samples)
            record = write_split(str(at), "train", samples, class_names, rows_per_shard=rows)
            publish(str(at), class_names, {"train": record})

    def __init__(self, setup: Source) -> None:
        from lift_ray.data.batches import Decoders
        from lift_ray.data.decoder_pool import DecoderPool
        from lift_ray.data.order import memory_bytes

        os.environ |= {"LIFT_CACHE": setup.copies, "LIFT_CACHE_GB": str(self.copies_gb)}
        super().__init__(setup)
        sizes = [size for shard in self.split.shards for size in shard.row_group_bytes]
        shuffle_bytes = SHUFFLE * sum(sizes) // self.split.num_samples
        self.sampling = replace(self.sampling, shuffle_bytes=shuffle_bytes)
        self.reader.cache_bytes = memory_bytes(self.split, shuffle_bytes)
        if setup.processes:
            self.decoders = Decoders(1, DecoderPool(setup.processes))


class LiftRayCopies(LiftRay):
    """The same with LIFT_CACHE_GB: whole shards are kept on this machine."""

    copies_gb = 100


class WebDataset(data_contenders.WebDataset):
    """WebDataset: a curl for each shard, images shuffled in a buffer."""

    keeps = False

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        import webdataset

        if (folder / "tar").exists():
            return
        (folder / "tar").mkdir()
        with webdataset.ShardWriter(str(folder / "tar" / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
            for number, (data, _, label) in enumerate(samples):
                writer.write({"__key__": f"{number:07d}", "jpg": data, "cls": label})

    def __init__(self, setup: Source) -> None:
        import webdataset

        shards = [f"{setup.endpoint}/{BUCKET}/tar/{number:05d}.tar" for number in range(setup.tars)]
        kept = {"cache_dir": setup.copies} if self.keeps else {}
        read = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=SEED, **kept)
        images = read.shuffle(SHUFFLE, seed=SEED).decode("pil").to_tuple("jpg", "cls")
        batched = images.map_tuple(TRANSFORMS[setup.transforms](setup.px)).batched(setup.batch)
        self.loader: Any = DataLoader(batched, batch_size=None, **workers(setup))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        return iter(self.loader)


class WebDatasetCopies(WebDataset):
    """The same with a cache_dir."""

    keeps = True


class Mosaic(Contender):
    """MosaicML streaming: whole shards of MDS, which it keeps."""

    imports = ("streaming", "PIL.Image", "torchvision.transforms.v2", "boto3")

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        import streaming

        columns = {"image": "bytes", "label": "int"}
        with streaming.MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=SHARD_BYTES) as writer:
            for data, _, label in samples:
                writer.write({"image": data, "label": label})

    def __init__(self, setup: Source) -> None:
        import streaming
        from PIL import Image

        transform = TRANSFORMS[setup.transforms](setup.px)

        class Images(streaming.StreamingDataset):  # type: ignore[misc]
            def __getitem__(self, at: int) -> Any:
                sample = super().__getitem__(at)
                return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

        remote, local = f"{setup.folder}/mds", f"{setup.copies}/mds"
        images = Images(remote=remote, local=local, batch_size=setup.batch, shuffle=True, shuffle_seed=SEED)
        self.loader: Any = DataLoader(images, setup.batch, **workers(setup))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        return iter(self.loader)


class LitData(Contender):
    """LitData: whole chunks, which it keeps."""

    imports = ("litdata", "PIL.Image", "torchvision.transforms.v2", "boto3")

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        from litdata.streaming.writer import BinaryWriter

        (folder / "litdata").mkdir()
        writer = BinaryWriter(str(folder / "litdata"), chunk_bytes=SHARD_BYTES)
        for number, (data, _, label) in enumerate(samples):
            writer[number] = {"image": data, "label": label}
        writer.done()
        writer.merge()

    def __init__(self, setup: Source) -> None:
        import litdata
        from litdata.streaming import downloader
        from PIL import Image

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # the server has no certificate
        transform = TRANSFORMS[setup.transforms](setup.px)

        def transformed(sample: dict[str, Any]) -> tuple[Any, int]:
            return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

        remote, local = f"{setup.folder}/litdata", f"{setup.copies}/litdata"
        Path(local).mkdir()
        images = litdata.StreamingDataset(remote, cache_dir=local, shuffle=True, seed=SEED, transform=transformed)
        self.loader = litdata.StreamingDataLoader(images, batch_size=setup.batch, **workers(setup))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        return iter(self.loader)


class Encoded(LiftRay):
    """Reading alone: the encoded images of lift_ray's stream, as s3fs reads them."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        from lift_ray.data.batches import made_ahead
        from lift_ray.data.order import READ_AHEAD_SAMPLES, steps_per_epoch

        samples = self.sampling.of_epoch(self.split, epoch)
        read_ahead = -(-READ_AHEAD_SAMPLES // self.setup.batch)

        def read(step: int) -> Any:
            return self.reader.read(samples(step)[1]), samples(step)[1]

        def prefetch(step: int) -> None:
            self.reader.prefetch(samples(step)[1])

        return made_ahead(read, range(start, steps_per_epoch(self.split, self.setup.batch)), 1, prefetch, read_ahead)


class ByObstore(LiftRay):
    """lift_ray's stream, with obstore instead of s3fs for its byte ranges. Only without decoding processes: they have s3fs."""

    imports = (*LiftRay.imports, "obstore.store")

    def __init__(self, setup: Source) -> None:
        from obstore.store import S3Store

        from lift_ray.storage import store

        bucket = S3Store(BUCKET, endpoint=setup.endpoint, client_options={"allow_http": True})

        def read(file_system: Any, path: str, start: int | None, end: int | None, limit_s: float) -> bytes:
            key = path.removeprefix(f"{BUCKET}/")
            if end is not None:
                return bytes(bucket.get_range(key, start=start or 0, end=end))
            wanted = {} if start is None else {"range": {"suffix": -start} if start < 0 else {"offset": start}}
            return bytes(bucket.get(key, options=wanted).bytes())

        store._read = read
        super().__init__(setup)


class EncodedByObstore(ByObstore, Encoded):
    """Reading alone, by obstore."""


CONTENDERS: dict[str, type[Contender]] = {
    "lift_ray": LiftRay,
    "lift_ray_copies": LiftRayCopies,
    "webdataset": WebDataset,
    "webdataset_copies": WebDatasetCopies,
    "mosaicml": Mosaic,
    "litdata": LitData,
}
# Other readers of lift_ray's shards, run only with --only.
READERS: dict[str, type[Contender]] = {
    "lift_ray_obstore": ByObstore,
    "read_s3fs": Encoded,
    "read_obstore": EncodedByObstore,
}
ALL = {**CONTENDERS, **READERS}


def serve(name: str, cores: set[int], answers: Any) -> None:
    """Answer requests, a line of JSON each, from standard input, on these cores, with one thread of torch.

    The first answer comes when the contender's library is imported. {setup} then opens the contender, {epoch} is `whole_epoch`.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    for module in ALL[name].imports:
        import_module(module)
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "setup" in request:
            began = time.perf_counter()
            contender = ALL[name](Source(**request["setup"]))
            answer = {"seconds": time.perf_counter() - began}
        else:
            answer = whole_epoch(contender, request["epoch"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as out, contextlib.redirect_stdout(sys.stderr):
        serve(sys.argv[1], set(map(int, sys.argv[2].split(","))), out)
