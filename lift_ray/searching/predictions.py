"""Predictions of a model for each image of a split: for intervals, calibration, confusions, and the choice of the winner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lift_ray.evaluation.resampling import ImageResults
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import OUT_OF_FOLD, PREDICTIONS_FILE
from lift_ray.storage.output import Output

if TYPE_CHECKING:
    from lift_ray.evaluation.evaluator import AtTau

PER_TAU = ("predicted", "confidence", "loss")


def prediction_table(labels: NDArray[Any], found: AtTau) -> pa.Table:
    """Return a table of label, predicted class and its probability, from an evaluation with predictions."""
    assert found.predictions is not None
    predicted, confidence = found.predictions
    columns = {"label": labels, "predicted": predicted, "confidence": confidence}
    types = {"label": pa.int32(), "predicted": pa.int32(), "confidence": pa.float32()}
    return pa.table({name: pa.array(columns[name]).cast(kind) for name, kind in types.items()})


def write_predictions(table: pa.Table, output: Output, folder: str, name: str = PREDICTIONS_FILE) -> None:
    """Write a file to a folder in OUT, atomically. Raises RunFailed if the storage refuses."""
    with output.staged(folder, name) as target:
        target.mkdir(parents=True, exist_ok=True)
        with replacing(target / name) as temporary:
            pq.write_table(table, temporary)


def out_of_fold_folder(number: int, fold: int) -> str:
    """Return the folder in OUT for the predictions of a trial's model on the images that a fold holds out."""
    return f"{OUT_OF_FOLD}/{number:04d}-fold-{fold}"


def part_name(rank: int, world_size: int) -> str:
    """Return the name of the file that a rank writes, with a few numbers for each image."""
    return f"part-{rank}-of-{world_size}.parquet"


def logits_name(rank: int, world_size: int) -> str:
    """Return the name of the file with the logits of the same images, which are read for the winner only."""
    return f"logits-{rank}-of-{world_size}.parquet"


@dataclass(frozen=True)
class OutOfFold:
    """Out-of-fold predictions of a trial for N images, with several strengths of the post-hoc adjustment.

    Args:
        taus: the T strengths.
        label, fold: of each image, (N,). The images are in the order of the folds, and within a fold in storage order.
        predicted, confidence, loss: with each strength, (N, T).
    """

    taus: Sequence[float]
    label: NDArray[np.int64]
    fold: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]

    def at(self, tau: float) -> ImageResults:
        """Return the predictions with one of the strengths."""
        t = self.taus.index(tau)
        return ImageResults(self.label, self.predicted[:, t], self.confidence[:, t], self.loss[:, t])


def read_out_of_fold(out: Output, number: int, parts: Sequence[int], taus: Sequence[float]) -> OutOfFold:
    """Read the out-of-fold predictions of a trial.

    Args:
        parts: number of files of each fold, one for each rank that wrote them; 0 for a fold without predictions.
        taus: the strengths that they were written with.

    Raises RunFailed if the storage cannot be read.
    """
    tables = []
    for fold, _, name in files_of(number, parts, part_name):
        with out.fetched(name) as path:
            part = pq.read_table(path)
        tables.append(part.append_column("fold", pa.array(np.full(len(part), fold, np.int32))))
    table = pa.concat_tables(tables)
    shape = (len(table), len(taus))
    predicted, confidence, loss = (
        table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(shape) for name in PER_TAU
    )
    label, fold = (table[name].to_numpy().astype(np.int64) for name in ("label", "fold"))
    return OutOfFold(taus, label, fold, predicted.astype(np.int64), confidence.astype(float), loss.astype(float))


def files_of(number: int, parts: Sequence[int], name: Callable[[int, int], str]) -> Iterator[tuple[int, int, str]]:
    """Yield fold, rank and path in OUT of each file of a trial's out-of-fold predictions, in the order of the images.

    Args:
        name: part_name or logits_name.
    """
    for fold, world_size in enumerate(parts, 1):
        for rank in range(world_size):
            yield fold, rank, f"{out_of_fold_folder(number, fold)}/{name(rank, world_size)}"
