"""python -m lift_ray.train: one run of LIFT on Ray Train workers or in one process; several runs for `method: backdoor`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, RunFailed, Stopped, run_and_exit
from lift_ray.storage.layout import CHECKPOINTS, FINAL_CHECKPOINT, SETTINGS, TOGETHER
from lift_ray.text import count, say

if TYPE_CHECKING:
    from lift_ray.data.dataset import Dataset
    from lift_ray.ray_runtime.capacity import Need
    from lift_ray.settings.run import RunConfig
    from lift_ray.settings.run_file import RunFile
    from lift_ray.storage.output import Output
    from lift_ray.tracking.services import Tracked
    from lift_ray.training.progress import Progress


@cli.app.command()
def train(
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Settings of the run.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Override settings of the file.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder or URL (s3://, gs://) for the results.  [runs/NAME-DATE-TIME]")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of worker processes that train together.")] = 1,
    min_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Continue with this many if the cluster shrinks, and grow again later.  [--workers]"),
    ] = None,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores of each worker.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    no_ray: Annotated[
        bool, typer.Option("--no-ray", help="Train in this process, without Ray, as a single worker.")
    ] = False,
    checkpoint_s: Annotated[
        float, typer.Option(min=0, help="Seconds between checkpoints, in addition to one after each epoch.")
    ] = 300.0,
    checkpoint_steps: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints, in addition.")] = None,
    max_failures: Annotated[int, typer.Option(min=0, help="Number of times that workers may be lost.")] = 3,
    heartbeat_s: Annotated[
        float, typer.Option(min=1, help="Replace workers that report nothing for this many seconds.")
    ] = 1800.0,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve Ray's dashboard if Ray is started here.")
    ] = False,
    log_to: Annotated[
        list[str] | None, typer.Option(metavar="SERVICE", help="Also log the run to mlflow or wandb; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print settings, steps and memory; start nothing.")
    ] = False,
) -> None:
    """Train one LIFT model and test it. Lost workers are replaced, and the run continues from its last checkpoint.

    With `method: backdoor`, several models are trained, as many at once as fit the cluster, and tested as an ensemble.

    \b
    Examples:
      python -m lift_ray.train search_spaces/lift_plus.yaml
      python -m lift_ray.train best.yaml optim.epochs=10 --workers 2 --out runs/mine
      python -m lift_ray.train best.yaml optim.epochs=10 --workers 8 --min-workers 4 --out s3://bucket/mine --resume
    """
    if not dry_run:  # whose output is a run file
        say(f"reading {run_file} ...")  # the imports below take seconds on a slow machine
    from lift_ray.data.folds import training_view
    from lift_ray.data.open import open_dataset
    from lift_ray.settings.methods import check_splits
    from lift_ray.settings.overrides import parse_overrides
    from lift_ray.settings.run_file import read_run
    from lift_ray.storage.output import Output
    from lift_ray.tracking.services import check_service

    run = read_run(run_file, parse_overrides(settings or []))
    data = training_view(open_dataset(run.dataset), run.train_on)
    data.split("train")
    check_splits(run.method, data.uri, data.splits)
    members = _members(run)
    least = min(min_workers or workers, workers)
    if no_ray and dashboard:
        raise BadInput(
            "--dashboard", "cannot be used with --no-ray, because Ray serves it", remedy="leave one of them out"
        )
    if "tensorboard" in (log_to or []):
        raise BadInput("--log-to", "must be mlflow or wandb", "tensorboard", "leave it out, every run writes it")
    for service in log_to or []:
        check_service(service)
    for one in members.values() or [run]:
        _check_workers(one, workers, least, no_ray)
        _check_batch(one, data)
        _check_precision(one, no_ray)
    out = out or run.out
    if resume and out is None:
        raise BadInput("--resume", "requires the run to continue", but="--out is missing", remedy="add --out FOLDER")
    if dry_run:
        if out and "://" not in out:
            _check_out(Output(out), run, resume)
        for one in members.values() or [run]:
            _print_plan(one, data, workers, checkpoint_s)
        return
    from lift_ray.ray_runtime.capacity import num_fitting, num_slots
    from lift_ray.ray_runtime.session import connected, dashboard_url
    from lift_ray.settings.search import ScaleConfig
    from lift_ray.tracking.services import trackers
    from lift_ray.training.ray_train import Job, Patience, train_alone, train_on_workers

    output = Output(out or f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    _check_out(output, run, resume)

    def train_one(one: RunFile, target: Output, need: Need | None = None, others: bool = False) -> Progress:
        where = str(need or f"this process, {cpus_per_worker} CPU")
        config = one.config.to_dict()
        job = Job(one.name, config, data.uri, target.url, cpus_per_worker, checkpoint_s, checkpoint_steps, one.train_on)
        with _begun(one, data.uri, target, where, services, others=others) as progress:
            if need is None:
                train_alone(job, progress)
            else:
                train_on_workers(job, need, least, Patience(max_failures, heartbeat_s), progress)
        return progress

    with trackers(log_to or [], run.name, output.folder) as services:
        if no_ray:
            _train_all(run, members, data, output, train_one, 1, None)
            return
        with connected(dashboard=dashboard, metadata={"job_name": run.name}) as nodes:
            if url := dashboard_url():
                say(f"dashboard: {url} (for the token it asks for: ray get-auth-token)")
            fits, _ = num_slots(ScaleConfig(workers_per_trial=least, cpus_per_worker=cpus_per_worker), nodes)
            need = replace(fits, workers=workers)
            at_once = max(1, min(len(members), num_fitting(need, nodes)))
            on_workers = partial(train_one, need=need, others=at_once > 1)
            _train_all(run, members, data, output, on_workers, at_once, fits)


def _members(run: RunFile) -> dict[str, RunFile]:
    """Return the member runs of `method: backdoor` by name; none for other methods."""
    from lift_ray.settings.run_file import RunFile

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
) -> None:
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
        _print_found(run, output, train_one(run, output))
        return
    from lift_ray.ensembles.train import bind, place_of, train_members
    from lift_ray.inference.evaluate import EvaluationRequest, evaluate_here, evaluate_on_workers
    from lift_ray.reporting.trial_rows import write_json
    from lift_ray.terminal.evaluation_tables import print_found

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


def _print_plan(run: RunFile, data: Dataset, workers: int, checkpoint_s: float) -> None:
    """Print the settings as YAML, and the plan as comments below them; the output is a valid run file."""
    from ruamel.yaml import YAML

    from lift_ray.ray_runtime.capacity import gpus_here
    from lift_ray.training.plan import plan

    config, lines = plan(run, data, workers, checkpoint_s)
    if run.backbone.precision != "fp32" and not gpus_here():
        lines["precision"] = f"{run.backbone.precision} requires a GPU, and this machine has none: run it on a cluster"
    YAML().dump(_as_file(run, data.uri, config), sys.stdout)
    for name, text in lines.items():
        say(f"# {name}: {text}")


def _write_settings(run: RunFile, dataset: str, output: Output) -> None:
    from lift_ray.settings.yaml_file import dump_yaml

    output.folder.mkdir(parents=True, exist_ok=True)
    dump_yaml(_as_file(run, dataset, run.config), output.folder / SETTINGS)
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


def _as_file(run: RunFile, dataset: str, config: RunConfig) -> dict[str, Any]:
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
    from lift_ray.ensembles.train import MemberProgress
    from lift_ray.tracking.services import followed
    from lift_ray.training.progress import Progress

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
    from lift_ray.terminal.tables import accuracy_table, console

    last = progress.last
    split = "test" if last.test else "validation"
    console().print(accuracy_table(f"{split} accuracy (%)", split, [(run.name, last)]))
    for reason, number in Counter(progress.retries).items():
        say(f"retried {count(number, 'time')}: {reason}")
    say(f"files in {output}: checkpoint, metrics.jsonl, {SETTINGS}, tensorboard")


def _check_workers(run: RunFile, most: int, least: int, no_ray: bool) -> None:
    from lift_ray.settings.run_file import batch_fault

    if no_ray and most > 1:
        raise BadInput("--workers", "must be 1 with --no-ray", most, "leave one of them out")
    for workers in {most, *range(least, most)}:
        if fault := batch_fault(run.optim.global_batch_size, workers, "optim.global_batch_size"):
            raise fault


def _check_batch(run: RunFile, data: Dataset) -> None:
    """Raise BadInput if a batch is larger than the training split."""
    from lift_ray.settings.run_file import too_large

    number, size = data.split("train").subset(run.optim.data_frac).num_samples, run.optim.global_batch_size
    if run.tuner.kind != "zero_shot" and size > number:
        raise too_large(size, number)


def _check_precision(run: RunFile, no_ray: bool) -> None:
    """Raise BadInput if this process would compute in another precision than fp32 without a GPU."""
    from lift_ray.ray_runtime.capacity import gpus_here

    if no_ray and run.backbone.precision != "fp32" and not gpus_here():
        raise BadInput(
            "backbone.precision",
            f"{run.backbone.precision} requires a GPU",
            but="this machine has none",
            remedy="set backbone.precision=fp32, or leave out --no-ray and run on a cluster",
        )


def _check_out(output: Output, run: RunFile, resume: bool) -> None:
    """Refuse to overwrite a run, and to resume a run that has other settings."""
    from lift_ray.settings.base import changes, dotted
    from lift_ray.settings.run_file import read_run

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


main = partial(cli.run, "lift_ray.train")

if __name__ == "__main__":
    run_and_exit(main)
