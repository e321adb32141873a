"""Predictions of a model for each image of a split: for bootstrap intervals, calibration and the display of errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lift_ray.data.order import rank_slice
from lift_ray.evaluation.accumulator import PredictionCollector
from lift_ray.storage.atomic import replacing
from lift_ray.storage.layout import PREDICTIONS_FILE
from lift_ray.storage.output import Output
from lift_ray.training.run import Run


def evaluate_each(
    run: Run, split_name: str, taus: Sequence[float] | None = None
) -> list[tuple[dict[str, float], pa.Table]]:
    """Return for each tau the metrics of a split as `split/name`, and a table of label, predicted class and its probability.

    Args:
        taus: strengths of the post-hoc adjustment; by default the run's own. The images are read once for all of them.
    """
    taus = [run.config.evaluation.posthoc_tau] if taus is None else taus
    split, ranks = run.warm.dataset.split(split_name), run.ranks
    mine = rank_slice(split.num_samples, ranks.rank, ranks.world_size)
    each = [PredictionCollector(split.num_samples, mine.start, ranks.device) for _ in taus]
    figures = run.evaluate_taus(split_name, taus, each)
    return [(found, _table(split.labels, *images.result())) for found, images in zip(figures, each, strict=True)]


def _table(label: NDArray[Any], predicted: NDArray[Any], confidence: NDArray[Any]) -> pa.Table:
    columns = {"label": label, "predicted": predicted, "confidence": confidence}
    types = {"label": pa.int32(), "predicted": pa.int32(), "confidence": pa.float32()}
    return pa.table({name: pa.array(columns[name]).cast(kind) for name, kind in types.items()})


def write_predictions(table: pa.Table, output: Output, folder: str) -> None:
    """Write folder/test.parquet in OUT, atomically. Raises RunFailed if the storage refuses."""
    with output.staged(folder, PREDICTIONS_FILE) as target:
        target.mkdir(parents=True, exist_ok=True)
        with replacing(target / PREDICTIONS_FILE) as temporary:
            pq.write_table(table, temporary)
