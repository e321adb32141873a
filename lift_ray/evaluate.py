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
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or the results of tune or train: folder or URL.")
    ],
    data: Annotated[str | None, typer.Option(help="Data set; any fsspec URL.  [the one it was trained on]")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    tau: Annotated[
        list[float] | None,
        typer.Option("--posthoc-tau", min=0, help="Post-hoc logit adjustment; several to compare.  [as trained]"),
    ] = None,
    tte: Annotated[bool, typer.Option("--tte", help="Mean of the logits of five crops.  [as trained]")] = False,
    per_class: Annotated[Path | None, typer.Option(help="Write a table of all classes to this CSV file.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Share the images out to so many Ray workers.")] = 1,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores for each; alone it takes all.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print overall, mean class, many, medium and few accuracy. The groups are those of the data it was trained on.

    \b
    Examples:
      python -m lift_ray.evaluate runs/quickstart/best
      python -m lift_ray.evaluate runs/quickstart/best --posthoc-tau 0 --posthoc-tau 0.5 --posthoc-tau 1 --per-class classes.csv
      python -m lift_ray.evaluate runs/mine --data s3://bucket/photos --split validation --json
    """
    from lift_ray.data.catalog import open_dataset
    from lift_ray.distributed.checkpoint import difference, opened, read_record

    with opened(checkpoint) as folder:
        record = read_record(folder)
        dataset = open_dataset(data or record.dataset)
        dataset.split(split)
        if list(dataset.class_names) != record.class_names:
            raise BadInput(f"{dataset.uri}: must have the classes of the checkpoint, but "
                           f"{difference(record.class_names, dataset.class_names)}; give the data set it was trained for")  # fmt: skip
        from lift_ray.distributed.evaluation import evaluate_checkpoint, evaluate_on_workers

        own = [record.config["evaluation"]["posthoc_tau"]]
        if workers == 1:
            found, rows = evaluate_checkpoint(folder, dataset.uri, split, taus=tau or own, tte=tte)
        else:
            found, rows = evaluate_on_workers(checkpoint, dataset.uri, split, tau or own, tte, workers, cpus_per_worker)
    if per_class is not None:
        from lift_ray.results.metrics import write_per_class

        write_per_class(rows, per_class)
    if as_json:
        print(json.dumps(found if tau and len(tau) > 1 else found[0], indent=1))
        return
    from lift_ray.results.tables import accuracy_table, console, percent

    title = f"{dataset.uri} {split}, {dataset.split(split).num_samples:,} images, accuracy in %"
    labels = [f"{checkpoint}, tau {t:g}" if t else checkpoint for t in tau or own]
    console().print(accuracy_table(title, split, list(zip(labels, found, strict=True))))
    others = ("worst_class", "harmonic_mean", "geometric_mean", "macro_f1", "calibration_error")
    for label, figures in zip(labels, found, strict=True):
        print(f"{label}: " + ", ".join(f"{n.replace('_', ' ')} {percent(figures[f'{split}/{n}'])}" for n in others))


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "evaluate", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
