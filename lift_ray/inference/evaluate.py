"""Evaluation of trained models, one or an ensemble of several, in one process without Ray or on Ray workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lift_ray.data.dataset import Dataset
from lift_ray.ensembles.ensemble import Ensemble, model_of
from lift_ray.epoch_metrics import EpochMetrics, named
from lift_ray.errors import BadInput, RunFailed, one_line
from lift_ray.evaluation.evaluator import evaluate
from lift_ray.methods.world import Ranks, join_group
from lift_ray.model.device import all_devices, best_device
from lift_ray.ray_runtime.capacity import Need, num_slots
from lift_ray.ray_runtime.session import connected, meeting_point
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import ScaleConfig
from lift_ray.storage.store import same_place
from lift_ray.training import checkpoint
from lift_ray.training.predictor import SplitPredictor
from lift_ray.training.workspace import Workspace


@dataclass(frozen=True)
class EvaluationRequest:
    """Models and images of an evaluation.

    Args:
        checkpoints: folders or URLs; several form an ensemble.
        dataset, split: images to evaluate on; a dataset by its URI, or an open one.
        taus: strengths of the post-hoc adjustment, one result for each.
        tte: mode of the test-time ensembling; None for that of each run.
        combine, weights, with_gla: arguments of `Ensemble.set_combination`.
        predictions: return the predicted class of each image and its probability.
    """

    checkpoints: tuple[str, ...]
    dataset: str | Dataset
    split: str
    taus: tuple[float, ...] = (0.0,)
    tte: str | None = None
    combine: str | None = None
    weights: tuple[float, ...] = ()
    with_gla: bool = False
    predictions: bool = False


@dataclass(frozen=True)
class Evaluated:
    """Result of an evaluation. The groups many, medium and few are those of the (first) checkpoint.

    Args:
        figures: for each tau, the metrics as `split/name` and `trained_parameters`; for a single model also the quality of the
            pseudo-labels in its last epoch.
        rows: one row for each class, for the last tau.
        report: GroupGainTable.result and the costs for an ensemble, otherwise empty.
        predicted, confidence: predicted class of each image of the split with the last tau and its probability, (N,), if requested.
    """

    figures: list[dict[str, float]]
    rows: list[dict[str, Any]]
    report: dict[str, Any]
    predicted: NDArray[np.int64] | None = None
    confidence: NDArray[np.float64] | None = None


def not_held_out(record: checkpoint.Record, dataset: Dataset, split: str) -> str:
    """Return a note if a model was trained on the images of a split; otherwise ""."""
    if split not in record.train_on.split("+") or not same_place(dataset.uri, record.dataset):
        return ""
    frac = record.config["optim"]["data_frac"]
    images = "these images" if frac == 1 else f"a part of these images (optim.data_frac={frac:g})"
    return f"the model was trained on {images}, so this accuracy is not held out"


def evaluate_here(request: EvaluationRequest, callback: Callable[[float], None] = lambda fraction: None) -> Evaluated:
    """Evaluate in this process; several models are spread over its GPUs, if any. Raises BadInput.

    Args:
        callback: called with the fraction of the images that are counted.
    """
    return evaluate_with(request, Ranks.on(best_device(), os.cpu_count() or 1), callback)


def evaluate_checkpoint(
    folder: Path, dataset: str, split: str, taus: Sequence[float] = (0.0,), tte: str | None = None
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Return the figures of one checkpoint for each tau, and one row per class for the last tau."""
    found = evaluate_here(EvaluationRequest((str(folder),), dataset, split, tuple(taus), tte))
    return found.figures, found.rows


def evaluate_with(
    request: EvaluationRequest, ranks: Ranks, callback: Callable[[float], None] = lambda fraction: None
) -> Evaluated:
    """Evaluate with the other ranks, if any: each takes a part of the split, and all return the whole result. Raises BadInput."""
    workspaces = [Workspace(request.dataset, replace(ranks, device=device)) for device in all_devices(ranks.device)]
    trained = [
        _trained(where, workspaces[number % len(workspaces) :] + workspaces[: number % len(workspaces)], request.tte)
        for number, where in enumerate(request.checkpoints)
    ]
    models, histories = [model for model, _ in trained], [history for _, history in trained]
    model, began = _together(models, request), time.monotonic()
    members = list(model.models.values()) if isinstance(model, Ensemble) else [model]
    table = model.gain_table(request.taus[-1]) if isinstance(model, Ensemble) else None
    split = workspaces[0].dataset.split(request.split)
    counters = [table] if table else []
    found = evaluate(model, split, request.taus, predictions=request.predictions, counters=counters, callback=callback)
    per_class, predictions = found.at_tau[-1].per_class, found.at_tau[-1].predictions
    shared: dict[str, float] = {"trained_parameters": model.num_trained}
    if len(members) == 1:
        if histories[0]:
            shared |= named("unlabelled", histories[0][-1].unlabelled)
        rows, report = members[0].per_class_rows(per_class), {}
    else:
        assert isinstance(model, Ensemble)
        assert table is not None
        epochs = list(chain.from_iterable(histories))
        cost = {
            "trained_parameters": model.num_trained,
            "evaluate_s": time.monotonic() - began,
            "train_s": sum(epoch.cost.get("train_s", epoch.seconds.get("train_s", 0.0)) for epoch in epochs),
        }
        rows, report = model.per_class_rows(per_class), model.report(request.split, per_class, table) | {"cost": cost}
    figures = [named(request.split, one.metrics) | shared for one in found.at_tau]
    return Evaluated(figures, rows, report, *(predictions or (None, None)))


def _trained(
    where: str, workspaces: list[Workspace], tte: str | None
) -> tuple[SplitPredictor | Ensemble, list[EpochMetrics]]:
    """Return the model of a checkpoint, and the metrics of its epochs."""
    with checkpoint.opened(where) as folder:
        record = checkpoint.read_record(folder)
        config = RunConfig.model_validate(
            apply_overrides(record.config, {} if tte is None else {"evaluation.tte": tte}, RunConfig)
        )
        model = model_of(config, workspaces, record.class_counts, record.groups)
        checkpoint.load_weights(folder, model)
    return model, [EpochMetrics.of(flat) for flat in record.history]


def _together(models: list[SplitPredictor | Ensemble], request: EvaluationRequest) -> SplitPredictor | Ensemble:
    """Return the model itself if there is one, or an ensemble of all models."""
    singles = {}
    for where, model in zip(request.checkpoints, models, strict=True):
        if isinstance(model, SplitPredictor):
            singles[where] = model
        elif len(models) > 1:
            raise BadInput(
                where,
                "must be a single model",
                f"an ensemble of {len(model.models)} ({', '.join(model.models)})",
                "evaluate it alone, or pass its members",
            )
    if len(singles) > 1 or (singles and request.with_gla):
        model = Ensemble(singles)
    if isinstance(model, Ensemble):
        model.set_combination(request.combine, request.weights, with_gla=request.with_gla)
    return model


class Evaluator:
    """Actor that evaluates one rank's part of a split."""

    def address(self) -> tuple[str, int]:
        """Return an address where the ranks can meet if this is the first rank."""
        return meeting_point()

    def evaluate(self, rank: int, meet: tuple[str, int], need: Need, request: EvaluationRequest) -> Evaluated:
        """Return the result of all ranks together, which is the same on each rank."""
        alone = Ranks.alone(use_gpu=bool(need.gpus), num_cpus=need.cpus)
        join_group(rank, need.workers, *meet, alone.device)
        return evaluate_with(request, replace(alone, rank=rank, world_size=need.workers))


def evaluate_on_workers(request: EvaluationRequest, workers: int, cpus_per_worker: int) -> Evaluated:
    """Evaluate on Ray workers, each of which takes a part of the images. All workers must be able to read the checkpoints.

    Raises:
        BadInput: a checkpoint or the dataset cannot be read, or the workers do not fit the cluster.
        RunFailed: a worker was lost.
    """
    import ray

    paths = [where if "://" in where else str(Path(where).absolute()) for where in request.checkpoints]
    request = replace(request, checkpoints=tuple(paths))
    with connected(dashboard=False) as nodes:
        need, _ = num_slots(ScaleConfig(workers_per_trial=workers, cpus_per_worker=cpus_per_worker), nodes)
        actor = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(Evaluator)
        evaluators = [actor.remote() for _ in range(workers)]
        try:
            meet = ray.get(evaluators[0].address.remote())
            waiting = [e.evaluate.remote(rank, meet, need, request) for rank, e in enumerate(evaluators)]
            ready, _ = ray.wait(waiting)
            first: Evaluated = ray.get(ready[0])
            return first
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BadInput):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise RunFailed(f"{', '.join(paths)}: lost a worker ({one_line(error)}); evaluate again") from None
