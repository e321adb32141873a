"""A study as its result folder tells it: trials, what was compared on the test split, and each model's answers there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lift_ray.errors import BadInput
from lift_ray.evaluation.metrics import class_groups
from lift_ray.storage.layout import BEST, PER_CLASS, PREDICTIONS, PREDICTIONS_FILE, RECORD, SPACE, STUDY, TRIALS

FILES = (STUDY, SPACE, TRIALS, f"{BEST}/{RECORD}", f"{BEST}/{PER_CLASS}")
BEST_FOUND = "best found"
DEFAULT_OBJECTIVES = {"validation/mean_class_accuracy": "max"}

Trial = dict[str, Any]


def predictions_of(model: str, tau: float) -> str:
    """The folder in OUT with a model's predictions for the test images, with this post-hoc adjustment."""
    return f"{PREDICTIONS}/{model}-tau-{tau:g}"


def _predictions_path(folder: Path, figures: dict[str, Any], index: int) -> Path:
    """Where the predictions of a compared model are; older studies number them by its place in the comparison."""
    return folder / PREDICTIONS / Path(figures.get("predictions", f"{index:02d}")).name / PREDICTIONS_FILE


@dataclass(frozen=True)
class Predictions:
    """What a model made of the N images of the test split, in storage order.

    Args:
        label, predicted: class of each image, (N,).
        confidence: probability of the predicted class, (N,).
    """

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @property
    def hits(self) -> NDArray[np.bool_]:
        """Which images were recognised, (N,)."""
        hits: NDArray[np.bool_] = self.label == self.predicted
        return hits


@dataclass(frozen=True)
class StudyFiles:
    """What is known of a study, finished or not.

    Args:
        where: its folder or URL, as shown.
        objectives: metric -> max or min; the first decides what is best.
        space: what was searched, setting -> range, as in the search-space file.
        trials: a row for each, as in trials.parquet.
        compared: label, and figures of validation and test, of each model of the final comparison.
        answers: for each of `compared`, what it made of the test images, None when that was not kept.
        best: number of the best trial.
        posthoc: for each tau after training, the best trial's figures on validation.
        about: what was written at the start, and over it the whole study.json.
        class_names, class_counts: of the training split; empty when not known yet.
    """

    where: str
    name: str
    dataset: str
    objectives: dict[str, str]
    space: dict[str, dict[str, Any]]
    trials: list[Trial]
    compared: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Predictions | None] = field(default_factory=list)
    best: int | None = None
    posthoc: list[dict[str, float]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    class_counts: list[int] = field(default_factory=list)

    @property
    def objective(self) -> tuple[str, str]:
        """(metric, max or min) of the first."""
        return next(iter(self.objectives.items()))

    @property
    def is_done(self) -> bool:
        """Did the search end, with its comparison on the test split?"""
        return bool(self.compared)

    @property
    def finished(self) -> list[Trial]:
        """The trials that were trained to their end and have the first objective, in the order of their numbers."""
        return [t for t in self.trials if t["state"] == "finished" and t.get(self.objective[0]) is not None]

    @property
    def best_trial(self) -> Trial | None:
        """The best finished trial; while the search runs, the best so far."""
        if self.best is not None:
            return next((t for t in self.trials if t["number"] == self.best), None)
        metric, mode = self.objective
        sign = 1 if mode == "max" else -1
        return max(self.finished, key=lambda t: (sign * t[metric], -t["number"]), default=None)

    @property
    def settings(self) -> list[str]:
        """The searched settings that the trials have."""
        return [name for name in self.space if any(t.get(name) is not None for t in self.trials)]

    @property
    def groups(self) -> NDArray[np.str_]:
        """many, medium or few for each class, (K,)."""
        return class_groups(np.array(self.class_counts))

    def entry(self, label: str) -> tuple[dict[str, Any], Predictions | None] | None:
        """Figures and answers of the compared model with this label."""
        return next(
            (found for found in zip(self.compared, self.answers, strict=True) if found[0]["label"] == label), None
        )


def read_study(folder: Path, shown: str) -> StudyFiles:
    """The study whose files are in a folder. Raises BadInput when there is none, or a file cannot be read."""
    about = _json(folder / SPACE, shown) | _json(folder / STUDY, shown)
    if not about and not (folder / TRIALS).exists():
        raise BadInput(
            f"{shown}: must be the results of a search, but there is no study.json and no trials.parquet; "
            "give the --out of python -m lift_ray.tune"
        )
    table = _table(folder / TRIALS, shown).to_pylist() if (folder / TRIALS).exists() else []
    trials = [{name: _finite(value) for name, value in row.items()} for row in table]
    try:
        return _study(about, trials, _json(folder / BEST / RECORD, shown), folder, shown)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{shown}: must be the results of a search, but study.json or trials.parquet lacks {error}; "
            "copy the folder again"
        ) from None


def _study(about: dict[str, Any], trials: list[Trial], best: dict[str, Any], folder: Path, shown: str) -> StudyFiles:
    space, compared = about.get("space", {}), about.get("compared", [])
    seen = {"number", "state", "epochs", "error", "trained_parameters", "train_s", "evaluate_s", "began_at", "ended_at"}
    named = {n: {} for t in trials[:1] for n in t if n not in seen and "/" not in n} if not space else space["space"]
    if trials and (missing := {"number", "state"} - trials[0].keys()):
        raise KeyError(", ".join(sorted(missing)))
    return StudyFiles(
        where=shown,
        name=about.get("name", Path(shown).name),
        dataset=about.get("dataset", ""),
        objectives=space.get("objectives", DEFAULT_OBJECTIVES),
        space=named,
        trials=trials,
        compared=compared,
        answers=[_answers(_predictions_path(folder, f, i), shown) for i, f in enumerate(compared)],
        best=about["best"]["trial"] if "best" in about else None,
        posthoc=about.get("posthoc_curve", []),
        about=about,
        class_names=best.get("class_names", []),
        class_counts=best.get("class_counts", []),
    )


def _finite(value: Any) -> Any:
    """What a trial that diverged has in place of a number is none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _answers(path: Path, shown: str) -> Predictions | None:
    if not path.exists():
        return None
    table = _table(path, shown)
    label, predicted = (table[name].to_numpy().astype(np.int64) for name in ("label", "predicted"))
    return Predictions(label, predicted, table["confidence"].to_numpy().astype(np.float64))


def _json(path: Path, shown: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{shown}: {path.name} must be JSON, but got {error}; copy the folder again") from None
    if not isinstance(data, dict):
        raise BadInput(
            f"{shown}: {path.name} must be a JSON object, but got {type(data).__name__}; copy the folder again"
        )
    return data


def _table(path: Path, shown: str) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        raise BadInput(f"{shown}: {path.name} must be a Parquet table, but got {text}; copy the folder again") from None


def numbers(trials: Sequence[Trial], name: str) -> NDArray[np.float64]:
    """One column as numbers, NaN where a trial has none."""
    values = [t.get(name) for t in trials]
    return np.array(
        [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else np.nan for v in values], float
    )
