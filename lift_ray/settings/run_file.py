"""A run file: the settings of one run, and the data it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lift_ray.settings.overrides import apply_file_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.yaml_file import SettingsFile


class RunFile(RunConfig):
    """A run file: the settings of one run, and the data it runs on."""

    name: str = "run"
    dataset: str
    """Any fsspec URL or path of Parquet shards, or embedded:NAME."""
    out: str | None = None

    @property
    def config(self) -> RunConfig:
        """The settings alone."""
        return RunConfig.model_validate(self.model_dump(include=set(RunConfig.model_fields)))


def check_global_batch(size: int, workers: int) -> None:
    """Raises ValueError, with what would fit, when a global batch cannot be shared evenly."""
    if size % workers:
        fits = max(1, round(size / workers)) * workers
        fewer = max(w for w in range(1, workers) if size % w == 0)
        raise ValueError(
            f"optim.global_batch_size: must be divisible by {workers} workers, but got {size}; "
            f"use {fits}, or {fewer} worker{'s' if fewer > 1 else ''}"
        )


def read_run(path: str | Path, overrides: dict[str, Any] | None = None) -> RunFile:
    """Read and check a run file. Raises BadInput with every problem found, one line each."""
    file = SettingsFile.read(path)
    apply_file_overrides(file, overrides or {}, RunFile)
    file.expand("dataset", "out")
    return file.validate(RunFile)
