"""Evaluating finished models in one process, without Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lift_ray.distributed import checkpoint
from lift_ray.distributed.ranks import Ranks
from lift_ray.distributed.run import Run
from lift_ray.distributed.warm import Warm
from lift_ray.settings.run import RunConfig, apply_overrides


def evaluate_checkpoint(
    folder: Path, dataset: str, split: str, taus: Sequence[float] = (0.0,), tte: bool = False
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Metrics of a checkpoint on a split; many, medium and few by the counts it was trained with.

    Args:
        taus: strengths of the post-hoc adjustment, one result for each.
        tte: test-time ensembling, also where the run was without.

    Returns:
        The figures for each tau, and a row for each class for the last.
    """
    record = checkpoint.read_record(folder)
    warm = Warm(dataset, Ranks.alone(use_gpu=torch.cuda.is_available(), num_cpus=os.cpu_count() or 1))
    config = apply_overrides(record.config, {"evaluation.tte": True} if tte else {})
    run = Run(RunConfig.model_validate(config), warm, record.class_counts)
    checkpoint.load_weights(folder, run.model)
    found = [figures | {"trained_parameters": run.num_trained} for figures in run.evaluate_taus(split, taus)]
    return found, run.per_class_rows()


def evaluate_all(
    dataset: str, use_gpu: bool, num_cpus: int, jobs: list[tuple[dict[str, Any], Path | None, list[str]]]
) -> list[dict[str, float]]:
    """Metrics of several models of one data set, the tower loaded once.

    Args:
        jobs: for each model its settings, its checkpoint folder (None when nothing was trained) and the splits.
    """
    warm = Warm(dataset, Ranks.alone(use_gpu=use_gpu, num_cpus=num_cpus))
    return [_evaluate(warm, config, folder, splits) for config, folder, splits in jobs]


def _evaluate(warm: Warm, config: dict[str, Any], folder: Path | None, splits: list[str]) -> dict[str, float]:
    run = Run(RunConfig.model_validate(config), warm)
    if folder is not None:
        checkpoint.load_weights(folder, run.model)
    figures = {k: v for split in splits for k, v in run.evaluate(split).items() if not k.startswith("time/")}
    return figures | {"trained_parameters": run.num_trained}
