"""Repeats of the best settings and the first baseline with other seeds, which show how much of a difference is chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lift_ray.reporting.study_files import BEST_FOUND
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching.confirmation import Choice, compared_baselines
from lift_ray.searching.jobs import FIRST_REPEAT, TrainJob
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import SpaceFile

Repeated = tuple[str, TrialRow, float | None]
"""Label, trial, and post-hoc tau; None for that of its settings."""


def repeated(space: SpaceFile, rows: Sequence[TrialRow], choice: Choice) -> list[Repeated]:
    """Return what `search.seeds_best` repeats: the winner with its post-hoc tau, and the first baseline if it is another trial."""
    best, labels = choice.row, space.baseline_labels()
    tau = choice.posthoc.tau if choice.posthoc.is_recommended else None
    found: list[Repeated] = [(BEST_FOUND, best, tau)]
    for row in compared_baselines(space, rows, is_over=True):
        if row is not best and row.baseline is not None and labels[row.baseline] == labels[0]:
            found.append((labels[0], row, None))
    return found


def repeat_jobs(space: SpaceFile, row: TrialRow, tau: float | None, fold: int) -> list[TrainJob]:
    """Return jobs for a trial's settings with each further seed, trained on the same images as the final models.

    Their numbers depend only on the trial and the seed, and name their checkpoints. A resumed search repeats none of them.
    """
    config = space.config(row.values).to_dict()
    return [
        TrainJob(
            FIRST_REPEAT + 1000 * row.number + k,
            apply_overrides(config, {"seed": (config["seed"] + k) % 2**32}, RunConfig),
            fold,
            then="test" if space.test == "split" else "keep",
            tau=tau,
        )
        for k in range(1, space.search.seeds_best)
    ]


def seed_results(
    space: SpaceFile,
    wanted: Sequence[Repeated],
    results: Mapping[str, dict[str, Any]],
    compared: Sequence[tuple[str, Mapping[str, Any]]],
    fold: int,
) -> list[dict[str, Any]]:
    """Return label, seed, and metrics of validation and test of each run: first the compared trials, then the repeats.

    Repeats that diverged are left out. Empty if nothing is repeated.
    """
    if space.search.seeds_best == 1:
        return []
    known = dict(compared)
    own, others = [], []
    for label, row, tau in wanted:
        figures = {name: value for name, value in known[label].items() if name != "predictions"}
        own.append({"label": label, "seed": space.config(row.values).seed, **figures})
        for job in repeat_jobs(space, row, tau, fold):
            if found := results[job.key]:
                others.append({"label": label, "seed": job.config["seed"], **found})
    return [*own, *others]
