"""Final comparison: the evaluations after the trials, or next to the last of them, and the files with the search's result."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lift_ray
from lift_ray.epoch_metrics import POSTHOC, POSTHOC_TAU, TRAINED_PARAMETERS, EpochMetrics
from lift_ray.errors import RunFailed
from lift_ray.ray_runtime.session import machine
from lift_ray.reporting.study_files import BEST_FOUND, predictions_of
from lift_ray.reporting.trial_rows import TrialRow, pareto_front, write_json
from lift_ray.search.jobs import EvaluationJob, Job, trial_checkpoint_path
from lift_ray.search.seed_repeats import repeat_jobs, repeated, seed_results
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import TAUS
from lift_ray.settings.space import SpaceFile
from lift_ray.settings.yaml_file import dump_yaml
from lift_ray.storage.layout import BEST, BEST_METRICS, BEST_SETTINGS, STUDY
from lift_ray.storage.output import Output
from lift_ray.training.checkpoint import Record, read_record

CROPS, TTE = 5, "-tte"  # test-time ensembling: crops per image, and the suffix of the model's name
Results = Mapping[str, dict[str, Any]]


@dataclass
class SearchResult:
    """Result of a search.

    Args:
        rows: all trials, in the order of their numbers.
        best: the finished trial with the best first objective.
        compared: (label, metrics of validation and test) of zero-shot, the baselines, the best trial, and its variants without
            further training: another post-hoc tau, test-time ensembling.
        front: the Pareto front of a search with several objectives; otherwise empty.
        time_s: seconds of wall time by activity, from `time_breakdown`.
        posthoc: validation metrics of the best trial for each post-hoc tau.
        seeds: label, seed and metrics of each run of the best settings and the baseline, if `search.seeds_best` is above 1.
        together: results of each finished trial of `method: backdoor`, from `ensemble_results`.
    """

    rows: list[TrialRow]
    best: TrialRow
    compared: list[tuple[str, dict[str, Any]]]
    front: list[TrialRow]
    time_s: dict[str, float]
    posthoc: list[dict[str, float]]
    seeds: list[dict[str, Any]] = field(default_factory=list)
    together: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Model:
    """Model of the comparison.

    Args:
        name: its name in results.
        config: the settings of its run.
        checkpoint: the folder of its weights in OUT; None for a model that trains nothing.
    """

    name: str
    config: dict[str, Any]
    checkpoint: str | None

    @property
    def tau(self) -> float:
        """Strength of the post-hoc adjustment in its settings."""
        return float(self.config.get("evaluation", {}).get("posthoc_tau", 0.0))


@dataclass(frozen=True)
class Entry:
    """Line of the comparison: a model with a post-hoc tau.

    Args:
        row: the trial that has the model's validation metrics already; None if they must be evaluated.
    """

    label: str
    model: Model
    tau: float
    row: TrialRow | None = None


def zero_shot(space: SpaceFile) -> Model:
    """Return the foundation model without fine-tuning."""
    changes = {"method.kind": "lift", "tuner.kind": "zero_shot", "extra_tuner": None}
    return Model("zero-shot", apply_overrides(space.base, changes, RunConfig), None)


def trained(space: SpaceFile, row: TrialRow, *, tte: bool = False) -> Model:
    """Return a finished trial's model, optionally with test-time ensembling."""
    config = space.config(row.values).to_dict()
    config = apply_overrides(config, {"evaluation.tte": True}, RunConfig) if tte else config
    path = trial_checkpoint_path(row.number, row.last.epoch)
    return Model(f"trial-{row.number:04d}{TTE if tte else ''}", config, path)


def final_jobs(space: SpaceFile, rows: Sequence[TrialRow], results: Results, *, is_over: bool) -> list[Job]:
    """Return the known jobs that are not done, most important first.

    Args:
        results: results of the jobs that are done.
        is_over: True once all trials have ended. Before, only jobs that do not depend on the best trial are returned:
            zero-shot and the finished baselines. They keep slots busy that no trial is left for.
    """
    wanted: dict[tuple[str, str], tuple[Model, list[float]]] = {}
    jobs: list[Job] = []

    def want(model: Model, split: str, *taus: float) -> None:
        _, here = wanted.setdefault((model.name, split), (model, []))
        here += [tau for tau in taus if tau not in here and result_key(model.name, split, tau) not in results]

    for entry in comparison(space, rows) if is_over else early_comparison(space, rows):
        want(entry.model, "test", entry.tau)
        if entry.row is None:
            want(entry.model, "validation", entry.tau)
    for row in ensembles(space, rows):
        want(trained(space, row), "test", trained(space, row).tau)
    if is_over and (best := best_of(rows, space)) is not None:
        want(trained(space, best), "validation", *TAUS)
        jobs = [
            job for _, row in repeated(space, rows, best) for job in repeat_jobs(space, row) if job.key not in results
        ]
    evaluations = [
        EvaluationJob(model.name, model.config, model.checkpoint, split, own_last(model, taus))
        for (_, split), (model, taus) in wanted.items()
        if taus
    ]
    # the long ones first, so that the slots end together
    return [*jobs, *sorted(evaluations, key=lambda job: not job.model.endswith(TTE))]


def comparison_seconds(
    space: SpaceFile, jobs: Sequence[Job] | None, num_images: Mapping[str, int], image_s: float, run_s: float
) -> float:
    """Estimate the slot time that the rest of the final comparison takes, in seconds.

    Args:
        jobs: the jobs that are left; None while trials run, when the estimate is for all that the space asks for.
        num_images: number of images of each split.
        image_s: seconds to evaluate an image.
        run_s: seconds to train a run to its end.
    """
    if jobs is None:
        both = num_images["validation"] + num_images["test"]
        images = (2 + CROPS * space.search.tte_best) * both + len(space.baselines) * num_images["test"]
        return image_s * images + run_s * (space.search.seeds_best - 1) * (1 + bool(space.baselines))
    evaluations = [job for job in jobs if isinstance(job, EvaluationJob)]
    images = sum(num_images[job.split] * (CROPS if job.model.endswith(TTE) else 1) for job in evaluations)
    return image_s * images + run_s * (len(jobs) - len(evaluations))


def own_last(model: Model, taus: Sequence[float]) -> tuple[float, ...]:
    """Return the taus in order, but with the model's own last, because an ensemble reports on the last one."""
    return tuple(sorted(taus, key=lambda tau: (tau == model.tau, tau)))


def results_of(job: EvaluationJob, value: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a slot's results by the keys under which they are stored, one for each tau."""
    further = {name: found for name, found in value.items() if name != "figures"}
    return {
        result_key(job.model, job.split, tau): {**figures, **(further if tau == job.taus[-1] else {})}
        for tau, figures in zip(job.taus, value["figures"], strict=True)
    }


def result_key(model: str, split: str, tau: float) -> str:
    """Return the key under which the metrics of a model on a split are stored."""
    return f"{model} {split} tau {tau:g}"


def early_comparison(space: SpaceFile, rows: Sequence[TrialRow]) -> list[Entry]:
    """Return the entries for zero-shot, if the foundation model has a text tower, and for the finished baselines."""
    labels, plain = space.baseline_labels(), zero_shot(space)
    out = [Entry("zero-shot", plain, plain.tau)] if space.config({}).backbone.has_text else []
    for row in rows:
        if row.baseline is not None and row.state == "finished":
            model = trained(space, row)
            out.append(Entry(labels[row.baseline], model, model.tau, row))
    return out


def comparison(space: SpaceFile, rows: Sequence[TrialRow]) -> list[Entry]:
    """Return all entries of the comparison, once the trials have ended. Empty if none has finished."""
    best = best_of(rows, space)
    if best is None:
        return []
    model = trained(space, best)
    out = [*early_comparison(space, rows), Entry(BEST_FOUND, model, model.tau, best)]
    if tau := best.last.validation.get(POSTHOC_TAU):
        out.append(Entry(f"{BEST_FOUND}, tau {tau:g} after training", model, tau))
    for row in _ranked(space, rows)[: space.search.tte_best]:
        label = f"{BEST_FOUND}, TTE" if row is best else f"trial {row.number}, TTE"
        model = trained(space, row, tte=True)
        out.append(Entry(label, model, model.tau))
    return out


def compared(space: SpaceFile, rows: Sequence[TrialRow], results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Return label and metrics of each entry, from the stored results; `predictions` is the folder of its test predictions."""
    out = []
    for entry in comparison(space, rows):
        figures: dict[str, Any] = {}
        for split in ("validation", "test"):
            if split == "validation" and entry.row is not None:
                figures |= entry.row.last.flat("validation")
            else:
                figures |= results[result_key(entry.model.name, split, entry.tau)]
        figures = {name: value for name, value in figures.items() if name not in ("time/evaluate_s", "report")}
        place = predictions_of(entry.model.name, entry.tau)
        out.append((entry.label, figures | {"predictions": Path(place).name}))
    return out


def best_of(rows: Sequence[TrialRow], space: SpaceFile) -> TrialRow | None:
    """Return the finished trial with the best first objective, with ties broken by the others; None if none has finished."""
    front = pareto_front(rows, space.objectives)
    return front[0] if front else None


def none_finished(rows: Sequence[TrialRow], out: Output) -> RunFailed:
    """Return the error of a search without a finished trial."""
    errors = [f"; the last error: {row.error}" for row in rows if row.error]
    return RunFailed(f"{out}: none of {len(rows)} trials finished{''.join(errors[-1:])}; see trials.csv")


def _ranked(space: SpaceFile, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the finished trials, sorted by the first objective, best first."""
    metric, mode = space.objective
    sign = -1 if mode == "max" else 1
    return sorted(
        (row for row in rows if row.state == "finished"), key=lambda row: (sign * row.last[metric], row.number)
    )


def posthoc_curve(space: SpaceFile, best: TrialRow, results: Results) -> list[dict[str, float]]:
    """Return the validation metrics of the best trial for each post-hoc tau."""
    found = [(tau, results[result_key(trained(space, best).name, "validation", tau)]) for tau in TAUS]
    return [{"tau": tau, **EpochMetrics.of(figures).flat("validation")} for tau, figures in found]


def ensembles(space: SpaceFile, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the finished trials of `method: backdoor`."""
    # Most searches have none, and this is called whenever a trial has ended: validate no settings for them.
    if not any("method" in name for name in (*space.base, *space.space)):
        return []
    return [row for row in rows if row.state == "finished" and space.config(row.values).members()]


def ensemble_results(space: SpaceFile, rows: Sequence[TrialRow], results: Results) -> list[dict[str, Any]]:
    """Return test metrics of each finished trial of `method: backdoor`, and the gain of the ensemble over each of its models.

    Each entry has the trial, its values, metrics as `test/name`, and the report of GroupGainTable.result with the cost.
    """
    out = []
    for row in ensembles(space, rows):
        model = trained(space, row)
        figures = results[result_key(model.name, "test", model.tau)]
        cost = {
            TRAINED_PARAMETERS: row.last.trained_parameters,
            "train_s": sum(metrics.cost.get("train_s", 0.0) for metrics in row.history),
            "evaluate_s": figures["time/evaluate_s"],
        }
        metrics = EpochMetrics.of(figures).flat("test")
        out.append(
            {"trial": row.number, "values": row.values, **metrics, "report": {**figures["report"], "cost": cost}}
        )
    return out


def conclude(space: SpaceFile, rows: list[TrialRow], results: Results, time_s: dict[str, float]) -> SearchResult:
    """Build the result from the trials and the final comparison. At least one trial must have finished."""
    best = best_of(rows, space)
    assert best is not None
    table = compared(space, rows, results)
    seeds = seed_results(space, repeated(space, rows, best), results, table)
    front = pareto_front(rows, space.objectives) if len(space.objectives) > 1 else []
    together = ensemble_results(space, rows, results)
    return SearchResult(rows, best, table, front, time_s, posthoc_curve(space, best, results), seeds, together)


def write_result(space: SpaceFile, dataset: str, found: SearchResult, out: Output) -> None:
    """Write best/, best.yaml and study.json. study.json is written last: if it exists, the search is done."""
    record = write_best(space, dataset, found.best, out, dict(found.compared)[BEST_FOUND])
    about: dict[str, Any] = {
        "name": space.name,
        "dataset": dataset,
        "space": space.model_dump(mode="json", by_alias=True),
        "best": {
            "trial": found.best.number,
            "values": found.best.values,
            "digest": record.digest,
            "config": record.config,
        },
        "posthoc": {name: value for name, value in found.best.last.validation.items() if name in POSTHOC},
        "posthoc_curve": found.posthoc,
        "compared": [{"label": label, **figures} for label, figures in found.compared],
        "seeds": found.seeds,
        "together": found.together,
        "pareto": [
            {"trial": row.number, "values": row.values, **{m: row.last[m] for m in space.objectives}}
            for row in found.front
        ],
        "time_s": {name: round(seconds, 2) for name, seconds in found.time_s.items()},
        "versions": {
            "lift_ray": lift_ray.__version__,
            "ray": version("ray"),
            "optuna": version("optuna"),
            "python": platform.python_version(),
        },
        "machine": machine(),
    }
    write_json(about, out.folder / STUDY)
    out.publish()


def write_best(space: SpaceFile, dataset: str, best: TrialRow, out: Output, figures: Mapping[str, Any]) -> Record:
    """Write best/ and best.yaml, the checkpoint and the settings of the best trial, each atomically."""
    record = _keep_best(best, out, {name: value for name, value in figures.items() if name != "predictions"})
    header = f"# Best of the search {space.name} (trial {best.number}); python -m lift_ray.train best.yaml trains it again.\n"
    dump_yaml({"name": f"{space.name}-best", "dataset": dataset, **record.config}, out.folder / BEST_SETTINGS, header)
    out.publish()
    return record


def _keep_best(best: TrialRow, out: Output, figures: Mapping[str, Any]) -> Record:
    """Copy the best checkpoint to best/, atomically."""
    target, temporary = out.folder / BEST, out.folder / f"{BEST}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with out.fetched(trial_checkpoint_path(best.number, best.last.epoch)) as folder:
        shutil.copytree(folder, temporary)
    write_json(figures, temporary / BEST_METRICS)
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    return read_record(target)
