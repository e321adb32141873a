"""How good lift-tiny is on the embedded Caltech-101, against the same tower untrained: the figures of its model card.

Zero-shot: classifier from the class names ("a photo of a {}."). Linear probe: multinomial logistic regression on
standardised features of all 6,742 training pictures, its L2 weight chosen on the validation split. Test split: 1,000
pictures, 10 of each of 100 classes, so chance is 1%.

    python benchmarks/lift_tiny.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.resources import files

import open_clip
import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from lift_ray.data.catalog import open_dataset
from lift_ray.data.shards import RowReader
from lift_ray.data.stream import evaluation_batches
from lift_ray.model.backbone import Backbone, load_backbone, rebuild

L2 = [1e-4, 1e-3, 1e-2, 1e-1]


@torch.inference_mode()
def features(backbone: Backbone, split_name: str) -> tuple[Tensor, Tensor]:
    """(N, D) features and (N,) labels of a split of the embedded data."""
    split = open_dataset("embedded:caltech101").split(split_name)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    parts = [
        (backbone.tower((batch.images / 255 - mean) / std), batch.labels)
        for batch in evaluation_batches(RowReader(split), split, size_px=backbone.tower.resolution_px)
    ]
    return torch.cat([f for f, _ in parts]), torch.cat([y for _, y in parts])


def linear_probe(backbone: Backbone) -> float:
    """Test accuracy of a linear probe whose L2 weight is best on the validation split."""
    sets = {name: features(backbone, name) for name in ("train", "validation", "test")}
    centre, spread = sets["train"][0].mean(0), sets["train"][0].std(0) + 1e-6
    x = {name: (f - centre) / spread for name, (f, _) in sets.items()}
    best = (-1.0, 0.0)
    for l2 in L2:
        layer = torch.nn.Linear(backbone.tower.width, 100)
        torch.nn.init.zeros_(layer.weight)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(layer: torch.nn.Linear = layer, l2: float = l2, opt: torch.optim.LBFGS = optimizer) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(layer(x["train"]), sets["train"][1]) + l2 * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            valid, test = ((layer(x[n]).argmax(1) == sets[n][1]).float().mean().item() for n in ("validation", "test"))
        best = max(best, (valid, test))
    return best[1]


def zero_shot(backbone: Backbone) -> float:
    """Test accuracy of the classifier made from the class names."""
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
    backbone = load_backbone(args.model, None)
    figures = {"zero_shot": zero_shot(backbone), "chance": 0.01, "linear_probe": linear_probe(backbone)}
    seeds = [0, 1, 2]
    figures["linear_probe_untrained"] = sum(linear_probe(untrained(backbone, seed)) for seed in seeds) / len(seeds)
    figures["zero_shot_over_chance"] = figures["zero_shot"] / figures["chance"]
    figures["linear_probe_over_untrained"] = figures["linear_probe"] / figures["linear_probe_untrained"]
    for name, value in figures.items():
        print(f"{name:30s} {value:.4f}")
    if not args.no_record:
        print(record("lift_tiny", "python benchmarks/lift_tiny.py", figures, seeds=seeds))


if __name__ == "__main__":
    main()
