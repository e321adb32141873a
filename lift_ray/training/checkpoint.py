"""A run on disk: trained tensors as safetensors, everything else as JSON. Nothing is pickled.

torch is imported by the functions that need it: the driver of a search reads records without it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

import lift_ray
from lift_ray.errors import BadInput
from lift_ray.evaluation.metrics import write_per_class
from lift_ray.storage.layout import BEST, FINAL_CHECKPOINT, OPTIMIZER, PER_CLASS, RECORD, STATE, WEIGHTS
from lift_ray.storage.output import Output

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lift_ray.methods.lift import Lift

FORMAT_VERSION = 1


@dataclass
class Record:
    """What a checkpoint says of its run.

    Args:
        config: the resolved settings.
        dataset: its URI, class_names and class_counts (K,) of the training split.
        epoch: epochs done, each with its evaluation.
        step: steps done in all; more than `epoch` epochs have when the run stands inside an epoch.
        metrics: of the last evaluation, by `split/name`.
        history: the figures of every epoch that is done.
        seconds: spent in the epoch that the run stands in, by name of its figure.
        scaler: state of the loss scaling, in fp16 only.
    """

    config: dict[str, Any]
    digest: str
    dataset: str
    class_names: list[str]
    class_counts: list[int]
    epoch: int
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    lift_ray_version: str = lift_ray.__version__


def save(
    folder: Path,
    model: Lift,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Tensor],
    record: Record,
    per_class: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a checkpoint, whole or not at all: to a temporary name, then renamed over what was there.

    Args:
        state: further tensors by name (random numbers, the losses of an epoch half done).
        per_class: rows of the last evaluation (results.metrics.per_class_rows).

    Raises OSError; what was there before is then unchanged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _write_tensors(temporary / WEIGHTS, model.stored())
        if optimizer is not None:
            trained = model.trained().items()
            momenta = {n: optimizer.state[p]["momentum_buffer"] for n, p in trained if optimizer.state.get(p)}
            _write_tensors(temporary / OPTIMIZER, momenta)
        _write_tensors(temporary / STATE, state)
        if per_class:
            write_per_class(per_class, temporary / PER_CLASS)
        (temporary / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
        temporary.chmod(0o755)
        _rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save as to_bytes  # its save_file hides a full disk behind an error of its own

    path.write_bytes(to_bytes({n: t.detach().cpu().contiguous() for n, t in tensors.items()}))


def _rename(temporary: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError as error:
        # Two ranks that are told to stop write the same checkpoint at the same time.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def opened(where: str) -> Iterator[Path]:
    """The checkpoint meant by a folder or URL, as a local folder.

    It is `where` itself, or the best/ of a search or the checkpoint/ of a run inside it. Raises BadInput.
    """
    output = Output(where, "CHECKPOINT")
    names = [name for name in ("", BEST, FINAL_CHECKPOINT) if output.holds(f"{name}/{RECORD}".lstrip("/"))]
    with output.fetched(names[0] if names else "") as folder:
        yield folder


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
    momenta = _read_tensors(folder / OPTIMIZER)
    for name, parameter in model.trained().items():
        if name in momenta:
            optimizer.state[parameter]["momentum_buffer"] = momenta[name].to(parameter.device)


def load_state(folder: Path) -> dict[str, Tensor]:
    """The further tensors given to `save`. Raises BadInput when they are unreadable."""
    return _read_tensors(folder / STATE)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: must be readable, but got: {error}; start from another checkpoint") from None
