"""Uncertainty of results: bootstrap intervals over held-out images and over trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lift_ray.epoch_metrics import ACCURACIES, GROUPS, MAIN, TRAINED_PARAMETERS
from lift_ray.reporting.study_files import BEST_FOUND, Predictions, StudyFiles, Trial, numbers
from lift_ray.text import count

Z = 1.96  # standard deviations of a 95% interval
FEW_IMAGES = 5  # a class with fewer held-out images is uncertain
DRAWS = 2000
CHUNK = 100  # draws at a time, so that thousands of classes fit in memory
FEWEST_POINTS = 5  # (size, accuracy) pairs required for a line with an interval
FEWEST_SIZES = 3  # different sizes among them

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """Value with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if the sign is certain at this level."""
        return self.low > 0 or self.high < 0


def accuracy_intervals(predictions: Predictions, groups: NDArray[np.str_]) -> dict[str, Interval]:
    """Return accuracy overall, by mean class and by group, with 95% bootstrap intervals over held-out images (`_intervals`).

    If all images of a measure are right, or all wrong, resampling finds nothing else, and the ends are those of Wilson's interval.

    Args:
        groups: many, medium or few for each class, (K,).
    """
    total = np.bincount(predictions.label, minlength=len(groups))
    correct = np.bincount(predictions.label[predictions.hits], minlength=len(groups))
    images = total[large := total >= FEW_IMAGES]
    fraction, random = correct[large] / images, np.random.default_rng(0)
    found = _intervals(
        correct, lambda: random.binomial(images, fraction, (CHUNK, len(images))), total, groups, are_hits=True
    )
    for measure, (value, low, high) in ((m, (i.value, i.low, i.high)) for m, i in found.items()):
        if low == high:
            number = total[_members(measure, total, groups)].sum()
            low, high = map(float, wilson(round(value * number), number))
        found[measure] = Interval(value, max(0.0, min(low, value)), min(1.0, max(high, value)))
    return found


def accuracy_gains(ours: Predictions, theirs: Predictions, groups: NDArray[np.str_]) -> dict[str, Interval]:
    """Return the gain of one model over another on the same images, with 95% bootstrap intervals over paired images.

    Args:
        groups: many, medium or few for each class, (K,).
    """
    total = np.bincount(ours.label, minlength=len(groups))
    won, lost = ours.hits & ~theirs.hits, ~ours.hits & theirs.hits
    counts = np.stack([np.bincount(ours.label[where], minlength=len(groups)) for where in (won, lost)], 1)
    images = total[large := total >= FEW_IMAGES]
    fraction, random = counts[large] / images[:, None], np.random.default_rng(0)
    pvals = np.concatenate([fraction, np.clip(1 - fraction.sum(1, keepdims=True), 0, 1)], 1)

    def draw() -> Ints:
        drawn = random.multinomial(images, pvals, (CHUNK, len(images)))
        return drawn[..., 0] - drawn[..., 1]

    return _intervals(counts[:, 0] - counts[:, 1], draw, total, groups)


def wilson(correct: Any, total: Any) -> tuple[Floats, Floats]:
    """Return the ends of Wilson's 95% interval for fractions of at least one image."""
    correct, total = np.asarray(correct, float), np.asarray(total, float)
    center = (correct + Z**2 / 2) / (total + Z**2)
    half = Z * np.sqrt(correct * (total - correct) / total + Z**2 / 4) / (total + Z**2)
    return np.clip(center - half, 0, 1), np.clip(center + half, 0, 1)


def _members(measure: str, total: Ints, groups: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Return the mask of the classes with images that a measure counts, (K,)."""
    members: NDArray[np.bool_] = (total > 0) & ((groups == measure) if measure in GROUPS else True)
    return members


def _intervals(
    found: Ints, draw: Callable[[], Ints], total: Ints, groups: NDArray[np.str_], *, are_hits: bool = False
) -> dict[str, Interval]:
    """Return each measure as a weighted sum of counts over classes, with the percentiles of its bootstrap draws.

    Images are resampled within their class, so each class keeps its number of images. This underestimates the variance of a class
    of n images by the factor (n - 1) / n, so deviations are widened by sqrt(n / (n - 1)). One or a few images say too little about
    their class for that: classes with fewer than FEW_IMAGES are resampled as a whole, with all their images, among the other such
    classes of the measure (a cluster bootstrap). That counts how these classes differ as uncertainty too, so it is rather too wide.
    A single one, or several that are all right or all wrong (for a gain: all won or all lost), would not vary: their images are
    drawn from one Beta posterior.

    Args:
        found: counts of the sample, (K,).
        draw: resampled counts of the L classes with at least FEW_IMAGES images, (CHUNK, L) at each call.
        total: images of each class, (K,).
        are_hits: the counts are correct images, and not differences of two models.
    """
    weights = {}
    for measure in ACCURACIES:
        members = _members(measure, total, groups)
        if members.any():
            per_image = 1 / total.sum() if measure == "accuracy" else 1 / (members.sum() * np.maximum(total, 1))
            weights[measure] = np.where(members, per_image, 0.0)
    matrix = np.stack(list(weights.values()), 1)
    large = total >= FEW_IMAGES
    widened = np.sqrt(total[large] / (total[large] - 1))[:, None] * matrix[large]
    drawn = np.concatenate([found @ matrix + (draw() - found[large]) @ widened for _ in range(DRAWS // CHUNK)])
    small = [(w > 0) & ~large for w in matrix.T]
    redrawn = [
        _redrawn_classes(w[few], found[few], total[few], are_hits) for w, few in zip(matrix.T, small, strict=True)
    ]
    drawn += np.stack(redrawn, 1)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {m: Interval(*map(float, three)) for m, *three in zip(weights, found @ matrix, low, high, strict=True)}


def _redrawn_classes(weights: Floats, found: Ints, total: Ints, are_hits: bool) -> Floats:
    """Return the deviations of a weighted sum of counts when its M classes are drawn with replacement, (DRAWS,).

    Each class counts with its distance from the common mean, so that a draw of larger classes alone changes nothing. Deviations are
    widened for the small number of classes: by sqrt(M / (M - 1)), and by Student's t with M - 1 degrees of freedom.
    """
    number, images, counted, random = len(weights), int(total.sum()), int(found.sum()), np.random.default_rng(1)
    shares = weights * total
    if number and (number == 1 or abs(counted) in (0, images)) and (are_hits or counted):
        fraction = random.beta(abs(counted) + 0.5, images - abs(counted) + 0.5, DRAWS)
        pooled: Floats = (-1 if counted < 0 else 1) * shares.sum() * (fraction - abs(counted) / images)
        return pooled
    if number < 2:
        return np.zeros(DRAWS)
    distance = weights * found - shares * ((weights * found).sum() / shares.sum())
    drawn = np.concatenate(
        [distance[random.integers(number, size=(CHUNK, number))].sum(1) for _ in range(DRAWS // CHUNK)]
    )
    widened: Floats = drawn * np.sqrt(number / (number - 1)) * student(number - 1) / Z
    return widened


def student(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t: exact for 1 and 2 degrees, then by its expansion in 1 / freedom, to 1%."""
    if freedom < 3:
        return math.tan(0.475 * math.pi) if freedom == 1 else 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z: float = Z
    powers = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum((term / freedom**power for power, term in enumerate(powers, 1)), 0.0)


HEAVY_KINDS = {"full", "partial", "sparse"}  # tuners that can train all weights of a block


@dataclass(frozen=True)
class Heavy:
    """Answer to the question whether heavy fine-tuning hurts the few-shot classes (arXiv 2309.10019).

    Args:
        short: the answer in a sentence.
        answer: the answer with its interval and the trials it is based on.
        trials: the best trial of each size, to which the line is fitted.
        slope: change in few-shot validation accuracy for ten times as many trained parameters.
        curve: (x, low, high) of the fitted line: trained parameters and the ends of its 95% interval.
    """

    short: str
    answer: str
    trials: list[Trial]
    slope: Interval | None = None
    curve: tuple[Floats, Floats, Floats] | None = None


def sized(study: StudyFiles) -> list[Trial]:
    """Return the finished trials that have a few-shot accuracy and trained parameters."""
    return [t for t in study.finished if t.get("validation/few") is not None and (t.get(TRAINED_PARAMETERS) or 0) > 0]


def is_grid(study: StudyFiles) -> bool:
    """Return True if the sampler was a grid, which tries every combination."""
    return bool(study.about.get("space", {}).get("search", {}).get("sampler") == "grid")


def best_of_each_size(study: StudyFiles) -> list[Trial]:
    """Return the best trial of each size by the objective, because a bad learning rate says nothing about the size.

    In a grid, a size is a number of trained parameters; otherwise it is a tuner kind with a number within a factor of two.
    """
    metric, mode = study.objective
    by_number = is_grid(study)
    best: dict[tuple[Any, ...], Trial] = {}
    for trial in sorted(sized(study), key=lambda t: t[metric], reverse=mode == "max"):
        size = trial[TRAINED_PARAMETERS]
        best.setdefault((size,) if by_number else (trial.get("tuner.kind"), round(np.log2(size))), trial)
    return sorted(best.values(), key=lambda t: (t[TRAINED_PARAMETERS], t["number"]))


def heavy_tuning(*studies: StudyFiles) -> Heavy:
    """Answer the question from the finished trials of studies of one dataset, or say why they cannot tell.

    The fitted line is few = a + b log10(trained parameters), with an intercept a for each study and one slope b for all.
    """
    if not any(t.get("validation/few") is not None for study in studies for t in study.trials):
        reason = "no trial has a few-shot accuracy, because no validation image is of a few-shot class."
        return Heavy("Cannot tell.", f"Cannot tell: {reason}", [])
    points = [(i, trial) for i, study in enumerate(studies) for trial in best_of_each_size(study)]
    owner, trials = np.array([i for i, _ in points], int), [trial for _, trial in points]
    number = sum(len(sized(study)) for study in studies)
    levels = np.eye(len(studies))[:, [i for i in range(len(studies)) if i in owner]]
    size, few = np.log10(numbers(trials, TRAINED_PARAMETERS)), numbers(trials, "validation/few")
    design, fewest = np.column_stack([levels[owner], size]), FEWEST_POINTS + levels.shape[1] - 1
    if len(trials) < fewest or len(np.unique(size)) < FEWEST_SIZES or np.linalg.matrix_rank(design) < design.shape[1]:
        return Heavy(
            "Cannot tell: too few sizes were tried.",
            f"Cannot tell: at least {fewest} sizes with {FEWEST_SIZES} different numbers of trained parameters are required, but "
            f"{count(number, 'finished trial')} cover {len(trials)} (see search_spaces/heavy.yaml).",
            trials,
        )
    grid = np.linspace(size.min(), size.max(), 30)
    level = np.tile(levels[owner].mean(0), (len(grid), 1))
    slope, *heights = regression_intervals(
        design, few, np.concatenate([np.eye(design.shape[1])[-1:], np.column_stack([level, grid])])
    )
    change = f"{'add' if slope.value > 0 else 'cost'} {100 * abs(slope.value):.1f} points of few-shot accuracy"
    word = ("No" if slope.value > 0 else "Yes") if slope.excludes_zero else "Cannot tell"
    chance = "" if slope.excludes_zero else ", which may be due to chance"
    short = f"{word}: ten times as many trained parameters {change}{chance}."
    interval = f"95% interval {100 * slope.low:+.1f} to {100 * slope.high:+.1f}"
    span = f"{10 ** size.min():,.0f} to {10 ** size.max():,.0f}"
    names = dict.fromkeys(study.objective[0].rsplit("/", 1)[-1].replace("_", " ") for study in studies)
    metrics = " or ".join(f"{name} accuracy" if name in GROUPS else name for name in names)
    answer = (
        f"{short.removesuffix('.')} ({interval}). Based on {len(trials)} sizes ({span} trained parameters), each "
        f"represented by its best trial by {metrics}, out of {count(number, 'finished trial')}.{_none_is_heavy(studies)}"
    )
    low, high = (np.array([getattr(h, end) for h in heights]) for end in ("low", "high"))
    return Heavy(short, answer, trials, slope, (10**grid, low, high))


def _none_is_heavy(studies: Sequence[StudyFiles]) -> str:
    """Say where heavy fine-tuning was tried if no trial of the studies tunes whole blocks of the backbone; "" if one does."""
    for study in studies:
        base = study.about.get("space", {}).get("base", {}).get("tuner", {})
        kinds = {
            trial.get("tuner.kind") or (base.get("kind") if isinstance(base, dict) else base) for trial in sized(study)
        }
        if kinds & HEAVY_KINDS:
            return ""
    return " None of them tunes whole blocks of the backbone: search_spaces/heavy.yaml does, and the README compares such methods."


def regression_intervals(design: Floats, y: Floats, wanted: Floats, single: bool = False) -> list[Interval]:
    """Return 95% intervals for combinations of least-squares coefficients, by bootstrap-t over residuals.

    With few trials a percentile bootstrap is too narrow; tests/test_confidence.py measures the coverage.

    Args:
        design: (N, P) of full rank, N > P. y: (N,).
        wanted: combinations, (M, P): a row of the design for a height, a unit vector for a coefficient.
        single: return intervals for one more observation, not for the mean of many.
    """
    random, inverse = np.random.default_rng(0), np.linalg.inv(design.T @ design)
    spread = np.sqrt(np.einsum("mi,ij,mj->m", wanted, inverse, wanted) + single)
    solve = inverse @ design.T

    def fit(values: Floats) -> tuple[Floats, Floats]:
        found = values @ solve.T
        scale = np.sqrt(((values - found @ design.T) ** 2).sum(-1, keepdims=True) / (len(y) - design.shape[1]))
        return found @ wanted.T, scale * spread

    found, error = fit(y)
    fitted = design @ (solve @ y)
    residuals = y - fitted
    drawn, errors = fit(fitted + random.choice(residuals, (DRAWS, len(y))))
    truth = found + (random.choice(residuals, drawn.shape) if single else 0.0)
    t = np.divide(drawn - truth, errors, out=np.zeros_like(drawn), where=errors > 1e-12)
    below, above = np.percentile(t, [2.5, 97.5], axis=0)
    return [
        Interval(*map(float, three)) for three in zip(found, found - above * error, found - below * error, strict=True)
    ]


def seed_spread(study: StudyFiles) -> str:
    """Compare the seeds of the best settings with those of the first baseline (search.seeds_best), in words."""
    runs: dict[str, list[float]] = {}
    for run in study.about.get("seeds", []):
        if (value := run.get(f"test/{MAIN}")) is not None:
            runs.setdefault(run["label"], []).append(100 * value)
    best, *others = (runs.pop(BEST_FOUND, []), *runs.values())
    if len(best) < 2:
        return "All settings were trained with a single seed, so the spread over seeds is unknown (search.seeds_best)."
    text = f"Over {len(best)} seeds, the best settings reach {np.mean(best):.1f} ± {np.std(best, ddof=1):.1f}% on test"
    if not others or len(others[0]) < 2:
        return text + "."
    label, theirs = next(iter(runs)), others[0]
    text += f" and {label} {np.mean(theirs):.1f} ± {np.std(theirs, ddof=1):.1f}%"
    if min(best) > max(theirs):
        return f"{text}: every seed of the best settings is above every seed of {label}."
    if np.mean(best) > np.mean(theirs):
        return f"{text}: the seeds overlap, so the difference may be due to chance."
    return f"{text}: the best settings are not better on average."


def reliability(predictions: Predictions, num_bins: int = 15) -> list[tuple[float, float, int]]:
    """Return (mean confidence, accuracy, images) of each non-empty confidence bin (arXiv 1706.04599)."""
    place = np.clip(np.ceil(predictions.confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    out = []
    for k in np.unique(place):
        here = place == k
        out.append((float(predictions.confidence[here].mean()), float(predictions.hits[here].mean()), int(here.sum())))
    return out
