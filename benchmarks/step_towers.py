"""One training step on a tower of each kind, against the same step with the origin's own blocks.

A step is as in step.py, with a serial adapter behind the MLP of every block. `ours` is methods.lift.Lift on the rebuilt tower. `plain`
is timm's own model, frozen, with the same adapter in a wrapper around each of its MLPs: all tokens in every block, attention as
timm calls it. Random weights, fp32. Nothing is timed before logits and gradients of the two agree. Towers by stages and in one piece
run the origin's blocks, so there is nothing to compare.

    python benchmarks/step_towers.py --record
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from statistics import median
from typing import Any

import rich.box
import rich.table
import timm
import torch
from record import record, typed
from step import NUM_CLASSES, SEED, TOLERANCE, Step, difference, seconds_of
from torch import Tensor, nn

from lift_ray.methods.lift import Lift
from lift_ray.model.heads import CosineHead, random_weights
from lift_ray.model.loading import rebuild
from lift_ray.terminal.tables import console

BOTTLENECK = 8
MODELS = {  # what is particular -> timm's name and options
    "class token (ViT)": ("vit_small_patch16_224", {}),
    "class token, registers (DINOv2)": ("vit_small_patch14_reg4_dinov2", {"img_size": 224}),
    "mean pooling (ViT)": ("vit_small_patch16_224", {"global_pool": "avg"}),
    "attention pooling (SigLIP)": ("vit_base_patch16_siglip_224", {"embed_dim": 384, "num_heads": 6}),
    "rotary, mean pooling (DINOv3)": ("vit_small_patch16_dinov3", {}),
    "rotary, attention pooling (PE)": ("vit_pe_core_small_patch16_384", {"img_size": 224}),
    "rotary, gated MLP (EVA-02)": ("eva02_small_patch14_336", {"img_size": 224, "global_pool": "token"}),
    "bias by distance, mean (BEiT)": (
        "beit_base_patch16_224",
        {"embed_dim": 384, "num_heads": 6},
    ),
}


class PlainMlp(nn.Module):
    """An MLP of timm with an adapter behind it."""

    def __init__(self, mlp: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.mlp, self.adapter = mlp, copy.deepcopy(adapter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out = self.mlp(x)
        return out + self.adapter.up(self.adapter.inner(out))  # type: ignore[operator]


class Plain(nn.Module):
    """A model of timm, frozen, with the adapters and the head of a Lift."""

    def __init__(self, origin: Any, model: Lift) -> None:
        super().__init__()
        self.origin = origin.requires_grad_(False)
        for block, adapter in zip(origin.blocks, model.tuner.per_block, strict=True):
            block.mlp = PlainMlp(block.mlp, adapter)
        self.head = copy.deepcopy(model.head)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K)."""
        return self.head(self.origin.forward_head(self.origin.forward_features(images), pre_logits=True))


def steps_of(name: str, options: dict[str, Any], batch: int) -> tuple[Step, Step]:
    """Ours and plain, on the same weights and images."""
    torch.manual_seed(SEED)
    origin = timm.create_model(name, **options).eval()
    with (
        torch.no_grad()
    ):  # layer scales are part of our weights, and an adapter sees the MLP's output before or behind them
        for key, parameter in origin.named_parameters():
            if "gamma" in key:
                parameter.fill_(1)
    tower = rebuild(origin, name)
    model = Lift(
        tower,
        {"adapter": {"blocks": list(range(tower.num_blocks)), "bottleneck": BOTTLENECK}},
        CosineHead(random_weights(NUM_CLASSES, tower.width)),
    )
    with torch.no_grad():
        for parameter in model.tuner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = torch.randn(batch, 3, tower.resolution_px, tower.resolution_px)
    labels, counts = torch.randint(NUM_CLASSES, (batch,)), torch.arange(NUM_CLASSES, 0, -1.0)
    return Step(model, images, labels, counts), Step(Plain(origin, model), images, labels, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each of the two in a round, at least")
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/step_towers.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("tower", "ms", "images/s", "times the origin's", "differ by"):
        table.add_column(heading, justify="left" if heading == "tower" else "right", no_wrap=True)
    rows: dict[str, Any] = {}
    for kind, (name, options) in MODELS.items():
        ours, plain = steps_of(name, options, args.batch)
        apart = difference(ours, plain)
        if not apart < TOLERANCE:
            sys.exit(f"{name}: the two differ by {apart:.1e} of a tensor's largest value; nothing was timed")
        rounds = []
        for index in range(args.rounds + 1):  # the first warms up
            seconds = [seconds_of(step, args.seconds, time.perf_counter) for step in (ours, plain)]
            rounds += [seconds] if index else []
        ratios = sorted(theirs / mine for mine, theirs in rounds)
        step_s = median(mine for mine, _ in rounds)
        rows[kind] = {"model": name, "step_s": step_s, "times_origin": ratios, "difference": apart}
        ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        table.add_row(kind, f"{1e3 * step_s:.0f}", f"{args.batch / step_s:.1f}", ratio, f"{apart:.1e}")
    console().print(table)
    if args.record:
        figures = {"threads": args.threads, "batch": args.batch, "rounds": args.rounds, "towers": rows}
        print(record("step_towers", typed(), figures, seeds=[SEED]))


if __name__ == "__main__":
    main()
