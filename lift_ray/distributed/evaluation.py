"""Evaluating finished models in one process, without Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lift_ray.distributed import checkpoint
from lift_ray.distributed.ranks import Ranks
from lift_ray.distributed.run import Run, Warm
from lift_ray.settings.run import RunConfig


def evaluate_checkpoint(folder: Path, dataset: str, split: str) -> dict[str, float]:
    """Metrics of a checkpoint on a split; many, medium and few by the counts it was trained with."""
    import torch

    record = checkpoint.read_record(folder)
    warm = Warm(dataset, Ranks.alone(use_gpu=torch.cuda.is_available(), num_cpus=os.cpu_count() or 1))
    return _evaluate(warm, record.config, folder, [split], record.class_counts)


def evaluate_all(
    dataset: str, use_gpu: bool, num_cpus: int, jobs: list[tuple[dict[str, Any], Path | None, list[str]]]
) -> list[dict[str, float]]:
    """Metrics of several models of one data set, the tower loaded once.

    Args:
        jobs: for each model its settings, its checkpoint folder (None when nothing was trained) and the splits.
    """
    warm = Warm(dataset, Ranks.alone(use_gpu=use_gpu, num_cpus=num_cpus))
    return [_evaluate(warm, config, folder, splits) for config, folder, splits in jobs]


def _evaluate(
    warm: Warm, config: dict[str, Any], folder: Path | None, splits: list[str], class_counts: list[int] | None = None
) -> dict[str, float]:
    run = Run(RunConfig.model_validate(config), warm, class_counts)
    if folder is not None:
        checkpoint.load_weights(folder, run.model)
    figures = {k: v for split in splits for k, v in run.evaluate(split).items() if not k.startswith("time/")}
    return figures | {"trained_parameters": run.num_trained}
