"""Settings and figures of small runs, for the tests that train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.evaluation.evaluator import AtTau, evaluate
from lift_ray.searching.predictions import prediction_table
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run


def run_config(tree: dict[str, Any], overrides: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a run; the override `tuner__kind` stands for the setting tuner.kind."""
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return RunConfig.model_validate(apply_overrides(tree, named, RunConfig))


def untimed(epochs: Iterable[EpochMetrics | dict[str, float]]) -> list[dict[str, float]]:
    """Return the flat metrics of each epoch without those that depend on the machine's speed."""
    flat = [epoch.flat() if isinstance(epoch, EpochMetrics) else epoch for epoch in epochs]
    return [
        {name: value for name, value in epoch.items() if not name.startswith("time/") and name != "train/images_per_s"}
        for epoch in flat
    ]


def predicted_by(run: Run) -> tuple[AtTau, pa.Table]:
    """Return the evaluation of a run on the test split, and the table of its predictions."""
    split = run.workspace.dataset.split("test")
    found = evaluate(run.predictor, split, [run.config.evaluation.posthoc_tau], predictions=True).at_tau[0]
    return found, prediction_table(split.labels, found)


def assert_same_tensors(out: Path, expected: Path, file: str = "weights.safetensors") -> None:
    """Assert that the checkpoints of two runs hold exactly the same tensors."""
    one, other = (load_file(folder / "checkpoint" / file) for folder in (out, expected))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
