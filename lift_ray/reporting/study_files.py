"""Study as read from its result folder: trials, the models compared on the test split, and their predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lift_ray.epoch_metrics import MAIN_METRIC, TRAINED_PARAMETERS
from lift_ray.errors import BadInput, one_line
from lift_ray.evaluation.metrics import PUBLISHED, ClassGroups, stored_groups
from lift_ray.storage.layout import BEST, OUT_OF_FOLD_FILE, PREDICTIONS, PREDICTIONS_FILE, RECORD, SPACE, STUDY, TRIALS
from lift_ray.storage.output import Output

FILES = (STUDY, SPACE, TRIALS, f"{BEST}/{RECORD}")
OUT_OF_FOLD_PATH = f"{BEST}/{OUT_OF_FOLD_FILE}"
PREDICTION_COLUMNS = ["label", "predicted", "confidence"]
BEST_FOUND, ZERO_SHOT = "best found", "zero-shot"
COPY_AGAIN = "copy the folder again"
DEFAULT_OBJECTIVES = {MAIN_METRIC: "max"}
MOST_DRAWN, BEST_DRAWN = 1000, 250  # trials in a plot, and the best of them; a browser takes a minute for 10,000

Trial = dict[str, Any]


def predictions_of(model: str, tau: float) -> str:
    """Return the folder in OUT for a model's predictions on the test images, with this post-hoc tau."""
    return f"{PREDICTIONS}/{model}-tau-{tau:g}"


def _predictions_path(folder: Path, figures: dict[str, Any], index: int) -> Path:
    """Return the path of the predictions of a compared model. Older studies number them by position in the comparison."""
    return folder / PREDICTIONS / Path(figures.get("predictions", f"{index:02d}")).name / PREDICTIONS_FILE


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model for N images: those of the test split in storage order, or the out-of-fold ones.

    Args:
        label, predicted: true and predicted class of each image, (N,).
        confidence: probability of the predicted class, (N,).
    """

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Mask of the correctly classified images, (N,)."""
        hits: NDArray[np.bool_] = self.label == self.predicted
        return hits


@dataclass(frozen=True)
class Candidate:
    """Trial that was compared with the winner on all out-of-fold predictions.

    Args:
        label: `trial 7`, or the label of a baseline.
        tau: its post-hoc tau.
        value: the metric that decides; None if unknown.
        trained_parameters: None if unknown.
        difference: value minus that of the winner.
        error: standard error of the difference, paired by image (bootstrap over classes); None if unknown.
    """

    label: str
    tau: float = 0.0
    value: float | None = None
    trained_parameters: int | None = None
    difference: float = 0.0
    error: float | None = None

    @property
    def is_close(self) -> bool:
        """True if the difference is at most one standard error; False if that is unknown."""
        return abs(self.difference) <= (self.error or 0.0)


@dataclass(frozen=True)
class Choice:
    """Choice of the winner.

    Args:
        baseline: label of the baseline that won; None if a trial of the search did.
        metric, mode: what decides, and whether the largest or the smallest value wins.
        folds: number of folds whose predictions decide; 1 is the validation split alone.
        images: number of these predictions.
        prefer: `best`, or `smaller` for the smallest tuner within one standard error of the best.
        candidates: the winner first; a single one if there was no confirmation.
    """

    baseline: str | None = None
    metric: str = MAIN_METRIC
    mode: str = "max"
    folds: int = 1
    images: int | None = None
    prefer: str = "best"
    candidates: tuple[Candidate, ...] = ()

    @classmethod
    def of(cls, found: dict[str, Any]) -> Choice:
        """Return the choice from its entry in study.json. Each key is optional."""
        candidates = tuple(
            Candidate(one.get("label", f"trial {one.get('trial', '?')}"), **_known(Candidate, one, without="label"))
            for one in found.get("candidates", ())
        )
        return cls(candidates=candidates, **_known(cls, found, without="candidates"))

    @property
    def is_confirmed(self) -> bool:
        """True if several candidates were compared on all folds."""
        return len(self.candidates) > 1


def _known(kind: Any, found: dict[str, Any], without: str) -> dict[str, Any]:
    """Return the entries that are arguments of a dataclass."""
    names = {argument.name for argument in fields(kind)} - {without}
    return {name: value for name, value in found.items() if name in names}


@dataclass(frozen=True)
class StudyFiles:
    """Everything known about a study, finished or not.

    Args:
        where: folder or URL, as shown.
        objectives: metric -> max or min; the first decides which trial is best.
        space: searched settings, name -> range, as in the search-space file.
        trials: rows of trials.parquet.
        compared: label, validation metrics and test metrics of each model in the final comparison.
        predictions: test predictions of each model in `compared`, None if they were not kept.
        best: number of the best trial.
        posthoc: validation metrics of the best trial for each post-hoc tau; with folds, out-of-fold metrics under the same names.
        out_of_fold: predictions of the winner for each image that it was not trained on; None if they were not kept.
        about: contents of space.json, overridden by study.json.
        class_names, class_counts: of the training split; empty if not known yet.
        record: contents of best/run.json; empty if not known yet.
    """

    where: str
    name: str
    dataset: str
    objectives: dict[str, str]
    space: dict[str, dict[str, Any]]
    trials: list[Trial]
    compared: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[Predictions | None] = field(default_factory=list)
    best: int | None = None
    posthoc: list[dict[str, float]] = field(default_factory=list)
    out_of_fold: Predictions | None = None
    about: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    class_counts: list[int] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def objective(self) -> tuple[str, str]:
        """First objective: (metric, max or min)."""
        return next(iter(self.objectives.items()))

    @property
    def is_done(self) -> bool:
        """True if the search has ended with its comparison on the test split."""
        return bool(self.compared)

    @property
    def finished(self) -> list[Trial]:
        """Trials that were trained to the end and have the first objective, in order of number."""
        return [t for t in self.trials if t["state"] == "finished" and t.get(self.objective[0]) is not None]

    def drawn(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return those of the trials that plots draw."""
        return [t for t in trials if t["number"] in self.drawn_numbers]

    @cached_property
    def drawn_numbers(self) -> set[int]:
        """Numbers of the trials that plots draw: all of them or, of thousands, the best, the Pareto front and an even sample."""
        every = [t["number"] for t in self.trials]
        if len(every) <= MOST_DRAWN:
            return set(every)
        metric, mode = self.objective
        best = sorted(self.finished, key=lambda t: t[metric], reverse=mode == "max")[:BEST_DRAWN]
        chosen = {t["number"] for t in best} | {row["trial"] for row in self.about.get("pareto", [])}
        others = [number for number in every if number not in chosen]
        return chosen | {others[i] for i in np.linspace(0, len(others) - 1, MOST_DRAWN - BEST_DRAWN, dtype=int)}

    @property
    def top_trial(self) -> Trial | None:
        """Finished trial with the best first objective."""
        metric, mode = self.objective
        sign = 1 if mode == "max" else -1
        return max(self.finished, key=lambda t: (sign * t[metric], -t["number"]), default=None)

    @property
    def best_trial(self) -> Trial | None:
        """Trial that won; while the search runs, the top one so far."""
        if self.best is None:
            return self.top_trial
        return next((t for t in self.trials if t["number"] == self.best), None)

    @property
    def is_best_on_top(self) -> bool:
        """True if the trial that won has the best first objective; another one may win on all folds."""
        best, top, metric = self.best_trial, self.top_trial, self.objective[0]
        return best is not None and top is not None and best.get(metric) == top[metric]

    @property
    def settings(self) -> list[str]:
        """Searched settings that at least one trial has."""
        return [name for name in self.space if any(t.get(name) is not None for t in self.trials)]

    @property
    def groups(self) -> NDArray[np.str_]:
        """many, medium or few for each class, (K,)."""
        return self.class_groups.names

    @cached_property
    def class_groups(self) -> ClassGroups:
        """many, medium and few as the study says; of older studies those of best/."""
        found = self.about.get("groups", {})
        if len(names := found.get("names", ())) != len(self.class_counts):
            return stored_groups({"class_counts": self.class_counts, **self.record})
        few_below, many_above = found.get("few_below", PUBLISHED[0]), found.get("many_above", PUBLISHED[1])
        return ClassGroups(np.array(names), few_below, many_above, bool(found.get("note")))

    @cached_property
    def choice(self) -> Choice:
        """Choice of the winner; that of an older study has no candidates."""
        return Choice.of(self.about.get("choice", {}))

    @property
    def has_test(self) -> bool:
        """False if the space file says `test: none`: no result of the study is then held out."""
        return bool(self.about.get("held_out", True))

    @property
    def estimate(self) -> str:
        """Name of the predictions that chose the winner: `out-of-fold`, or `validation` if there is only one fold."""
        return "out-of-fold" if self.choice.folds > 1 else "validation"

    @property
    def unseen(self) -> list[str]:
        """Classes without an image that can measure them."""
        return list(self.about.get("unseen", ()))

    @property
    def winner(self) -> tuple[dict[str, Any], Predictions | None] | None:
        """Metrics and test predictions of the best settings, which are those of a baseline if it won; None if not known."""
        found = self.entry(BEST_FOUND)
        return self.entry(self.choice.baseline) if found is None and self.choice.baseline else found

    @property
    def measured(self) -> tuple[str, Predictions] | None:
        """Predictions of the best settings for single classes, with a name: those on test, or else those that chose it."""
        found = self.winner
        if found is not None and found[1] is not None:
            return "test", found[1]
        return (self.estimate, self.out_of_fold) if self.out_of_fold is not None else None

    def entry(self, label: str) -> tuple[dict[str, Any], Predictions | None] | None:
        """Return metrics and predictions of the compared model with this label, None if there is none."""
        return next(
            (found for found in zip(self.compared, self.predictions, strict=True) if found[0]["label"] == label), None
        )


def read_study(folder: Path, shown: str) -> StudyFiles:
    """Read the study in a folder. Raises BadInput if there is none or a file cannot be read."""
    about = _json(folder / SPACE, shown) | _json(folder / STUDY, shown)
    about = {**_without_unknown(about), **({"space": about["space"]} if "space" in about else {})}
    if not about and not (folder / TRIALS).exists():
        raise BadInput(
            shown,
            "must contain the results of a search",
            but="there is no study.json or trials.parquet",
            remedy="give the --out of python -m lift_ray.tune",
        )
    table = _table(folder / TRIALS, shown).to_pylist() if (folder / TRIALS).exists() else []
    trials = [{name: _finite(value) for name, value in row.items()} for row in table]
    try:
        return _study(about, trials, _json(folder / BEST / RECORD, shown), folder, shown)
    except KeyError as error:
        raise BadInput(
            shown,
            "must contain the results of a search",
            but=f"{error} is missing from study.json or trials.parquet",
            remedy=COPY_AGAIN,
        ) from None
    except (TypeError, AttributeError) as error:
        raise BadInput(
            shown, f"unexpected value in study.json or trials.parquet: {one_line(error)}", remedy=COPY_AGAIN
        ) from None


def read_winner(out: Output) -> tuple[dict[str, Any], Predictions | None] | None:
    """Read the test metrics and test predictions of the best settings, without the rest of a study; None if it has no test yet.

    Raises BadInput if a file cannot be read.
    """
    with out.fetched(STUDY) as path:
        about = _json(path, out.shown)
    compared = [one for one in about.get("compared", ()) if isinstance(one, dict)]
    labels = [one.get("label") for one in compared]
    baseline = Choice.of(about.get("choice", {})).baseline
    wanted = next((label for label in (BEST_FOUND, baseline) if label in labels), None)
    if wanted is None:
        return None
    figures = compared[index := labels.index(wanted)]
    name = str(_predictions_path(Path(), figures, index))
    if not out.holds(name):
        return figures, None
    with out.fetched(name) as path:
        return figures, _predictions(path, out.shown)


def _study(about: dict[str, Any], trials: list[Trial], best: dict[str, Any], folder: Path, shown: str) -> StudyFiles:
    space, compared = about.get("space", {}), about.get("compared", [])
    seen = {"number", "state", "epochs", "error", TRAINED_PARAMETERS, "train_s", "evaluate_s", "began_at", "ended_at"}
    named = {n: {} for t in trials[:1] for n in t if n not in seen and "/" not in n} if not space else space["space"]
    named = {n: {**p, "choices": list(p["named"])} if p.get("named") else p for n, p in named.items()}
    if any("label" not in figures for figures in compared):
        raise KeyError("label")
    if trials and (missing := {"number", "state"} - trials[0].keys()):
        raise KeyError(", ".join(sorted(missing)))
    return StudyFiles(
        where=shown,
        name=about.get("name", Path(shown).name),
        dataset=about.get("dataset", ""),
        objectives=space.get("objectives", DEFAULT_OBJECTIVES),
        space=named,
        trials=[_as_chosen(trial, named) for trial in trials],
        compared=compared,
        predictions=[_predictions(_predictions_path(folder, f, i), shown) for i, f in enumerate(compared)],
        best=about["best"]["trial"] if "best" in about else None,
        posthoc=[at for at in about.get("posthoc_curve", []) if "tau" in at],
        out_of_fold=_predictions(folder / OUT_OF_FOLD_PATH, shown),
        about=about,
        class_names=best.get("class_names", []),
        class_counts=best.get("class_counts", []),
        record=best,
    )


def _as_chosen(trial: Trial, space: Mapping[str, Any]) -> Trial:
    """Return a row of trials.parquet with numbers in place of their text: a column of numbers and text holds text only."""
    choices = {name: param["choices"] for name, param in space.items() if param.get("choices")}
    numbers = {name: {str(c): c for c in some if not isinstance(c, str)} for name, some in choices.items()}
    return {
        name: numbers[name].get(value, value) if name in numbers and isinstance(value, str) else value
        for name, value in trial.items()
    }


def _finite(value: Any) -> Any:
    """Return a value, None for the NaN or infinity of a trial that diverged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_unknown(value: Any) -> Any:
    """Return a JSON value without entries that are null or not finite: what a study does not know is missing."""
    if isinstance(value, list):
        return [_without_unknown(one) for one in value]
    if isinstance(value, dict):
        return {name: _without_unknown(one) for name, one in value.items() if _finite(one) is not None}
    return value


def _predictions(path: Path, shown: str) -> Predictions | None:
    if not path.exists():
        return None
    table = _table(path, shown, PREDICTION_COLUMNS)
    if not table.num_rows:
        return None
    label, predicted = (table[name].to_numpy().astype(np.int64) for name in ("label", "predicted"))
    return Predictions(label, predicted, table["confidence"].to_numpy().astype(np.float64))


def _json(path: Path, shown: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(shown, f"invalid JSON in {path.name}: {one_line(error)}", remedy=COPY_AGAIN) from None
    if not isinstance(data, dict):
        raise BadInput(shown, f"{path.name} must be a JSON object", type(data).__name__, COPY_AGAIN)
    return data


def _table(path: Path, shown: str, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(shown, f"invalid Parquet in {path.name}: {one_line(error)}", remedy=COPY_AGAIN) from None


def numbers(trials: Sequence[Trial], name: str) -> NDArray[np.float64]:
    """Return a column of trials as numbers, NaN if a trial has none."""
    values = [t.get(name) for t in trials]
    return np.array(
        [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else np.nan for v in values], float
    )
