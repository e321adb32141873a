"""python -m lift_ray.convert: any image set as sharded Parquet with a manifest."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray.errors import BadInput, exit_codes, run_verb

if TYPE_CHECKING:
    from lift_ray.data.conversion import Converted

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def convert() -> None:
    """Turn an image set into Parquet shards that lift_ray, Hugging Face datasets and DuckDB read.

    \b
    Example:
      python -m lift_ray.convert folder photos/ data/photos --short-side 256
    """


@app.command()
def folder(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of class directories, or of train/val/test.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="Folder for the shards; any fsspec URL.")],
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink larger images to this short side (px), as JPEG.")
    ] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="JPEG quality with --short-side.  [90]")] = None,
    validation_frac: Annotated[
        float | None, typer.Option(help="Part of each class for validation, where SRC has no such directory.  [0.1]")
    ] = None,
    test_frac: Annotated[float | None, typer.Option(help="Part of each class for the test split.  [0]")] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Images in a file.")] = 4096,
    row_group_rows: Annotated[int, typer.Option(min=1, help="Images in a row group, the unit of reading.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split and of the order.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be decoded.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set at DEST.")] = False,
) -> None:
    """Convert class directories of images: SRC/<class>/... or SRC/<train|val|test>/<class>/...

    \b
    Example:
      python -m lift_ray.convert folder photos/ s3://bucket/photos --short-side 256 --test-frac 0.1
    """
    if quality is not None and short_side is None:
        raise BadInput("--quality: must come with --short-side, but got it alone (bytes are kept); add --short-side")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from lift_ray.data import conversion
    from lift_ray.data.folder import scan_folder

    index = scan_folder(source)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]} images/s"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=None, rate="0")
        converted = conversion.convert(
            index,
            destination,
            short_side_px=short_side,
            quality=quality or 90,
            validation_frac=validation_frac,
            test_frac=test_frac,
            rows_per_shard=rows_per_shard,
            row_group_rows=row_group_rows,
            seed=seed,
            skip_bad=skip_bad,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(
                task, completed=done, total=total, rate=f"{bar.tasks[0].speed or 0:.0f}"
            ),
        )
    _report(destination, converted, index.num_ignored)


def _report(destination: str, converted: Converted, num_ignored: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from lift_ray.data.conversion import SKIPPED
    from lift_ray.data.store import join

    table = Table("split")
    for name in ("images", "classes", "shards", "MB"):
        table.add_column(name, justify="right")
    for split, record in converted.splits.items():
        classes = sum(count > 0 for count in record.class_counts)
        num_bytes = sum(shard.bytes for shard in record.shards)
        table.add_row(split, f"{record.rows:,}", f"{classes:,}", str(len(record.shards)), f"{num_bytes / 1e6:,.1f}")
    Console().print(table)
    if num_ignored:
        print(f"{num_ignored} files that are not images by name were left out")
    if converted.skipped:
        print(f"{len(converted.skipped)} bad images were skipped: {join(destination, SKIPPED)}")
    print(f"data set: {destination}")


def main(argv: list[str]) -> int | None:
    """Parse the words after `python -m lift_ray.convert` and run them. Raises BadInput for wrong usage."""
    return run_verb(app, "convert", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
