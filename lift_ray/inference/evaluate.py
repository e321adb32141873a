"""Evaluating finished models, each alone or several together: in one process without Ray, or shared out to Ray workers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lift_ray.ensembles.ensemble import Ensemble, run_of
from lift_ray.errors import BadInput, RunFailed
from lift_ray.methods.world import Ranks, join_group
from lift_ray.ray_runtime.capacity import Need, num_slots
from lift_ray.ray_runtime.session import connected, meeting_point
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import ScaleConfig
from lift_ray.training import checkpoint
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace


@dataclass(frozen=True)
class EvaluationRequest:
    """What to find out about trained models.

    Args:
        checkpoints: folders or URLs; several answer together.
        dataset, split: which images.
        taus: strengths of the post-hoc adjustment, one result for each.
        tte: test-time ensembling, also where the run was without.
        combine, weights, with_gla: as in `Ensemble.answer`.
    """

    checkpoints: tuple[str, ...]
    dataset: str
    split: str
    taus: tuple[float, ...] = (0.0,)
    tte: bool = False
    combine: str | None = None
    weights: tuple[float, ...] = ()
    with_gla: bool = False


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found; many, medium and few go by the counts that the (first) model was trained with.

    Args:
        figures: for each tau the metrics as `split/name`, trained_parameters, and of a single model how good the pseudo-labels of its
            last epoch were.
        rows: one for each class, for the last tau.
        report: GroupGainTable.result where several models answer together, otherwise empty.
    """

    figures: list[dict[str, float]]
    rows: list[dict[str, Any]]
    report: dict[str, Any]


def evaluate_here(question: EvaluationRequest) -> Evaluated:
    """Evaluate in this process, several models shared out to its GPUs if it has some. Raises BadInput."""
    ranks = Ranks.alone(use_gpu=torch.cuda.is_available(), num_cpus=os.cpu_count() or 1)
    return _evaluate(question, ranks)


def evaluate_checkpoint(
    folder: Path, dataset: str, split: str, taus: Sequence[float] = (0.0,), tte: bool = False
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """The figures of one checkpoint for each tau, and a row for each class for the last."""
    found = evaluate_here(EvaluationRequest((str(folder),), dataset, split, tuple(taus), tte))
    return found.figures, found.rows


def devices(ranks: Ranks) -> list[torch.device]:
    """Where the models of this process go in turn: its own device first, then the other GPUs that it sees."""
    if ranks.device.type != "cuda":
        return [ranks.device]
    return [ranks.device, *(torch.device("cuda", number) for number in range(1, torch.cuda.device_count()))]


def _evaluate(question: EvaluationRequest, ranks: Ranks) -> Evaluated:
    warms = [Workspace(question.dataset, replace(ranks, device=device)) for device in devices(ranks)]
    runs = [
        _trained(where, warms[number % len(warms) :] + warms[: number % len(warms)], question.tte)
        for number, where in enumerate(question.checkpoints)
    ]
    run, began = _together(runs, question), time.monotonic()
    figures = [
        found | {"trained_parameters": run.num_trained} for found in run.evaluate_taus(question.split, question.taus)
    ]
    if not isinstance(run, Ensemble) or len(run.runs) == 1:
        learnt = {
            name: value for name, value in (runs[0].history or [{}])[-1].items() if name.startswith("unlabelled/")
        }
        return Evaluated([found | learnt for found in figures], run.per_class_rows(), {})
    epochs = [epoch for run in runs for epoch in run.history]
    cost = {
        "trained_parameters": run.num_trained,
        "evaluate_s": time.monotonic() - began,
        "train_s": sum(epoch.get("cost/train_s", epoch.get("time/train_s", 0.0)) for epoch in epochs),
    }
    report = run.report(question.split) | {"cost": cost}
    return Evaluated(figures, run.per_class_rows(), report)


def _trained(where: str, warms: list[Workspace], tte: bool) -> Run:
    with checkpoint.opened(where) as folder:
        record = checkpoint.read_record(folder)
        config = RunConfig.model_validate(
            apply_overrides(record.config, {"evaluation.tte": True} if tte else {}, RunConfig)
        )
        run = run_of(config, warms, record.class_counts)
        checkpoint.load_weights(folder, run.model)
    run.history = record.history
    return run


def _together(runs: list[Run], question: EvaluationRequest) -> Run:
    """One run for all of them."""
    if len(runs) > 1:
        for where, run in zip(question.checkpoints, runs, strict=True):
            if isinstance(run, Ensemble):
                raise BadInput(
                    f"{where}: must be a single model, but it has {len(run.runs)} itself ({', '.join(run.runs)}); "
                    "evaluate it alone, or give its members"
                )
    run = runs[0]
    if len(runs) > 1 or (question.with_gla and not isinstance(run, Ensemble)):
        run = Ensemble(RunConfig(), dict(zip(question.checkpoints, runs, strict=True)))
    if isinstance(run, Ensemble):
        run.answer(question.combine, question.weights, with_gla=question.with_gla)
    return run


class Evaluator:
    """An actor that evaluates one rank's share of a split."""

    def address(self) -> tuple[str, int]:
        """Where the ranks may meet, if this is the first."""
        return meeting_point()

    def evaluate(self, rank: int, meet: tuple[str, int], need: Need, question: EvaluationRequest) -> Evaluated:
        """What all ranks find together, the same on each."""
        alone = Ranks.alone(use_gpu=bool(need.gpus), num_cpus=need.cpus)
        join_group(rank, need.workers, *meet, alone.device)
        return _evaluate(question, replace(alone, rank=rank, world_size=need.workers))


def evaluate_on_workers(question: EvaluationRequest, workers: int, cpus_per_worker: int) -> Evaluated:
    """As `evaluate_here`, each image on one of several Ray workers, which all reach the checkpoints.

    Raises:
        BadInput: also when so many workers do not fit the cluster.
        RunFailed: a worker was lost.
    """
    import ray

    paths = [where if "://" in where else str(Path(where).absolute()) for where in question.checkpoints]
    question = replace(question, checkpoints=tuple(paths))
    with connected(dashboard=False) as nodes:
        need, _ = num_slots(ScaleConfig(workers_per_trial=workers, cpus_per_worker=cpus_per_worker), nodes)
        actor = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(Evaluator)
        evaluators = [actor.remote() for _ in range(workers)]
        try:
            meet = ray.get(evaluators[0].address.remote())
            waiting = [e.evaluate.remote(rank, meet, need, question) for rank, e in enumerate(evaluators)]
            ready, _ = ray.wait(waiting)
            first: Evaluated = ray.get(ready[0])
            return first
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BadInput):
                raise BadInput(str(error.cause)) from None
            raise
        except ray.exceptions.RayActorError as error:
            raise RunFailed(
                f"{', '.join(paths)}: the workers must finish, but one was lost ({str(error).splitlines()[0]}); "
                "evaluate again"
            ) from None
