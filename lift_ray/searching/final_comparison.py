"""Final comparison: the trainings and evaluations after the trials, or next to the last of them, and their result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lift_ray.data.folds import EVERYTHING, SEARCHED
from lift_ray.epoch_metrics import TRAINED_PARAMETERS, EpochMetrics
from lift_ray.errors import RunFailed
from lift_ray.reporting.study_files import BEST_FOUND, ZERO_SHOT, predictions_of
from lift_ray.reporting.trial_rows import TrialRow, pareto_front
from lift_ray.searching.confirmation import Choice, Results, candidates, compared_baselines, fold_jobs, ranked
from lift_ray.searching.jobs import EvaluationJob, Job, TrainJob, trial_checkpoint_path, trial_checkpoints
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.seed_repeats import repeat_jobs, repeated, seed_results
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import BackboneConfig, EvaluationConfig, RunConfig
from lift_ray.settings.space import SpaceFile, backbones
from lift_ray.storage.layout import FINAL_CHECKPOINT
from lift_ray.storage.output import Output
from lift_ray.terminal.tables import TTE_ROW
from lift_ray.text import count

CROPS, TTE = 5, "-tte"  # added test-time ensembling: crops per image, and the suffix of the model's name
REFIT = "-refit"  # suffix of the name of a model that was trained again
WORKERS = "workers"  # in the result of a refit that Ray Train ran, which has its model where `train` writes it


@dataclass
class SearchResult:
    """Result of a search.

    Args:
        rows: all trials, in the order of their numbers.
        choice: the winner, and the trials it was compared with on out-of-fold predictions.
        final: the winner's model in best/.
        compared: (label, metrics of validation and test) of zero-shot, the baselines, the best trial, and its variants without
            further training: without post-hoc tau, test-time ensembling.
        front: the Pareto front of a search with several objectives; otherwise empty.
        tte: label of each row of `compared` -> mode of its test-time ensembling.
        time_s: seconds of wall time by activity, from `time_breakdown`.
        seeds: label, seed and metrics of each run of the best settings and the baseline, if `search.seeds_best` is above 1.
        together: results of each finished trial of `method: backdoor`, from `ensemble_results`.
    """

    rows: list[TrialRow]
    choice: Choice
    final: Model
    compared: list[tuple[str, dict[str, Any]]]
    front: list[TrialRow]
    tte: dict[str, str]
    time_s: dict[str, float]
    seeds: list[dict[str, Any]] = field(default_factory=list)
    together: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Model:
    """Model of the comparison.

    Args:
        name: its name in results.
        config: the settings of its run.
        checkpoint: the folder of its weights in OUT; None for a model that trains nothing.
        refit: the job that trains it again on all labeled images; None for the model of a trial.
    """

    name: str
    config: dict[str, Any]
    checkpoint: str | None
    refit: TrainJob | None = None

    @property
    def tau(self) -> float:
        """Strength of the post-hoc adjustment in its settings."""
        return float(self.config.get("evaluation", {}).get("posthoc_tau", 0.0))

    @property
    def tte(self) -> str:
        """Mode of the test-time ensembling in its settings."""
        return EvaluationConfig.model_validate(self.config.get("evaluation", {})).tte

    @property
    def has_text(self) -> bool:
        """True if its backbone has a text tower."""
        return BackboneConfig.model_validate(self.config.get("backbone", {})).has_text


@dataclass(frozen=True)
class Entry:
    """Line of the comparison: a model with a post-hoc tau.

    Args:
        model: the model that is tested.
        searched: the model with the same settings that has not seen the validation images.
        row: the trial that has the validation metrics already; None if they must be evaluated.
    """

    label: str
    model: Model
    searched: Model
    tau: float
    row: TrialRow | None = None


def zero_shots(space: SpaceFile) -> dict[str, Model]:
    """Return each foundation model of the search without fine-tuning, by its label in the comparison."""
    plain = {"method.kind": "lift", "tuner.kind": "zero_shot", "extra_tuner": None}
    found = {}
    for number, (label, values) in enumerate(backbones(space).items(), 1):
        name = f"{ZERO_SHOT}-{number}" if label else ZERO_SHOT
        config = apply_overrides(space.base, space.settings(values) | plain, RunConfig)
        found[f"{ZERO_SHOT} {label}".strip()] = Model(name, config, None)
    return found


def trained(space: SpaceFile, row: TrialRow, *, tte: bool = False) -> Model:
    """Return a finished trial's model, optionally with test-time ensembling."""
    config = space.config(row.values).to_dict()
    config = apply_overrides(config, {"evaluation.tte": "five_crops"}, RunConfig) if tte else config
    path = trial_checkpoint_path(row.number, row.last.epoch)
    return Model(f"trial-{row.number:04d}{TTE if tte else ''}", config, path)


def final(space: SpaceFile, row: TrialRow, results: Results, data: SearchData, *, tte: bool = False) -> Model:
    """Return the final model of a finished trial: trained again on all labeled images, or that of the trial itself.

    It is that of the trial if it trains nothing, or if training it again diverged.
    """
    model = trained(space, row, tte=tte)
    job = TrainJob(row.number, space.config(row.values).to_dict(), EVERYTHING, then="keep")
    if not data.retrains or not row.last.epoch or results.get(job.key) == {}:
        return model
    path = trial_checkpoint_path(row.number, row.last.epoch, EVERYTHING)
    if WORKERS in results.get(job.key, {}):
        path = f"{trial_checkpoints(row.number, EVERYTHING)}/{FINAL_CHECKPOINT}"
    name = f"trial-{row.number:04d}{REFIT}{TTE if tte else ''}"
    return replace(model, name=name, checkpoint=path, refit=job)


def final_jobs(
    space: SpaceFile,
    rows: Sequence[TrialRow],
    results: Results,
    data: SearchData,
    choice: Choice | None,
    *,
    is_over: bool,
) -> list[Job]:
    """Return the known jobs that are not done, most important first.

    Args:
        results: results of the jobs that are done.
        choice: the winner; None if it is not known yet.
        is_over: True once all trials have ended. Before, only jobs that do not depend on the best trial are returned: those of
            zero-shot and the finished baselines. They keep slots busy that no trial is left for.
    """
    confirmed = candidates(space, rows) if is_over else []
    if not is_over and space.search.confirm is not None:
        confirmed = compared_baselines(space, rows, is_over=False)
    jobs: dict[str, Job] = {job.key: job for row in confirmed for job in fold_jobs(space, row)}
    wanted: dict[tuple[str, str], tuple[Model, list[float]]] = {}

    def want(model: Model, split: str, tau: float) -> None:
        _, here = wanted.setdefault((model.name, split), (model, []))
        if tau not in here and result_key(model.name, split, tau) not in results:
            here.append(tau)

    for entry in comparison(space, rows, results, data, choice):
        refit = entry.model.refit
        if refit is not None and (space.test == "split" or entry.label == BEST_FOUND):
            jobs[refit.key] = refit
        if space.test == "split" and (refit is None or refit.key in results):
            want(entry.model, "test", entry.tau)
        if entry.row is None:
            want(entry.searched, "validation", entry.tau)
    if space.test == "split":
        for row in ensembles(space, rows):
            want(trained(space, row), "test", trained(space, row).tau)
    if choice is not None:
        fold = final_fold(space, data)
        repeats = repeated(space, rows, choice)
        jobs |= {job.key: job for _, row, tau in repeats for job in repeat_jobs(space, row, tau, fold)}
    evaluations = [evaluation_job(model, split, taus) for (_, split), (model, taus) in wanted.items() if taus]
    left = [job for key, job in jobs.items() if key not in results]
    # the long ones first, so that the slots end together
    return [*left, *sorted(evaluations, key=lambda job: not job.model.endswith(TTE))]


def evaluation_job(model: Model, split: str, taus: Sequence[float]) -> EvaluationJob:
    """Return the job that evaluates a model on a split, for each strength of the post-hoc adjustment."""
    fold = SEARCHED if model.refit is None else EVERYTHING
    return EvaluationJob(model.name, model.config, model.checkpoint, split, own_last(model, taus), fold=fold)


def final_fold(space: SpaceFile, data: SearchData) -> int:
    """Return the number of the view that repeats with other seeds are trained on: that of the final models, if they are tested."""
    return EVERYTHING if data.retrains and space.test == "split" else SEARCHED


def comparison_seconds(
    space: SpaceFile,
    jobs: Sequence[Job] | None,
    num_images: Mapping[str, int],
    image_s: float,
    run_s: float,
    *,
    retrains: bool,
) -> float:
    """Estimate the slot time that the rest of the final comparison takes, in seconds.

    Args:
        jobs: the jobs that are left; None while trials run, when the estimate is for all that the space asks for.
        num_images: number of images of each split.
        image_s: seconds to evaluate an image.
        run_s: seconds to train a run to its end.
        retrains: True if final models are trained again on all labeled images.
    """
    if jobs is None:
        test = num_images.get("test", 0) if space.test == "split" else 0
        both = num_images["validation"] + test
        plain = sum(model.has_text for model in zero_shots(space).values())
        images = (1 + plain + CROPS * tte_rows(space)) * both + len(set(space.baseline_labels())) * test
        return image_s * images + run_s * further_trainings(space, retrains=retrains)
    evaluations = [job for job in jobs if isinstance(job, EvaluationJob)]
    images = sum(num_images[job.split] * (CROPS if job.model.endswith(TTE) else 1) for job in evaluations)
    return image_s * images + run_s * (len(jobs) - len(evaluations))


def further_trainings(space: SpaceFile, *, retrains: bool) -> int:
    """Return the number of trainings after the trials: for confirmation, on all labeled images, and with other seeds."""
    search, baselines = space.search, len(set(space.baseline_labels()))
    confirmed = min(space.num_trials, search.confirm.best + baselines) if search.confirm else 1
    again = 1 + baselines + max(0, tte_rows(space) - 1) if retrains else 0
    return confirmed * (search.folds - 1) + again + (search.seeds_best - 1) * (1 + bool(baselines))


def tte_rows(space: SpaceFile) -> int:
    """Return the number of trials that are evaluated again with test-time ensembling: none if all evaluations of the search have it."""
    return space.search.tte_best if next(iter(zero_shots(space).values())).tte == "off" else 0


def own_last(model: Model, taus: Sequence[float]) -> tuple[float, ...]:
    """Return the taus in order, but with the model's own last, because an ensemble reports on the last one."""
    return tuple(sorted(taus, key=lambda tau: (tau == model.tau, tau)))


def results_of(job: EvaluationJob, value: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a slot's results by the keys under which they are stored: one for each tau, and that of the job if it wrote a file."""
    further = {name: found for name, found in value.items() if name == "report"}
    out = {
        result_key(job.model, job.split, tau): {**figures, **(further if tau == job.taus[-1] else {})}
        for tau, figures in zip(job.taus, value["figures"], strict=True)
    }
    if job.out_of_fold is not None:
        out[job.key] = {"parts": value["parts"], "images": value["images"]}
    return out


def result_key(model: str, split: str, tau: float) -> str:
    """Return the key under which the metrics of a model on a split are stored."""
    return f"{model} {split} tau {tau:g}"


def comparison(
    space: SpaceFile, rows: Sequence[TrialRow], results: Results, data: SearchData, choice: Choice | None
) -> list[Entry]:
    """Return the entries of the comparison that are known: zero-shot and finished baselines, and then the winner's."""
    labels = space.baseline_labels()
    out = [Entry(label, model, model, model.tau) for label, model in zero_shots(space).items() if model.has_text]
    baselines = {
        row.number: labels[row.baseline]
        for row in compared_baselines(space, rows, is_over=choice is not None)
        if row.baseline is not None
    }
    for row in rows:
        if label := baselines.get(row.number):
            searched = trained(space, row)
            out.append(Entry(label, final(space, row, results, data), searched, searched.tau, row))
    if choice is None:
        return out
    for one in choice.candidates[1:]:  # the winner has a tau of its choice, so the baselines have theirs too
        if (label := baselines.get(one.row.number)) and one.posthoc.is_recommended:
            model, searched = final(space, one.row, results, data), trained(space, one.row)
            out.append(Entry(f"{label}, tau {one.posthoc.tau:g}", model, searched, one.posthoc.tau))
    best, posthoc = choice.row, choice.posthoc
    model, searched = final(space, best, results, data), trained(space, best)
    if posthoc.is_recommended:
        out.append(Entry(f"{BEST_FOUND}, tau {posthoc.own:g}", model, searched, posthoc.own, best))
        out.append(Entry(BEST_FOUND, model, searched, posthoc.tau))
    else:
        out.append(Entry(BEST_FOUND, model, searched, posthoc.own, best))
    for row in ranked(space, rows, best)[: tte_rows(space)]:
        if trained(space, row).tte != "off":
            continue
        label = f"{BEST_FOUND if row is best else f'trial {row.number}'}{TTE_ROW}"
        model, searched = final(space, row, results, data, tte=True), trained(space, row, tte=True)
        out.append(Entry(label, model, searched, posthoc.tau if row is best else model.tau))
    return out


def compared(space: SpaceFile, entries: Sequence[Entry], results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Return label and metrics of each entry, from the stored results; `predictions` is the folder of its test predictions."""
    out = []
    for entry in entries:
        if entry.row is not None:
            figures: dict[str, Any] = entry.row.last.flat("validation")
        else:
            figures = dict(results[result_key(entry.searched.name, "validation", entry.tau)])
        if space.test == "split":
            figures |= results[result_key(entry.model.name, "test", entry.tau)]
            figures["predictions"] = Path(predictions_of(entry.model.name, entry.tau)).name
        figures = {name: value for name, value in figures.items() if name not in ("time/evaluate_s", "report")}
        out.append((entry.label, figures))
    return out


def none_finished(rows: Sequence[TrialRow], out: Output) -> RunFailed:
    """Return the error of a search without a finished trial."""
    errors = [f"; the last error: {row.error}" for row in rows if row.error]
    return RunFailed(f"{out}: none of {count(len(rows), 'trial')} finished{''.join(errors[-1:])}; see trials.csv")


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


def conclude(
    space: SpaceFile,
    rows: list[TrialRow],
    results: Results,
    data: SearchData,
    choice: Choice,
    time_s: dict[str, float],
) -> SearchResult:
    """Build the result from the trials and the final comparison."""
    entries = comparison(space, rows, results, data, choice)
    table, tte = compared(space, entries, results), {entry.label: entry.model.tte for entry in entries}
    seeds = seed_results(space, repeated(space, rows, choice), results, table, final_fold(space, data))
    front = pareto_front(rows, space.objectives) if len(space.objectives) > 1 else []
    together = ensemble_results(space, rows, results) if space.test == "split" else []
    model = final(space, choice.row, results, data)
    return SearchResult(rows, choice, model, table, front, tte, time_s, seeds, together)
