"""Evaluating finished models: in one process without Ray, or shared out to Ray workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lift_ray.distributed import checkpoint
from lift_ray.distributed.capacity import Need, num_slots
from lift_ray.distributed.cluster import connected, meeting_point
from lift_ray.distributed.ranks import Ranks, join_group
from lift_ray.distributed.run import Run
from lift_ray.distributed.warm import Warm
from lift_ray.errors import BadInput, RunFailed
from lift_ray.settings.run import RunConfig, apply_overrides
from lift_ray.settings.space import Scale


def evaluate_checkpoint(
    folder: Path, dataset: str, split: str, taus: Sequence[float] = (0.0,), tte: bool = False
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Metrics of a checkpoint on a split; many, medium and few by the counts it was trained with.

    Args:
        taus: strengths of the post-hoc adjustment, one result for each.
        tte: test-time ensembling, also where the run was without.

    Returns:
        The figures for each tau, and a row for each class for the last.
    """
    ranks = Ranks.alone(use_gpu=torch.cuda.is_available(), num_cpus=os.cpu_count() or 1)
    return _evaluate_checkpoint(folder, Warm(dataset, ranks), split, taus, tte)


def _evaluate_checkpoint(
    folder: Path, warm: Warm, split: str, taus: Sequence[float], tte: bool
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    record = checkpoint.read_record(folder)
    config = apply_overrides(record.config, {"evaluation.tte": True} if tte else {})
    run = Run(RunConfig.model_validate(config), warm, record.class_counts)
    checkpoint.load_weights(folder, run.model)
    found = [figures | {"trained_parameters": run.num_trained} for figures in run.evaluate_taus(split, taus)]
    return found, run.per_class_rows()


class Evaluator:
    """An actor that evaluates one rank's share of a split."""

    def address(self) -> tuple[str, int]:
        """Where the ranks may meet, if this is the first."""
        return meeting_point()

    def evaluate(
        self, rank: int, meet: tuple[str, int], need: Need, where: str, dataset: str, split: str,
        taus: Sequence[float], tte: bool,
    ) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:  # fmt: skip
        """The figures over all ranks, the same on each."""
        alone = Ranks.alone(use_gpu=bool(need.gpus), num_cpus=need.cpus)
        join_group(rank, need.workers, *meet, alone.device)
        warm = Warm(dataset, replace(alone, rank=rank, world_size=need.workers))
        with checkpoint.opened(where) as folder:
            return _evaluate_checkpoint(folder, warm, split, taus, tte)


def evaluate_on_workers(
    where: str, dataset: str, split: str, taus: Sequence[float], tte: bool, workers: int, cpus_per_worker: int
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """As `evaluate_checkpoint`, each image on one of several Ray workers.

    Args:
        where: folder or URL that every worker reaches.

    Raises:
        BadInput: also when so many workers do not fit the cluster.
        RunFailed: a worker was lost.
    """
    import ray

    if "://" not in where:
        where = str(Path(where).absolute())
    with connected(dashboard=False) as nodes:
        need, _ = num_slots(Scale(workers_per_trial=workers, cpus_per_worker=cpus_per_worker), nodes)
        actor = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(Evaluator)
        evaluators = [actor.remote() for _ in range(workers)]
        try:
            meet = ray.get(evaluators[0].address.remote())
            waiting = [evaluator.evaluate.remote(rank, meet, need, where, dataset, split, taus, tte)
                       for rank, evaluator in enumerate(evaluators)]  # fmt: skip
            ready, _ = ray.wait(waiting)
            first: tuple[list[dict[str, float]], list[dict[str, Any]]] = ray.get(ready[0])
            return first
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, BadInput):
                raise BadInput(str(error.cause)) from None
            raise
        except ray.exceptions.RayActorError as error:
            raise RunFailed(f"{where}: the workers must finish, but one was lost ({str(error).splitlines()[0]}); "
                            "evaluate again") from None  # fmt: skip


def evaluate_all(
    dataset: str, use_gpu: bool, num_cpus: int, jobs: list[tuple[dict[str, Any], Path | None, list[str]]]
) -> list[dict[str, float]]:
    """Metrics of several models of one data set, the tower loaded once.

    Args:
        jobs: for each model its settings, its checkpoint folder (None when nothing was trained) and the splits.
    """
    warm = Warm(dataset, Ranks.alone(use_gpu=use_gpu, num_cpus=num_cpus))
    return [_evaluate(warm, config, folder, splits) for config, folder, splits in jobs]


def _evaluate(warm: Warm, config: dict[str, Any], folder: Path | None, splits: list[str]) -> dict[str, float]:
    run = Run(RunConfig.model_validate(config), warm)
    if folder is not None:
        checkpoint.load_weights(folder, run.model)
    figures = {k: v for split in splits for k, v in run.evaluate(split).items() if not k.startswith("time/")}
    return figures | {"trained_parameters": run.num_trained}
