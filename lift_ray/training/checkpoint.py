"""Checkpoints: trained tensors as safetensors, everything else as JSON. Nothing is pickled.

Functions import torch when they need it, because the driver of a search reads records without torch.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError

import lift_ray
from lift_ray.data.bit_depth import Rendering
from lift_ray.epoch_metrics import POSTHOC, EpochMetrics, named
from lift_ray.errors import BadInput, first_few, one_line
from lift_ray.evaluation.metrics import ClassGroups, labelled_counts, stored_groups, write_per_class
from lift_ray.settings.messages import check_json
from lift_ray.settings.run import RunConfig, experiment
from lift_ray.storage.file_kinds import JSON, SAFETENSORS, file_kind, remedy
from lift_ray.storage.layout import BEST, FINAL_CHECKPOINT, OPTIMIZER, PER_CLASS, RECORD, STATE, WEIGHTS
from lift_ray.storage.output import Output
from lift_ray.text import count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lift_ray.data.dataset import Dataset

FORMAT_VERSION = 1


@dataclass
class Record:
    """Description of a run in its checkpoint.

    Args:
        config: resolved settings.
        digest: digest of these settings.
        dataset: URI of the dataset.
        class_names: names of the K classes.
        class_counts: (K,), training images of each class.
        labelled_counts: (K,), labeled images of each class before any were held out, which define many, medium and few; None in
            checkpoints of earlier versions.
        train_on: splits that the training images come from, as in a run file.
        rendering: how new images become 8-bit RGB (`Rendering.to_dict`); empty in checkpoints of earlier versions.
        epoch: number of finished epochs, evaluation included.
        step: number of finished steps since the start of the run, including those of an unfinished epoch.
        metrics: validation metrics of the last finished epoch, by `validation/name`.
        history: figures of every finished epoch.
        seconds: seconds spent in the unfinished epoch, by the name of the figure.
        scaler: state of the loss scaling, in fp16 only.
    """

    config: dict[str, Any]
    digest: str
    dataset: str
    class_names: list[str]
    class_counts: list[int]
    epoch: int
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    labelled_counts: list[int] | None = None
    train_on: str = "train"
    rendering: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    lift_ray_version: str = lift_ray.__version__

    @property
    def groups(self) -> ClassGroups:
        """Groups of the classes, known without the dataset."""
        return stored_groups(vars(self))


def record_of(
    config: RunConfig,
    dataset: Dataset,
    class_counts: NDArray[np.int64],
    history: Sequence[EpochMetrics],
    epoch: int,
    **state: Any,
) -> Record:
    """Return the description of a training. Arguments as in `Record`; `state` has its step, seconds and scaler."""
    last = history[-1].validation if history else {}
    return Record(
        config=config.to_dict(),
        digest=config.digest(),
        dataset=dataset.uri,
        class_names=list(dataset.class_names),
        class_counts=class_counts.tolist(),
        labelled_counts=labelled_counts(dataset).tolist(),
        train_on=dataset.train_on,
        rendering=dataset.rendering.to_dict(),
        epoch=epoch,
        metrics=named("validation", {name: last[name] for name in last if name not in POSTHOC}),
        history=[metrics.flat() for metrics in history],
        **state,
    )


def save(
    folder: Path,
    weights: Mapping[str, Tensor],
    record: Record,
    *,
    state: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
    per_class: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a checkpoint atomically: to a temporary folder, which is then renamed over the previous checkpoint.

    Args:
        weights: trained tensors and the head, by name.
        state: other tensors by name (states of random generators, the losses of an unfinished epoch).
        optimizer: what the optimizer keeps of each parameter (TrainStep.optimizer_state); None if nothing is trained.
        per_class: rows of the last evaluation (evaluation.metrics.per_class_rows).

    Raises OSError; the previous checkpoint is then unchanged.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _write_tensors(temporary / WEIGHTS, weights)
        if optimizer is not None:
            _write_tensors(temporary / OPTIMIZER, optimizer)
        _write_tensors(temporary / STATE, state or {})
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
        # Two ranks that are told to stop may write the same checkpoint at the same time: the first one wins.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def opened(where: str) -> Iterator[Path]:
    """Yield a checkpoint, given by folder or URL, as a local folder.

    `where` is the checkpoint itself, or the result folder of a search (its best/) or of a run (its checkpoint/). Raises BadInput.
    """
    output = Output(where, "CHECKPOINT")
    names = [name for name in ("", BEST, FINAL_CHECKPOINT) if output.holds(f"{name}/{RECORD}".lstrip("/"))]
    with output.fetched(names[0] if names else "") as folder:
        yield folder


def read_record(folder: Path) -> Record:
    """Read the JSON part of a checkpoint. Raises BadInput if the folder is not a checkpoint."""
    try:
        text = (folder / RECORD).read_text()
        data = json.loads(text)
        if data.get("format_version") != FORMAT_VERSION:
            raise BadInput(
                str(folder),
                f"must be a checkpoint of format {FORMAT_VERSION}",
                data.get("format_version", "none"),
                "use the version of lift_ray that wrote it",
            )
        return _record(text)
    except FileNotFoundError:
        raise BadInput(
            str(folder),
            "must be a checkpoint folder",
            but=f"there is no {RECORD}",
            remedy="give the folder that contains it",
        ) from None
    except NotADirectoryError:
        raise BadInput(
            str(folder),
            "must be a checkpoint folder",
            but=f"it is {file_kind(folder)}" if folder.is_file() else "a part of the path is a file",
            remedy="give the folder that tune or train wrote",
        ) from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        kind = "" if isinstance(error, OSError) else file_kind(folder / RECORD)
        why = one_line(error) if kind in ("", JSON) else f"it is {kind}"
        raise BadInput(
            str(folder / RECORD), f"invalid checkpoint record: {why}", remedy="copy the folder again"
        ) from None


def _record(text: str) -> Record:
    """Return the record in a JSON text. Raises ValueError, in one line, for keys, types or settings that no record has."""
    check_json(Record, text)
    data = json.loads(text)
    if unknown := sorted(data.keys() - {each.name for each in fields(Record)}):
        raise ValueError(f"unknown key {first_few(list(map(repr, unknown)))}")
    record = Record(**data)
    if len(record.class_counts) != len(record.class_names):
        raise ValueError(f"class_counts: {len(record.class_counts)} for {count(len(record.class_names), 'class')}")
    try:
        record.config = RunConfig.parse(record.config).to_dict()
    except ValueError as error:
        raise ValueError(f"config: {error}") from None
    Rendering.of(record.rendering)
    return record


def difference(there: Sequence[str], here: Sequence[str], other: str = "the dataset") -> str:
    """Describe how the class names of a checkpoint differ from those of a dataset, or of something else."""
    if odd := sorted(set(here) ^ set(there))[:3]:
        return f"it has {count(len(there), 'class')} and {other} {len(here):,}, which differ in {', '.join(odd)}"
    return "their order differs"


def check_same(folder: Path, record: Record, config: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Raise BadInput, with the first difference, if a checkpoint has other settings or classes."""
    before = experiment(record.config)
    for section, value in experiment(config).items():
        if before.get(section) != value:
            raise BadInput(
                str(folder),
                "must have the same settings",
                but=f"{section} was {before.get(section)} and is now {value}",
                remedy="use another --out, or the settings it started with",
            )
    if record.class_names != list(class_names):
        raise BadInput(
            str(folder),
            "must have the same classes",
            but=difference(record.class_names, class_names),
            remedy="give the dataset it was trained on",
        )


class Stored(Protocol):
    """A model, or several as one, whose tensors a checkpoint contains."""

    def load_stored(self, state: dict[str, Tensor]) -> None:
        """Load the tensors strictly. Raises ValueError."""


def load_weights(folder: Path, model: Stored) -> None:
    """Load tuner and head strictly. Raises BadInput if they do not match the model."""
    tensors = read_tensors(folder / WEIGHTS)
    try:
        model.load_stored(tensors)
    except ValueError as error:
        raise BadInput(
            str(folder / WEIGHTS),
            f"does not match the settings next to it: {one_line(error)}",
            remedy="copy the folder again",
        ) from None


def load_optimizer_state(folder: Path) -> dict[str, Tensor]:
    """Read what the optimizer kept of each parameter. Raises BadInput if it is unreadable."""
    return read_tensors(folder / OPTIMIZER)


def load_state(folder: Path) -> dict[str, Tensor]:
    """Read the other tensors that `save` was given. Raises BadInput if they are unreadable."""
    return read_tensors(folder / STATE)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors by name. Raises BadInput if it is missing, cut off, or something else."""
    from safetensors.torch import load_file

    try:
        if (kind := file_kind(path)) != SAFETENSORS:
            raise BadInput(str(path), f"must be {SAFETENSORS}", but=f"it is {kind}", remedy=remedy(kind))
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(str(path), f"cannot be read: {one_line(error)}", remedy="copy the folder again") from None
