"""Power law fitted to the trials of a study: predicted gain from more images, longer training or a wider tuner (arXiv 2203.15556)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lift_ray.epoch_metrics import MAIN_METRIC, TRAINED_PARAMETERS
from lift_ray.reporting.confidence import Interval, regression_intervals
from lift_ray.reporting.study_files import StudyFiles, Trial, numbers

SCALES = {"optim.data_frac": "training images", "optim.epochs": "epochs", TRAINED_PARAMETERS: "trained parameters"}
FEWEST_VALUES = 3  # of a scale, spanning at least a factor of two
HELD_OUT_FRAC = 0.25
FARTHEST = 4.0  # times the largest scale seen; no prediction goes beyond

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """Trial with the prediction of the law fitted to the smaller trials, with a 95% interval for a single trial."""

    trial: Trial
    scales: dict[str, float]
    found: float
    predicted: Interval
    held_out: bool


@dataclass(frozen=True)
class Law:
    """Fitted law.

    Args:
        answer: predictions in words, or the reason why there are none.
        points: the trials with their predictions.
        exponents: b of error = c * product of scale^-b, by scale.
    """

    answer: str
    points: list[Point] = field(default_factory=list)
    exponents: dict[str, Interval] = field(default_factory=dict)


class PowerLaw:
    """Least-squares fit of log error = c - sum of b_i log scale_i.

    Args:
        scales: (N, S), N > S + 1, all positive; each column has at least two values and is no combination of the others.
        accuracy: (N,), in [0, 1].
    """

    def __init__(self, scales: Floats, accuracy: Floats) -> None:
        self.design, self.target = _design(scales), np.log(np.maximum(1 - accuracy, 1e-6))

    def predict(self, scales: Floats) -> list[Interval]:
        """Predict the accuracy of one more trial at each row of scales, (M, S) -> M."""
        found = regression_intervals(self.design, self.target, _design(scales), single=True)
        return [Interval(*(float(1 - np.exp(v)) for v in (error.value, error.high, error.low))) for error in found]

    def exponents(self) -> list[Interval]:
        """Return the exponent b of each scale."""
        found = regression_intervals(self.design, self.target, np.eye(self.design.shape[1])[1:])
        return [Interval(-b.value, -b.high, -b.low) for b in found]


def _design(scales: Floats) -> Floats:
    return np.column_stack([np.ones(len(scales)), np.log(scales)])


def fit_law(study: StudyFiles, devices: int, unit: str) -> Law:
    """Fit a law to the smaller trials of a study, check it on the larger ones, then predict the gain from more training.

    Only the best of the trials with the same scales counts: the law is about what a search finds there.

    Args:
        devices: number of devices that a trial holds.
        unit: unit of device time, GPU-hours or CPU-hours.
    """
    metric = study.objective[0] if _is_accuracy(study) else MAIN_METRIC
    trials = [t for t in study.finished if t.get(metric) is not None]
    used = [name for name in SCALES if _is_scale(numbers(trials, name))]
    if not used:
        return Law(
            "Cannot tell: the trials do not vary enough in training images, epochs or trained parameters. At least "
            f"{FEWEST_VALUES} values spanning a factor of two are required: search optim.data_frac, optim.epochs or the width."
        )
    best = _best_at_each_scale(trials, used, metric)
    held = max(1, round(HELD_OUT_FRAC * len(best)))
    fewest = 4 + 2 * len(used)
    scales, found = np.column_stack([numbers(best, n) for n in used]), numbers(best, metric)
    order = np.argsort(np.log(scales / scales.max(0)).sum(1), kind="stable")
    best, scales, found = [best[i] for i in order], scales[order], found[order]
    small = len(best) - held
    if len(best) < fewest or np.linalg.matrix_rank(_design(scales[:small])) <= len(used):
        return Law(
            f"Cannot tell: {fewest} trials that differ in {' and '.join(SCALES[n] for n in used)} are required to fit and check "
            f"a law, but there are {len(best)}."
        )
    predicted = PowerLaw(scales[:small], found[:small]).predict(scales)
    points = [
        Point(trial, dict(zip(used, map(float, at), strict=True)), float(value), guess, i >= small)
        for i, (trial, at, value, guess) in enumerate(zip(best, scales, found, predicted, strict=True))
    ]
    law = PowerLaw(scales, found)
    exponents = dict(zip(used, law.exponents(), strict=True))
    parts = [_checked(points), _exponents(exponents)]
    if any(b.excludes_zero for b in exponents.values()):
        parts += [_more_images(law, study, used, scales), _next_hour(law, study, used, scales, devices, unit)]
    else:
        parts.append("No effect is clear, so the gain from more training cannot be predicted.")
    return Law(" ".join(part for part in parts if part), points, exponents)


def _is_accuracy(study: StudyFiles) -> bool:
    metric, mode = study.objective
    return "/" in metric and mode == "max"


def _is_scale(values: Floats) -> bool:
    if not len(values) or np.isnan(values).any() or values.min() <= 0:
        return False
    return bool(len(np.unique(values)) >= FEWEST_VALUES and values.max() >= 2 * values.min())


def _best_at_each_scale(trials: Sequence[Trial], used: Sequence[str], metric: str) -> list[Trial]:
    best: dict[tuple[float, ...], Trial] = {}
    for trial in trials:
        key = tuple(trial[name] for name in used)
        if key not in best or trial[metric] > best[key][metric]:
            best[key] = trial
    return list(best.values())


def _checked(points: Sequence[Point]) -> str:
    held = [p for p in points if p.held_out]
    mean = float(np.mean([p.found for p in points if not p.held_out]))
    error = 100 * float(np.mean([abs(p.found - p.predicted.value) for p in held]))
    plain = 100 * float(np.mean([abs(p.found - mean) for p in held]))
    inside = sum(p.predicted.low <= p.found <= p.predicted.high for p in held)
    verdict = "" if error < plain else " The law predicts no better than that mean: do not rely on it."
    return (
        f"A power law fitted to the {len(points) - len(held)} smaller trials predicts the {len(held)} larger, held-out trials with "
        f"a mean absolute error of {error:.1f} points ({plain:.1f} for the mean of the smaller trials); {inside} of {len(held)} are "
        f"inside the 95% interval.{verdict}"
    )


def _exponents(exponents: dict[str, Interval]) -> str:
    words = []
    for name, b in exponents.items():
        change, low, high = (100 * (2**-exponent - 1) for exponent in (b.value, b.high, b.low))
        words.append(
            f"Doubling the {SCALES[name]} changes the error by {change:+.1f}%, relative (95% interval {low:+.1f} to {high:+.1f})."
        )
    return " ".join(words)


def _more_images(law: PowerLaw, study: StudyFiles, used: Sequence[str], scales: Floats) -> str:
    """Predict the best trial on all training images, or on twice as many if trials already used them all."""
    at = _scales_of_best(study, used)
    if at is None or "optim.data_frac" not in used:
        return ""
    place = used.index("optim.data_frac")
    most = float(scales[:, place].max())
    at[0, place] = min(2.0 if most == 1 else 1.0, FARTHEST * most)
    number = {1.0: "all", 2.0: "twice the"}.get(float(at[0, place]), f"{100 * at[0, place]:.0f}% of the")
    return f"With {number} training images, the best trial would reach {_words(law.predict(at)[0])}."


def _scales_of_best(study: StudyFiles, used: Sequence[str]) -> Floats | None:
    """Return the scales of the best trial, (1, S); None if one is unknown."""
    best = study.best_trial
    return None if best is None or any(not best.get(n) for n in used) else np.array([[float(best[n]) for n in used]])


def _next_hour(law: PowerLaw, study: StudyFiles, used: Sequence[str], scales: Floats, devices: int, unit: str) -> str:
    """Predict the best trial trained for one more device-hour; with twice the width if epochs were not searched."""
    best, at = study.best_trial, _scales_of_best(study, used)
    if best is None or at is None:
        return ""
    limit = FARTHEST * scales.max(0)
    if "optim.epochs" not in used:
        wider = np.where(np.array(used) == TRAINED_PARAMETERS, np.minimum(2 * at, limit), at)
        return (
            ""
            if (wider == at).all()
            else f"With twice the trained parameters, the best trial would reach {_words(law.predict(wider)[0])}."
        )
    seconds = (best.get("train_s") or 0) + (best.get("evaluate_s") or 0)
    if not seconds:
        return ""
    place = used.index("optim.epochs")
    longer = at.copy()
    longer[0, place] = at[0, place] * (1 + 3600 / (devices * seconds))
    bounded = np.minimum(longer, limit)
    epochs, one_hour = bounded[0, place], bool(bounded[0, place] == longer[0, place])
    hours = devices * seconds / 3600 * (epochs / at[0, place] - 1)
    lead = (
        f"One more {unit.removesuffix('s')} on the best settings buys"
        if one_hour
        else f"{hours:.2g} more {unit} on the best settings ({FARTHEST:g} times the most epochs tried) buy"
    )
    now, then = law.predict(at)[0], law.predict(bounded)[0]
    return (
        f"{lead} {epochs:.0f} epochs instead of {at[0, place]:.0f}: predicted accuracy {_words(then)}, up from "
        f"{100 * now.value:.1f}%."
    )


def _words(interval: Interval) -> str:
    return f"{100 * interval.value:.1f}% (95% interval {100 * interval.low:.1f} to {100 * interval.high:.1f})"
