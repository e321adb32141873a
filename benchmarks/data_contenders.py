"""The loaders that benchmarks/data.py compares, and the process that each of them runs in.

A contender writes the images in its own format (`write`), opens them (`__init__`), and gives the float batches of an epoch
(`batches`), whole ones only. What it imports is imported inside, so that the memory of its process is its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from process_memory import memory
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SEED, FILES_PER_SHARD, SHUFFLE = 0, 1000, 1000

Sample = tuple[bytes, str, int]
Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setup:
    """What is loaded, and as what.

    Args:
        folder: where the images were written, a folder for each format.
        transforms: of the contenders that use torchvision's, a key of TRANSFORMS.
        px: side of the square images.
        batch: images in a batch.
        floats: float32 and normalised, or uint8 as this stream decodes them (its own contenders only).
        processes: of `stream`, that decode; 0 for a thread on each core.
    """

    folder: str
    transforms: str = "classic"
    px: int = 96
    batch: int = 128
    floats: bool = True
    processes: int = 0


class Contender(ABC):
    """A loader of training images; `imports` is what it needs, its library first."""

    imports: tuple[str, ...]

    @abstractmethod
    def __init__(self, setup: Setup) -> None: ...

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        """Write the images where `__init__` looks for them: as our Parquet, unless another contender has."""
        from lift_ray.data.convert.shards import publish, write_split

        at = folder / "parquet"
        if not at.exists():
            publish(str(at), class_names, {"train": write_split(str(at), "train", samples, class_names)})

    @abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        """Images (B, 3, px, px), float32 and normalised, and labels (B,), from batch `start` of the epoch on."""


def classic(px: int) -> Callable[[Any], Tensor]:
    """torchvision's first transforms: Pillow resizes."""
    from torchvision import transforms as t

    crop = t.RandomResizedCrop(px, (0.08, 1.0), (1.0, 1.0), t.InterpolationMode.BICUBIC)
    return cast(Callable[[Any], Tensor], t.Compose([crop, t.ToTensor(), t.Normalize(MEAN, STD)]))


def tensors(px: int) -> Callable[[Any], Tensor]:
    """torchvision's transforms v2 on tensors: torch resizes."""
    from torchvision.transforms import v2 as t

    crop = t.RandomResizedCrop(px, (0.08, 1.0), (1.0, 1.0), t.InterpolationMode.BICUBIC, antialias=True)
    steps = [t.PILToTensor(), crop, t.ToDtype(torch.float32, scale=True), t.Normalize(MEAN, STD)]
    return cast(Callable[[Any], Tensor], t.Compose(steps))


TRANSFORMS: dict[str, Callable[[int], Callable[[Any], Tensor]]] = {"classic": classic, "v2": tensors}


def mapped(dataset: Any, setup: Setup, epoch: int, start: int) -> Iterator[Any]:
    """Batches of a data set that gives a sample for a number, in a random order that can start anywhere."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
    sampler = order[start * setup.batch :]
    return iter(torch.utils.data.DataLoader(dataset, setup.batch, sampler=sampler, drop_last=True))


class ImageFolder(Contender):
    """torchvision's ImageFolder: a file for each image."""

    imports = ("torchvision.datasets", "torchvision.transforms.v2")

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        for label in range(len(class_names)):
            (folder / "files" / f"{label:05d}").mkdir(parents=True)
        for number, (data, _, label) in enumerate(samples):
            (folder / "files" / f"{label:05d}" / f"{number:07d}.jpg").write_bytes(data)

    def __init__(self, setup: Setup) -> None:
        from torchvision.datasets import ImageFolder as Files

        self.setup = setup
        self.dataset = Files(f"{setup.folder}/files", TRANSFORMS[setup.transforms](setup.px))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        return mapped(self.dataset, self.setup, epoch, start)


class HuggingFace(Contender):
    """Hugging Face `datasets` over the same Parquet as ours, which it turned into Arrow files before anything is timed."""

    imports = ("datasets", "PIL.Image", "torchvision.transforms.v2")

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        Contender.write(samples, class_names, folder)
        HuggingFace.load(folder)

    @staticmethod
    def load(folder: Path) -> Any:
        import datasets

        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report the load to a server
        datasets.disable_progress_bars()
        files = str(folder / "parquet" / "train-*.parquet")
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "arrow"))

    def __init__(self, setup: Setup) -> None:
        self.setup, self.dataset = setup, self.load(Path(setup.folder))
        transform = TRANSFORMS[setup.transforms](setup.px)

        def transformed(rows: dict[str, Any]) -> dict[str, Any]:
            return {"image": [transform(image.convert("RGB")) for image in rows["image"]], "label": rows["label"]}

        self.dataset.set_transform(transformed)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        return ((rows["image"], rows["label"]) for rows in mapped(self.dataset, self.setup, epoch, start))


class WebDataset(Contender):
    """WebDataset: tar files read in order, images shuffled in a buffer. It starts in the middle by skipping."""

    imports = ("webdataset", "PIL.Image", "torchvision.transforms.v2")

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        import webdataset

        (folder / "tar").mkdir()
        pattern = str(folder / "tar" / "%05d.tar")
        with webdataset.ShardWriter(pattern, maxcount=FILES_PER_SHARD, verbose=0) as writer:
            for number, (data, _, label) in enumerate(samples):
                writer.write({"__key__": f"{number:07d}", "jpg": data, "cls": label})

    def __init__(self, setup: Setup) -> None:
        self.setup, self.transform = setup, TRANSFORMS[setup.transforms](setup.px)
        self.shards = sorted(map(str, Path(setup.folder, "tar").glob("*.tar")))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        import webdataset

        read = webdataset.WebDataset(self.shards, shardshuffle=len(self.shards), seed=SEED + epoch)
        shuffled = read.shuffle(SHUFFLE, seed=SEED + epoch).slice(start * self.setup.batch, sys.maxsize)
        images = shuffled.decode("pil").to_tuple("jpg", "cls").map_tuple(self.transform)
        whole = images.batched(self.setup.batch, partial=False)
        return iter(torch.utils.data.DataLoader(whole, batch_size=None))


class Mosaic(Contender):
    """MosaicML streaming over MDS shards on this machine's disk."""

    imports = ("streaming", "PIL.Image", "torchvision.transforms.v2")

    @staticmethod
    def write(samples: Sequence[Sample], class_names: Sequence[str], folder: Path) -> None:
        import streaming

        with streaming.MDSWriter(out=str(folder / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
            for data, _, label in samples:
                writer.write({"image": data, "label": label})

    def __init__(self, setup: Setup) -> None:
        import streaming
        from PIL import Image

        transform = TRANSFORMS[setup.transforms](setup.px)

        class Images(streaming.StreamingDataset):  # type: ignore[misc]
            def __getitem__(self, at: int) -> Any:
                sample = super().__getitem__(at)
                return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

        self.setup = setup
        self.dataset = Images(local=f"{setup.folder}/mds", batch_size=setup.batch, shuffle=True, shuffle_seed=SEED)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        if start:
            done = {"epoch": epoch, "sample_in_epoch": start * self.setup.batch, "num_canonical_nodes": 1}
            self.dataset.load_state_dict({**done, "shuffle_seed": SEED, "initial_physical_nodes": 1})
        return iter(torch.utils.data.DataLoader(self.dataset, self.setup.batch, drop_last=True))


def normalised(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 to float32, as Workspace.device_batches does."""
    std = torch.tensor(STD).view(3, 1, 1)
    gain, offset = 1 / (255 * std), -torch.tensor(MEAN).view(3, 1, 1) / std
    return images.float().mul_(gain).add_(offset)


class LiftRay(Contender):
    """lift_ray's stream, with one thread."""

    imports: tuple[str, ...] = ("lift_ray.data.batches", "lift_ray.data.open", "lift_ray.data.reader")

    def __init__(self, setup: Setup) -> None:
        from lift_ray.data.batches import ONE_THREAD
        from lift_ray.data.open import open_dataset
        from lift_ray.data.order import Sampling, memory_bytes
        from lift_ray.data.reader import RowReader

        self.setup, self.decoders = setup, ONE_THREAD
        self.sampling = Sampling(SEED, setup.batch)
        self.split = open_dataset(f"{setup.folder}/parquet").split("train")
        self.reader = RowReader(self.split, memory_bytes(self.split))

    def decoded(self, epoch: int, start: int) -> Iterator[Any]:
        """The uint8 batches of the stream."""
        from lift_ray.data.augment import SMALLEST_AREA, Augmentation, Preprocessing, square_crop
        from lift_ray.data.batches import training_batches

        augmentation = Augmentation(Preprocessing(self.setup.px), partial(square_crop, smallest=SMALLEST_AREA))
        return training_batches(
            self.reader, self.split, self.sampling, augmentation, epoch=epoch, start_step=start, decoders=self.decoders
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        for batch in self.decoded(epoch, start):
            yield normalised(batch.images), batch.labels


class Stream(LiftRay):
    """lift_ray's stream on all cores, until a uint8 batch can be read in this process."""

    def __init__(self, setup: Setup) -> None:
        from lift_ray.data.batches import Decoders
        from lift_ray.data.decoder_pool import DecoderPool

        super().__init__(setup)
        self.decoders = Decoders(os.cpu_count() or 1, DecoderPool(setup.processes) if setup.processes else None)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        for batch in self.decoded(epoch, start):
            yield batch.images, batch.labels


class Bare(Contender):
    """The limit: a loop that decodes, crops and resizes bytes in memory as lift_ray does, and nothing else."""

    imports = ("lift_ray.data.augment", "lift_ray.data.open", "lift_ray.data.reader")

    def __init__(self, setup: Setup) -> None:
        from lift_ray.data.open import open_dataset
        from lift_ray.data.reader import RowReader

        self.setup = setup
        split = open_dataset(f"{setup.folder}/parquet").split("train")
        self.labels = torch.from_numpy(split.labels)
        with RowReader(split) as reader:
            self.encoded = reader.read(np.arange(split.num_samples))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Labelled]:
        from lift_ray.data.augment import SMALLEST_AREA, Preprocessing, square_crop, training_image

        px, size = self.setup.px, self.setup.batch
        draws = np.random.default_rng([SEED, epoch]).random((len(self.encoded), 3))
        for first in range(start * size, len(self.encoded) - size + 1, size):
            images = np.empty((size, 3, px, px), np.uint8)
            for place in range(size):
                crop = partial(square_crop, smallest=SMALLEST_AREA, draw=draws[first + place])
                images[place] = training_image(self.encoded[first + place], Preprocessing(px), crop).transpose(2, 0, 1)
            made = torch.from_numpy(images)
            yield normalised(made) if self.setup.floats else made, self.labels[first : first + size]


CONTENDERS: dict[str, type[Contender]] = {
    "imagefolder": ImageFolder,
    "datasets": HuggingFace,
    "webdataset": WebDataset,
    "mosaicml": Mosaic,
    "lift_ray": LiftRay,
    "bare": Bare,
}


STREAM = "stream"
ALL: dict[str, type[Contender]] = {**CONTENDERS, STREAM: Stream}


def first_batch(name: str, setup: Setup, start: int) -> tuple[Contender, float]:
    """A new contender, and the seconds until it has given batch `start` of the first epoch."""
    began = time.perf_counter()
    contender = ALL[name](setup)
    batches = contender.batches(0, start)
    next(batches)
    return contender, time.perf_counter() - began


def whole_epoch(contender: Contender, epoch: int) -> dict[str, Any]:
    """Wall and processor seconds of an epoch, of how many images, and the process's peak memory since it began."""
    wall, processor, images = time.perf_counter(), time.process_time(), 0
    for batch, _ in contender.batches(epoch):
        images += len(batch)
    spent = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
    return {**spent, "images": images, "peak_bytes": peak_bytes()}


def growth(contender: Contender, marks: Sequence[int]) -> dict[str, Any]:
    """The process's peak memory before the first batch of an epoch, and when so many images have come."""
    start_bytes, images = peak_bytes(), 0
    peaks: list[int] = []
    for batch, _ in contender.batches(0):
        images += len(batch)
        while len(peaks) < len(marks) and images >= marks[len(peaks)]:
            peaks.append(peak_bytes())
    return {"start_bytes": start_bytes, "images": list(marks[: len(peaks)]), "peak_bytes": peaks}


def peak_bytes() -> int:
    """The largest memory that this process had: of its own program, which getrusage does not tell after an exec."""
    if Path("/proc/self/status").exists():
        return memory("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(name: str, core: int, answers: Any) -> None:
    """Answer requests, a line of JSON each, from standard input; on one core (STREAM on all), with one thread of torch.

    {setup, start} makes a contender and times its first batch, {epoch} and {marks} are `whole_epoch` and `growth` of the first
    one made. What the contender imports is there the first request is read.
    """
    if name != STREAM and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    torch.set_num_threads(1)
    for module in ALL[name].imports:
        import_module(module)
    imported_bytes = peak_bytes()
    opened: Contender | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "setup" in request:
            contender, seconds = first_batch(name, Setup(**request["setup"]), request["start"])
            opened, answer = opened or contender, {"seconds": seconds, "imported_bytes": imported_bytes}
        else:
            assert opened is not None
            answer = growth(opened, request["marks"]) if "marks" in request else whole_epoch(opened, request["epoch"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as out, contextlib.redirect_stdout(sys.stderr):
        serve(sys.argv[1], int(sys.argv[2]), out)
