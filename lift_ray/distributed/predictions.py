"""What a model made of each image of a split: for intervals by bootstrap, calibration, and pictures of what went wrong."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from lift_ray.data.stream import stretch
from lift_ray.distributed.run import Run
from lift_ray.results.output import Output
from lift_ray.results.studies import PREDICTIONS
from lift_ray.results.tally import PerImage


def evaluate_each(run: Run, split_name: str) -> tuple[dict[str, float], pa.Table]:
    """Metrics of a split as `split/name`, and a row for each image: label, predicted class, its probability."""
    split, ranks = run.warm.dataset.split(split_name), run.ranks
    mine = stretch(split.num_samples, ranks.rank, ranks.world_size)
    each = PerImage(split.num_samples, mine.start, ranks.device)
    figures = run.evaluate_taus(split_name, [run.config.evaluation.posthoc_tau], each)[0]
    predicted, confidence = each.result()
    columns = {"label": split.labels, "predicted": predicted, "confidence": confidence}
    types = {"label": pa.int32(), "predicted": pa.int32(), "confidence": pa.float32()}
    return figures, pa.table({name: pa.array(columns[name]).cast(kind) for name, kind in types.items()})


def write_predictions(table: pa.Table, output: Output, folder: str) -> None:
    """folder/test.parquet in OUT, renamed into place. Raises RunFailed when the storage refuses."""
    with output.staged(folder, PREDICTIONS) as target:
        target.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target / f"{PREDICTIONS}.tmp")
        (target / f"{PREDICTIONS}.tmp").replace(target / PREDICTIONS)
