"""Refit on Ray Train workers (scale.refit_workers), between the trials of a search and the evaluation of its final models."""

from __future__ import annotations

from collections.abc import Callable

from lift_ray.data.folds import EVERYTHING
from lift_ray.ensembles.train import MemberProgress
from lift_ray.errors import RunFailed
from lift_ray.ray_runtime.capacity import Need
from lift_ray.search.final_comparison import WORKERS
from lift_ray.search.interrupts import Interrupts
from lift_ray.search.jobs import TrainJob, trial_checkpoints
from lift_ray.search.search_data import SearchData
from lift_ray.settings.yaml_file import dump_yaml
from lift_ray.storage.layout import SETTINGS
from lift_ray.storage.output import Output
from lift_ray.training.ray_train import Job, Patience, train_on_workers


def refit_on_workers(
    job: TrainJob,
    name: str,
    dataset: str,
    data: SearchData,
    out: Output,
    need: Need,
    interrupts: Interrupts,
    on_event: Callable[[], None],
) -> dict[str, int]:
    """Train a model as `train --workers` does, from its last checkpoint if there is one.

    Returns the result of its job, which is empty if the loss diverged.

    Args:
        name: name of the search.
        dataset: absolute URI.
        need: resources of each worker, and their number.
        on_event: called whenever the workers are heard, about once a second.

    Raises:
        BadInput: settings that only a worker can find invalid.
        RunFailed: workers were lost too often.
        Stopped: a signal arrived; the last checkpoint is kept.
    """
    from lift_ray.training.loop import told_to_stop  # imports torch

    title = f"{name}-{job.number:04d}-refit"
    place = out.inside(trial_checkpoints(job.number, EVERYTHING))
    place.folder.mkdir(parents=True, exist_ok=True)
    dump_yaml({"name": title, "dataset": dataset, "train_on": data.train_on, **job.config}, place.folder / SETTINGS)
    place.publish()
    interrupts.ask(told_to_stop.set)  # train_on_workers handles SIGTERM itself
    with MemberProgress(place, title) as progress:
        progress.listeners.append(lambda event: on_event())
        run = Job(title, job.config, dataset, place.url, need.cpus, train_on=data.train_on)
        try:
            train_on_workers(run, need, need.workers, Patience(), progress)
        except RunFailed:
            if progress.problem is None or not progress.problem.diverged:
                raise
            return {}
    place.publish()
    return {WORKERS: need.workers}
