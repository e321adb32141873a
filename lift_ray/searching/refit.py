"""Refit on Ray Train workers (scale.refit_workers), between the trials of a search and the evaluation of its final models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lift_ray.data.folds import EVERYTHING
from lift_ray.ensembles.train import MemberProgress
from lift_ray.errors import RunFailed, Stopped
from lift_ray.ray_runtime.capacity import Need
from lift_ray.searching.final_comparison import WORKERS
from lift_ray.searching.interrupts import Interrupts
from lift_ray.searching.jobs import TrainJob, trial_checkpoints
from lift_ray.searching.state import Search
from lift_ray.settings.yaml_file import dump_yaml
from lift_ray.storage.layout import SETTINGS
from lift_ray.training.ray_train import Job, Patience, train_on_workers


def refit_all(search: Search, dataset: str, need: Need, interrupts: Interrupts, on_event: Callable[[], None]) -> None:
    """Run the refits of a search, one after the other, and store their results.

    Args:
        dataset: absolute URI.
        need: resources of a slot, whose workers are like those of a refit.
        on_event: called whenever the workers are heard, about once a second.

    Raises:
        BadInput: settings that only a worker can find invalid.
        RunFailed: workers were lost too often.
        Stopped: a signal arrived; the last checkpoint is kept.
    """
    for job in search.refits:
        if interrupts.came:
            raise Stopped("")
        search.refitted(job, _refit(job, search, dataset, need, interrupts, on_event))
        search.out.publish()


def _refit(
    job: TrainJob, search: Search, dataset: str, need: Need, interrupts: Interrupts, on_event: Callable[[], None]
) -> dict[str, int]:
    """Train a model as `train --workers` does, from its last checkpoint if there is one.

    Returns the result of its job, which is empty if the loss diverged.
    """
    from lift_ray.training.loop import told_to_stop  # imports torch

    need, train_on = replace(need, workers=search.space.scale.refit_workers), search.data.train_on
    title = f"{search.space.name}-{job.number:04d}-refit"
    place = search.out.inside(trial_checkpoints(job.number, EVERYTHING))
    place.folder.mkdir(parents=True, exist_ok=True)
    dump_yaml({"name": title, "dataset": dataset, "train_on": train_on, **job.config}, place.folder / SETTINGS)
    place.publish()
    interrupts.ask(told_to_stop.set)  # train_on_workers handles SIGTERM itself
    with MemberProgress(place, title) as progress:
        progress.listeners.append(lambda event: on_event())
        run = Job(title, job.config, dataset, place.url, need.cpus, train_on=train_on)
        try:
            train_on_workers(run, need, need.workers, Patience(), progress)
        except RunFailed:
            if progress.problem is None or not progress.problem.diverged:
                raise
            return {}
    place.publish()
    return {WORKERS: need.workers}
