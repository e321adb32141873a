"""python -m lift_ray.export for a tower of real size: the largest difference of each file's logits, seconds and bytes.

CLIP ViT-B/32 at 224 px with random weights, 100 classes; the trained tensors are moved far from where they start, as after a long
training. That takes as long, and differs as much, as with pretrained weights of the same scale.

    python benchmarks/export.py --tuner lora --record
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from record import record
from safetensors.torch import save_file

from lift_ray.inference.export import export_checkpoint
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

MODEL, DATASET = "ViT-B-32", "embedded:caltech101-lt"


def clip(folder: Path) -> str:
    """A random CLIP as open_clip loads it."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(MODEL)
    folder.mkdir()
    save_file(
        {
            name: value.contiguous()
            for name, value in open_clip.create_model(MODEL, pretrained=None).state_dict().items()
        },
        folder / "open_clip_model.safetensors",
    )
    about = {"model_cfg": config, "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return f"local-dir:{folder}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuner", default="lora")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    figures: dict[str, Any] = {"model": MODEL, "tuner": args.tuner}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = {
            "backbone": {"model": clip(folder / "clip")},
            "tuner": {"kind": args.tuner},
            "head": {"init": "random"},
        }
        run = Run(RunConfig.model_validate(config), Workspace(DATASET, Ranks.alone(num_cpus=os.cpu_count() or 1)))
        with torch.no_grad():
            for tensor in run.model.trained().values():
                tensor += 0.1 * tensor.std(correction=0).clamp(min=0.1) * torch.randn_like(tensor)
        run.save(folder / "checkpoint")
        began = time.perf_counter()
        exported, left_out = export_checkpoint(folder / "checkpoint", folder / "out")
        figures |= {"seconds": round(time.perf_counter() - began, 1), "left_out": left_out}
        for each in exported:
            files = [
                path
                for path in (folder / "out").rglob("*")
                if path.is_relative_to(folder / "out" / each.file.rstrip("/"))
            ]
            figures[each.name] = {
                "difference": each.difference,
                "bytes": sum(path.stat().st_size for path in files if path.is_file()),
            }
    print(figures)
    if args.record:
        print(record("export", f"python benchmarks/export.py --tuner {args.tuner} --record", figures, seeds=[0]))


if __name__ == "__main__":
    main()
