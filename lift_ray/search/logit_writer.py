"""Logits of an evaluation, written batch by batch, so that no rank holds those of all images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lift_ray.evaluation.accumulator import shift_of
from lift_ray.evaluation.evaluator import LogitBatch
from lift_ray.methods.world import Ranks
from lift_ray.search.predictions import out_of_fold_folder, part_name
from lift_ray.storage.atomic import replacing
from lift_ray.storage.output import Output


class LogitWriter:
    """Counter of an evaluation that writes a row for each image of this rank.

    The columns are label and logits (K,), and for each of the T strengths of the post-hoc adjustment the predicted class, its
    probability and the cross-entropy, (T,).

    Args:
        class_counts: training images of each class, (K,), which define the prior.
        taus: the strengths.
        writer: the open file.
    """

    def __init__(self, class_counts: NDArray[np.int64], taus: Sequence[float], writer: pq.ParquetWriter) -> None:
        self.shifts = torch.stack([shift_of(tau, class_counts) for tau in taus])
        self.writer = writer

    def add(self, batch: LogitBatch) -> None:
        """Write the next images."""
        logits, labels = batch.logits.float().cpu(), batch.labels.cpu()
        adjusted = (logits.unsqueeze(1) - self.shifts).log_softmax(2)
        confidence, predicted = adjusted.max(2)
        loss = F.nll_loss(adjusted.transpose(1, 2), labels.unsqueeze(1).expand(-1, len(self.shifts)), reduction="none")
        columns = [labels.int(), logits, predicted.int(), confidence.exp(), loss]
        arrays = [_array(column.contiguous().numpy()) for column in columns]
        self.writer.write_table(pa.Table.from_arrays(arrays, schema=self.writer.schema))

    def tensors(self) -> list[Tensor]:
        """Return nothing: each rank writes its own file."""
        return []


@contextmanager
def logit_writer(
    output: Output, number: int, fold: int, ranks: Ranks, class_counts: NDArray[np.int64], taus: Sequence[float]
) -> Iterator[LogitWriter]:
    """Yield a writer for the out-of-fold predictions of a trial; its file is in OUT, whole, afterwards.

    Raises RunFailed if the storage refuses.
    """
    name = part_name(ranks.rank, ranks.world_size)
    num_taus, num_classes = len(taus), len(class_counts)
    schema = pa.schema(
        {
            "label": pa.int32(),
            "logits": pa.list_(pa.float32(), num_classes),
            "predicted": pa.list_(pa.int32(), num_taus),
            "confidence": pa.list_(pa.float32(), num_taus),
            "loss": pa.list_(pa.float32(), num_taus),
        }
    )
    with output.staged(out_of_fold_folder(number, fold), name) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            yield LogitWriter(class_counts, taus, writer)


def _array(values: NDArray[np.generic]) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
