"""python -m lift_ray.train: one run of LIFT on Ray Train workers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lift_ray.errors import BadInput, exit_codes, run_verb

if TYPE_CHECKING:
    from lift_ray.settings.run import RunFile

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SETTINGS = "run.yaml"


@app.command()
def train(
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Change the file.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the results.  [runs/NAME-DATE-TIME]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 1,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores for each.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the settings; train nothing.")
    ] = False,
) -> None:
    """Train one LIFT model and test it. A lost worker is replaced, and the run goes on from its last epoch.

    \b
    Examples:
      python -m lift_ray.train search_spaces/lift_plus.yaml
      python -m lift_ray.train best.yaml optim.epochs=10 --workers 2 --out runs/mine
      python -m lift_ray.train best.yaml optim.epochs=10 --workers 2 --out runs/mine --resume
    """
    from lift_ray.data.catalog import open_dataset
    from lift_ray.settings.files import dump_yaml, parse_overrides, read_run

    run = read_run(run_file, parse_overrides(settings or []))
    data = open_dataset(run.dataset)
    data.split("train"), data.split("validation")
    _check_batch(run, workers)
    if dry_run:
        from ruamel.yaml import YAML

        YAML().dump({"name": run.name, "dataset": data.uri, **run.config.to_dict()}, sys.stdout)
        return
    if resume and out is None:
        raise BadInput("--resume: must name the run to go on with, but --out is missing; add --out FOLDER")
    folder = Path(out or run.out or f"runs/{run.name}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    _check_out(folder, run, resume)
    from lift_ray.distributed.cluster import connected

    with connected(dashboard=False) as nodes:
        from lift_ray.distributed.capacity import num_slots
        from lift_ray.distributed.trainer import run_training
        from lift_ray.settings.space import Scale

        need, _ = num_slots(Scale(workers_per_trial=workers, cpus_per_worker=cpus_per_worker), nodes)
        folder.mkdir(parents=True, exist_ok=True)
        dump_yaml({"name": run.name, "dataset": data.uri, **run.config.to_dict()}, folder / SETTINGS)
        print(f"{run.name}: {need}, {run.optim.epochs} epochs; results in {folder}")
        began = time.monotonic()

        def show(figures: dict[str, Any]) -> None:
            print(f"{time.monotonic() - began:5.0f} s  epoch {figures['epoch']}/{run.optim.epochs}  loss {figures['train/loss']:.4f}"
                  f"  validation mean class accuracy {figures['validation/mean_class_accuracy']:.4f}"
                  f"  {figures['train/images_per_s']:.0f} images/s", flush=True)  # fmt: skip

        checkpoint, last = run_training(run.config.to_dict(), data.uri, need, folder, show)
    from lift_ray.results.tables import accuracy_table, console

    split = "test" if "test/accuracy" in last else "validation"
    console().print(accuracy_table(f"{split}, accuracy in %", split, [(run.name, last)]))
    print(f"files: {checkpoint} (checkpoint), {folder / 'metrics.jsonl'}, {folder / SETTINGS}")


def _check_batch(run: RunFile, workers: int) -> None:
    from lift_ray.settings.run import check_global_batch

    try:
        check_global_batch(run.optim.global_batch_size, workers)
    except ValueError as error:
        raise BadInput(str(error)) from None


def _check_out(folder: Path, run: RunFile, resume: bool) -> None:
    """Refuse to write over a run, and to go on with one of other settings."""
    from lift_ray.settings.files import read_run

    holds_run = (folder / SETTINGS).exists()
    if not resume:
        if holds_run:
            raise BadInput(
                f"{folder}: must be a new folder, but it holds a run already; add --resume, or give another --out"
            )
        return
    if not holds_run:
        raise BadInput(
            f"{folder}: must hold a run to go on with, but there is no {SETTINGS}; check --out, or leave out --resume"
        )
    before, now = read_run(folder / SETTINGS).config.to_dict(), run.config.to_dict()
    for section, value in now.items():
        if before[section] != value:
            raise BadInput(f"{folder / SETTINGS} {section}: must stay as the run began, {before[section]}, but got {value}; "
                           "give another --out, or the settings it began with")  # fmt: skip


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "train", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
