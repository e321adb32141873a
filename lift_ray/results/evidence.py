"""How sure a result is: intervals by bootstrap over test images and over trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lift_ray.results.metrics import GROUPS
from lift_ray.results.studies import Answers, StudyFiles, Trial, numbers

DRAWS = 2000
CHUNK = 100  # draws at a time: thousands of classes fit into memory
MEASURES = ("accuracy", "mean_class_accuracy", *GROUPS)
FEWEST_TRIALS = 8
FEWEST_SIZES = 3

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A value and the 95% interval around it."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Is the sign certain at this level?"""
        return self.low > 0 or self.high < 0


def accuracy_intervals(answers: Answers, groups: NDArray[np.str_]) -> dict[str, Interval]:
    """Accuracy overall, by mean class and by group, with 95% intervals by bootstrap over test images.

    Images are drawn anew within their class, so each class keeps its number of images.

    Args:
        groups: many, medium or few for each class, (K,).
    """
    total = np.bincount(answers.label, minlength=len(groups))
    correct = np.bincount(answers.label[answers.hits], minlength=len(groups))
    share = correct / np.maximum(total, 1)
    random = np.random.default_rng(0)
    return _intervals(correct, lambda: random.binomial(total, share, (CHUNK, len(groups))), total, groups)


def accuracy_gains(ours: Answers, theirs: Answers, groups: NDArray[np.str_]) -> dict[str, Interval]:
    """By how much one model is better than another on the same images, as `accuracy_intervals`; the images are paired."""
    total = np.bincount(ours.label, minlength=len(groups))
    won, lost = ours.hits & ~theirs.hits, ~ours.hits & theirs.hits
    counts = np.stack([np.bincount(ours.label[where], minlength=len(groups)) for where in (won, lost)], 1)
    share = counts / np.maximum(total, 1)[:, None]
    pvals = np.concatenate([share, np.clip(1 - share.sum(1, keepdims=True), 0, 1)], 1)
    random = np.random.default_rng(0)

    def draw() -> Ints:
        drawn = random.multinomial(total, pvals, (CHUNK, len(groups)))
        return drawn[..., 0] - drawn[..., 1]

    return _intervals(counts[:, 0] - counts[:, 1], draw, total, groups)


def _intervals(found: Ints, draw: Callable[[], Ints], total: Ints, groups: NDArray[np.str_]) -> dict[str, Interval]:
    """Each measure is a weighted sum over the classes of the images that count: (K,) found, (CHUNK, K) at each draw.

    Drawing within a class of n images gives (n - 1) / n of the variance that there is, which is put back; of a class with one
    image no variance is known, and it adds none.
    """
    seen, weights = total > 0, {}
    for measure in MEASURES:
        members = seen & (groups == measure) if measure in GROUPS else seen
        if members.any():
            per_image = 1 / total.sum() if measure == "accuracy" else 1 / (members.sum() * np.maximum(total, 1))
            weights[measure] = np.where(members, per_image, 0.0)
    matrix = np.stack(list(weights.values()), 1)
    widen = np.sqrt(total / np.maximum(total - 1, 1))
    drawn = np.concatenate([(found + (draw() - found) * widen) @ matrix for _ in range(DRAWS // CHUNK)])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return {m: Interval(*map(float, three)) for m, *three in zip(weights, found @ matrix, low, high, strict=True)}


@dataclass(frozen=True)
class Heavy:
    """Does heavy fine-tuning hurt the few-shot classes? (arXiv 2309.10019)

    Args:
        slope: change of few-shot validation accuracy for ten times as many trained parameters.
        rank: Spearman's rank correlation.
        curve: (x, low, high) of the fitted line: trained parameters, and its 95% interval.
        answer: in words.
    """

    answer: str
    trials: list[Trial]
    slope: Interval | None = None
    rank: Interval | None = None
    curve: tuple[Floats, Floats, Floats] | None = None


def heavy_tuning(study: StudyFiles) -> Heavy:
    """The question answered from the finished trials of a study, or why they cannot tell."""
    trials = [
        t for t in study.finished if t.get("validation/few") is not None and (t.get("trained_parameters") or 0) > 0
    ]
    if not any(t.get("validation/few") is not None for t in study.trials):
        return Heavy("Cannot tell: no trial has a few-shot accuracy, as no class has under 20 training images.", [])
    size, few = np.log10(numbers(trials, "trained_parameters")), numbers(trials, "validation/few")
    sizes = len(np.unique(size))
    if len(trials) < FEWEST_TRIALS or sizes < FEWEST_SIZES:
        needed = f"at least {FEWEST_TRIALS} trials with {FEWEST_SIZES} numbers are needed (search_spaces/heavy.yaml)"
        return Heavy(f"Cannot tell: {len(trials)} finished trials with {sizes} different numbers of trained parameters are too few; "
                     f"{needed}.", trials)  # fmt: skip
    grid = np.linspace(size.min(), size.max(), 30)
    line = np.column_stack([np.ones_like(grid), grid])
    slope, *heights = regression_intervals(
        np.column_stack([np.ones_like(size), size]), few, np.concatenate([[[0.0, 1.0]], line])
    )
    rank = rank_interval(spearman(size, few), len(trials))
    span = f"from {10 ** size.min():,.0f} to {10 ** size.max():,.0f} trained parameters, {len(trials)} finished trials"
    points = f"{100 * abs(slope.value):.1f} points (95% interval of the change {100 * slope.low:+.1f} to {100 * slope.high:+.1f})"
    words = {
        (True, True): f"No: ten times as many trained parameters gain {points} on the few-shot classes ({span}).",
        (True, False): f"Yes: ten times as many trained parameters cost {points} on the few-shot classes ({span}).",
        (
            False,
            True,
        ): f"Cannot tell: ten times as many trained parameters go with a gain of {points}; that may be chance ({span}).",
        (
            False,
            False,
        ): f"Cannot tell: ten times as many trained parameters go with a loss of {points}; that may be chance ({span}).",
    }
    return Heavy(
        words[slope.excludes_zero, slope.value > 0],
        trials,
        slope,
        rank,
        (10**grid, np.array([h.low for h in heights]), np.array([h.high for h in heights])),
    )


def regression_intervals(design: Floats, y: Floats, wanted: Floats, single: bool = False) -> list[Interval]:
    """Least squares by bootstrap-t over residuals: 95% intervals of combinations of the coefficients.

    With few trials a bootstrap of percentiles is too narrow: tests/test_evidence.py measures how often the truth is inside.

    Args:
        design: (N, P) of full rank, N > P. y: (N,).
        wanted: (M, P), the combinations: a row of the design for a height, a unit vector for a coefficient.
        single: intervals for one more observation at each, not for the mean of many.
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


def rank_interval(rank: float, number: int) -> Interval:
    """Spearman's correlation of so many pairs, at least 4, with its 95% interval: Fisher's z, its variance as of Bonett and Wright."""
    z, error = np.arctanh(np.clip(rank, -0.9999, 0.9999)), np.sqrt((1 + rank**2 / 2) / (number - 3))
    return Interval(rank, float(np.tanh(z - 1.96 * error)), float(np.tanh(z + 1.96 * error)))


def spearman(x: Floats, y: Floats) -> float:
    """Rank correlation in [-1, 1], ties sharing their mean rank; 0 when one of them is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / norm if norm else 0.0


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[inverse]
    return ranks


def seed_spread(study: StudyFiles) -> str:
    """What repeats with other seeds say; that there are none, when there are none."""
    metric, _ = study.objective
    best = study.best_trial
    same = [t for t in study.finished if best and all(t.get(n) == best.get(n) for n in study.settings if n != "seed")]
    if "seed" not in study.settings or len(same) < 2:
        return "Each setting was trained with one seed: how much another seed would change is not known, and no interval here holds it."
    values = numbers(same, metric)
    spread = f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1):.1f}"
    return f"The best settings were trained with {len(same)} seeds: {metric} {spread} (mean ± standard deviation)."


def reliability(answers: Answers, num_bins: int = 15) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, images) of each bin of confidence that holds images (arXiv 1706.04599)."""
    place = np.clip(np.ceil(answers.confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    out = []
    for k in np.unique(place):
        here = place == k
        out.append((float(answers.confidence[here].mean()), float(answers.hits[here].mean()), int(here.sum())))
    return out
