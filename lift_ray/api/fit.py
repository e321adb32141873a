"""Training of one run: `lift_ray.fit`, which `python -m lift_ray.train` calls too."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lift_ray.api.data import open_dataset
from lift_ray.data.dataset import Dataset
from lift_ray.data.folds import training_view
from lift_ray.ensembles.train import MemberProgress, bind, place_of, train_members
from lift_ray.errors import BadInput, RunFailed, Stopped
from lift_ray.inference.classifier import Classifier
from lift_ray.inference.evaluate import EvaluationRequest, evaluate_here, evaluate_on_workers
from lift_ray.ray_runtime.capacity import Need, num_fitting, num_slots
from lift_ray.ray_runtime.session import connected, dashboard_url
from lift_ray.reporting.trial_rows import write_json
from lift_ray.settings.base import changes, dotted, settings_given
from lift_ray.settings.methods import check_splits
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import RunFile, batch_fault, read_run, too_large
from lift_ray.settings.search import ScaleConfig
from lift_ray.settings.yaml_file import dump_yaml
from lift_ray.storage.layout import CHECKPOINTS, FINAL_CHECKPOINT, SETTINGS, TOGETHER
from lift_ray.storage.output import Output
from lift_ray.terminal.evaluation_tables import print_found
from lift_ray.terminal.tables import accuracy_table, console
from lift_ray.text import count, say
from lift_ray.tracking.services import Tracked, check_service, followed, trackers
from lift_ray.training.backbone_check import check_weights_file
from lift_ray.training.checkpoint import opened, read_record
from lift_ray.training.progress import Progress
from lift_ray.training.ray_train import Job, Patience, train_alone, train_on_workers


@dataclass(frozen=True)
class FitOptions:
    """How a run is trained, apart from its settings; each as the option of `train` with its name.

    Attributes:
        workers: number of Ray workers; None to train in this process.
        cpus_per_worker: cores of each worker, or of this process.
    """

    out: str | None = None
    workers: int | None = 1
    min_workers: int | None = None
    cpus_per_worker: int = 1
    resume: bool = False
    checkpoint_s: float = 300.0
    checkpoint_steps: int | None = None
    max_failures: int = 3
    heartbeat_s: float = 1800.0
    dashboard: bool = False
    log_to: Sequence[str] = ()

    @property
    def most(self) -> int:
        """Number of processes that train, at most."""
        return self.workers or 1

    @property
    def least(self) -> int:
        """Number of processes that the run continues with, at least."""
        return min(self.min_workers or self.most, self.most)


@dataclass(frozen=True)
class FitResult:
    """Result of a training.

    Attributes:
        out: folder or URL of the results.
        metrics: test metrics by name; those of validation if the dataset has no test split.
        history: metrics of each epoch, as `train/loss` and `validation/few`; empty for an ensemble.
    """

    out: str
    metrics: dict[str, float]
    history: list[dict[str, float]]

    @property
    def classifier(self) -> Classifier:
        """The trained model; use its members' folders in OUT/members for an ensemble."""
        return Classifier.load(self.out)


def fit(
    config: RunConfig,
    data: Dataset | str,
    *,
    out: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    resume: bool = False,
    name: str = "run",
    log_to: Sequence[str] = (),
) -> FitResult:
    """Train one LIFT model and test it.

    Args:
        config: settings of the run.
        data: the dataset, or anything that `open_dataset` opens.
        out: new folder or URL for the results; None for runs/NAME-DATE-TIME.
        workers: number of Ray workers that train together; None to train in this process, without Ray.
        resume: continue the run in `out` from its last checkpoint. Without a run there, begin one.
        name: name of the run.
        log_to: also log the run to mlflow or wandb.

    Raises:
        BadInput: the settings, the data or `out` cannot be used.
        RunFailed: the training diverged, or workers were lost too often.
        Stopped: SIGTERM; call it again with `resume=True` to continue.
    """
    import torch

    opened_data = open_dataset(data)
    run = RunFile.model_validate({"name": name, "dataset": opened_data.uri, **settings_given(config)})
    target = None if out is None else os.fspath(out)
    resume = resume and target is not None and Output(target).holds(SETTINGS)
    cpus = 1 if workers else torch.get_num_threads()
    return train_run(run, opened_data, FitOptions(target, workers, cpus_per_worker=cpus, resume=resume, log_to=log_to))


def check_run(run: RunFile, data: Dataset, options: FitOptions) -> None:
    """Raise BadInput for settings, data and options that do not go together."""
    data.split("train")
    check_splits(run.method, data.uri, data.splits)
    if options.workers is None and options.dashboard:
        raise BadInput(
            "--dashboard", "cannot be used with --no-ray, because Ray serves it", remedy="leave one of them out"
        )
    if "tensorboard" in options.log_to:
        raise BadInput("--log-to", "must be mlflow or wandb", "tensorboard", "leave it out, every run writes it")
    for service in options.log_to:
        check_service(service)
    for one in members_of(run).values() or [run]:
        _check_workers(one, options.most, options.least)
        _check_batch(one, data)
        _check_precision(one, options.workers is None)
        check_weights_file(one.backbone)
    if options.resume and options.out is None:
        raise BadInput("--resume", "requires the run to continue", but="--out is missing", remedy="add --out FOLDER")


def train_run(run: RunFile, whole: Dataset, options: FitOptions) -> FitResult:
    """Train a run, or the members of an ensemble, and test it.

    Args:
        whole: the dataset with all its splits, before `train_on` chooses.
    """
    data = training_view(whole, run.train_on)
    check_run(run, data, options)
    output = Output(options.out or f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    check_out(output, run, options.resume)
    members, cpus = members_of(run), options.cpus_per_worker

    def train_one(one: RunFile, target: Output, need: Need | None = None, others: bool = False) -> Progress:
        where, config = str(need or f"this process, {cpus} CPU"), one.config.to_dict()
        saving = options.checkpoint_s, options.checkpoint_steps
        job = Job(one.name, config, data.uri, target.url, cpus, *saving, one.train_on)
        with _begun(one, data.uri, target, where, services, others=others) as progress:
            if need is None:
                train_alone(job, progress)
            else:
                patience = Patience(options.max_failures, options.heartbeat_s)
                train_on_workers(job, need, options.least, patience, progress)
        return progress

    with trackers(list(options.log_to), run.name, output.folder) as services:
        if options.workers is None:
            return _train_all(run, members, data, output, train_one, 1, None)
        with connected(dashboard=options.dashboard, metadata={"job_name": run.name}) as nodes:
            if url := dashboard_url():
                say(f"dashboard: {url} (for the token it asks for: ray get-auth-token)")
            fits, _ = num_slots(ScaleConfig(workers_per_trial=options.least, cpus_per_worker=cpus), nodes)
            need = replace(fits, workers=options.workers)
            at_once = max(1, min(len(members), num_fitting(need, nodes)))
            on_workers = partial(train_one, need=need, others=at_once > 1)
            return _train_all(run, members, data, output, on_workers, at_once, fits)


def members_of(run: RunFile) -> dict[str, RunFile]:
    """Return the member runs of `method: backdoor` by name; none for other methods."""
    return {
        name: RunFile.model_validate(
            {"name": name, "dataset": run.dataset, "train_on": run.train_on, **config.model_dump()}
        )
        for name, config in run.config.members().items()
    }


def _train_all(
    run: RunFile,
    members: dict[str, RunFile],
    data: Dataset,
    output: Output,
    train_one: Callable[[RunFile, Output], Progress],
    at_once: int,
    need: Need | None,
) -> FitResult:
    """Train one model, or all members and combine them; then print the metrics.

    Args:
        run: the run.
        members: its members by name; none for a single model.
        data: the dataset.
        output: the result folder.
        train_one: trains one run in a result folder.
        at_once: number of members that are trained at once.
        need: resources of the workers that evaluate the ensemble; None to use this process.
    """
    if not members:
        progress = train_one(run, output)
        _print_found(run, output, progress)
        with opened(output.url) as folder:
            history = read_record(folder).history
        return FitResult(output.url, dict(progress.last.test or progress.last.validation), history)

    places = {name: place_of(output, name) for name in members}
    with _settings_written(run, data.uri, output, *places.values()):
        train_members(places, lambda name, place: train_one(members[name], place), at_once)
    bind(run.config, places, output)
    split = "test" if "test" in data.splits else "validation"
    question = EvaluationRequest((output.url,), data.uri, split, (run.evaluation.posthoc_tau,))
    found = evaluate_on_workers(question, need.workers, need.cpus) if need else evaluate_here(question)
    write_json({**found.figures[0], **found.report}, output.folder / TOGETHER)
    output.publish()
    print_found(f"{split} accuracy (%)", split, [(run.name, found.figures[0])], found.report)
    say(f"files in {output}: checkpoint, members, {TOGETHER}, {SETTINGS}")
    metrics = {name.removeprefix(f"{split}/"): value for name, value in found.figures[0].items()}
    return FitResult(output.url, metrics, [])


def _write_settings(run: RunFile, dataset: str, output: Output) -> None:
    output.folder.mkdir(parents=True, exist_ok=True)
    dump_yaml(as_file(run, dataset, run.config), output.folder / SETTINGS)
    output.publish()


@contextmanager
def _settings_written(run: RunFile, dataset: str, *outputs: Output) -> Iterator[None]:
    """Write run.yaml to the first of the folders, and remove it again if what follows fails before there is a checkpoint.

    A folder with a run.yaml counts as taken, and without a checkpoint there is nothing in it to continue. A run that was stopped
    keeps it: `--resume` begins it anew, and a worker may still write its checkpoint.
    """
    output = outputs[0]
    _write_settings(run, dataset, output)
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException:
        with suppress(BadInput, RunFailed):  # the first error is the one to report
            if not any(place.names(CHECKPOINTS) or place.holds(FINAL_CHECKPOINT) for place in outputs):
                output.remove(SETTINGS)
        raise


def as_file(run: RunFile, dataset: str, config: RunConfig) -> dict[str, Any]:
    """Return the content of a run file with the given dataset and settings."""
    train_on = {} if run.train_on == "train" else {"train_on": run.train_on}
    return {"name": run.name, "dataset": dataset, **train_on, **config.to_dict()}


@contextmanager
def _begun(
    run: RunFile, dataset: str, output: Output, where: str, services: Sequence[Tracked], *, others: bool = False
) -> Iterator[Progress]:
    """Write run.yaml, announce the run, log it to the services, and show its progress.

    Args:
        others: True if other runs are trained at the same time.
    """
    with (
        _settings_written(run, dataset, output),
        followed(services, run.name, run.config.to_dict()) as tell,
        MemberProgress(output, run.name) if others else Progress(output) as progress,
    ):
        say(f"{run.name}: {where}, {count(run.optim.epochs, 'epoch')}; results in {output}")
        progress.listeners.append(tell)
        yield progress
    output.publish()


def _print_found(run: RunFile, output: Output, progress: Progress) -> None:
    last = progress.last
    split = "test" if last.test else "validation"
    console().print(accuracy_table(f"{split} accuracy (%)", split, [(run.name, last)]))
    for reason, number in Counter(progress.retries).items():
        say(f"retried {count(number, 'time')}: {reason}")
    say(f"files in {output}: checkpoint, metrics.jsonl, {SETTINGS}, tensorboard")


def _check_workers(run: RunFile, most: int, least: int) -> None:
    for workers in {most, *range(least, most)}:
        if fault := batch_fault(run.optim.global_batch_size, workers, "optim.global_batch_size"):
            raise fault


def _check_batch(run: RunFile, data: Dataset) -> None:
    """Raise BadInput if a batch is larger than the training split."""
    number, size = data.split("train").subset(run.optim.data_frac).num_samples, run.optim.global_batch_size
    if run.tuner.kind != "zero_shot" and size > number:
        raise too_large(size, number)


def _check_precision(run: RunFile, no_ray: bool) -> None:
    """Raise BadInput if this process is to compute in a precision that its device does not have."""
    if not no_ray or run.backbone.precision == "fp32":
        return
    from lift_ray.model.device import best_device, precision_fault

    if fault := precision_fault(run.backbone.precision, best_device()):
        raise fault


def check_out(output: Output, run: RunFile, resume: bool) -> None:
    """Refuse to overwrite a run, and to resume a run that has other settings."""
    holds_run = output.holds(SETTINGS)
    if not resume:
        if holds_run:
            raise BadInput(
                output.shown,
                "must be a new folder",
                but="it already contains a run",
                remedy="add --resume, or use another --out",
            )
        return
    if not holds_run:
        raise BadInput(
            output.shown,
            "must contain a run to continue",
            but=f"there is no {SETTINGS}",
            remedy="check --out, or leave out --resume",
        )
    with output.fetched(SETTINGS) as path:
        stored = read_run(path)
    was, given = (dict(dotted({"train_on": one.train_on, **one.config.to_dict()})) for one in (stored, run))
    if changed := changes(was, given):
        raise BadInput(
            f"{output.shown}/{SETTINGS}",
            "the settings must be those the run started with",
            changed,
            "restore them, or give another --out",
        )
