"""Predictions of a model for each image of a split: for bootstrap intervals, calibration and the display of errors."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lift_ray.evaluation.evaluator import AtTau
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import PREDICTIONS_FILE
from lift_ray.storage.output import Output


def prediction_table(labels: NDArray[Any], found: AtTau) -> pa.Table:
    """Return a table of label, predicted class and its probability, from an evaluation with predictions."""
    assert found.predictions is not None
    predicted, confidence = found.predictions
    columns = {"label": labels, "predicted": predicted, "confidence": confidence}
    types = {"label": pa.int32(), "predicted": pa.int32(), "confidence": pa.float32()}
    return pa.table({name: pa.array(columns[name]).cast(kind) for name, kind in types.items()})


def write_predictions(table: pa.Table, output: Output, folder: str) -> None:
    """Write folder/test.parquet in OUT, atomically. Raises RunFailed if the storage refuses."""
    with output.staged(folder, PREDICTIONS_FILE) as target:
        target.mkdir(parents=True, exist_ok=True)
        with replacing(target / PREDICTIONS_FILE) as temporary:
            pq.write_table(table, temporary)
