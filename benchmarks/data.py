"""Loading training images: this stream against four other loaders and against a loop that only decodes.

All read the same images, each from its own format on this machine's disk, in a process of its own with one thread on one
core: a square crop of 8% to 100% of the area, bicubic with antialiasing, float32 batches, normalised. `bare` is decoding,
cropping and resizing bytes in memory: the limit. The others use torchvision's transforms, on Pillow's images or on tensors,
whichever is faster here. Processes stay alive and take turns, an epoch each, so that a drift of the machine's speed meets all
alike; ratios are formed in each round. On a busy machine the processor time is the fairer one.

`first` is the time from making the data set to its first batch, imports left out, with the files in the page cache and
Hugging Face's Arrow files written before; `resumed` the same in the middle of an epoch. `peak` is the process's memory, and in
brackets what it was after the imports. How this stream's memory grows is measured with the images repeated to a larger set.

`--processes` are numbers of decoding processes to compare, 0 for threads: the stream on all cores, until a uint8 batch can be read in
the training process. A bare loop on each of as many cores is the limit, and the processor time is that of the training process.
Before anything is timed, images are compared with torchvision's, with the same crops.

    python benchmarks/data.py                                   # the embedded images
    python benchmarks/data.py --data URI --images 6742 --only imagefolder lift_ray bare

A contender that is not installed is left out. MosaicML streaming asks for older packages than this project has, so it goes
into an environment that only borrows the project's:

    python -m venv --without-pip /tmp/mosaic
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" \\
        > /tmp/mosaic/lib/python3.11/site-packages/project.pth
    .venv/bin/python -m pip --python /tmp/mosaic/bin/python install --no-deps mosaicml-streaming transformers tokenizers \\
        Brotli python-snappy cramjam zstd catalogue
    /tmp/mosaic/bin/python benchmarks/data.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import rich.table
import torch
from data_contenders import CONTENDERS, SEED, STREAM, TRANSFORMS, Sample, Setup
from PIL import Image
from record import record, typed, without_place
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from lift_ray.data.augment import SMALLEST_AREA, Preprocessing, square_crop, training_image
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.terminal.tables import console
from lift_ray.text import count

MARKS = (2_000, 10_000, 50_000)  # images after which the peak memory is looked at
COMPARED, RESUMES = 512, 3
MIB = 2**20
PACKAGES = {
    "imagefolder": "torchvision",
    "datasets": "datasets",
    "webdataset": "webdataset",
    "mosaicml": "mosaicml-streaming",
    "lift_ray": "torchcodec",
    "bare": "pillow",
}


class Process:
    """A contender in its own process, which has imported its library once it has answered.

    Args:
        folder: for its temporary files; MosaicML leaves lock files behind.
        cores: indices of the cores that it runs on, separated by commas.
        script: what it runs, a file in this folder.
        env: further variables of its environment.
    """

    def __init__(
        self, name: str, folder: Path, cores: str = "-1", script: str = "data_contenders.py", **env: str
    ) -> None:
        own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder)}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), name, cores],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own | env,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request of data_contenders.serve; exits when the process has ended."""
        self.send(**request)
        return self.answer()

    def send(self, **request: Any) -> None:
        """Make a request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to the first request without one."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def samples_of(uri: str, number: int) -> tuple[list[Sample], list[str]]:
    """The first training images of a data set, as stored, and the names of their classes."""
    dataset = open_dataset(uri)
    split = dataset.split("train")
    classes, labels = np.unique(split.labels[:number], return_inverse=True)
    with RowReader(split) as reader:
        images = reader.read(np.arange(len(labels)))
    samples = [
        (data, f"{row}.jpg", label) for row, (data, label) in enumerate(zip(images, labels.tolist(), strict=True))
    ]
    return samples, [dataset.class_names[label] for label in classes]


def differences(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, float]:
    """How far uint8 images are apart: the largest difference, and the share of values off by 1, 2 and more levels."""
    apart = np.concatenate([np.abs(a.astype(int) - b.astype(int)).ravel() for a, b in zip(ours, theirs, strict=True)])
    shares = {f"off_by_{levels}_frac": float(np.mean(apart == levels)) for levels in (1, 2)}
    return {"largest": int(apart.max()), **shares, "off_by_more_frac": float(np.mean(apart > 2))}


def compare(samples: Sequence[Sample], px: int) -> dict[str, dict[str, float]]:
    """The stream's images against torchvision's of Pillow's images and of tensors, with the same crops."""
    ours, pillow, tensor = [], [], []
    draws = np.random.default_rng(SEED).random((len(samples), 3))
    for (data, _, _), draw in zip(samples, draws, strict=True):
        ours.append(training_image(data, Preprocessing(px), partial(square_crop, smallest=SMALLEST_AREA, draw=draw)))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        crop = square_crop(*image.size, SMALLEST_AREA, draw)
        box = (crop.top, crop.left, crop.height, crop.width, [px, px], InterpolationMode.BICUBIC)
        pillow.append(np.asarray(torchvision.resized_crop(image, *box)))
        resized = torchvision.resized_crop(torchvision.pil_to_tensor(image), *box, antialias=True)
        tensor.append(resized.permute(1, 2, 0).numpy())
    return {"pillow": differences(ours, pillow), "tensors": differences(ours, tensor)}


def transform_ms(samples: Sequence[Sample], px: int) -> dict[str, float]:
    """Processor milliseconds of decoding and transforming an image with each of torchvision's transforms."""
    transforms = {name: make(px) for name, make in TRANSFORMS.items()}
    spent: dict[str, list[float]] = {name: [] for name in transforms}
    for at in range(0, len(samples), 16):  # turns are short and many: the machine's speed drifts
        for name, transform in transforms.items():
            began = time.process_time()
            for data, _, _ in samples[at : at + 16]:
                transform(Image.open(io.BytesIO(data)).convert("RGB"))
            spent[name].append(1e3 * (time.process_time() - began) / len(samples[at : at + 16]))
    return {name: median(times) for name, times in spent.items()}


def measure(args: argparse.Namespace, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """All figures of these contenders."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(Process(name, folder)) for name in names
        }  # they import while files are written
        samples, class_names = samples_of(args.data, args.images)
        for name in names:
            CONTENDERS[name].write(samples, class_names, folder)
        some = samples[:: max(1, len(samples) // COMPARED)]
        figures: dict[str, Any] = {"pictures": compare(some, args.px), "transforms_ms": transform_ms(some, args.px)}
        faster = min(figures["transforms_ms"], key=figures["transforms_ms"].__getitem__)
        setup = asdict(Setup(str(folder), faster, args.px, args.batch))

        middle = len(samples) // args.batch // 2
        first = {name: process.ask(setup=setup, start=0) for name, process in processes.items()}
        rounds = [
            {name: process.ask(epoch=1 + index) for name, process in processes.items()}
            for index in range(args.rounds + 1)
        ]
        resumes = [
            {name: process.ask(setup=setup, start=middle)["seconds"] for name, process in processes.items()}
            for _ in range(RESUMES)
        ]
    figures |= {
        "data": without_place(args.data),
        "images": len(samples),
        "px": args.px,
        "batch": args.batch,
        "rounds": args.rounds,
        "transforms": faster,
        "contenders": evaluate(rounds[1:]),  # the first warms up
    }
    for name, found in figures["contenders"].items():
        found |= {"first_batch_s": first[name]["seconds"], "imported_bytes": first[name]["imported_bytes"]}
        found |= {"resumed_s": median(r[name] for r in resumes)}
        found["version"] = importlib.metadata.version(PACKAGES[name])
    if args.processes:
        CONTENDERS["bare"].write(samples, class_names, folder)
        figures["processes"] = by_processes(args.processes, folder, setup, args.rounds)
    if "lift_ray" in names and args.memory:
        figures["memory"] = memory(samples, class_names, folder / "many", setup, args.memory)
    return figures


def by_processes(numbers: Sequence[int], folder: Path, setup: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Throughput by number of decoding processes, beside bare loops on as many cores; medians over interleaved rounds."""
    found = []
    for number in numbers:
        cores = number or os.cpu_count() or 1
        with ExitStack() as stack:
            stream = stack.enter_context(Process(STREAM, folder))
            loops = [stack.enter_context(Process("bare", folder, str(core))) for core in range(cores)]
            stream.ask(setup={**setup, "floats": False, "processes": number}, start=0)
            for loop in loops:
                loop.ask(setup={**setup, "floats": False}, start=0)
            epochs, bare = [], []
            for index in range(rounds + 1):
                epochs.append(stream.ask(epoch=1 + index))
                for loop in loops:
                    loop.send(epoch=1 + index)
                bare.append(sum(a["images"] / a["wall_s"] for a in [loop.answer() for loop in loops]))
        speeds = [epoch["images"] / epoch["wall_s"] for epoch in epochs]
        found.append(
            {
                "processes": number,
                "images_per_s": median(speeds[1:]),
                "bare_images_per_s": median(bare[1:]),
                "of_bare": median(ours / limit for ours, limit in zip(speeds[1:], bare[1:], strict=True)),
                "training_process_ms_per_1000": median(1e6 * e["processor_s"] / e["images"] for e in epochs[1:]),
            }
        )
    return found


def memory(
    samples: Sequence[Sample], class_names: Sequence[str], folder: Path, setup: dict[str, Any], marks: Sequence[int]
) -> dict[str, Any]:
    """The peak memory of this stream after so many images of one epoch, of a set in which the images repeat."""
    many = list(islice(cycle(samples), max(marks) + setup["batch"]))
    CONTENDERS["lift_ray"].write(many, class_names, folder)
    with Process("lift_ray", folder) as process:
        process.ask(setup={**setup, "folder": str(folder)}, start=0)
        found = process.ask(marks=sorted(marks))
    return {**found, "growth_bytes": [after - before for before, after in pairwise(found["peak_bytes"])]}


def evaluate(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds of each contender's epochs. Ratios are formed in each round, of wall and of processor time."""
    found: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        epochs = [r[name] for r in rounds]
        row = found[name] = {"images": epochs[-1]["images"], "peak_bytes": epochs[-1]["peak_bytes"]}
        for clock in ("wall", "processor"):
            row[f"{clock}_ms"] = median(1e3 * e[f"{clock}_s"] / e["images"] for e in epochs)
            row[f"images_per_{clock}_s"] = 1e3 / row[f"{clock}_ms"]
            for other in ("imagefolder", "bare"):
                if other in rounds[0]:
                    ratios = sorted(
                        (r[other][f"{clock}_s"] / r[other]["images"]) / (r[name][f"{clock}_s"] / r[name]["images"])
                        for r in rounds
                    )
                    row[f"{clock}_times_{other}"] = median(ratios)
                    row[f"{clock}_times_{other}_range"] = [ratios[0], ratios[-1]]
    return found


def show(figures: dict[str, Any]) -> None:
    """Prints the figures for reading."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    headings = ("images/s", "per CPU s", "x ImageFolder", "x bare", "peak MiB", "first s", "resumed s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)

    def ratio(row: dict[str, Any], other: str) -> str:
        if f"processor_times_{other}" not in row:
            return "-"
        least, most = row[f"processor_times_{other}_range"]
        return f"{row[f'processor_times_{other}']:.2f} ({least:.2f}-{most:.2f})"

    for name, row in figures["contenders"].items():
        table.add_row(
            name,
            f"{row['images_per_wall_s']:.0f}",
            f"{row['images_per_processor_s']:.0f}",
            ratio(row, "imagefolder"),
            ratio(row, "bare"),
            f"{row['peak_bytes'] / MIB:.0f} ({row['imported_bytes'] / MIB:.0f})",
            f"{row['first_batch_s']:.2f}",
            f"{row['resumed_s']:.2f}",
        )
    out = console()
    compared = (
        f"against torchvision on {name}: {d['off_by_1_frac']:.3%} of the values off by 1, {d['off_by_2_frac']:.4%} by 2, "
        f"{d['off_by_more_frac']:.4%} by more, {d['largest']} at most"
        for name, d in figures["pictures"].items()
    )
    out.print(
        f"{figures['data']}: {figures['images']} images at {figures['px']} px in batches of {figures['batch']}",
        f"medians of {figures['rounds']} rounds; ratios of processor time (lowest to highest); memory (of imports)",
        table,
        "torchvision's transforms, ms an image: "
        + ", ".join(f"{name} {ms:.2f}" for name, ms in figures["transforms_ms"].items()),
        *compared,
        sep="\n",
    )
    if "processes" in figures:
        by_number = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("decoded by", "images/s", "of bare", "training process, ms per 1,000"):
            by_number.add_column(heading, justify="left" if heading == "decoded by" else "right", no_wrap=True)
        for row in figures["processes"]:
            by_number.add_row(
                count(row["processes"], "process") if row["processes"] else "threads",
                f"{row['images_per_s']:.0f}",
                f"{row['of_bare']:.0%}",
                f"{row['training_process_ms_per_1000']:.0f}",
            )
        out.print(by_number)
    if "memory" in figures:
        of = figures["memory"]
        peaks = ", ".join(f"{p / MIB:.0f} after {n:,}" for n, p in zip(of["images"], of["peak_bytes"], strict=True))
        out.print(f"lift_ray's peak memory in MiB: {of['start_bytes'] / MIB:.0f} at the start, {peaks} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="embedded:caltech101-lt", help="a folder or URI of which the training split is read"
    )
    parser.add_argument("--images", type=int, default=2048, help="images of it, and in an epoch")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--px", type=int, default=96)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument(
        "--memory", nargs="*", type=int, default=MARKS, metavar="IMAGES", help="when to look at the peak"
    )
    parser.add_argument(
        "--processes",
        nargs="*",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="decoding processes to compare; 0 for threads",
    )
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/data.jsonl")
    args = parser.parse_args()
    if args.images < args.batch:
        parser.error(f"--images must fill a batch of {args.batch}, but got {args.images}")
    names = [name for name in args.only if find_spec(CONTENDERS[name].imports[0].split(".")[0])]
    left_out = [name for name in args.only if name not in names]
    for name in left_out:
        print(f"{name}: left out, {PACKAGES[name]} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        figures = {**measure(args, names, Path(folder)), "left_out": left_out}
    show(figures)
    if args.record:
        print(record("data", typed(), figures, seeds=[SEED]))


if __name__ == "__main__":
    main()
