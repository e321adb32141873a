"""How good lift-tiny is on the embedded Caltech-101, against the same tower untrained: the figures of its model card.

Zero-shot: classifier from the class names ("a photo of a {}."). Linear probe: multinomial logistic regression on
standardised features, its L2 weight chosen on the validation split, trained on 1, 4 or 12 images of each class or on all
6,742. Test split: 1,000 images, 10 of each of 100 classes, so chance is 1%. Means over three seeds of the untrained
weights and of the choice of images.

    python benchmarks/lift_tiny.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.resources import files
from statistics import fmean

import open_clip
import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from lift_ray.data.batches import evaluation_batches
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.model.backbone import Backbone, load_backbone, rebuild

L2 = [1e-4, 1e-3, 1e-2, 1e-1]


@torch.no_grad()
def features(backbone: Backbone, split_name: str) -> tuple[Tensor, Tensor]:
    """(N, D) features and (N,) labels of a split of the embedded data."""
    split = open_dataset("embedded:caltech101").split(split_name)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    parts = [
        (backbone.tower((batch.images / 255 - mean) / std), batch.labels)
        for batch in evaluation_batches(RowReader(split), split, size_px=backbone.tower.resolution_px)
    ]
    return torch.cat([f for f, _ in parts]), torch.cat([y for _, y in parts])


Sets = dict[str, tuple[Tensor, Tensor]]


def sets_of(backbone: Backbone) -> Sets:
    """Features and labels of the three splits, standardised by the training split."""
    sets = {name: features(backbone, name) for name in ("train", "validation", "test")}
    centre, spread = sets["train"][0].mean(0), sets["train"][0].std(0) + 1e-6
    return {name: ((f - centre) / spread, y) for name, (f, y) in sets.items()}


def linear_probe(sets: Sets, shots: int | None, seed: int) -> float:
    """Test accuracy of a linear probe whose L2 weight is best on the validation split.

    Args:
        shots: training images of each class, drawn with the seed; all when not given.
    """
    x, y = sets["train"]
    if shots:
        random = torch.Generator().manual_seed(seed)
        rows = [torch.nonzero(y == k).flatten() for k in range(100)]
        pick = torch.cat([r[torch.randperm(len(r), generator=random)[:shots]] for r in rows])
        x, y = x[pick], y[pick]
    best = (-1.0, 0.0)
    for l2 in L2:
        layer = torch.nn.Linear(x.shape[1], 100)
        torch.nn.init.zeros_(layer.weight)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure(layer: torch.nn.Linear = layer, l2: float = l2, opt: torch.optim.LBFGS = optimizer) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(layer(x), y) + l2 * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            valid, test = (
                layer(sets[n][0]).argmax(1).eq(sets[n][1]).float().mean().item() for n in ("validation", "test")
            )
        best = max(best, (valid, test))
    return best[1]


def zero_shot(backbone: Backbone) -> float:
    """Test accuracy of CLIP's classifier made from the class names."""
    head = backbone.zero_shot_head(open_dataset("embedded:caltech101").class_names, "a photo of a {}.")
    f, y = features(backbone, "test")
    return head(f).argmax(1).eq(y).float().mean().item()


def untrained(backbone: Backbone, seed: int) -> Backbone:
    """The same architecture with open_clip's random initial weights."""
    torch.manual_seed(seed)
    folder = files("lift_ray") / "assets" / "lift-tiny"
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    clip = open_clip.CLIP(**config)
    return dataclasses.replace(backbone, tower=rebuild(clip.eval().visual), text=None, projection=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:lift-tiny")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    torch.manual_seed(0)
    backbone, seeds = load_backbone(args.model, None), [0, 1, 2]
    figures = {"chance": 0.01, "zero_shot": zero_shot(backbone)}
    figures["zero_shot_over_chance"] = figures["zero_shot"] / figures["chance"]
    trained, random = sets_of(backbone), [sets_of(untrained(backbone, seed)) for seed in seeds]
    for shots in (1, 4, 12, None):
        name = f"linear_probe_{shots or 'all'}"
        figures[name] = fmean(linear_probe(trained, shots, seed) for seed in (seeds if shots else seeds[:1]))
        figures[f"{name}_untrained"] = fmean(
            linear_probe(s, shots, seed) for s, seed in zip(random, seeds, strict=True)
        )
        figures[f"{name}_ratio"] = figures[name] / figures[f"{name}_untrained"]
    for name, value in figures.items():
        print(f"{name:30s} {value:.4f}")
    if not args.no_record:
        print(record("lift_tiny", "python benchmarks/lift_tiny.py", figures, seeds=seeds))


if __name__ == "__main__":
    main()
