"""Metrics of resamples of the classes, against `summarise` of images that are copied or left out; standard errors by simulation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lift_ray.epoch_metrics import METRICS
from lift_ray.evaluation.metrics import NUM_BINS, PUBLISHED, ClassGroups, PerClass, summarise
from lift_ray.evaluation.resampling import ImageResults, metric_values, paired_difference

GROUPS = ClassGroups.of([500, 300, 200, 80, 50, 30, 19, 10, 5, 2], PUBLISHED).names
K = len(GROUPS)


def drawn(seed: int, images: int = 60, right: float = 0.6) -> ImageResults:
    """Made-up predictions for images of K classes; a class may have none."""
    random = np.random.default_rng(seed)
    label = random.integers(K, size=images)
    guess = np.where(random.random(images) < right, label, random.integers(K, size=images))
    return ImageResults(label, guess, random.uniform(1 / K, 1, images), random.exponential(size=images))


def summarised(results: ImageResults, groups: np.ndarray = GROUPS) -> dict[str, float]:
    """Metrics of `summarise`."""
    hits = (results.label == results.predicted).astype(float)
    place = np.clip(np.ceil(results.confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    images, confidence, right = (
        np.bincount(place, values, NUM_BINS) for values in (np.ones_like(hits), results.confidence, hits)
    )
    correct, total = (np.bincount(results.label, values, K).astype(np.int64) for values in (hits, None))
    classes = PerClass(correct, total, np.bincount(results.predicted, minlength=K))
    losses = np.bincount(results.label, results.loss, K)
    return summarise(classes, np.stack([images, confidence, right]), losses, groups)


def kept(results: ImageResults, where: np.ndarray) -> ImageResults:
    """Some of the images, by mask or number."""
    return ImageResults(results.label[where], results.predicted[where], results.confidence[where], results.loss[where])


@given(seed=st.integers(0, 2**20), images=st.integers(1, 80), right=st.floats(0, 1))
def test_with_weights_of_one_every_metric_is_that_of_summarise(seed: int, images: int, right: float) -> None:
    results = drawn(seed, images, right)
    expected = summarised(results)
    for metric in METRICS:
        (found,) = metric_values(results, metric, GROUPS, np.ones((1, K)))
        assert found == pytest.approx(expected.get(metric, np.nan), rel=1e-12, abs=1e-12, nan_ok=True), metric


@given(seed=st.integers(0, 2**20), left=st.lists(st.booleans(), min_size=K, max_size=K))
def test_a_class_of_weight_0_is_as_if_its_images_were_not_there(seed: int, left: list[bool]) -> None:
    results, weights = drawn(seed), np.array(left, float)
    rest = kept(results, np.array(left)[results.label])
    expected = summarised(rest) if len(rest.label) else {}
    for metric in METRICS:
        whole, found = metric_values(results, metric, GROUPS, np.stack([np.ones(K), weights]))
        assert found == pytest.approx(expected.get(metric, np.nan), nan_ok=True), metric
        assert whole == pytest.approx(metric_values(results, metric, GROUPS, np.ones((1, K)))[0], nan_ok=True)


@pytest.mark.parametrize("metric", METRICS)
def test_a_class_of_weight_2_counts_like_two_classes(metric: str) -> None:
    """The images of class k + K are copies of those of class k, and so are their predictions."""
    results, weights = drawn(3, 200), np.array([1, 2, 0, 1, 2, 2, 1, 1, 0, 2], float)
    apart = [kept(results, results.label == k) for k in range(K) for _ in range(int(weights[k]))]
    hits = [part.label == part.predicted for part in apart]
    copies = ImageResults(
        np.repeat(np.arange(len(apart)), [len(part.label) for part in apart]),
        np.concatenate([np.where(hit, number, -1) for number, hit in enumerate(hits)]),
        np.concatenate([part.confidence for part in apart]),
        np.concatenate([part.loss for part in apart]),
    )
    groups = np.repeat(GROUPS, weights.astype(int))
    if metric == "macro_f1":  # of a class that is there twice, both copies are confused as often as the class
        correct = 2 * weights * np.bincount(results.label[results.label == results.predicted], minlength=K)
        total = weights * np.bincount(results.label, minlength=K)
        expected = (weights * correct / (total + np.bincount(results.predicted, weights[results.label], K))).sum()
        expected /= weights.sum()
    else:
        expected = metric_values(copies, metric, groups, np.ones((1, len(groups))))[0]
    assert metric_values(results, metric, GROUPS, weights[None])[0] == pytest.approx(expected)


def test_a_group_that_a_resample_lacks_has_no_value() -> None:
    weights = np.array([(group != GROUPS) for group in ("few", "many")], float)
    values = metric_values(drawn(0), "few", GROUPS, weights)
    assert np.isnan(values).tolist() == [True, False]
    assert np.isnan(metric_values(drawn(0), "worst_class", GROUPS, np.zeros((1, K)))).all()


def balanced(right: np.ndarray, seed: int, images: int = 20) -> tuple[ImageResults, ImageResults]:
    """Two models on `images` images of each class: right[m, k] is the chance that model m is right."""
    random, label = np.random.default_rng(seed), np.repeat(np.arange(right.shape[1]), images)
    models = [np.where(random.random(len(label)) < mine[label], label, (label + 1) % right.shape[1]) for mine in right]
    ours, theirs = (ImageResults(label, guess, np.ones(len(label)), np.zeros(len(label))) for guess in models)
    return ours, theirs


@pytest.mark.parametrize(("num_classes", "metric"), [(100, "mean_class_accuracy"), (20, "few"), (6, "few")])
def test_the_error_of_a_mean_over_classes_is_the_analytic_one(num_classes: int, metric: str) -> None:
    """Standard deviation of the differences of the classes over sqrt(n), also if the group is small and others are there."""
    random = np.random.default_rng(1)
    groups = np.array(["few"] * num_classes + ["many"] * 30)
    ours, theirs = balanced(random.uniform(0.2, 0.9, (2, num_classes + 30)), 2)
    number = num_classes if metric == "few" else num_classes + 30
    means = [np.bincount(m.label, m.label == m.predicted)[:number] / 20 for m in (ours, theirs)]
    apart = means[0] - means[1]
    difference, error = paired_difference(ours, theirs, metric, groups, draws=4000)
    assert difference == pytest.approx(apart.mean())
    assert error == pytest.approx(apart.std(ddof=1) / np.sqrt(number), rel=0.05)


@pytest.mark.parametrize("metric", ["mean_class_accuracy", "few", "macro_f1", "harmonic_mean"])
def test_two_standard_errors_hold_the_true_difference_about_as_often_as_they_should(metric: str) -> None:
    """200 times, predictions of two models of the same quality are drawn for 40 classes of 20 images: in 95%, or a little less."""
    groups, inside = np.array(["few", "many"] * 20), 0
    for seed in range(200):
        chance = np.random.default_rng(seed).uniform(0.3, 0.9, 40)
        difference, error = paired_difference(*balanced(np.stack([chance, chance]), seed), metric, groups, draws=200)
        inside += abs(difference) < 2 * error
    assert 180 <= inside <= 198


def test_the_error_is_that_of_the_pair_and_vanishes_for_equal_predictions() -> None:
    random = np.random.default_rng(0)
    ours, theirs = balanced(np.tile(random.uniform(0.1, 0.9, 40), (2, 1)), 0)
    groups = np.array(["many"] * 40)
    assert paired_difference(ours, ours, "accuracy", groups) == (0.0, 0.0)
    alone = np.std(np.bincount(ours.label, ours.label == ours.predicted) / 20, ddof=1) / np.sqrt(40)
    assert paired_difference(ours, theirs, "mean_class_accuracy", groups)[1] < 0.7 * np.sqrt(2) * alone


def test_the_same_seed_gives_the_same_error_and_another_one_a_similar_one() -> None:
    ours, theirs = drawn(1, 400), drawn(1, 400, 0.4)
    first, again, other = (paired_difference(ours, theirs, "loss", GROUPS, seed=seed) for seed in (5, 5, 6))
    assert first == again
    back = paired_difference(theirs, ours, "loss", GROUPS, seed=5)
    assert back == pytest.approx((-first[0], first[1]))
    assert other[1] == pytest.approx(first[1], rel=0.2)


def test_one_class_has_no_standard_error_and_no_class_no_difference() -> None:
    ours, theirs = balanced(np.array([[0.9, 0.5], [0.3, 0.5]]), 0)
    difference, error = paired_difference(ours, theirs, "few", np.array(["few", "many"]))
    assert difference > 0.3
    assert np.isnan(error)
    assert np.isnan(paired_difference(ours, theirs, "medium", np.array(["few", "many"]))).all()


def test_importing_the_resampling_loads_neither_torch_nor_pyarrow() -> None:
    code = "import sys, lift_ray.evaluation.resampling; print({'torch', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
