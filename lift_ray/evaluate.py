"""python -m lift_ray.evaluate: the accuracy of a checkpoint, or of an ensemble of checkpoints, on a dataset."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, did_you_mean, run_and_exit
from lift_ray.text import count, say

if TYPE_CHECKING:
    from lift_ray.data.dataset import Dataset
    from lift_ray.inference.evaluate import Evaluated
    from lift_ray.terminal.tables import PlainTable
    from lift_ray.training.checkpoint import Record

COMBINE = ("logits", "probabilities")
MOST_CONFUSED = 10  # pairs of classes that are printed


@cli.app.command()
def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoints, or results of tune or train: folders or URLs. Several form an ensemble.",
        ),
    ],
    data: Annotated[str | None, typer.Option(help="Dataset; any fsspec URL.  [the one it was trained on]")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    tau: Annotated[
        list[float] | None,
        typer.Option(
            "--posthoc-tau",
            min=0,
            help="Strength of post-hoc logit adjustment; may be repeated.  [as trained]",
        ),
    ] = None,
    tte: Annotated[bool, typer.Option("--tte", help="Average the logits of five crops.  [as trained]")] = False,
    combine: Annotated[
        str | None, typer.Option(help="Average the logits or the probabilities of several models.  [logits]")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights of the models, in order: 2,1,1.  [equal]")] = None,
    gla: Annotated[
        bool,
        typer.Option(
            "--gla", help="Add zero-shot logits and remove both label priors; also reads the validation split."
        ),
    ] = False,
    per_class: Annotated[Path | None, typer.Option(help="Write the metrics of each class to this CSV file.")] = None,
    confusion: Annotated[
        Path | None,
        typer.Option(
            help="Write how often each class is predicted as another to this CSV file; print the most confused pairs."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of Ray workers that share the images.")] = 1,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores of each worker; a single one uses all.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print overall, mean class, many, medium and few accuracy. The groups are those of the (first) checkpoint.

    Several checkpoints of the same classes form an ensemble (backdoor adjustment, arXiv 2501.15955); each image is read once.

    \b
    Examples:
      python -m lift_ray.evaluate runs/quickstart/best
      python -m lift_ray.evaluate runs/quickstart/best --posthoc-tau 0 --posthoc-tau 0.5 --posthoc-tau 1 --per-class classes.csv
      python -m lift_ray.evaluate runs/mine --data s3://bucket/photos --split validation --json
      python -m lift_ray.evaluate runs/openai runs/laion runs/metaclip --combine probabilities --weights 2,1,1
      python -m lift_ray.evaluate runs/mine --gla
      python -m lift_ray.evaluate runs/mine --confusion confusion.csv
    """
    from lift_ray.data.open import open_dataset
    from lift_ray.training.checkpoint import difference

    records = _records(checkpoints)
    dataset = open_dataset(data or records[0].dataset)
    dataset.split(split)
    if list(dataset.class_names) != records[0].class_names:
        raise BadInput(
            dataset.uri,
            "must have the classes of the checkpoint",
            but=difference(records[0].class_names, dataset.class_names),
            remedy="give the dataset it was trained on",
        )
    if any(record.train_on != "train" and record.dataset == dataset.uri for record in records):
        _check_held_out(checkpoints[0], split, gla)
    taus = _taus(checkpoints, records, tau, gla)
    _check_together(records, combine, weights)
    from lift_ray.inference.evaluate import EvaluationRequest, evaluate_here, evaluate_on_workers

    question = EvaluationRequest(
        tuple(checkpoints), dataset.uri, split, taus, tte, combine, _numbers(weights), gla, confusion is not None
    )
    found = evaluate_here(question) if workers == 1 else evaluate_on_workers(question, workers, cpus_per_worker)
    if per_class is not None:
        from lift_ray.evaluation.metrics import write_per_class

        write_per_class(found.rows, per_class)
    confused = None if confusion is None else _write_confusions(found, dataset, split, confusion)
    if as_json:
        every = [figures | found.report for figures in found.figures]
        say(json.dumps(every if len(every) > 1 else every[0], indent=1))
        return
    from lift_ray.terminal.evaluation_tables import print_found
    from lift_ray.terminal.tables import console

    name = "ensemble" if found.report else checkpoints[0]
    shown = [(f"{name}, tau {t:g}" if t else name, figures) for t, figures in zip(taus, found.figures, strict=True)]
    print_found(
        f"{dataset.uri} {split}, {count(dataset.split(split).num_samples, 'image')}, accuracy (%)",
        split,
        shown,
        found.report,
    )
    if note := records[0].groups.note:
        say(note)
    if confused is not None:
        console().print(confused)


def _write_confusions(found: Evaluated, dataset: Dataset, split: str, path: Path) -> PlainTable:
    """Write how often each class is predicted as another as CSV, and return the table of the most confused pairs."""
    from lift_ray.reporting.confusion import Confusions
    from lift_ray.reporting.csv_files import write_csv
    from lift_ray.terminal.evaluation_tables import confused_table

    assert found.predicted is not None
    confusions = Confusions.of(dataset.split(split).labels, found.predicted, dataset.class_names)
    write_csv(confusions.rows(), path)
    return confused_table(confusions.most_confused(MOST_CONFUSED))


def _records(checkpoints: list[str]) -> list[Record]:
    """Read the records of the checkpoints. Raises BadInput if their classes or the order of these differ."""
    from lift_ray.training.checkpoint import difference, opened, read_record

    records = []
    if twice := next((where for where in checkpoints if checkpoints.count(where) > 1), None):
        raise BadInput(
            "CHECKPOINT", "each must be given once", f"{twice} twice", "use --weights to give it more weight"
        )
    for where in checkpoints:
        with opened(where) as folder:
            records.append(read_record(folder))
        first, here = records[0].class_names, records[-1].class_names
        if here != first:
            raise BadInput(
                where,
                f"must have the classes of {checkpoints[0]} in the same order",
                but=difference(here, first, "the other"),
                remedy="combine models of one dataset",
            )
    return records


def _check_held_out(checkpoint: str, split: str, gla: bool) -> None:
    """Say that a model was trained on the validation images. Raises BadInput if they would be used to combine models."""
    if gla:
        raise BadInput(
            "--gla",
            "requires validation images that the models have not seen",
            but=f"{checkpoint} was trained on them",
            remedy="train with train_on=train",
        )
    if split == "validation":
        say("note: the model was trained on these images, so this accuracy is not held out", error=True)


def _taus(checkpoints: list[str], records: list[Record], tau: list[float] | None, gla: bool) -> tuple[float, ...]:
    """Return the strengths of the post-hoc adjustment: those of the option, or else those of the models' settings."""
    if gla:
        if tau:
            raise BadInput(
                "--posthoc-tau",
                "cannot be used with --gla, which removes the prior itself",
                remedy="leave one of them out",
            )
        return (0.0,)
    own = {
        record.config["evaluation"]["posthoc_tau"]: where for where, record in zip(checkpoints, records, strict=True)
    }
    if not tau and len(own) > 1:
        raise BadInput(
            "--posthoc-tau",
            f"is required for models with different values ({', '.join(map(str, own))})",
            but="is missing",
            remedy="give one",
        )
    return tuple(tau or own)


def _check_together(records: list[Record], combine: str | None, weights: str | None) -> None:
    """Raise BadInput if an option requires several models and there is only one."""
    if combine not in (None, *COMBINE):
        raise BadInput("--combine", f"unknown value '{combine}'", remedy=did_you_mean(combine, COMBINE))
    several = len(records) > 1 or records[0].config["method"]["kind"] == "backdoor"
    for option, value in (("--combine", combine), ("--weights", weights)):
        if value is not None and not several:
            raise BadInput(option, "requires at least 2 models", 1, "give more checkpoints, or leave it out")


def _numbers(weights: str | None) -> tuple[float, ...]:
    """Parse weights: `2,1,1` -> (2.0, 1.0, 1.0). Raises BadInput."""
    try:
        numbers = tuple(float(word) for word in weights.split(",")) if weights else ()
    except ValueError:
        numbers = (0.0,)
    if any(not 0 < number < float("inf") for number in numbers):
        raise BadInput("--weights", "must be positive numbers separated by commas", f"'{weights}'", "try 2,1,1")
    return numbers


main = partial(cli.run, "lift_ray.evaluate")

if __name__ == "__main__":
    run_and_exit(main)
