"""A run on disk: trained tensors as safetensors, everything else as JSON. Nothing is pickled.

torch is imported by the functions that need it: the driver of a search reads records without it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

import lift_ray
from lift_ray.errors import BadInput
from lift_ray.results.metrics import write_per_class

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lift_ray.methods.lift import Lift

WEIGHTS, OPTIMIZER, RECORD = "weights.safetensors", "optimizer.safetensors", "run.json"
PER_CLASS = "per_class.csv"
FORMAT_VERSION = 1
FOLDER = "lift"  # inside a checkpoint of Ray Tune or Ray Train


@dataclass
class Record:
    """What a checkpoint says of its run.

    Args:
        config: the resolved settings.
        dataset: its URI, class_names and class_counts (K,) of the training split.
        epoch, step: what is done.
        metrics: of the last evaluation, by `split/name`.
    """

    config: dict[str, Any]
    digest: str
    dataset: str
    class_names: list[str]
    class_counts: list[int]
    epoch: int
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    lift_ray_version: str = lift_ray.__version__


def save(
    folder: Path,
    model: Lift,
    optimizer: torch.optim.Optimizer | None,
    record: Record,
    per_class: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a checkpoint, whole or not at all: to a temporary name, then renamed over what was there.

    Args:
        per_class: rows of the last evaluation (results.metrics.per_class_rows).
    """
    from safetensors.torch import save_file

    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in model.stored().items()}, temporary / WEIGHTS)
    if optimizer is not None:
        momenta = {
            n: optimizer.state[p]["momentum_buffer"] for n, p in model.trained().items() if optimizer.state.get(p)
        }
        save_file({n: t.detach().cpu().contiguous() for n, t in momenta.items()}, temporary / OPTIMIZER)
    if per_class:
        write_per_class(per_class, temporary / PER_CLASS)
    (temporary / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


def keep(stored: Any, target: Path) -> None:
    """Copy the checkpoint inside one of Ray's, wherever it is stored, to `target`: whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with stored.as_directory() as folder:
        shutil.copytree(Path(folder) / FOLDER, temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def find(folder: Path) -> Path:
    """The checkpoint meant by a folder: itself, or the best/ of a search or the checkpoint/ of a run inside it."""
    inside = (folder / name for name in ("best", "checkpoint"))
    return next((f for f in inside if (f / RECORD).is_file() and not (folder / RECORD).is_file()), folder)


def read_record(folder: Path) -> Record:
    """The JSON part of a checkpoint. Raises BadInput when the folder does not hold one."""
    try:
        data = json.loads((folder / RECORD).read_text())
        if data.get("format_version") != FORMAT_VERSION:
            raise BadInput(
                f"{folder}: must be a checkpoint of format {FORMAT_VERSION}, but got {data.get('format_version')}; "
                "use the version of lift_ray that wrote it"
            )
        return Record(**data)
    except FileNotFoundError:
        raise BadInput(
            f"{folder}: must be a checkpoint folder, but there is no {RECORD}; give the folder that holds it"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{folder / RECORD}: must be a checkpoint's record, but got {error}; copy the folder again"
        ) from None


def difference(there: Sequence[str], here: Sequence[str]) -> str:
    """What differs between a checkpoint's class names and those of a data set."""
    odd = sorted(set(here) ^ set(there))[:3] or ["the same names in another order"]
    return f"it has {len(there)} and the data set {len(here)}, which differ ({', '.join(odd)})"


def check_same(folder: Path, record: Record, config: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Raises BadInput, with the first difference, when a checkpoint is not of these settings and classes."""
    for section, value in config.items():
        if record.config.get(section) != value:
            raise BadInput(
                f"{folder}: must be of the same settings, but {section} was {record.config.get(section)} "
                f"and is {value}; use another --out, or the settings it began with"
            )
    if record.class_names != list(class_names):
        raise BadInput(
            f"{folder}: must be of the same classes, but {difference(record.class_names, class_names)}; "
            "give the data set it was trained for"
        )


def load_weights(folder: Path, model: Lift) -> None:
    """Load tuner and head, strictly. Raises BadInput when they do not fit."""
    from safetensors.torch import load_file

    try:
        model.load_stored(load_file(folder / WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise BadInput(
            f"{folder / WEIGHTS}: must fit the settings beside it, but got: {error}; copy the folder again"
        ) from None


def load_optimizer(folder: Path, model: Lift, optimizer: torch.optim.Optimizer) -> None:
    """Load SGD's momentum. Raises BadInput when it is unreadable."""
    from safetensors.torch import load_file

    try:
        momenta: dict[str, Tensor] = load_file(folder / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"{folder / OPTIMIZER}: must be readable, but got: {error}; start from another checkpoint"
        ) from None
    for name, parameter in model.trained().items():
        if name in momenta:
            optimizer.state[parameter]["momentum_buffer"] = momenta[name].to(parameter.device)
