"""A training step of LIFT on one GPU by precision, and whole runs there: the stream, the planned memory, prediction.

The step is that of `benchmarks/step.py` (AdaptFormer in every block, forward, loss, backward, fused SGD) on a fixed batch, ViT-B/16 at
224 px with random weights: `plain` is open_clip's own tower with the same tuners. All variants take turns, round by round. The peak is
torch's product of two 8192 x 8192 bf16 matrices.

A run is `lift_ray.train --no-ray` on JPEGs of 256 px with the same tower; its figures are those of its last epoch. The stream is what
decodes its images, alone, by the number of threads and of processes.

    python benchmarks/gpu.py --rounds 5 --images 6000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from record import record, typed
from safetensors.torch import save_file
from step import NUM_CLASSES, SEED, Plain, Step, difference, new_lift, step_flops
from torch import Tensor, nn

from lift_ray.data.augment import SMALLEST_AREA, Augmentation, Preprocessing, square_crop
from lift_ray.data.batches import Decoders, training_batches
from lift_ray.data.convert.shards import publish, write_split
from lift_ray.data.decoder_pool import DecoderPool
from lift_ray.data.open import open_dataset
from lift_ray.data.order import Sampling
from lift_ray.data.reader import RowReader
from lift_ray.methods.world import Ranks
from lift_ray.model.loading import rebuild
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training.plan import memory
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

TOWER, GIB, SQUARE = "ViT-B-16", 2**30, 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class GpuStep(Step):
    """A step of benchmarks/step.py under autocast."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, counts: Tensor, precision: str) -> None:
        super().__init__(model, images, labels, counts)
        self.dtype = DTYPES[precision]
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")

    def backward(self) -> Tensor:
        """Gradients in the parameters; returns the logits."""
        self.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(self.images).float()
        self.scaler.scale(self.loss(logits, self.labels)).backward()
        return logits.detach()

    def __call__(self) -> None:
        self.backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def milliseconds(call: Callable[[], Any], times: int) -> float:
    """Of one call, by the GPU's clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def steps(batch: int, rounds: int, times: int) -> dict[str, Any]:
    """Medians of every variant of the step."""
    torch.manual_seed(SEED)
    logging.disable(logging.WARNING)  # open_clip's, of random weights
    visual = open_clip.create_model(TOWER).visual
    tower = rebuild(visual)
    model, bottleneck = new_lift(tower, 4, NUM_CLASSES), 4
    plain = Plain(visual, model).train().cuda()
    model = model.cuda()
    images = torch.randn(batch, 3, tower.resolution_px, tower.resolution_px, device="cuda")
    labels = torch.randint(NUM_CLASSES, (batch,), device="cuda")
    counts = 500 * 0.01 ** (torch.arange(NUM_CLASSES, device="cuda") / (NUM_CLASSES - 1))

    def step(of: nn.Module, precision: str) -> GpuStep:
        return GpuStep(of, images, labels, counts, precision)

    variants = {
        f"{name} {precision}": step(of, precision)
        for precision in DTYPES
        for name, of in (("ours", model), ("plain", plain))
    }
    differences = {p: difference(variants[f"ours {p}"], variants[f"plain {p}"]) for p in DTYPES}
    assert differences["fp32"] < 1e-3, differences
    began = time.perf_counter()
    variants["compiled bf16"] = step(torch.compile(model), "bf16")
    variants["compiled bf16"]()
    torch.cuda.synchronize()
    figures: dict[str, Any] = {"batch": batch, "differences": differences, "compile_s": time.perf_counter() - began}
    peaks = {}
    for name, variant in variants.items():
        variant()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        variant()
        peaks[name] = (torch.cuda.max_memory_allocated() - held) / GIB
    square = torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Callable[[], Any]] = {**variants, "matmul": lambda: square @ square}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            taken = milliseconds(call, times if index else 2)
            found[name] += [taken] if index else []
    peak = 2 * SQUARE**3 / statistics.median(found.pop("matmul")) / 1e9
    flops = step_flops(tower, bottleneck, NUM_CLASSES, batch)
    figures |= {"bf16_peak_tflop_per_s": peak, "step_gflop": flops / 1e9}
    for name, values in found.items():
        middle, precision = statistics.median(values), name.split()[1]
        figures[name] = {
            "ms": middle,
            "images_per_s": 1e3 * batch / middle,
            "tflop_per_s": flops / middle / 1e9,
            "share_of_bf16_peak": flops / middle / 1e9 / peak,
            "peak_gib": peaks[name],
            "times_plain": statistics.median(p / v for p, v in zip(found[f"plain {precision}"], values, strict=True)),
        }
        print(f"{name:>14}: " + ", ".join(f"{key} {value:,.3g}" for key, value in figures[name].items()), flush=True)
    return figures


def photographs(folder: Path, number: int) -> str:
    """A data set of 256 px JPEGs made of the embedded images, 100 classes."""
    source = open_dataset("embedded:caltech101-lt")
    records = {}
    for split, count in (("train", number), ("validation", 200), ("test", 200)):
        here = source.split(split)
        rows = np.arange(count) % here.num_samples
        with RowReader(here) as reader:
            encoded = reader.read(rows)
        samples = []
        for row, data in zip(rows, encoded, strict=True):
            out = io.BytesIO()
            Image.open(io.BytesIO(data)).convert("RGB").resize((340, 256), Image.Resampling.BICUBIC).save(
                out, "JPEG", quality=92
            )
            samples.append((out.getvalue(), f"{row}.jpg", int(here.labels[row])))
        records[split] = write_split(
            str(folder), split, samples, list(source.class_names), rows_per_shard=1000, row_group_rows=100
        )
    publish(str(folder), list(source.class_names), records)
    return str(folder)


def run(data: str, weights: str, threads: int, **overrides: Any) -> dict[str, float]:
    """Figures of a run's second epoch, and the memory it took against the planned."""
    tree = {
        "backbone": {"model": TOWER, "pretrained": weights, "precision": "bf16"},
        "head": {"init": "random"},
        "optim": {"epochs": 2},
    }
    config = RunConfig.model_validate(
        apply_overrides(tree, {k.replace("__", "."): v for k, v in overrides.items()}, RunConfig)
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one = Run(config, Workspace(data, Ranks.alone(use_gpu=True, num_cpus=threads)))
    for _ in range(2):
        found = one.train_epoch()
    taken = torch.cuda.max_memory_allocated() - before
    parts = memory(one.model.cpu(), one.config, one.config.optim.global_batch_size)
    planned = parts["tower"] + parts["trained, gradients and optimizer"] + parts["activations"]
    figures = {
        "images_per_s": found["train/images_per_s"],
        "loss": found["train/loss"],
        "data_wait_share": found["time/data_wait_s"] / found["time/train_s"],
        "gib": taken / GIB,
        "planned_gib": planned / GIB,
    }
    return {name: round(value, 4) for name, value in figures.items()}


def stream(data: str, decoders: Decoders) -> dict[str, float]:
    """Images/s of a training epoch's stream alone, and milliseconds to its first batch."""
    split = open_dataset(data).split("train")
    with RowReader(split) as reader:
        for _ in range(2):  # the first fills the reader's cache
            began = time.perf_counter()
            augmentation = Augmentation(Preprocessing(224), partial(square_crop, smallest=SMALLEST_AREA))
            batches = training_batches(reader, split, Sampling(0, 128), augmentation, epoch=0, decoders=decoders)
            next(batches)
            first = time.perf_counter() - began
            number = 1 + sum(1 for _ in batches)
            seconds = time.perf_counter() - began
    return {"images_per_s": round(128 * number / seconds, 1), "first_batch_ms": round(1e3 * first, 1)}


@contextlib.contextmanager
def random_weights() -> Iterator[str]:
    """A file with an untrained tower."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        state = open_clip.create_model(TOWER).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, f"{folder}/weights.safetensors")
        yield f"{folder}/weights.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=10, help="steps of a variant in a round")
    parser.add_argument("--images", type=int, default=6000, help="of the runs' training split")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the runs")
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/gpu.jsonl")
    args = parser.parse_args()
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "step": steps(args.batch, args.rounds, args.times)}
    kinds = {
        "bf16": {},
        "bf16, decoded by threads": {"optim.decode_processes": 0},
        "compiled": {"backbone.compile": True},
        "decode gpu": {"augment.decode": "gpu"},
        "fp32": {"backbone.precision": "fp32"},
        "fp16": {"backbone.precision": "fp16"},
        "checkpointing": {"backbone.checkpointing": True},
        "lora": {"tuner.kind": "lora"},
        "full": {"tuner.kind": "full"},
        "kept activations, last 2 blocks": {"augment.kind": "none", "tuner.blocks": [10, 11], "backbone.cache_gib": 8},
    }
    with random_weights() as weights, tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder), args.images)
        torch.set_num_threads(args.threads)
        for threads in sorted({1, 4, max(1, args.threads - 1)}):
            for kind, decoders in (("threads", Decoders(threads)), ("processes", Decoders(1, DecoderPool(threads)))):
                name = f"stream, {threads} {kind}"
                figures[name] = stream(data, decoders)
                print(name, figures[name], flush=True)
        for name, overrides in kinds.items():
            try:
                figures[name] = run(data, weights, args.threads, **overrides)
            except Exception as error:
                figures[name] = {"error": str(error)[:300]}
            print(name, json.dumps(figures[name]), flush=True)
    if args.record:
        print(record("gpu", typed(), figures, seeds=[SEED]))


if __name__ == "__main__":
    main()
