"""Plan of a search, printed by `--dry-run`: data, space, trials, and an estimate of the work. Nothing is trained."""

from __future__ import annotations

import os
from collections.abc import Iterator

from lift_ray.data.dataset import Dataset
from lift_ray.ray_runtime.capacity import gpus_here, lacking, need, num_fitting
from lift_ray.searching.final_comparison import further_trainings
from lift_ray.searching.search_data import SearchData, unseen_line
from lift_ray.settings.space import SpaceFile, backbones
from lift_ray.text import count

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
        size = f"{count(data.num_classes, 'class')}, {count(int(counts.sum()), 'training image')}"
        yield "data", f"{dataset}: {size}, {counts.max()} ... {counts.min()} per class"
    facts = None if data is None else SearchData.of(space, data)
    if facts is not None:
        yield from _held_out(space, facts)
    yield from _space(space)
    yield from _trials(space, space.plan.training_images if facts is None else facts.num_images["train"], facts)


def _held_out(space: SpaceFile, facts: SearchData) -> Iterator[Line]:
    images, number = facts.num_images, space.search.folds
    further = f"; folds 2 to {number} divide the {count(images['train'], 'training image')}" if number > 1 else ""
    yield "validation", f"{count(images['validation'], 'image')}{further}"
    if facts.unseen:
        yield "", unseen_line(facts.unseen, len(facts.groups.names))
    yield "groups", str(facts.groups)
    if space.test == "none":
        yield "test", "none: the result is not held out from the search"
    yield "best/", f"trained on {count(facts.final_images, 'image')} ({facts.train_on.replace('+', ' and ')})"


def _space(space: SpaceFile) -> Iterator[Line]:
    for label, values in backbones(space).items():
        backbone = space.config(values).backbone
        name, weights = f"{label}: " if label else "", " ".join(filter(None, (backbone.model, backbone.pretrained)))
        yield "backbone", f"{name}{weights} in {backbone.precision}"
    for metric, mode in space.objectives.items():
        yield "objective", f"{metric}, {mode}"
    for metric, limit in space.constraints.items():
        ends = (("at least", limit.min), ("at most", limit.max))
        yield "constraint", f"{metric} {' and '.join(f'{word} {end:g}' for word, end in ends if end is not None)}"
    for name, param in space.space.items():
        if name == "backbone":  # listed above
            continue
        when = f"   when {', '.join(f'{k} is {v}' for k, v in param.when.items())}" if param.when else ""
        yield name, f"{param}{when}"


def _trials(space: SpaceFile, num_images: int | None, facts: SearchData | None) -> Iterator[Line]:
    search, number, most = space.search, space.num_trials, space.most_epochs()
    given = f"{count(len(space.baselines), 'baseline')} first, then " if space.baselines else ""
    each = f" ({search.per_kind} for each tuner.kind)" if search.per_kind else ""
    yield "search", f"{count(number, 'trial')}{each}, {given}{search.sampler}; stops early: {search.scheduler.kind}"
    if search.seeds_best > 1:
        baseline = ", and for the first baseline" if space.baselines else ""
        yield "seeds", f"{search.seeds_best - 1} more at the end for the best settings{baseline}"
    epochs = space.expected_epochs()
    yield "epochs", f"at most {number} x {most} = {number * most}, about {epochs:.0f} with early stopping"
    if further := further_trainings(space, retrains=facts is not None and facts.retrains):
        yield (
            "after the trials",
            f"{count(further, 'more training')}, up to {count(further * most, 'epoch')}: {_further(space, facts)}",
        )
        epochs += further * most
    wanted = need(space.scale, has_gpu=gpus_here() > 0)
    if num_images and (speed := space.plan.images_per_s):
        images, unit = epochs * num_images, "GPU-hours" if wanted.gpus else "worker-hours"
        hours = f"about {images / speed / 3600:.0f} {unit} at {speed:g} images/s per worker (plan)"
        yield "work", f"{images:,.0f} training images, {hours}"
    yield "each trial", str(wanted)
    cpus, gpus = os.cpu_count() or 1, gpus_here()
    here = {"CPU": float(cpus), "GPU": float(gpus)}
    fits = f"{cpus} CPU, {gpus} GPU: fits {count(num_fitting(wanted, [here]), 'trial')} at a time"
    yield "this machine", lacking(wanted, here) or fits


def _further(space: SpaceFile, facts: SearchData | None) -> str:
    """Return the purposes of the trainings after the trials."""
    search = space.search
    confirm = f"the best {search.confirm.best} and the baselines" if search.confirm else "the best trial"
    purposes = [f"{confirm} on folds 2 to {search.folds}"] if search.folds > 1 else []
    if facts is not None and facts.retrains:
        purposes.append(f"the winner and the baselines on {facts.train_on.replace('+', ' and ')} images")
    if search.seeds_best > 1:
        purposes.append("other seeds")
    return "; ".join(purposes)
