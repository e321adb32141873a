"""Settings and figures of small runs, a free port, and waiting for an event, for all tests."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
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


def free_ports(number: int) -> list[int]:
    with ExitStack() as open_until_all_are_found:
        probes = [open_until_all_are_found.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 150, every_s: float = 0.05) -> Any:
    """Return the first true value of `condition`. Raises AssertionError if there is none in time."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, f"{what}: not within {seconds:g} s"
        time.sleep(every_s)
    return value
