"""How good lift-small is: the figures of its model card, on the embedded Caltech-101 and on CIFAR-10.

Zero-shot: classifier from the class names ("a photo of a {}."). Linear probe: multinomial logistic regression on standardized
features, its L2 weight chosen on the validation split, trained on 1 or 4 images of each class (means over three draws) or on all, but
at most 1,000 of a class. The training split of the embedded data has a long tail; the test splits are balanced. CIFAR-10 has no
validation split, so 50 further training images of each class are used.

    python benchmarks/lift_small.py --cifar ../shared/data/cifar10 --record
    python benchmarks/lift_small.py --cifar ../shared/data/cifar10 --model local-dir:FP32 --record    # `pretrain_small.py --fp32 FP32`

Time and memory of loading are what it adds to a new process that has imported torch and open_clip.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from record import record, typed
from torch import Tensor

from lift_ray.data.augment import Preprocessing, View
from lift_ray.data.batches import evaluation_batches
from lift_ray.data.dataset import Split
from lift_ray.data.longtail import keep_first
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.evaluation.cpu_parallel import batch_size, on_cores
from lift_ray.model.backbone import Backbone, load_backbone

EMBEDDED = "embedded:caltech101-lt"
MODEL = "embedded:lift-small"
L2 = [1e-4, 1e-3, 1e-2, 1e-1]
SEEDS = [0, 1, 2]
MOST_IMAGES, VALIDATION_IMAGES = 1000, 50  # of each class; the second where there is no validation split

Sets = dict[str, tuple[Tensor, Tensor]]


def splits_of(uri: str) -> dict[str, Split]:
    """Return the splits of a dataset, with a validation split in any case."""
    dataset = open_dataset(uri)
    splits = dict(dataset.splits)
    if "validation" not in splits:
        train, used = splits["train"], np.full(dataset.num_classes, MOST_IMAGES)
        first, further = keep_first(train.labels, used), keep_first(train.labels, used + VALIDATION_IMAGES)
        splits |= {"train": train.take(first), "validation": train.take(np.setdiff1d(further, first))}
    return splits


def features(backbone: Backbone, split: Split) -> tuple[Tensor, Tensor]:
    """Return features (N, D) and labels (N,) of a split."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))

    @torch.inference_mode()  # a mode of the thread, and each core has its own
    def compute(batch: Any) -> tuple[Tensor, Tensor]:
        return backbone.tower((batch.images / 255 - mean) / std), batch.labels

    size = batch_size(torch.device("cpu"), backbone.tower)
    batches = evaluation_batches(
        RowReader(split), split, View(Preprocessing(backbone.tower.resolution_px)), batch_size=size
    )
    parts = list(on_cores(torch.device("cpu"), compute, batches))
    return torch.cat([f for f, _ in parts]), torch.cat([y for _, y in parts])


def standardized(sets: Sets) -> Sets:
    """Return the sets with features standardized by the training split."""
    center, spread = sets["train"][0].mean(0), sets["train"][0].std(0) + 1e-6
    return {name: ((f - center) / spread, y) for name, (f, y) in sets.items()}


def linear_probe(sets: Sets, shots: int | None, seed: int) -> float:
    """Return the test accuracy of a linear probe whose L2 weight is best on the validation split.

    Args:
        shots: training images of each class, drawn with the seed; None for all.
    """
    x, y = sets["train"]
    num_classes = int(y.max()) + 1
    if shots:
        random = torch.Generator().manual_seed(seed)
        rows = [torch.nonzero(y == k).flatten() for k in range(num_classes)]
        pick = torch.cat([r[torch.randperm(len(r), generator=random)[:shots]] for r in rows])
        x, y = x[pick], y[pick]
    best = (-1.0, 0.0)
    for l2 in L2:
        layer = torch.nn.Linear(x.shape[1], num_classes)
        torch.nn.init.zeros_(layer.weight)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure(layer: torch.nn.Linear = layer, l2: float = l2, opt: torch.optim.LBFGS = optimizer) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(layer(x), y) + l2 * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            valid, test = (top_k(layer(sets[n][0]), sets[n][1], 1) for n in ("validation", "test"))
        best = max(best, (valid, test))
    return best[1]


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return the fraction of images whose class is among the k most likely."""
    return logits.topk(k, dim=1).indices.eq(labels[:, None]).any(1).float().mean().item()


def figures_on(backbone: Backbone, uri: str) -> dict[str, float]:
    """Return zero-shot accuracy and that of linear probes on a dataset."""
    class_names = open_dataset(uri).class_names
    sets = {name: features(backbone, split) for name, split in splits_of(uri).items()}
    head = backbone.zero_shot_head(class_names, "a photo of a {}.")
    with torch.no_grad():
        logits = head(sets["test"][0])
    out = {"zero_shot": top_k(logits, sets["test"][1], 1), "zero_shot_top5": top_k(logits, sets["test"][1], 5)}
    scaled = standardized(sets)
    for shots in (1, 4, None):
        draws = SEEDS if shots else SEEDS[:1]
        out[f"probe_{shots or 'all'}"] = statistics.fmean(linear_probe(scaled, shots, seed) for seed in draws)
    return out


def loading(model: str) -> dict[str, float]:
    """Return seconds and MiB that loading the model adds to a process with torch and open_clip; medians of five processes."""
    runs = [
        subprocess.run([sys.executable, __file__, "--only-load", model], capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    pairs = [tuple(map(float, run.stdout.split())) for run in runs]
    return {"load_s": statistics.median(p[0] for p in pairs), "load_mib": statistics.median(p[1] for p in pairs)}


def only_load(model: str) -> None:
    """Print seconds and MiB of loading a model in this process."""
    import open_clip

    assert open_clip
    process, began = psutil.Process(), time.monotonic()
    before = process.memory_info().rss
    backbone = load_backbone(model, None)
    print(time.monotonic() - began, (process.memory_info().rss - before) / 2**20)
    del backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--cifar", help="folder of CIFAR-10 as Parquet; left out if not given")
    parser.add_argument("--only-load", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help="append the result to benchmarks/results")
    args = parser.parse_args()
    if args.only_load:
        return only_load(args.only_load)
    backbone = load_backbone(args.model, None)
    found: dict[str, Any] = {"model": args.model.partition(":")[0] + ":" + Path(args.model).name.rpartition(":")[2]}
    if args.model == MODEL:
        import lift_ray

        folder = Path(lift_ray.__file__).parent / "assets"
        for name in ("lift-small", "caltech101"):
            found[f"{name}_bytes"] = sum(file.stat().st_size for file in (folder / name).iterdir())
    found |= loading(args.model)
    for name, uri in (("caltech101-lt", EMBEDDED), ("cifar10", args.cifar)):
        if uri:
            found |= {f"{name}/{key}": value for key, value in figures_on(backbone, uri).items()}
    for name, value in found.items():
        print(f"{name:32s} {value if isinstance(value, str) else round(value, 4)}", flush=True)
    if args.record:
        print(record("lift_small", typed(), found, seeds=SEEDS))
    return None


if __name__ == "__main__":
    main()
