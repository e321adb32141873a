"""Run files: the settings of a run and the dataset it uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lift_ray.errors import BadInput
from lift_ray.settings.overrides import apply_file_overrides, merged
from lift_ray.settings.run import RunConfig
from lift_ray.settings.shipped import SPACES, find_space, shipped_files
from lift_ray.settings.yaml_file import SettingsFile
from lift_ray.text import count


class RunFile(RunConfig):
    """Settings of a run file: those of the run, and the dataset it uses."""

    name: str = "run"
    """Name of the run, which is part of the default output folder."""
    dataset: str
    """Path or fsspec URL of Parquet shards, or embedded:NAME."""
    train_on: Literal["train", "train+validation"] = "train"
    """Images to train on. With train+validation there is no validation; a search writes it into best.yaml if it trained so."""
    out: str | None = None
    """New folder or URL for the results, as --out; by default runs/NAME-DATE-TIME."""

    @property
    def config(self) -> RunConfig:
        """The settings without name, data and output folder."""
        return RunConfig.model_validate(self.model_dump(include=set(RunConfig.model_fields)))


def batch_fault(size: int, workers: int, place: str) -> BadInput | None:
    """Return the error, with values that would fit, for a global batch that workers cannot share evenly; None if they can."""
    if size % workers == 0:
        return None
    fits = max(1, round(size / workers)) * workers
    fewer = max(w for w in range(1, workers) if size % w == 0)
    remedy = f"use {fits}, or {count(fewer, 'worker')}"
    return BadInput(place, f"must be divisible by {workers} workers", size, remedy)


def too_large(size: int, num_images: int) -> BadInput:
    """Return the error for a global batch of more images than the training split has: such a run would have no step."""
    rule = f"must be at most the {count(num_images, 'training image')}"
    return BadInput("optim.global_batch_size", rule, f"{size:,}", "lower it")


def read_run(path: str | Path, overrides: dict[str, Any] | None = None) -> RunFile:
    """Read and check a run file, given by its path or by the name of a shipped one, with the files that it is based on.

    Raises BadInput with every problem found, one line each.
    """
    file = _with_base(find_space(path), [])
    apply_file_overrides(file, overrides or {}, RunFile)
    file.expand("dataset", "out")
    file.resolve("dataset")
    return file.validate(RunFile)


def _with_base(path: str, above: list[Path]) -> SettingsFile:
    """Read a run file and what its key `base` names: a run file that it changes.

    Args:
        above: the files that are based on it.
    """
    file = SettingsFile.read(path)
    if "space" in file.data:
        place, remedy = file.where(("space",)), "use python -m lift_ray.tune, or the best.yaml that it writes"
        raise BadInput(place, "must not be in a run file", but="this is a space file", remedy=remedy)
    if "base" not in file.data:
        return file
    place, name, above = file.where(("base",)), file.data.pop("base"), [*above, Path(path).resolve()]
    if not isinstance(name, str):
        raise BadInput(place, "must be the path of a run file", f"{name!r}", "write base: other.yaml")
    base = shipped_files(SPACES).get(name, Path(path).parent / name)
    if base.resolve() in above:
        raise BadInput(place, "must not lead back to this file", f"{name!r}", "remove one base of the circle")
    if not base.is_file():
        remedy = "give its path relative to this file, or the name of a shipped one"
        raise BadInput(place, "must be a run file", but=f"there is no {base}", remedy=remedy)
    file.base = _with_base(str(base), above)
    file.data = merged(file.base.data, file.data, RunFile)
    return file
