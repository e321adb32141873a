"""Settings and figures of small runs, for the tests that train."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
