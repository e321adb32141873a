"""Metrics of the same predictions on many resamples of the classes, and the standard error of a difference; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lift_ray.epoch_metrics import GROUPS, METRICS
from lift_ray.evaluation.metrics import NUM_BINS

Floats = NDArray[np.float64]
CHUNK = 100  # resamples at a time, which bounds the memory


@dataclass(frozen=True, eq=False)
class ImageResults:
    """Predictions of a model for N labeled images.

    Args:
        label, predicted: true and predicted class of each image, (N,).
        confidence: probability of the predicted class, (N,).
        loss: cross-entropy, (N,).
    """

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: Floats
    loss: Floats

    def take(self, images: NDArray[np.bool_]) -> ImageResults:
        """Return the results of some of the images, given by a mask, (N,)."""
        return ImageResults(self.label[images], self.predicted[images], self.confidence[images], self.loss[images])


def metric_values(results: ImageResults, metric: str, groups: NDArray[np.str_], class_weights: Floats) -> Floats:
    """Return a metric on D resamples of the classes, (D,). With weights of one it is that of `metrics.summarise`.

    Args:
        metric: one of METRICS.
        groups: many, medium or few for each class, (K,).
        class_weights: how often each class is in a resample, with all its images, (D, K); 0 leaves it out. A class that is there
            w times counts w times in a mean over classes; in macro_f1 its copies share the images predicted as the class.

    Returns the values; NaN for a resample without an image that the metric is about.
    """
    weights, total = np.asarray(class_weights, float), _class_sums(results, len(groups))
    if metric == "calibration_error":
        return _ratio(np.abs(weights @ _gaps(results, len(groups))).sum(1), weights @ total)
    sums = _class_sums(results, len(groups), results.loss if metric in LOSSES else _hits(results))
    if metric in ("accuracy", "loss"):
        return _ratio(weights @ sums, weights @ total)
    weights = weights * counted(results, metric, groups)
    if metric == "macro_f1":
        return _ratio((weights * _f1(results, weights, total)).sum(1), weights.sum(1))
    return MEANS.get(metric, _mean)(weights, sums / np.maximum(total, 1))


def all_metrics(results: ImageResults, groups: NDArray[np.str_]) -> dict[str, float]:
    """Return every metric of METRICS that the images can give, as `metrics.summarise` does."""
    whole = np.ones((1, len(groups)))
    values = {metric: float(metric_values(results, metric, groups, whole)[0]) for metric in METRICS}
    return {metric: value for metric, value in values.items() if np.isfinite(value)}


def _mean(weights: Floats, values: Floats) -> Floats:
    """Return the mean over the classes of each resample, (D,), from weights (D, K) and a value for each class, (K,)."""
    return _ratio(weights @ values, weights.sum(1))


def _worst(weights: Floats, values: Floats) -> Floats:
    lowest: Floats = np.where(weights > 0, values, np.inf).min(1)
    return np.where(np.isinf(lowest), np.nan, lowest)


def _harmonic(weights: Floats, values: Floats) -> Floats:
    mean = 1 / _mean(weights, 1 / np.where(values > 0, values, 1.0))
    return np.where(weights @ (values == 0) > 0, 0.0, mean)


def _geometric(weights: Floats, values: Floats) -> Floats:
    mean = np.exp(_mean(weights, np.log(np.where(values > 0, values, 1.0))))
    return np.where(weights @ (values == 0) > 0, 0.0, mean)


LOSSES = ("loss", "balanced_log_loss")
MEANS = {"worst_class": _worst, "harmonic_mean": _harmonic, "geometric_mean": _geometric}


def counted(results: ImageResults, metric: str, groups: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Return the classes that a metric is about, (K,): those with an image, and of the group if the metric is one of a group."""
    members: NDArray[np.bool_] = _class_sums(results, len(groups)) > 0
    return members & (groups == metric) if metric in GROUPS else members


def paired_difference(
    ours: ImageResults,
    theirs: ImageResults,
    metric: str,
    groups: NDArray[np.str_],
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the difference of a metric between two models on the same images (ours - theirs), and its standard error.

    The error is that of a bootstrap over the classes: as many of the classes that the metric is about are drawn with replacement,
    each with all its images and the same ones for both models. It is scaled by sqrt(n / (n - 1)) for n classes, so that for a
    mean over classes its square is unbiased, also if a group has few classes.

    Returns (difference, standard error); the error is NaN for fewer than two classes, the difference too for none.
    """
    members = np.flatnonzero(counted(ours, metric, groups))
    number, whole = len(members), np.ones((1, len(groups)))
    difference = float(metric_values(ours, metric, groups, whole)[0] - metric_values(theirs, metric, groups, whole)[0])
    if number < 2:
        return difference, float("nan")
    random, drawn = np.random.default_rng(seed), []
    for first in range(0, draws, CHUNK):
        weights = np.zeros((min(CHUNK, draws - first), len(groups)))
        weights[:, members] = random.multinomial(number, np.full(number, 1 / number), len(weights))
        drawn.append(metric_values(ours, metric, groups, weights) - metric_values(theirs, metric, groups, weights))
    return difference, float(np.concatenate(drawn).std(ddof=1) * np.sqrt(number / (number - 1)))


def _class_sums(results: ImageResults, num_classes: int, values: Floats | None = None) -> Floats:
    """Return the sum of values (N,) over the images of each class, (K,); without values the number of images."""
    sums: Floats = np.bincount(results.label, values, minlength=num_classes).astype(float)
    return sums


def _hits(results: ImageResults) -> Floats:
    hits: Floats = (results.label == results.predicted).astype(float)
    return hits


def _ratio(above: Floats, below: Floats) -> Floats:
    ratio: Floats = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    return ratio


def _gaps(results: ImageResults, num_classes: int) -> Floats:
    """Return the summed confidence minus the correct images of each class and bin of confidence, (K, NUM_BINS)."""
    place = np.clip(np.ceil(results.confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    cells, gaps = results.label * NUM_BINS + place, results.confidence - _hits(results)
    sums: Floats = np.bincount(cells, gaps, minlength=num_classes * NUM_BINS).astype(float)
    return sums.reshape(-1, NUM_BINS)


def _f1(results: ImageResults, weights: Floats, total: Floats) -> Floats:
    """Return 2 correct / (total + predicted) of each class in each resample, (D, K); 0 for a class that is left out."""
    num_classes = len(total)
    pairs, images = np.unique(results.label * num_classes + results.predicted, return_counts=True)
    label, guess = np.divmod(pairs, num_classes)
    predicted = np.array([np.bincount(guess, images * row[label], minlength=num_classes) for row in weights])
    correct = weights * _class_sums(results, num_classes, _hits(results))
    both: Floats = weights * total + predicted
    return np.divide(2 * correct, both, out=np.zeros_like(both), where=weights > 0)
