"""python -m lift_ray.train: one run of LIFT on Ray Train workers, or in one process."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray.errors import BadInput, exit_codes, run_verb

if TYPE_CHECKING:
    from lift_ray.data.catalog import Dataset
    from lift_ray.distributed.progress import Progress
    from lift_ray.results.output import Output
    from lift_ray.settings.run import RunFile

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SETTINGS = "run.yaml"


@app.command()
def train(
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Change the file.")] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder or URL (s3://, gs://) for the results.  [runs/NAME-DATE-TIME]")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 1,
    min_workers: Annotated[
        int | None, typer.Option(min=1, help="Go on with so few when the cluster shrinks, and grow again.  [--workers]")
    ] = None,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores for each.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Train in this process, without Ray; one worker.")] = False,
    checkpoint_s: Annotated[
        float, typer.Option(min=0, help="Seconds between checkpoints; one more after each epoch.")
    ] = 300.0,
    checkpoint_steps: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints, too.")] = None,
    max_failures: Annotated[int, typer.Option(min=0, help="How often workers may be lost.")] = 3,
    heartbeat_s: Annotated[
        float, typer.Option(min=1, help="Workers that are silent for longer hang, and are replaced.")
    ] = 1800.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print settings, steps and memory; start nothing.")
    ] = False,
) -> None:
    """Train one LIFT model and test it. Lost workers are replaced, and the run goes on from its last checkpoint.

    \b
    Examples:
      python -m lift_ray.train search_spaces/lift_plus.yaml
      python -m lift_ray.train best.yaml optim.epochs=10 --workers 2 --out runs/mine
      python -m lift_ray.train best.yaml optim.epochs=10 --workers 8 --min-workers 4 --out s3://bucket/mine --resume
    """
    from lift_ray.data.catalog import open_dataset
    from lift_ray.settings.files import parse_overrides, read_run

    run = read_run(run_file, parse_overrides(settings or []))
    data = open_dataset(run.dataset)
    data.split("train"), data.split("validation")
    least = min(min_workers or workers, workers)
    _check_workers(run, workers, least, no_ray)
    if dry_run:
        _print_plan(run, data, workers, checkpoint_s)
        return
    if resume and out is None:
        raise BadInput("--resume: must name the run to go on with, but --out is missing; add --out FOLDER")
    from lift_ray.distributed.trainer import Job, Patience, train_alone, train_on_workers
    from lift_ray.results.output import Output

    output = Output(out or run.out or f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    _check_out(output, run, resume)
    job = Job(run.name, run.config.to_dict(), data.uri, output.url, cpus_per_worker, checkpoint_s, checkpoint_steps)
    if no_ray:
        with _begun(run, data.uri, output, f"this process, {cpus_per_worker} CPU") as progress:
            train_alone(job, progress)
    else:
        from lift_ray.distributed.capacity import num_slots
        from lift_ray.distributed.cluster import connected
        from lift_ray.settings.space import Scale

        with connected(dashboard=False) as nodes:
            fits, _ = num_slots(Scale(workers_per_trial=least, cpus_per_worker=cpus_per_worker), nodes)
            need = replace(fits, workers=workers)
            with _begun(run, data.uri, output, str(need)) as progress:
                train_on_workers(job, need, least, Patience(max_failures, heartbeat_s), progress)
    _print_found(run, output, progress)


def _print_plan(run: RunFile, data: Dataset, workers: int, checkpoint_s: float) -> None:
    """The settings as YAML, and the plan as comments below them: together they are a run file."""
    from ruamel.yaml import YAML

    from lift_ray.distributed.plan import plan

    config, lines = plan(run, data, workers, checkpoint_s)
    YAML().dump({"name": run.name, "dataset": data.uri, **config.to_dict()}, sys.stdout)
    for name, text in lines.items():
        print(f"# {name}: {text}")


@contextmanager
def _begun(run: RunFile, dataset: str, output: Output, where: str) -> Iterator[Progress]:
    """Write run.yaml, say what begins, and show how it goes."""
    from lift_ray.distributed.progress import Progress
    from lift_ray.settings.files import dump_yaml

    output.folder.mkdir(parents=True, exist_ok=True)
    dump_yaml({"name": run.name, "dataset": dataset, **run.config.to_dict()}, output.folder / SETTINGS)
    output.publish()
    print(f"{run.name}: {where}, {run.optim.epochs} epochs; results in {output}", flush=True)
    with Progress(output) as progress:
        yield progress
    output.publish()


def _print_found(run: RunFile, output: Output, progress: Progress) -> None:
    from lift_ray.results.tables import accuracy_table, console

    last = progress.last
    split = "test" if "test/accuracy" in last else "validation"
    console().print(accuracy_table(f"{split}, accuracy in %", split, [(run.name, last)]))
    for reason, number in Counter(progress.retries).items():
        print(f"tried again {number} time{'s' if number > 1 else ''}: {reason}")
    print(f"files in {output}: checkpoint, metrics.jsonl, {SETTINGS}, tensorboard")


def _check_workers(run: RunFile, most: int, least: int, no_ray: bool) -> None:
    from lift_ray.settings.run import check_global_batch

    if no_ray and most > 1:
        raise BadInput(f"--workers: must be 1 with --no-ray, but got {most}; leave one of them out")
    for workers in {most, *range(least, most)}:
        try:
            check_global_batch(run.optim.global_batch_size, workers)
        except ValueError as error:
            raise BadInput(str(error)) from None


def _check_out(output: Output, run: RunFile, resume: bool) -> None:
    """Refuse to write over a run, and to go on with one of other settings."""
    from lift_ray.settings.files import read_run

    holds_run = output.holds(SETTINGS)
    if not resume:
        if holds_run:
            raise BadInput(
                f"{output.shown}: must be a new folder, but it holds a run already; add --resume, or give another --out"
            )
        return
    if not holds_run:
        raise BadInput(f"{output.shown}: must hold a run to go on with, but there is no {SETTINGS}; check --out, or leave out "
                       "--resume")  # fmt: skip
    with output.fetched(SETTINGS) as path:
        before, now = read_run(path).config.to_dict(), run.config.to_dict()
    for section, value in now.items():
        if before[section] != value:
            raise BadInput(f"{output.shown}/{SETTINGS} {section}: must stay as the run began, {before[section]}, but got "
                           f"{value}; give another --out, or the settings it began with")  # fmt: skip


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "train", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
