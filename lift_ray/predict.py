"""python -m lift_ray.predict: class names and probabilities for pictures."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from lift_ray.errors import BadInput, exit_codes, run_verb

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def predict(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or the results of tune or train: folder or URL.")
    ],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES|PARQUET...", help="Images, folders, patterns or shards; any fsspec URL."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A new .parquet or .csv file.")],
    top: Annotated[int, typer.Option(min=1, help="Classes in a row, the most probable first.")] = 5,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.01, max=100, help="Divides the logits; 1: not calibrated.  [fitted on validation images]"),
    ] = None,
    posthoc_tau: Annotated[
        float | None, typer.Option("--posthoc-tau", min=0, help="Post-hoc logit adjustment.  [as trained]")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the images in Parquet.  [image]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Share the images out to so many Ray workers.")] = 1,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores for each; alone it takes all.")] = 1,
) -> None:
    """Write a row for each image: file, row in it, class_1, probability_1, ... and error where an image cannot be read.

    What was killed goes on when the same command is given again.

    \b
    Examples:
      python -m lift_ray.predict runs/quickstart photos/ --out photos.csv
      python -m lift_ray.predict runs/mine 's3://bucket/shards/*.parquet' --out found.parquet --top 3 --workers 8
    """
    from lift_ray.data.convert.index import absolute
    from lift_ray.inference.image_files import find_images

    if "://" in str(out) or out.suffix not in (".parquet", ".csv"):
        raise BadInput(f"--out: must be a local .parquet or .csv file, but got {out}; name one")
    if out.exists():
        raise BadInput(f"--out: must be a new file, but {out} exists; delete it, or give another")
    pictures = find_images(images, column)
    from lift_ray.inference.predict import Job
    from lift_ray.inference.predict import predict as run
    from lift_ray.terminal.image_progress import image_progress

    began = time.monotonic()
    with image_progress() as advance:
        job = Job(absolute(checkpoint), pictures, top, temperature, posthoc_tau)
        done = run(job, out, advance, workers=workers, cpus_per_worker=cpus_per_worker)
    bad = f", {done.num_bad:,} of them not readable (column error)" if done.num_bad else ""
    print(f"{out}: {done.num_images:,} images{bad}, in {time.monotonic() - began:.0f} s")
    print(done.calibration)


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "predict", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
