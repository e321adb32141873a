"""Prediction for many images, in one process or on Ray workers. Finished parts are stored and never computed again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from lift_ray.data.bad_image import BadImage
from lift_ray.data.batches import made_ahead
from lift_ray.errors import BadInput, RunFailed, one_line
from lift_ray.evaluation.cpu_parallel import on_cores
from lift_ray.inference.calibration import Calibration
from lift_ray.inference.classifier import Classifier, default_top, single_record
from lift_ray.inference.image_files import ImageFiles, ImageReader, write_left_out
from lift_ray.methods.world import Ranks
from lift_ray.model.device import best_device
from lift_ray.ray_runtime.capacity import num_slots
from lift_ray.ray_runtime.session import connected
from lift_ray.settings.search import ScaleConfig
from lift_ray.storage.layout import CALIBRATION, WEIGHTS
from lift_ray.training import checkpoint

PART = 2000
READ_AHEAD = 800  # images
TRIES = 3
PLAN = "plan.json"


@dataclass(frozen=True)
class Job:
    """One prediction job: a checkpoint, images and options.

    Attributes:
        where: folder or URL of the checkpoint.
        images: images to classify.
        top: number of classes per image, at most K; None for `default_top(K)`.
        temperature: divides the logits; None for the fitted temperature.
        posthoc_tau: strength of the post-hoc adjustment; None for the value of the run.
        part: number of images in a part.
    """

    where: str
    images: ImageFiles
    top: int | None = None
    temperature: float | None = None
    posthoc_tau: float | None = None
    part: int = PART

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return -(-len(self.images) // self.part)

    def span(self, number: int) -> tuple[int, int]:
        """Return the images [start, stop) of a part."""
        return number * self.part, min((number + 1) * self.part, len(self.images))


Advance = Callable[[int, int], None]


class Predictor:
    """A loaded model that predicts parts of a job.

    Args:
        job: job to predict.
        ranks: device and number of threads; images are decoded in threads while the model runs.
    """

    def __init__(self, job: Job, ranks: Ranks) -> None:
        self._job, self._ranks = job, ranks
        self._classifier = Classifier.load(
            job.where, temperature=job.temperature, posthoc_tau=job.posthoc_tau, ranks=ranks
        )
        self.calibration = self._classifier.calibration
        self._names = np.array(self._classifier.classes)

    def parts(self, numbers: Sequence[int], temperature: float) -> Iterator[tuple[int, pa.Table]]:
        """Yield the number and the rows of each part, in order."""
        reader = ImageReader(self._job.images)
        size = self._classifier.batch_size
        steps = [
            (number, start, min(start + size, stop))
            for number in numbers
            for first, stop in [self._job.span(number)]
            for start in range(first, stop, size)
        ]
        # One stream of batches over all parts, so that decoding and the model do not pause between two parts. A batch holds
        # images of one part only.
        decoded = made_ahead(
            lambda index: (steps[index], *self._decoded(reader, *steps[index][1:])),
            range(len(steps)),
            self._ranks.num_threads,
            lambda index: reader.prefetch(*steps[index][1:]),
            READ_AHEAD // size,
        )
        rows: list[pa.Table] = []
        try:
            for (number, stop), table in on_cores(self._ranks.device, partial(self._table, temperature), decoded):
                rows.append(table)
                if stop == self._job.span(number)[1]:
                    yield number, pa.concat_tables(rows)
                    rows = []
        finally:
            reader.close()

    def _decoded(self, reader: ImageReader, start: int, stop: int) -> tuple[torch.Tensor, list[str | None]]:
        """Return the readable images of [start, stop), (b, *view.shape) uint8, and an error or None for each image."""
        images, good = np.empty((stop - start, *self._classifier.view.shape), np.uint8), 0
        errors: list[str | None] = []
        for encoded in reader.read(start, stop):
            try:
                images[good] = np.moveaxis(self._classifier.image(encoded or b""), -1, -3)
                good += 1
                errors.append(None)
            except BadImage as error:
                errors.append(str(error) if encoded else "no image")
        return torch.from_numpy(images[:good]), errors

    def _table(
        self, temperature: float, decoded: tuple[tuple[int, int, int], torch.Tensor, list[str | None]]
    ) -> tuple[tuple[int, int], pa.Table]:
        """Return the rows of a decoded batch, with the number of its part and the end of the batch."""
        (number, start, stop), images, errors = decoded
        top = self._job.top or default_top(len(self._names))
        good = np.array([error is None for error in errors])
        classes, probabilities = np.zeros((stop - start, top), np.int64), np.zeros((stop - start, top), np.float32)
        if len(images):
            best = self._classifier.probabilities(images, temperature).topk(top)
            classes[good], probabilities[good] = best.indices.cpu().numpy(), best.values.cpu().numpy()
        files, rows = self._job.images.places(start, stop)
        columns: dict[str, Any] = {"file": pa.array(files, pa.string()), "row": pa.array(rows, pa.int64())}
        for place in range(top):
            columns[f"class_{place + 1}"] = pa.array(self._names[classes[:, place]], pa.string(), mask=~good)
            columns[f"probability_{place + 1}"] = pa.array(probabilities[:, place], mask=~good)
        return (number, stop), pa.table(columns | {"error": pa.array(errors, pa.string())})


class Worker:
    """An actor that predicts one part at a time."""

    def __init__(self, job: Job, use_gpu: bool, num_cpus: int) -> None:
        self._predictor = Predictor(job, Ranks.alone(use_gpu=use_gpu, num_cpus=num_cpus))

    def calibration(self) -> Calibration:
        """Return the calibration; it is fitted here if none is stored next to the checkpoint."""
        return self._predictor.calibration

    def part(self, number: int, temperature: float) -> pa.Table:
        """Return the rows of a part."""
        return next(self._predictor.parts([number], temperature))[1]


@dataclass(frozen=True)
class Predicted:
    """Result of a job: number of images, number of unreadable images, and the calibration."""

    num_images: int
    num_bad: int
    calibration: Calibration


def predict(job: Job, out: Path, advance: Advance, *, workers: int = 1, cpus_per_worker: int = 1) -> Predicted:
    """Write a row for each image to a Parquet or CSV file, which appears only when it is complete.

    Finished parts are kept in OUT.parts until then; if interrupted, the same call reuses them.

    Args:
        job: checkpoint, images and options.
        out: FILE.parquet or FILE.csv. The calibration is stored in the metadata of the Parquet schema, or in FILE.csv.json.
        advance: called with (done, total) numbers of images.
        workers: number of Ray workers; 1 for this process.
        cpus_per_worker: cores for each Ray worker.

    Raises:
        BadInput: `out` exists, its parts belong to another job, the checkpoint, its validation split or an image file cannot be
            read, or the workers do not fit the cluster.
        RunFailed: workers were lost too often, or writing failed.
    """
    parts = out.with_name(f"{out.name}.parts")
    if out.exists():
        raise BadInput("--out", "must be a new file", but=f"{out} exists", remedy="delete it, or choose another")
    try:
        parts.mkdir(parents=True, exist_ok=True)
        job = _checked(job, parts)
        total = len(job.images)
        missing = [number for number in range(job.num_parts) if not _part(parts, number).exists()]
        done = total - sum(stop - start for start, stop in map(job.span, missing))
        advance(done, total)
        run = _here if workers == 1 else _on_workers(workers, cpus_per_worker)
        for number, table in run(job, parts, missing):
            _replace(_part(parts, number), lambda path, table=table: pq.write_table(table, path))  # type: ignore[misc]
            done += len(table)
            advance(done, total)
        write_left_out(job.images, out)
        predicted = _joined(job, parts, out)
    except OSError as error:
        raise RunFailed(
            f"{out}: could not write the predictions: {one_line(error)}; check the disk, then rerun the same command "
            "(finished parts are reused)"
        ) from None
    shutil.rmtree(parts, ignore_errors=True)
    return predicted


def _here(job: Job, parts: Path, missing: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
    if missing:
        predictor = Predictor(job, Ranks.on(best_device(), os.cpu_count() or 1))
        yield from predictor.parts(missing, _settled(parts, lambda: predictor.calibration).temperature)


def _on_workers(
    workers: int, cpus_per_worker: int
) -> Callable[[Job, Path, Sequence[int]], Iterator[tuple[int, pa.Table]]]:
    def run(job: Job, parts: Path, missing: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        import ray

        with connected(dashboard=False) as nodes:
            need, _ = num_slots(ScaleConfig(workers_per_trial=workers, cpus_per_worker=cpus_per_worker), nodes)
            kind: Any = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus, max_restarts=TRIES, max_task_retries=TRIES)(
                Worker
            )
            actors = [kind.remote(job, bool(need.gpus), need.cpus) for _ in range(min(workers, len(missing)))]
            rest = iter(missing)
            running: dict[Any, tuple[int, Any]] = {}
            try:
                if actors:
                    temperature = _settled(parts, lambda: ray.get(actors[0].calibration.remote())).temperature
                # Two parts for each actor: the second is queued there, so that the actor never waits for this process.
                for actor in 2 * actors:
                    running |= {actor.part.remote(n, temperature): (n, actor) for n in islice(rest, 1)}
                while running:
                    for ready in ray.wait(list(running))[0]:
                        number, actor = running.pop(ready)
                        running |= {actor.part.remote(n, temperature): (n, actor) for n in islice(rest, 1)}
                        yield number, ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, BadInput) else error) from None
            except ray.exceptions.RayActorError as error:
                raise RunFailed(
                    f"{job.where}: lost a worker too often ({one_line(error)}); rerun the same command (finished parts are reused)"
                ) from None
            finally:
                for actor in actors:
                    ray.kill(actor)

    return run


def _checked(job: Job, parts: Path) -> Job:
    """Return the job with its number of classes per image. Raises BadInput if the folder holds parts of another job."""
    with checkpoint.opened(job.where) as folder:
        record = single_record(folder)
        num_classes = len(record.class_names)
        top = job.top or default_top(num_classes)
        if top > num_classes:
            raise BadInput("--top", f"must be at most {num_classes}, the number of classes", top, "lower it")
        job = replace(job, top=top)
        try:
            weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        except OSError as error:
            raise BadInput(
                str(folder / WEIGHTS), f"cannot be read: {one_line(error)}", remedy="copy the folder again"
            ) from None
    fields = asdict(job) | {"where": ""}
    for unrelated in ("left_out", "num_links"):
        del fields["images"][unrelated]
    fields["pictures"] = fields.pop("images")  # its name in the plans of earlier versions, whose parts are still reused
    about = json.dumps([fields, record.digest, weights], sort_keys=True)
    digest = hashlib.sha256(about.encode()).hexdigest()
    if not (parts / PLAN).exists():
        _replace(parts / PLAN, lambda path: path.write_text(digest))
    elif (parts / PLAN).read_text() != digest:
        raise BadInput(
            str(parts),
            "must hold parts of the same images, checkpoint and options",
            but="it holds parts of another job",
            remedy="delete it, or choose another --out",
        )
    return job


def _settled(parts: Path, find: Callable[[], Calibration]) -> Calibration:
    """Return the calibration that all parts use, also those that a later process writes."""
    path = parts / CALIBRATION
    if not path.exists():
        found = find()
        _replace(path, lambda temporary: temporary.write_text(json.dumps(asdict(found))))
    return Calibration(**json.loads(path.read_text()))


def _joined(job: Job, parts: Path, out: Path) -> Predicted:
    calibration = _settled(parts, lambda: Calibration(1.0))
    about = json.dumps({"checkpoint": job.where, "posthoc_tau": job.posthoc_tau, "calibration": asdict(calibration)})
    tables = (pq.read_table(_part(parts, number)) for number in range(job.num_parts))
    num_bad = 0

    def write(path: Path) -> None:
        nonlocal num_bad
        writer: Any = None
        for table in tables:
            if writer is None:
                schema = table.schema.with_metadata({b"lift_ray": about.encode()})
                writer = pyarrow.csv.CSVWriter(path, schema) if out.suffix == ".csv" else pq.ParquetWriter(path, schema)
            num_bad += len(table) - table["error"].null_count
            writer.write_table(table.cast(schema))
        writer.close()

    if out.suffix == ".csv":
        _replace(out.with_name(f"{out.name}.json"), lambda path: path.write_text(about + "\n"))
    _replace(out, write)
    return Predicted(len(job.images), num_bad, calibration)


def _part(parts: Path, number: int) -> Path:
    return parts / f"part-{number:05d}.parquet"


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
