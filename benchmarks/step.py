"""One training step of LIFT with AdaptFormer in every block, against the same step written the straightforward way.

A step is the forward pass, the logit-adjusted loss, the backward pass and a fused SGD update, on a fixed batch in memory,
fp32. `ours` is methods.lift.Lift. `plain` is open_clip's own vision transformer, frozen, with an AdaptFormer in a wrapper
around each of its blocks: all tokens in every block, nn.MultiheadAttention as open_clip calls it. Both hold the same
values; nothing is timed before logits and gradients of the two agree. Large matmuls measure what the machine can do at
that moment: all of them take turns, round by round, so that a drift of the machine's speed meets all alike.

GFLOP/s counts for all variants the least that a step needs (`step_flops`), so work that could be left out lowers it.

    python benchmarks/step.py                       # both models, 10 rounds
    python benchmarks/step.py --models lift-tiny --compile --checkpointing
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import open_clip
import rich.table
import torch
import torch.nn.functional as F
from record import record, typed
from torch import Tensor, nn

from lift_ray.methods.lift import Lift
from lift_ray.model.heads import CosineHead, random_weights
from lift_ray.model.linear import prepack
from lift_ray.model.loading import rebuild
from lift_ray.model.tower import Tower
from lift_ray.model.tuners.adaptformer.module import Adaptformer
from lift_ray.model.tuners.config import derived_width
from lift_ray.registry import LOSSES
from lift_ray.settings.run import OptimConfig
from lift_ray.terminal.tables import console
from lift_ray.training.step import make_optimizer

NUM_CLASSES, TOLERANCE, SEED = 100, 1e-4, 0
SQUARES = (1024, 2048)


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Args:
        source: what open_clip.create_model loads, or open_clip's settings of an image tower; random weights where it would
            need a download.
    """

    source: str | dict[str, int]
    batch: int

    def visual(self) -> nn.Module:
        """Its image tower."""
        if isinstance(self.source, str):
            return open_clip.create_model(self.source).visual
        return open_clip.CLIP(self.source["width"], self.source, {"width": 64, "heads": 1, "layers": 1}).visual


LIFT_SMALL = {"image_size": 70, "patch_size": 14, "width": 384, "layers": 12}
CASES = {
    "vit-b-32": Case("ViT-B-32", 32),
    "lift-tiny": Case("local-dir:tests/lift-tiny", 128),
    "lift-small": Case(LIFT_SMALL, 32),
    "vit-b-16": Case("ViT-B-16", 8),
    "vit-l-14": Case("ViT-L-14", 4),
}


class PlainBlock(nn.Module):
    """open_clip's block with an AdaptFormer beside its MLP: out + s * Up(ReLU(Down(LN(a)))) (arXiv 2205.13535)."""

    def __init__(self, block: nn.Module, tuner: Adaptformer) -> None:
        super().__init__()
        self.block, self.tuner = block, copy.deepcopy(tuner)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        block, tuner = self.block, self.tuner
        a = x + block.attention(block.ln_1(x), attn_mask=attn_mask)
        beside = tuner.up(F.relu(tuner.down(tuner.norm(a))))
        return a + block.mlp(block.ln_2(a)) + tuner.scale * beside


class Plain(nn.Module):
    """open_clip's VisionTransformer, frozen, with the AdaptFormers and the head of a Lift."""

    def __init__(self, visual: nn.Module, model: Lift) -> None:
        super().__init__()
        self.visual = copy.deepcopy(visual).requires_grad_(False)
        self.visual.proj = None
        blocks = self.visual.transformer.resblocks
        for index, tuner in enumerate(model.tuner.per_block):
            assert isinstance(tuner, Adaptformer)
            blocks[index] = PlainBlock(blocks[index], tuner)
        self.head = copy.deepcopy(model.head)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K)."""
        return self.head(self.visual(images))


def new_lift(tower: Tower, bottleneck: int, num_classes: int) -> Lift:
    """AdaptFormer in every block, away from its start at zero, where nothing of it would show."""
    head = CosineHead(random_weights(num_classes, tower.width))
    model = Lift(tower, {"adaptformer": {"blocks": list(range(tower.num_blocks)), "bottleneck": bottleneck}}, head)
    with torch.no_grad():
        for parameter in model.tuner.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def step_flops(tower: Tower, bottleneck: int, num_classes: int, batch: int) -> int:
    """The least floating point operations of a training step with AdaptFormer in every block and a linear head.

    Counted are matrix products and the patch convolution, a product of (m, k) and (k, n) as 2 m k n:
    * forward: patches; in every block queries, keys, values, scores, their sum of values, output projection, MLP and
      AdaptFormer; the classifier. In the last block for the class token only, with its query multiplied into the keys'
      weights and its sum of normed tokens by the values' weights, so that no other token has keys or values;
    * backward through frozen linears: the gradient of their input, once as much as forward, but none in the first block,
      below which nothing is trained, and none for the weights;
    * backward through attention: four products (queries, keys, values and the scores' softmax). Kernels in the way of
      flash attention, torch's for CPUs too, compute the scores again, a fifth; that is not counted;
    * backward through AdaptFormer and classifier: gradients of input and weights, twice as much as forward. In the first
      block as well, because the norm before Down is trained.
    Norms, activations, softmax, additions, loss and SGD are not counted.
    """
    tokens, width, rank = tower.num_patches(tower.resolution_px) + 1, tower.width, bottleneck
    flops = 2 * batch * (tokens - 1) * 3 * tower.patch_px**2 * width
    for index in range(tower.num_blocks):
        outer = 1 if index == tower.num_blocks - 1 else tokens  # tokens that leave the block
        linears = 2 * batch * outer * (4 * width * width + 2 * width * tower.shape.hidden)
        heads = tower.blocks[0].attn.num_heads if outer == 1 else 1  # each sees normed tokens of full width
        attention = 2 * batch * 2 * outer * tokens * width * heads
        tuner = 2 * batch * outer * 2 * width * rank
        flops += linears + attention + 3 * tuner + (linears + 2 * attention if index else 0)
    return flops + 3 * 2 * batch * width * num_classes


def recomputed_flops(tower: Tower, batch: int) -> int:
    """What torch's attention computes again in the backward pass: the scores of all blocks but the first and the last."""
    tokens = tower.num_patches(tower.resolution_px) + 1
    return 2 * batch * tokens * tower.width * tokens * (tower.num_blocks - 2)


class Step:
    """A training step of a model on a fixed batch; calling it takes one."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, counts: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.loss = LOSSES.build("logit_adjusted", counts, tau=1.0)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.trained, OptimConfig())

    def backward(self) -> Tensor:
        """Gradients in the parameters; returns the logits."""
        self.optimizer.zero_grad()
        logits = self.model(self.images)
        self.loss(logits, self.labels).backward()
        return logits.detach()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()


def difference(one: Step, other: Step) -> float:
    """The largest difference of two variants' logits and gradients, each relative to the largest value of its tensor."""
    pairs = [(one.backward(), other.backward())]
    theirs = list(other.trained.values())
    assert len(theirs) == len(one.trained)
    for (name, mine), yours in zip(one.trained.items(), theirs, strict=True):
        assert mine.shape == yours.shape, name
        assert mine.grad is not None, name
        assert yours.grad is not None, name
        pairs.append((mine.grad, yours.grad))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def matmuls(tower: Tower, batch: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """(call, flops) of matmuls that show what the machine can do: large squares, and the shapes of the model's own.

    Each by torch.mm (MKL on x86), and by oneDNN where torch has it, which is faster on AMD.
    """
    rows, width, hidden = batch * (tower.num_patches(tower.resolution_px) + 1), tower.width, tower.shape.hidden
    own = [(rows, width, 3 * width), (rows, width, hidden), (rows, hidden, width)]
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    for m, k, n in [(s, s, s) for s in SQUARES] + own:
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        shape, flops = f"{m} x {k} x {n}", 2 * m * k * n
        calls[f"mm {shape}"] = (lambda a=a, b=b, out=out: torch.mm(a, b, out=out)), flops
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            onednn = torch.ops.mkldnn._linear_pointwise
            calls[f"oneDNN {shape}"] = (lambda a=a, b=b, f=onednn: f(a, b.t(), None, "none", [], "")), flops
    return calls


KINDS = {  # of torch's operations, by parts of their names
    "matmuls": ("linear_pointwise", "::mm", "::addmm", "::bmm", "convolution"),
    "attention": ("scaled_dot_product",),
    "activations": ("gelu", "relu"),
    "norms": ("layer_norm",),
}


def operations(step: Step) -> dict[str, float]:
    """Share of a step's processor time by kind of operation; `rest` is additions, copies, loss, optimizer and Python between them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    events = [(event.key, event.self_cpu_time_total) for event in found.key_averages()]
    total = sum(micros for _, micros in events)
    shares = {
        kind: sum(micros for key, micros in events if any(part in key for part in parts)) / total
        for kind, parts in KINDS.items()
    }
    return shares | {"rest": 1 - sum(shares.values())}


def seconds_of(call: Callable[[], Any], at_least_s: float, clock: Callable[[], float]) -> float:
    """The median time of a call, over calls that together take `at_least_s`."""
    times: list[float] = []
    while sum(times) < at_least_s:
        began = clock()
        call()
        times.append(clock() - began)
    return median(times)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one model; exits when `ours` and `plain` do not compute the same."""
    case = CASES[name]
    torch.manual_seed(SEED)
    logging.disable(logging.WARNING)  # open_clip's, of random weights
    visual = case.visual()
    tower, batch = rebuild(visual), args.batch or case.batch
    bottleneck = derived_width(NUM_CLASSES, 2 * tower.num_blocks)
    model = new_lift(tower, bottleneck, NUM_CLASSES)
    images = torch.randn(batch, 3, tower.resolution_px, tower.resolution_px)
    labels = torch.randint(NUM_CLASSES, (batch,))
    counts = 500 * 0.01 ** (torch.arange(NUM_CLASSES) / (NUM_CLASSES - 1))

    def step(of: nn.Module) -> Step:
        return Step(of, images, labels, counts)

    steps = {"ours": step(model), "plain": step(Plain(visual, model).train())}
    if args.checkpointing:
        again = copy.deepcopy(model)
        again.tower.checkpointing = True
        steps["checkpointed"] = step(again)
    compile_s = None
    if args.prepacked:
        packed = copy.deepcopy(model)
        prepack(packed.tower)
        steps["prepacked"] = step(packed)
    if args.compile:
        steps["compiled"] = step(torch.compile(copy.deepcopy(model)))
        began = time.perf_counter()
        steps["compiled"].backward()
        compile_s = time.perf_counter() - began
    differences = {other: difference(steps["ours"], steps[other]) for other in list(steps)[1:]}
    for other, value in differences.items():
        if not value < TOLERANCE:
            sys.exit(f"{name}: {other} differs from ours by {value:.1e} of a tensor's largest value; nothing was timed")

    peaks = matmuls(tower, batch)
    calls: dict[str, Callable[[], Any]] = {**steps, **{shape: call for shape, (call, _) in peaks.items()}}
    rounds: list[dict[str, float]] = []
    clock = time.process_time if args.processor_time else time.perf_counter
    for index in range(args.rounds + 1):  # the first warms up
        seconds = {
            key: seconds_of(call, args.seconds if key in steps else args.seconds / 8, clock)
            for key, call in calls.items()
        }
        rounds += [seconds] if index else []
    figures = evaluate(rounds, list(steps), step_flops(tower, bottleneck, NUM_CLASSES, batch), batch, peaks)
    figures |= {"differences": differences, "batch": batch, "bottleneck": bottleneck}
    figures["operations"] = operations(steps["ours"])
    if compile_s is not None:
        figures["compile_s"] = compile_s - figures["variants"]["compiled"]["step_s"]
    return figures


def evaluate(
    rounds: Sequence[dict[str, float]],
    variants: Sequence[str],
    flops: int,
    batch: int,
    peaks: dict[str, tuple[Any, int]],
) -> dict[str, Any]:
    """Medians over the rounds. Shares and ratios are formed in each round, where the machine was equally fast for both.

    The peak is the matmul whose median is highest, once of all and once of torch.mm alone.
    """
    matmul = {shape: median(n / r[shape] for r in rounds) / 1e9 for shape, (_, n) in peaks.items()}
    best = {"peak": max(matmul, key=matmul.__getitem__)}
    best["mm_peak"] = max((key for key in matmul if key.startswith("mm ")), key=matmul.__getitem__)
    figures: dict[str, Any] = {"step_gflop": flops / 1e9, **best, "matmul_gflop_per_s": matmul, "variants": {}}
    for name in variants:
        step_s = median(r[name] for r in rounds)
        ratios = sorted(r["plain"] / r[name] for r in rounds)
        shares = {
            f"share_of_{which}": sorted(flops / r[name] / (peaks[key][1] / r[key]) for r in rounds)
            for which, key in best.items()
        }
        figures["variants"][name] = {
            "step_s": step_s,
            "images_per_s": batch / step_s,
            "gflop_per_s": flops / step_s / 1e9,
            **{which: median(values) for which, values in shares.items()},
            **{f"{which}_range": [values[0], values[-1]] for which, values in shares.items()},
            "times_plain": median(ratios),
            "times_plain_range": [ratios[0], ratios[-1]],
        }
    return figures


def show(name: str, figures: dict[str, Any], rounds: int) -> None:
    """Prints the figures for reading."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("ms a step", "images/s", "GFLOP/s", "of the peak", "of mm's peak", "times plain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for variant, v in figures["variants"].items():
        cells = [
            f"{v[key]:.1%} ({100 * v[key + '_range'][0]:.0f}-{v[key + '_range'][1]:.0%})"
            for key in ("share_of_peak", "share_of_mm_peak")
        ]
        least, most = v["times_plain_range"]
        table.add_row(
            variant,
            f"{1e3 * v['step_s']:.1f}",
            f"{v['images_per_s']:.1f}",
            f"{v['gflop_per_s']:.1f}",
            *cells,
            f"{v['times_plain']:.2f} ({least:.2f}-{most:.2f})",
        )
    out = console()
    out.print(
        f"{name}: batch {figures['batch']}, bottleneck {figures['bottleneck']}, "
        f"{figures['step_gflop']:.1f} GFLOP a step; medians of {rounds} rounds (lowest to highest)",
        table,
        "matmuls, GFLOP/s: " + ", ".join(f"{key} {rate:.1f}" for key, rate in figures["matmul_gflop_per_s"].items()),
        f"peak: {figures['peak']}; torch.mm's: {figures['mm_peak']}",
        "time of ours: " + ", ".join(f"{kind} {share:.0%}" for kind, share in figures["operations"].items()),
        *(
            f"{other} differs from ours by {v:.1e} of a tensor's largest value"
            for other, v in figures["differences"].items()
        ),
        sep="\n",
    )
    if "compile_s" in figures:
        out.print(f"compiling took {figures['compile_s']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES)[:2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each variant in a round, at least")
    parser.add_argument(
        "--processor-time", action="store_true", help="instead of wall time: one thread, a busy machine"
    )
    parser.add_argument("--batch", type=int, help="images a step (default: 32 and 128)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of ours, and what its start costs")
    parser.add_argument("--checkpointing", action="store_true", help="also ours with activation checkpointing")
    parser.add_argument("--prepacked", action="store_true", help="also ours with prepacked frozen weights")
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/step.jsonl")
    args = parser.parse_args()
    if args.processor_time and args.threads != 1:
        parser.error("--processor-time adds up all threads, also where they wait; use it with --threads 1")
    torch.set_num_threads(args.threads)
    clock = "processor" if args.processor_time else "wall"
    figures: dict[str, Any] = {"threads": args.threads, "rounds": args.rounds, "clock": clock}
    for name in args.models:
        figures[name] = measure(name, args)
        show(name, figures[name], args.rounds)
    if args.record:
        print(record("step", typed(), figures, seeds=[SEED]))


if __name__ == "__main__":
    main()
