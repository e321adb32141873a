"""python -m lift_ray.init: write a search space that fits a folder of images or a dataset."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, run_and_exit
from lift_ray.text import say


@cli.app.command(short_help="Write a search space that fits a folder of images or a dataset.")
@cli.with_json("init")
def init(
    photos: Annotated[
        str,
        typer.Argument(
            metavar="PHOTOS",
            help="Folder of class directories, CSV, Parquet, .txt list or dataset; a path, any fsspec URL, or embedded:NAME.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File to write.  [NAME.yaml]")] = None,
    shipped: Annotated[
        str | None, typer.Option("--from", metavar="NAME", help="Copy this shipped file, with this dataset: inat.")
    ] = None,
    image_column: cli.ImageColumn = None,
    label_column: cli.LabelColumn = None,
    split_column: cli.SplitColumn = None,
    root: cli.Root = None,
    class_names: Annotated[
        str | None, typer.Option(metavar="FILE", help="Class names, one per line, for labels that are numbers.")
    ] = None,
    similar_names: Annotated[
        Literal["merge", "keep"] | None,
        typer.Option(help="Names of classes that differ only in case or spaces: one class, or several."),
    ] = None,
) -> dict[str, object]:
    """Look at labeled images and write a commented search space that fits them. Converts, downloads and trains nothing.

    If the images are not converted yet, the first lines of the file are the command that converts them.

    \b
    Examples:
      python -m lift_ray.init photos/
      python -m lift_ray.init labels.csv --root photos/ --out search_spaces/mine.yaml
      python -m lift_ray.init s3://bucket/inat2018 --from inat
    """
    from lift_ray.searching.first_space import check_place, name_for

    name = name_for(photos)
    target = out or Path(f"{name}.yaml")
    for place in (photos, str(target), root or "", class_names or ""):
        check_place(place)
    if os.path.lexists(target):
        raise BadInput(str(target), "must be a new file", but="it is there", remedy="give another --out FILE")
    from lift_ray.settings.shipped import SPACES, find_shipped

    original = None if shipped is None else find_shipped(shipped, SPACES)
    from lift_ray.data.convert.sources import ReadOptions, find_source

    source = find_source(
        photos, ReadOptions(image_column, label_column, split_column, root, class_names, similar_names)
    )
    sizes, problem = source.sizes()
    from lift_ray.ray_runtime.capacity import gpus_here
    from lift_ray.searching.first_space import Fit, copied_text, describe, figures_of, space_text

    say(*describe(source, sizes, problem))
    fit = Fit.of(source, sizes, gpus_here(), target, name)
    text = space_text(fit) if original is None else copied_text(fit, shipped or "", original.read_text("utf-8"))
    _write(target, text)
    commands = fit.next_commands(text)
    say(f"wrote {target}; next:", *(f"  {command}" for command in commands))
    return {"out": target, **figures_of(source, sizes), "next": commands}


def _write(target: Path, text: str) -> None:
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BadInput("--out", "must be a writable file", f"{target} ({error.strerror})", "choose another") from None


main = partial(cli.run, "lift_ray.init")

if __name__ == "__main__":
    run_and_exit(main)
