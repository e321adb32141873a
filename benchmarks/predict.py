"""python -m lift_ray.predict against its tower alone, on pictures that are decoded already, in the same process and rounds.

Pictures of the embedded Caltech-101, repeated, out of one Parquet file. Of each round: pictures/s of the tower alone, of a loop
that decodes a batch on all cores and then runs the tower on all cores, and of prediction, which does both at once. The first
tower is so small that decoding costs about as much; the second (ViT-S/14 at 70 px, random weights) is what decides the time.

    python benchmarks/predict.py --images 5000 --rounds 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from record import record
from safetensors.torch import save_file

from lift_ray.data.augment import evaluation_picture
from lift_ray.data.catalog import open_dataset
from lift_ray.data.pictures import find_pictures
from lift_ray.data.reader import RowReader
from lift_ray.data.stream import Batch
from lift_ray.distributed.finished import Finished
from lift_ray.distributed.prediction import BATCH, Job, Predictor
from lift_ray.distributed.ranks import Ranks
from lift_ray.distributed.run import Run
from lift_ray.distributed.warm import Warm
from lift_ray.settings.run import RunConfig

DATASET = "embedded:caltech101-lt"
SMALL = {"backbone": {"model": "embedded:lift-tiny"}}
LARGE = "vit_small_patch14_dinov2"


def checkpoint(config: dict[str, Any], folder: Path) -> Path:
    """A model as it is before training."""
    Run(RunConfig.model_validate(config), Warm(DATASET, Ranks.alone(num_cpus=os.cpu_count() or 1))).save(folder)
    return folder


def large(folder: Path) -> dict[str, Any]:
    """Settings of the large tower, its random weights in a file."""
    torch.manual_seed(0)
    save_file(timm.create_model(LARGE, pretrained=False).state_dict(), folder / "large.safetensors")
    backbone = {"model": f"timm:{LARGE}", "pretrained": str(folder / "large.safetensors"), "resolution_px": 70}
    return {"backbone": backbone, "head": {"init": "random"}}


def images_of(number: int) -> list[bytes]:
    """Encoded pictures."""
    split = open_dataset(DATASET).split("train")
    with RowReader(split) as reader:
        return reader.read(np.arange(number) % split.num_samples)


def measure(folder: Path, images: list[bytes], parquet: Path, rounds: int) -> dict[str, list[float]]:
    """Pictures/s of each way, for each round."""
    cores = os.cpu_count() or 1
    ranks = Ranks.alone(use_gpu=torch.cuda.is_available(), num_cpus=cores)
    finished, pool = Finished(folder, ranks), ThreadPoolExecutor(cores)
    job = Job(str(folder), find_pictures([str(parquet)]), temperature=1.0)
    predictor = Predictor(job, ranks)

    def decoded(part: list[bytes]) -> torch.Tensor:
        pictures = pool.map(lambda data: np.moveaxis(evaluation_picture(data, finished.size_px), -1, -3), part)
        return torch.from_numpy(np.stack(list(pictures)))

    parts = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
    ready = [decoded(part) for part in parts]

    def forward(pictures: torch.Tensor) -> None:
        for logits, _ in finished.logits([Batch(pictures, torch.empty(0))]):
            logits.cpu()

    def predict() -> None:
        found = sum(len(table) for _, table in predictor.parts(range(job.num_parts), 1.0))
        assert found == len(images)

    ways: dict[str, Callable[[], None]] = {
        "tower": lambda: [forward(pictures) for pictures in ready] and None,
        "decode_then_tower": lambda: [forward(decoded(part)) for part in parts] and None,
        "predict": predict,
    }
    forward(ready[0])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            rates[name].append(len(images) / (time.perf_counter() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    images, figures = images_of(args.images), {"images": args.images, "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pq.write_table(
            pa.table({"image": pa.array(images, pa.binary())}), folder / "images.parquet", row_group_size=256
        )
        for tower, config in (("lift-tiny", SMALL), (LARGE, large(folder))):
            rates = measure(checkpoint(config, folder / tower), images, folder / "images.parquet", args.rounds)
            middle = {name: statistics.median(values) for name, values in rates.items()}
            ratios = {f"to_{other}": statistics.median(p / o for p, o in zip(rates["predict"], rates[other], strict=True))
                      for other in ("tower", "decode_then_tower")}  # fmt: skip
            figures[tower] = {name: round(value, 3) for name, value in {**middle, **ratios}.items()}
            print(f"{tower}: " + ", ".join(f"{name} {value:,.2f}" for name, value in {**middle, **ratios}.items()))
    if not args.no_record:
        command = f"python benchmarks/predict.py --images {args.images} --rounds {args.rounds}"
        print(record("predict", command, figures, seeds=[0]))


if __name__ == "__main__":
    main()
