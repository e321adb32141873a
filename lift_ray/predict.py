"""python -m lift_ray.predict: class names and probabilities for images."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, run_and_exit
from lift_ray.text import count, say


@cli.app.command(short_help="Write class names and probabilities for images.")
@cli.with_json("predict")
def predict(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Folder or URL of a checkpoint, or of the results of tune or train."),
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES|PARQUET...", help="Images, folders, patterns or Parquet shards; paths or fsspec URLs."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help=".parquet or .csv file to create.")],
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Number of classes per image, the most probable first.  [5, or all if fewer]"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=100,
            help="Divides the logits; 1 for uncalibrated probabilities.  [fitted on validation images]",
        ),
    ] = None,
    posthoc_tau: Annotated[
        float | None,
        typer.Option("--posthoc-tau", min=0, help="Strength of the post-hoc logit adjustment.  [as in the run]"),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of a table: image bytes.  [image]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of Ray workers that share the images; 1: no Ray.")] = 1,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores of each worker; a single one uses all.")] = 1,
) -> dict[str, object]:
    """Write one row per image: file, row in the shard, class_1, probability_1, ..., and error for an unreadable image.

    If interrupted, rerun the same command: finished parts are reused.

    \b
    Examples:
      python -m lift_ray.predict runs/quickstart photos/ --out photos.csv
      python -m lift_ray.predict runs/mine 's3://bucket/shards/*.parquet' --out found.parquet --top 3 --workers 8
    """
    from lift_ray.data.convert.index import absolute
    from lift_ray.inference.image_files import find_images, left_out_lines, left_out_list

    if "://" in str(out) or out.suffix not in (".parquet", ".csv"):
        raise BadInput("--out", "must be a local .parquet or .csv file", out, "choose such a name")
    if out.exists():
        raise BadInput("--out", "must be a new file", but=f"{out} exists", remedy="delete it, or choose another")
    found = find_images(images, image_column)
    from lift_ray.inference.predict import Job
    from lift_ray.inference.predict import predict as run
    from lift_ray.terminal.image_progress import image_progress

    began = time.monotonic()
    with image_progress() as advance:
        job = Job(absolute(checkpoint), found, top, temperature, posthoc_tau)
        done = run(job, out, advance, workers=workers, cpus_per_worker=cpus_per_worker)
    bad = f", {done.num_bad:,} of them unreadable (see column error)" if done.num_bad else ""
    took_s = time.monotonic() - began
    say(f"{out}: {count(done.num_images, 'image')}{bad}, in {took_s:.0f} s")
    say(*left_out_lines(found, out), done.calibration)
    return {
        "out": out,
        "images": done.num_images,
        "unreadable": done.num_bad,
        "left_out": len(found.left_out),
        "left_out_list": left_out_list(out) if found.left_out else None,
        "links": found.num_links,
        "calibration": asdict(done.calibration),
        "time_s": round(took_s, 2),
    }


main = partial(cli.run, "lift_ray.predict")

if __name__ == "__main__":
    run_and_exit(main)
