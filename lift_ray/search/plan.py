"""Plan of a search, printed by `--dry-run`: data, space, trials, and an estimate of the work. Nothing is trained."""

from __future__ import annotations

import os
from collections.abc import Iterator

from lift_ray.data.dataset import Dataset
from lift_ray.ray_runtime.capacity import gpus_here, lacking, need, num_fitting
from lift_ray.settings.search import expected_epochs
from lift_ray.settings.space import SpaceFile

Line = tuple[str, str]


def plan(space: SpaceFile, dataset: str, data: Dataset | None) -> Iterator[Line]:
    """Yield a name and a text for each line of the plan.

    Args:
        space: the search.
        dataset: absolute URI.
        data: None for remote data, which a dry run does not open.
    """
    if data is None:
        yield "data", f"{dataset} (remote: not opened in a dry run)"
    else:
        counts = data.split("train").class_counts(data.num_classes)
        size = (
            f"{data.num_classes} classes, {counts.sum():,} training images, {counts.max()} ... {counts.min()} per class"
        )
        yield "data", f"{dataset}: {size}"
    yield from _space(space)
    yield from _trials(space, space.plan.training_images if data is None else data.split("train").num_samples)


def _space(space: SpaceFile) -> Iterator[Line]:
    backbone = space.config({}).backbone
    yield "backbone", f"{backbone.model} {backbone.pretrained or ''} in {backbone.precision}"
    for metric, mode in space.objectives.items():
        yield "objective", f"{metric}, {mode}"
    for metric, limit in space.constraints.items():
        ends = (("at least", limit.min), ("at most", limit.max))
        yield "constraint", f"{metric} {' and '.join(f'{word} {end:g}' for word, end in ends if end is not None)}"
    for name, param in space.space.items():
        when = f"   when {', '.join(f'{k} is {v}' for k, v in param.when.items())}" if param.when else ""
        yield name, f"{param}{when}"


def _trials(space: SpaceFile, num_images: int | None) -> Iterator[Line]:
    search, number, most = space.search, space.num_trials, space.most_epochs()
    given = f"{len(space.baselines)} baselines first, then " if space.baselines else ""
    each = f" ({search.per_kind} for each tuner.kind)" if search.per_kind else ""
    yield "search", f"{number} trials{each}, {given}{search.sampler}; stops early: {search.scheduler.kind}"
    if search.seeds_best > 1:
        baseline = ", and for the first baseline" if space.baselines else ""
        yield "seeds", f"{search.seeds_best - 1} more at the end for the best settings{baseline}"
    drawn = max(0, number - len(space.baselines))
    epochs = (number - drawn) * most + drawn * expected_epochs(search.scheduler, most)
    yield "epochs", f"at most {number} x {most} = {number * most}, about {epochs:.0f} with early stopping"
    wanted = need(space.scale, has_gpu=gpus_here() > 0)
    if num_images and (speed := space.plan.images_per_s):
        images, unit = epochs * num_images, "GPU-hours" if wanted.gpus else "worker-hours"
        hours = f"about {images / speed / 3600:.0f} {unit} at {speed:g} images/s per worker (plan)"
        yield "work", f"{images:,.0f} training images, {hours}"
    yield "each trial", str(wanted)
    cpus, gpus = os.cpu_count() or 1, gpus_here()
    here = {"CPU": float(cpus), "GPU": float(gpus)}
    fits = f"{cpus} CPU, {gpus} GPU: fits {num_fitting(wanted, [here])} trials at a time"
    yield "this machine", lacking(wanted, here) or fits
