"""Settings and figures of small runs, for the tests that train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig


def run_config(tree: dict[str, Any], overrides: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a run; the override `tuner__kind` stands for the setting tuner.kind."""
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return RunConfig.model_validate(apply_overrides(tree, named, RunConfig))


def untimed(figures: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the figures of each epoch without those that depend on the machine's speed."""
    return [
        {name: value for name, value in epoch.items() if not name.startswith("time/") and name != "train/images_per_s"}
        for epoch in figures
    ]


def assert_same_tensors(out: Path, expected: Path, file: str = "weights.safetensors") -> None:
    """Assert that the checkpoints of two runs hold exactly the same tensors."""
    one, other = (load_file(folder / "checkpoint" / file) for folder in (out, expected))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
