"""python -m lift_ray.evaluate: the accuracy of a checkpoint, or of an ensemble of checkpoints, on a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from lift_ray import cli
from lift_ray.errors import BadInput, did_you_mean, run_and_exit
from lift_ray.text import count, say

if TYPE_CHECKING:
    from lift_ray.data.dataset import Dataset
    from lift_ray.inference.evaluate import Evaluated, EvaluationRequest
    from lift_ray.inference.new_images import NewImages, SourceOptions
    from lift_ray.reporting.old_test import NewResults, OldTest
    from lift_ray.reporting.study_files import Predictions
    from lift_ray.training.checkpoint import Record

COMBINE = ("logits", "probabilities")
MOST_CONFUSED = 10  # pairs of classes that are printed


@cli.app.command()
@cli.with_json("evaluate")
def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Checkpoints, or results of tune or train: folders or URLs. Several form an ensemble.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|CSV|PARQUET|URL",
            help="Labeled images: a dataset, class folders, a CSV or Parquet table, or a .txt list.  [what it was trained on]",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test.  [test, or all images if the data has no splits]")
    ] = None,
    tau: Annotated[
        list[float] | None,
        typer.Option(
            "--posthoc-tau",
            min=0,
            help="Strength of post-hoc logit adjustment; may be repeated.  [as trained]",
        ),
    ] = None,
    tte: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="Average the logits of several crops: five_crops, ten_crops, augmented, or off.  [as trained]",
        ),
    ] = None,
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
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip images of --data that cannot be decoded, and count them.")
    ] = False,
    old_test: Annotated[
        bool,
        typer.Option("--old-test", help="Also evaluate the test split that the model was trained with, to compare."),
    ] = False,
    image_column: cli.ImageColumn = None,
    label_column: cli.LabelColumn = None,
    split_column: cli.SplitColumn = None,
    root: cli.Root = None,
    class_names: Annotated[
        str | None, typer.Option(metavar="FILE", help="Class names, one per line, for labels that are integers.")
    ] = None,
) -> dict[str, object]:
    """Print overall, mean class, many, medium and few accuracy. The groups are those of the (first) checkpoint.

    Several checkpoints of the same classes form an ensemble (backdoor adjustment, arXiv 2501.15955); each image is read once.

    --data also takes new images that are not converted. Their classes are matched to the model's by name. There may be fewer of them,
    and images of other classes are left out. The result is compared with that on the old test split.

    \b
    Examples:
      python -m lift_ray.evaluate runs/quickstart/best
      python -m lift_ray.evaluate runs/quickstart/best --posthoc-tau 0 --posthoc-tau 0.5 --posthoc-tau 1 --per-class classes.csv
      python -m lift_ray.evaluate runs/mine --data s3://bucket/photos --split validation --json
      python -m lift_ray.evaluate runs/openai runs/laion runs/metaclip --combine probabilities --weights 2,1,1
      python -m lift_ray.evaluate runs/mine --gla
      python -m lift_ray.evaluate runs/mine --split train
      python -m lift_ray.evaluate runs/mine --confusion confusion.csv
      python -m lift_ray.evaluate runs/mine --data photos/2026 --per-class classes.csv
      python -m lift_ray.evaluate runs/mine --data season.csv --root photos/ --label-column species --skip-bad --old-test
    """
    from lift_ray.inference.evaluate import EvaluationRequest, not_held_out
    from lift_ray.inference.new_images import SourceOptions
    from lift_ray.settings.run import TteMode
    from lift_ray.storage.store import same_place

    records = _records(checkpoints)
    record, taus = records[0], _taus(checkpoints, records, tau, gla)
    _check_together(records, combine, weights)
    modes = [tte or _tte(record) for record in records]
    if tte is not None and tte not in get_args(TteMode):
        raise BadInput("--tte", f"unknown value '{tte}'", remedy=did_you_mean(tte, get_args(TteMode)))
    options = SourceOptions(image_column, label_column, split_column, root, class_names)
    _check_data_options(data, {**options.given, "skip_bad": skip_bad, "old_test": old_test})
    with _opened(data, record, split, options, skip_bad) as images:
        dataset, split = images.dataset, images.split
        is_new = data is not None and not same_place(dataset.uri, record.dataset)
        if gla:
            _check_gla(images, checkpoints, records)
        if old_test and not is_new:
            raise BadInput(
                "--old-test", "requires other images", dataset.uri, "leave it out: these have the test split"
            )
        _check_shared(images, workers)
        old_dataset = _trained_on(record) if old_test else None
        seen = next(filter(None, (not_held_out(one, dataset, split) for one in records)), "")
        for note in (*([seen] if seen else []), *images.notes(absent=is_new), *_other_rendering(images, record)):
            say(f"note: {note}", error=True)
        with_predictions = is_new or confusion is not None
        request = EvaluationRequest(
            tuple(checkpoints), dataset, split, taus, tte, combine, _numbers(weights), gla, with_predictions
        )
        found = _evaluated(request, dataset, workers, cpus_per_worker)
        old = None
        if old_dataset is not None:
            earlier = replace(request, dataset=old_dataset, split="test")
            on_old = _evaluated(earlier, old_dataset, workers, cpus_per_worker)
            old = _predictions(old_dataset, "test", on_old)
    if per_class is not None:
        from lift_ray.evaluation.metrics import write_per_class

        write_per_class(found.rows, per_class)
    confused = None if confusion is None else _write_confusions(found, dataset, split, confusion)
    new = _new_results(request, dataset, record, found, old) if is_new else None
    _print(request, dataset, found, new, modes, record.groups.note, confused)
    return {
        "dataset": dataset.uri,
        "split": split,
        "images": dataset.split(split).num_samples,
        "tte": modes,
        "figures": [{"tau": tau, **figures} for tau, figures in zip(taus, found.figures, strict=True)],
        "ensemble": found.report or None,
        "new_images": None if new is None else images.for_json() | new.for_json(),
        "per_class": per_class,
        "confusion": confusion,
        "most_confused": confused,
    }


def _print(
    request: EvaluationRequest,
    dataset: Dataset,
    found: Evaluated,
    new: NewResults | None,
    modes: Sequence[str],
    note: str,
    confused: list[dict[str, Any]] | None,
) -> None:
    """Print the table of an evaluation, the comparison of new images with the old, a note, and the most confused pairs."""
    from lift_ray.terminal.evaluation_tables import confused_table, print_found
    from lift_ray.terminal.tables import console, tte_in_words

    different = dict.fromkeys(modes)
    crops = " or ".join(tte_in_words(mode) or "one crop" for mode in different) if {*modes} != {"off"} else ""
    name, split, taus = "ensemble" if found.report else request.checkpoints[0], request.split, request.taus
    shown = [(f"{name}, tau {t:g}" if t else name, figures) for t, figures in zip(taus, found.figures, strict=True)]
    print_found(
        f"{dataset.uri} {split}, {count(dataset.split(split).num_samples, 'image')}{crops and f', {crops}'}, accuracy (%)",
        split,
        shown,
        found.report,
    )
    if new is not None:
        new.print(f"tau {taus[-1]:g}: " if len(taus) > 1 else "")
    if note:
        say(note)
    if confused is not None:
        console().print(confused_table(confused))


def _evaluated(request: EvaluationRequest, dataset: Dataset, workers: int, cpus_per_worker: int) -> Evaluated:
    """Evaluate a request for an open dataset in this process, with its progress, or on Ray workers."""
    from lift_ray.inference.evaluate import evaluate_here, evaluate_on_workers
    from lift_ray.terminal.image_progress import image_progress

    if workers > 1:
        return evaluate_on_workers(request, workers, cpus_per_worker)
    num_images = dataset.split(request.split).num_samples
    with image_progress() as show:
        show(0, num_images)
        return evaluate_here(request, lambda fraction: show(round(fraction * num_images), num_images))


@contextmanager
def _opened(
    data: str | None, record: Record, split: str | None, options: SourceOptions, skip_bad: bool
) -> Iterator[NewImages]:
    """Yield the images of --data, or of the dataset that a model was trained on. Raises BadInput."""
    from lift_ray.data.bit_depth import Rendering
    from lift_ray.data.open import open_dataset
    from lift_ray.inference.new_images import of_dataset, opened_images
    from lift_ray.terminal.image_progress import image_progress

    if data is None:
        yield of_dataset(open_dataset(record.dataset), record.class_names, split or "test")
        return
    with ExitStack() as stack:
        with image_progress() as show:
            rendering = Rendering.of(record.rendering)
            images = stack.enter_context(
                opened_images(
                    data, record.class_names, split, options, rendering=rendering, skip_bad=skip_bad, progress=show
                )
            )
        yield images


def _trained_on(record: Record) -> Dataset:
    """Return the dataset that a model was trained on, which has a test split. Raises BadInput."""
    from lift_ray.data.open import open_dataset
    from lift_ray.inference.new_images import of_dataset

    return of_dataset(open_dataset(record.dataset), record.class_names, "test").dataset


def _check_data_options(data: str | None, given: Mapping[str, object]) -> None:
    """Raise BadInput if an option is given that requires --data."""
    if data is None and (names := [name for name, value in given.items() if value]):
        raise BadInput(f"--{names[0].replace('_', '-')}", "requires --data", but="it is missing", remedy="add --data")


def _other_rendering(images: NewImages, record: Record) -> tuple[str, ...]:
    """Return a note if a dataset was converted with other options than the one that a model was trained on."""
    from lift_ray.data.bit_depth import Rendering

    theirs, ours = images.dataset.rendering, Rendering.of(record.rendering)
    if images.is_temporary or theirs == ours:
        return ()
    shown = [" ".join(f"--{name} {value}" for name, value in one.to_dict().items()) for one in (theirs, ours)]
    return (
        f"these images were converted with {shown[0] or 'no --window, --page or --background'}, those of the model with "
        f"{shown[1] or 'none'}: they may look different to it",
    )


def _check_shared(images: NewImages, workers: int) -> None:
    """Raise BadInput if workers on other machines would have to read images in a temporary folder of this one."""
    if workers > 1 and images.is_temporary and os.environ.get("RAY_ADDRESS"):
        raise BadInput(
            "--workers",
            "must be 1 on a cluster for images that are not converted",
            workers,
            "leave it out, or convert them to a place that all nodes can read",
        )


def _check_gla(images: NewImages, checkpoints: Sequence[str], records: Sequence[Record]) -> None:
    """Raise BadInput without validation images that the models have not seen, from which GLA estimates their label prior."""
    from lift_ray.inference.evaluate import not_held_out

    if any(not_held_out(one, images.dataset, "validation") for one in records):
        raise BadInput(
            "--gla",
            "requires validation images that the models have not seen",
            but=f"{checkpoints[0]} was trained on them",
            remedy="train with train_on=train",
        )
    if images.is_temporary:
        raise BadInput("--gla", "requires a dataset with validation images", images.dataset.uri, "leave it out")


def _new_results(
    request: EvaluationRequest, dataset: Dataset, record: Record, found: Evaluated, old: Predictions | None
) -> NewResults:
    """Return the results on new images, compared with those on the old test split."""
    from lift_ray.reporting.old_test import NewResults

    predictions = _predictions(dataset, request.split, found)
    return NewResults.of(predictions, record.groups.names, _old_test(request, record, old))


def _old_test(request: EvaluationRequest, record: Record, old: Predictions | None) -> OldTest | str:
    """Return the results on the old test split: these predictions, those that are stored, or the reason why there are none.

    Stored are those with the settings of the run, which the request must not change (with its last tau).
    """
    from lift_ray.reporting.old_test import EVALUATE_IT, OldTest, read_old_test

    if old is not None:
        return OldTest({}, old)
    settings, rule = record.config["evaluation"], "no comparison with the old test split: "
    changed = request.with_gla or request.combine or request.weights or request.tte not in (None, _tte(record))
    if len(request.checkpoints) > 1 or changed or request.taus[-1] != settings["posthoc_tau"]:
        return f"{rule}results are stored for the settings of the run only; {EVALUATE_IT}"
    (checkpoint,) = request.checkpoints
    return read_old_test(checkpoint) or f"{rule}no results on it are stored with {checkpoint}; {EVALUATE_IT}"


def _tte(record: Record) -> str:
    """Return the mode of the test-time ensembling of a run."""
    from lift_ray.settings.run import EvaluationConfig

    return EvaluationConfig.model_validate(record.config["evaluation"]).tte


def _predictions(dataset: Dataset, split: str, found: Evaluated) -> Predictions:
    from lift_ray.reporting.study_files import Predictions

    assert found.predicted is not None
    assert found.confidence is not None
    return Predictions(dataset.split(split).labels, found.predicted, found.confidence)


def _write_confusions(found: Evaluated, dataset: Dataset, split: str, path: Path) -> list[dict[str, Any]]:
    """Write how often each class is predicted as another as CSV, and return the most confused pairs."""
    from lift_ray.reporting.confusion import Confusions
    from lift_ray.reporting.csv_files import write_csv

    assert found.predicted is not None
    confusions = Confusions.of(dataset.split(split).labels, found.predicted, dataset.class_names)
    write_csv(confusions.rows(), path)
    return confusions.most_confused(MOST_CONFUSED)


def _records(checkpoints: list[str]) -> list[Record]:
    """Read the records of the checkpoints. Raises BadInput if their classes, the order of these, or their renderings differ."""
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
        if records[-1].rendering != records[0].rendering:
            raise BadInput(
                where,
                f"must have the --window, --page and --background of {checkpoints[0]}",
                records[-1].rendering or "none",
                "evaluate them one by one",
            )
    return records


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
