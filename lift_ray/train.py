"""python -m lift_ray.train: one run of LIFT on Ray Train workers or in one process; several runs for `method: backdoor`."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, run_and_exit
from lift_ray.text import say

if TYPE_CHECKING:
    from lift_ray.api.fit import FitResult
    from lift_ray.data.dataset import Dataset
    from lift_ray.settings.run_file import RunFile


@cli.app.command()
@cli.with_json("train")
def train(
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="Settings of the run.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Override settings of the file.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder or URL (s3://, gs://) for the results.  [runs/NAME-DATE-TIME]")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of Ray workers that share the images of each step.")] = 1,
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
    dashboard: Annotated[bool, typer.Option(help="Serve Ray's dashboard if Ray is started on this machine.")] = False,
    log_to: Annotated[
        list[str] | None, typer.Option(metavar="SERVICE", help="Also log the run to mlflow or wandb; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print settings, steps and memory; start nothing.")
    ] = False,
) -> cli.Results:
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
    from lift_ray.api.fit import FitOptions, check_out, check_run, members_of, train_run
    from lift_ray.data.folds import training_view
    from lift_ray.data.open import open_dataset
    from lift_ray.settings.overrides import parse_overrides
    from lift_ray.settings.run_file import read_run
    from lift_ray.storage.output import Output

    run = read_run(run_file, parse_overrides(settings or []))
    if no_ray and workers > 1:
        raise BadInput("--workers", "must be 1 with --no-ray", workers, "leave one of them out")
    options = FitOptions(
        out or run.out,
        None if no_ray else workers,
        min_workers,
        cpus_per_worker,
        resume,
        checkpoint_s,
        checkpoint_steps,
        max_failures,
        heartbeat_s,
        dashboard,
        log_to or [],
    )
    data = open_dataset(run.dataset)
    if not dry_run:
        return partial(_results, train_run(run, data, options), run)
    data = training_view(data, run.train_on)
    check_run(run, data, options)
    if options.out and "://" not in options.out:
        check_out(Output(options.out), run, resume)
    return {"runs": [_plan(one, data, workers, checkpoint_s) for one in members_of(run).values() or [run]]}


def _results(done: FitResult, run: RunFile) -> dict[str, object]:
    """Return the files of a run, and the figures in its file of metrics."""
    from lift_ray.storage.layout import FINAL_CHECKPOINT, METRICS, SETTINGS, TOGETHER
    from lift_ray.storage.output import Output

    out, name = Output(done.out), TOGETHER if run.config.members() else METRICS
    with out.fetched(name) as path:
        figures = json.loads(path.read_text().splitlines()[-1] if name == METRICS else path.read_text())
    files = {"checkpoint": FINAL_CHECKPOINT, "settings": SETTINGS, "metrics": name}
    return {"out": str(out), **{what: f"{out}/{file}" for what, file in files.items()}, "figures": figures}


def _plan(run: RunFile, data: Dataset, workers: int, checkpoint_s: float) -> dict[str, object]:
    """Print the settings as YAML, and the plan as comments below them; the output is a valid run file. Return both."""
    from ruamel.yaml import YAML

    from lift_ray.api.fit import as_file
    from lift_ray.model.device import best_device, precision_fault
    from lift_ray.training.plan import plan

    config, lines = plan(run, data, workers, checkpoint_s)
    if precision_fault(run.backbone.precision, best_device()):
        lines["precision"] = f"this machine cannot compute in {run.backbone.precision}: run it on a cluster"
    settings = as_file(run, data.uri, config)
    YAML().dump(settings, sys.stdout)
    for name, text in lines.items():
        say(f"# {name}: {text}")
    return {"settings": settings, "plan": lines}


main = partial(cli.run, "lift_ray.train")

if __name__ == "__main__":
    run_and_exit(main)
