"""python -m lift_ray.evaluate: the accuracy of a checkpoint on a data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lift_ray.errors import BadInput, exit_codes, run_verb

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or the results of tune or train.")
    ],
    data: Annotated[str | None, typer.Option(help="Data set; any fsspec URL.  [the one it was trained on]")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print overall, mean class, many, medium and few accuracy. The groups are those of the data it was trained on.

    \b
    Examples:
      python -m lift_ray.evaluate runs/quickstart/best
      python -m lift_ray.evaluate runs/mine --data s3://bucket/photos --split validation --json
    """
    from lift_ray.data.catalog import open_dataset
    from lift_ray.distributed.checkpoint import find, read_record

    folder = find(Path(checkpoint))
    record = read_record(folder)
    dataset = open_dataset(data or record.dataset)
    dataset.split(split)
    if list(dataset.class_names) != record.class_names:
        here, there = set(dataset.class_names), set(record.class_names)
        odd = sorted(here ^ there)[:3] or ["the same names in another order"]
        raise BadInput(f"{dataset.uri}: must have the {len(there)} classes of the checkpoint, but got {len(here)} that differ "
                       f"({', '.join(odd)}); give the data set it was trained for")  # fmt: skip
    from lift_ray.distributed.evaluation import evaluate_checkpoint

    figures = evaluate_checkpoint(folder, dataset.uri, split)
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    from lift_ray.results.tables import accuracy_table, console

    title = f"{dataset.uri} {split}, {dataset.split(split).num_samples:,} images, accuracy in %"
    console().print(accuracy_table(title, split, [(str(checkpoint), figures)]))


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "evaluate", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
