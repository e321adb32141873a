"""python -m lift_ray.evaluate: the accuracy of a checkpoint on a data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lift_ray.errors import BadInput, did_you_mean, exit_codes, run_verb

if TYPE_CHECKING:
    from lift_ray.training.checkpoint import Record

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
COMBINE = ("logits", "probabilities")


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoints, or the results of tune or train: folders or URLs. Several answer together.",
        ),
    ],
    data: Annotated[str | None, typer.Option(help="Data set; any fsspec URL.  [the one it was trained on]")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    tau: Annotated[
        list[float] | None,
        typer.Option("--posthoc-tau", min=0, help="Post-hoc logit adjustment; several to compare.  [as trained]"),
    ] = None,
    tte: Annotated[bool, typer.Option("--tte", help="Mean of the logits of five crops.  [as trained]")] = False,
    combine: Annotated[
        str | None, typer.Option(help="Mean of the logits or of the probabilities of several models.  [logits]")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Of the models, in order: 2,1,1.  [equal]")] = None,
    gla: Annotated[
        bool, typer.Option("--gla", help="Add zero-shot logits and take the priors of both out; reads validation too.")
    ] = False,
    per_class: Annotated[Path | None, typer.Option(help="Write a table of all classes to this CSV file.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Share the images out to so many Ray workers.")] = 1,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="Cores for each; alone it takes all.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print overall, mean class, many, medium and few accuracy. The groups are those of the data it was trained on.

    Several checkpoints of the same classes answer together (backdoor adjustment, arXiv 2501.15955), each image read once.

    \b
    Examples:
      python -m lift_ray.evaluate runs/quickstart/best
      python -m lift_ray.evaluate runs/quickstart/best --posthoc-tau 0 --posthoc-tau 0.5 --posthoc-tau 1 --per-class classes.csv
      python -m lift_ray.evaluate runs/mine --data s3://bucket/photos --split validation --json
      python -m lift_ray.evaluate runs/openai runs/laion runs/metaclip --combine probabilities --weights 2,1,1
      python -m lift_ray.evaluate runs/mine --gla
    """
    from lift_ray.data.open import open_dataset
    from lift_ray.training.checkpoint import difference

    records = _records(checkpoints)
    dataset = open_dataset(data or records[0].dataset)
    dataset.split(split)
    if list(dataset.class_names) != records[0].class_names:
        raise BadInput(
            f"{dataset.uri}: must have the classes of the checkpoint, but "
            f"{difference(records[0].class_names, dataset.class_names)}; give the data set it was trained for"
        )
    taus = _taus(checkpoints, records, tau, gla)
    _check_together(records, combine, weights)
    from lift_ray.inference.evaluate import EvaluationRequest, evaluate_here, evaluate_on_workers

    question = EvaluationRequest(tuple(checkpoints), dataset.uri, split, taus, tte, combine, _numbers(weights), gla)
    found = evaluate_here(question) if workers == 1 else evaluate_on_workers(question, workers, cpus_per_worker)
    if per_class is not None:
        from lift_ray.evaluation.metrics import write_per_class

        write_per_class(found.rows, per_class)
    if as_json:
        every = [figures | found.report for figures in found.figures]
        print(json.dumps(every if len(every) > 1 else every[0], indent=1))
        return
    from lift_ray.terminal.evaluation_tables import print_found

    name = "together" if found.report else checkpoints[0]
    shown = [(f"{name}, tau {t:g}" if t else name, figures) for t, figures in zip(taus, found.figures, strict=True)]
    print_found(
        f"{dataset.uri} {split}, {dataset.split(split).num_samples:,} images, accuracy in %", split, shown, found.report
    )


def _records(checkpoints: list[str]) -> list[Record]:
    """What the checkpoints say of themselves. Raises BadInput when they do not know the same classes in the same order."""
    from lift_ray.training.checkpoint import opened, read_record

    records = []
    if twice := next((where for where in checkpoints if checkpoints.count(where) > 1), None):
        raise BadInput(
            f"CHECKPOINT: must each be named once, but got {twice} twice; use --weights to make it count more"
        )
    for where in checkpoints:
        with opened(where) as folder:
            records.append(read_record(folder))
        first, here = records[0].class_names, records[-1].class_names
        if here != first:
            odd = sorted(set(here) ^ set(first))[:3] or ["the same names in another order"]
            raise BadInput(
                f"{where}: must have the classes of {checkpoints[0]} in the same order, but it has {len(here)} and that "
                f"{len(first)}, which differ ({', '.join(odd)}); combine models of one data set"
            )
    return records


def _taus(checkpoints: list[str], records: list[Record], tau: list[float] | None, gla: bool) -> tuple[float, ...]:
    """The strengths of the post-hoc adjustment: those asked for, else what the models were trained with."""
    if gla:
        if tau:
            raise BadInput(
                "--posthoc-tau: must not be given with --gla, which takes the prior out itself; leave one of them out"
            )
        return (0.0,)
    own = {
        record.config["evaluation"]["posthoc_tau"]: where for where, record in zip(checkpoints, records, strict=True)
    }
    if not tau and len(own) > 1:
        raise BadInput(
            f"--posthoc-tau: must be given for models trained with several, but got none for {', '.join(map(str, own))}; "
            "name one"
        )
    return tuple(tau or own)


def _check_together(records: list[Record], combine: str | None, weights: str | None) -> None:
    """Raises BadInput for options that need several models, and there is one."""
    if combine not in (None, *COMBINE):
        raise BadInput(f"--combine: unknown value '{combine}'; {did_you_mean(combine, COMBINE)}")
    several = len(records) > 1 or records[0].config["method"]["kind"] == "backdoor"
    for option, value in (("--combine", combine), ("--weights", weights)):
        if value is not None and not several:
            raise BadInput(f"{option}: needs at least 2 models, but got 1; name more checkpoints, or leave it out")


def _numbers(weights: str | None) -> tuple[float, ...]:
    """`2,1,1` -> (2.0, 1.0, 1.0). Raises BadInput."""
    try:
        numbers = tuple(float(word) for word in weights.split(",")) if weights else ()
    except ValueError:
        numbers = (0.0,)
    if any(not 0 < number < float("inf") for number in numbers):
        raise BadInput(f"--weights: must be numbers over 0 with commas between them, but got '{weights}'; try 2,1,1")
    return numbers


def main(argv: list[str]) -> int | None:
    """Run the verb on the words after its name."""
    return run_verb(app, "evaluate", argv)


if __name__ == "__main__":
    exit_codes(main)(sys.argv[1:])
