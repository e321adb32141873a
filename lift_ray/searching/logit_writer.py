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
from lift_ray.searching.predictions import logits_name, out_of_fold_folder, part_name
from lift_ray.storage.atomic import replacing
from lift_ray.storage.output import Output

ROW_GROUP_ROWS = 1024


class LogitWriter:
    """Counter of an evaluation that writes a row for each image of this rank to two files.

    One has the label and, for each of the T strengths of the post-hoc adjustment, the predicted class, its probability and the
    cross-entropy, (T,). The other has the raw logits, (K,).

    Args:
        class_counts: training images of each class, (K,), which define the prior.
        taus: the strengths.
        measured, logits: the open files.
    """

    def __init__(
        self,
        class_counts: NDArray[np.int64],
        taus: Sequence[float],
        measured: pq.ParquetWriter,
        logits: pq.ParquetWriter,
    ) -> None:
        self.shifts = [shift_of(tau, class_counts) for tau in taus]
        self._files = [_RowGroups(measured), _RowGroups(logits)]

    def add(self, batch: LogitBatch) -> None:
        """Take the next images."""
        logits, labels = batch.logits.float().cpu(), batch.labels.cpu()
        per_tau = [_measured(logits - shift, labels) for shift in self.shifts]
        columns = [labels.int(), *(torch.stack(values, 1) for values in zip(*per_tau, strict=True))]
        for file, tensors in zip(self._files, (columns, [logits]), strict=True):
            file.add([_array(tensor.numpy()) for tensor in tensors])

    def flush(self) -> None:
        """Write the images that wait."""
        for file in self._files:
            file.flush()

    def tensors(self) -> list[Tensor]:
        """Return nothing: each rank writes its own files."""
        return []


class _RowGroups:
    """Rows that wait until they are enough for a row group: a batch of an evaluation can have a few images."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer
        self._waiting: list[pa.RecordBatch] = []

    def add(self, arrays: list[pa.Array]) -> None:
        self._waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self.writer.schema))
        if sum(map(len, self._waiting)) >= ROW_GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self.writer.write_table(pa.Table.from_batches(self._waiting), row_group_size=2 * ROW_GROUP_ROWS)
            self._waiting.clear()


def _measured(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the predicted class, its probability and the cross-entropy of each image, (b,) each, from logits (b, K)."""
    log_p = logits.log_softmax(1)
    confidence, predicted = log_p.max(1)
    return predicted.int(), confidence.exp(), F.nll_loss(log_p, labels, reduction="none")


@contextmanager
def logit_writer(
    output: Output, number: int, fold: int, ranks: Ranks, class_counts: NDArray[np.int64], taus: Sequence[float]
) -> Iterator[LogitWriter]:
    """Yield a writer for the out-of-fold predictions of a trial; its files are in OUT, whole, afterwards.

    Raises RunFailed if the storage refuses.
    """
    name, logits_file = (each(ranks.rank, ranks.world_size) for each in (part_name, logits_name))
    per_tau = {"predicted": pa.int32(), "confidence": pa.float32(), "loss": pa.float32()}
    measured = pa.schema({"label": pa.int32(), **{key: pa.list_(kind, len(taus)) for key, kind in per_tau.items()}})
    raw = pa.schema({"logits": pa.list_(pa.float32(), len(class_counts))})
    with output.staged(out_of_fold_folder(number, fold), name) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            replacing(folder / name) as first,
            replacing(folder / logits_file) as second,
            pq.ParquetWriter(first, measured) as measured_writer,
            pq.ParquetWriter(second, raw) as raw_writer,
        ):
            writer = LogitWriter(class_counts, taus, measured_writer, raw_writer)
            yield writer
            writer.flush()


def _array(values: NDArray[np.generic]) -> pa.Array:
    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
