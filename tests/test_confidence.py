"""Uncertainty of results: intervals, the effect of heavy fine-tuning, the power law."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_run import predicted_by

from lift_ray.evaluation.accumulator import PredictionCollector
from lift_ray.methods.world import Ranks
from lift_ray.reporting.confidence import (
    accuracy_gains,
    accuracy_intervals,
    best_of_each_size,
    heavy_tuning,
    regression_intervals,
    reliability,
    seed_spread,
    student,
    wilson,
)
from lift_ray.reporting.scaling_law import Law, fit_law
from lift_ray.reporting.study_files import Predictions, StudyFiles, read_study
from lift_ray.searching.predictions import write_predictions
from lift_ray.settings.run import RunConfig
from lift_ray.storage.output import Output
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

GROUPS = np.array(["many"] * 5 + ["few"] * 5)


def predictions(fraction: float, seed: int, images: int = 40) -> Predictions:
    """Predictions for ten classes, of which about this fraction is correct."""
    label = np.repeat(np.arange(10), images)
    hit = np.random.default_rng(seed).random(len(label)) < fraction
    return Predictions(label, np.where(hit, label, (label + 1) % 10), np.full(len(label), 0.5))


@pytest.mark.parametrize("images", [3, 40])
def test_intervals_cover_the_truth_as_often_as_they_say(images: int) -> None:
    """Without the correction for small classes, coverage is 85% with three test images per class, as in iNaturalist."""
    inside = 0
    for seed in range(200):
        spread = accuracy_intervals(predictions(0.6, seed, images), GROUPS)["mean_class_accuracy"]
        inside += spread.low <= 0.6 <= spread.high
    assert 0.9 * 200 <= inside <= 0.99 * 200


def of_classes(images: list[int], fractions: Any, seed: int) -> Predictions:
    """Predictions for classes with these numbers of images, each correct with the probability of its class."""
    label = np.repeat(np.arange(len(images)), images)
    hit = np.random.default_rng(seed).random(len(label)) < np.repeat(fractions, images)
    return Predictions(label, np.where(hit, label, (label + 1) % len(images)), np.full(len(label), 0.5))


@pytest.mark.parametrize("images", [[1] * 10, [2] * 10, [1, 20] * 5, [1, 2, 3, 4] * 3])
def test_classes_with_few_images_are_as_uncertain_as_they_are(images: list[int]) -> None:
    """Drawing images within their class alone covers 34% if half of the classes have one image, which adds no width."""
    fractions, inside, gained = np.linspace(0.3, 0.8, len(images)), 0, 0
    groups = np.full(len(images), "few")
    for seed in range(200):
        theirs, ours = of_classes(images, fractions, seed), of_classes(images, fractions + 0.1, 1000 + seed)
        spread = accuracy_intervals(theirs, groups)["few"]
        inside += spread.low <= fractions.mean() <= spread.high
        gain = accuracy_gains(ours, theirs, groups)["few"]
        gained += gain.low <= 0.1 <= gain.high
        assert 0 <= spread.low <= spread.value <= spread.high <= 1
    assert inside >= 0.9 * 200
    assert gained >= 0.9 * 200


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_few_images_that_are_all_right_or_all_wrong_prove_nothing(fraction: float) -> None:
    groups = np.array(["few", "few", "medium", "many"])
    found = accuracy_intervals(of_classes([2, 2, 1, 40], [fraction] * 4, 0), groups)
    widths = {group: found[group].high - found[group].low for group in ("few", "medium", "many")}
    assert 0.05 < widths["many"] < 0.1 < widths["few"] < widths["medium"] < 0.9


def test_one_image_is_no_certain_gain() -> None:
    groups = np.array(["few", "many"])
    right, wrong = of_classes([1, 40], [1, 0.5], 0), of_classes([1, 40], [0, 0.5], 0)
    for ours, theirs, sign in ((right, wrong, 1), (wrong, right, -1)):
        gain = accuracy_gains(ours, theirs, groups)["few"]
        assert gain.value == sign
        assert gain.high - gain.low > 0.5


def test_the_formulas_of_student_and_wilson_give_the_values_of_the_tables() -> None:
    for freedom, value in ((3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert student(freedom) == pytest.approx(value, rel=0.01)
    low, high = wilson([0, 5, 1], [1, 10, 1])
    assert low == pytest.approx([0, 0.2366, 0.2065], abs=1e-3)
    assert high == pytest.approx([0.7935, 0.7634, 1], abs=1e-3)


def test_an_interval_is_as_wide_as_the_binomial_law_says() -> None:
    found = predictions(0.5, 0, images=400)
    spread = accuracy_intervals(found, GROUPS)
    assert spread["accuracy"].value == pytest.approx(found.hits.mean())
    assert spread["few"].high - spread["few"].low == pytest.approx(2 * 1.96 * (0.25 / 2000) ** 0.5, rel=0.1)


def test_a_gain_on_the_same_images_is_more_certain_than_the_difference_of_two_accuracies() -> None:
    theirs = predictions(0.5, 0)
    better = theirs.predicted.copy()
    better[::20] = theirs.label[::20]
    ours = Predictions(theirs.label, better, theirs.confidence)
    gain, apart = accuracy_gains(ours, theirs, GROUPS)["accuracy"], accuracy_intervals(ours, GROUPS)["accuracy"]
    assert gain.value == pytest.approx(ours.hits.mean() - theirs.hits.mean())
    assert gain.excludes_zero
    assert gain.high - gain.low < (apart.high - apart.low) / 2


def test_a_model_gains_nothing_over_itself() -> None:
    gain = accuracy_gains(predictions(0.5, 0), predictions(0.5, 0), GROUPS)["few"]
    assert (gain.value, gain.low, gain.high) == (0, 0, 0)


def study(sizes: list[float], few: list[float], **columns: list[Any]) -> StudyFiles:
    trials = [
        {
            "number": i,
            "state": "finished",
            "trained_parameters": size,
            "validation/few": value,
            "train_s": 90.0,
            "evaluate_s": 0.0,
            "validation/mean_class_accuracy": value,
            **{name: values[i] for name, values in columns.items()},
        }
        for i, (size, value) in enumerate(zip(sizes, few, strict=True))
    ]
    return StudyFiles("out", "s", "", {"validation/mean_class_accuracy": "max"}, {name: {} for name in columns}, trials)


NOISE = np.random.default_rng(0).normal(0, 0.01, 14).tolist()
SIZES = [10.0 ** (3 + i / 4) for i in range(14)]


@pytest.mark.parametrize(("slope", "answer"), [(-0.05, "Yes: "), (0.05, "No: "), (0.0, "Cannot tell: ")])
def test_heavy_tuning_hurts_if_the_trials_say_so(slope: float, answer: str) -> None:
    few = [0.4 + slope * np.log10(size / 1e3) + noise for size, noise in zip(SIZES, NOISE, strict=True)]
    heavy = heavy_tuning(study(SIZES, few))
    assert heavy.answer.startswith(answer)
    assert heavy.slope
    assert heavy.slope.low <= slope <= heavy.slope.high


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_answer_says_if_no_trial_tunes_the_backbone_itself(kind: str) -> None:
    found = study(SIZES, [0.4 + noise for noise in NOISE])
    in_base = replace(found, about={"space": {"base": {"tuner": {"kind": kind}}}})
    in_space = replace(found, trials=[trial | {"tuner.kind": kind} for trial in found.trials])
    for one in (in_base, in_space):
        assert ("None of them tunes whole blocks of the backbone" in heavy_tuning(one).answer) == (kind == "lora")


@pytest.mark.parametrize("sizes", [SIZES[:4], [1e3, 1e4] * 7])
def test_few_sizes_cannot_tell_about_heavy_tuning(sizes: list[float]) -> None:
    heavy = heavy_tuning(study(sizes, [0.5 - 1e-6 * size for size in sizes]))
    assert heavy.answer.startswith("Cannot tell: ")
    assert heavy.slope is None


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_bad_rates_at_large_sizes_do_not_make_heavy_tuning_hurt(sampler: str) -> None:
    """Every size gains a little, but the higher of two rates ruins the large ones: over all trials the line falls by 4 points."""
    sizes = [10.0 ** (3 + i / 2) for i in range(7)] * 2
    good = [0.40 + 0.02 * np.log10(size / 1e3) + noise / 10 for size, noise in zip(sizes[:7], NOISE[:7], strict=True)]
    bad = [value - 0.1 * np.log10(size / 1e3) for size, value in zip(sizes[:7], good, strict=True)]
    found = replace(
        study(sizes, good + bad),
        about={"space": {"search": {"sampler": sampler}, "base": {"tuner": {"kind": "sparse"}}}},
    )
    assert np.polyfit(np.log10(sizes), good + bad, 1)[0] < -0.02
    heavy = heavy_tuning(found)
    assert heavy.answer.startswith("No: ten times as many trained parameters add 2.0 points of few-shot accuracy")
    assert (
        "Based on 7 sizes (1,000 to 1,000,000 trained parameters), each represented by its best trial" in heavy.answer
    )
    assert heavy.answer.endswith(" by mean class accuracy, out of 14 finished trials.")
    assert [t["number"] for t in heavy.trials] == list(range(7))


def test_kinds_and_sizes_apart_are_points_of_their_own() -> None:
    sizes = [1e4, 1.1e4, 1e4, 8e4, 8e4]
    found = study(sizes, [0.5, 0.6, 0.4, 0.3, 0.2], **{"tuner.kind": ["lora", "lora", "ssf", "lora", "lora"]})
    assert [t["number"] for t in best_of_each_size(found)] == [2, 1, 3]


def test_studies_of_one_dataset_are_pooled_each_with_its_own_intercept() -> None:
    """Both lose 5 points for ten times the size; the study with the larger sizes is better by 30."""
    one, two = (
        study(
            SIZES[at : at + 4],
            [level - 0.05 * np.log10(s) + n / 5 for s, n in zip(SIZES[at : at + 4], NOISE[at:], strict=False)],
        )
        for at, level in ((0, 0.5), (10, 0.8))
    )
    assert heavy_tuning(one).slope is None
    both = heavy_tuning(one, two)
    assert both.slope
    assert both.slope.value == pytest.approx(-0.05, abs=0.005)
    assert both.answer.startswith("Yes: ")


@pytest.mark.parametrize("number", [5, 8, 14])
def test_regression_intervals_cover_the_truth_with_few_trials(number: int) -> None:
    """Intervals for a slope and for one more observation; a percentile bootstrap covers the slope in 90% of the cases."""
    random, inside = np.random.default_rng(1), np.zeros(2)
    for _ in range(300):
        x = np.column_stack([np.ones(number), random.uniform(3, 6, number)])
        y, new = random.normal(0, 1, number), random.normal()
        slope = regression_intervals(x, y, np.array([[0.0, 1.0]]))[0]
        single = regression_intervals(x, y, np.array([[1.0, 6.5]]), single=True)[0]
        inside += [slope.low <= 0 <= slope.high, single.low <= new <= single.high]
    assert (inside >= 0.925 * 300).all()
    assert (inside <= 0.98 * 300).all()


def law_of(exponent: float, noise: float = 0.0) -> Law:
    epochs = [float(e) for e in (1, 2, 3, 4, 6, 8, 12, 16)]
    random = np.random.default_rng(3)
    accuracy = [1 - 0.8 * e**-exponent * float(np.exp(noise * random.normal())) for e in epochs]
    return fit_law(study([1e4] * 8, accuracy, **{"optim.epochs": epochs}), devices=1, unit="GPU-hours")


def test_a_power_law_is_found_and_predicts_larger_trials_exactly() -> None:
    law = law_of(0.25)
    assert law.exponents["optim.epochs"].value == pytest.approx(0.25)
    held = [p for p in law.points if p.held_out]
    assert [p.scales["optim.epochs"] for p in held] == [12, 16], "the largest must be held out"
    for point in held:
        assert point.predicted.value == pytest.approx(point.found)
    assert "buy 64 epochs instead of 16: predicted accuracy 71.7%" in law.answer, (
        "no law reaches beyond four times as many"
    )
    assert "do not rely on it" not in law.answer


@pytest.mark.parametrize(
    ("fracs", "number"), [((1.0, 0.5), "twice the"), ((0.5, 0.25), "all"), ((0.2, 0.1), "80% of the")]
)
def test_a_law_predicts_the_gain_from_more_images(fracs: tuple[float, float], number: str) -> None:
    """The error falls with the number of images alone, at every width."""
    fractions = [fracs[0] / 2**n for n in range(4) for _ in range(3)]
    sizes = [1e4, 2e4, 4e4] * 4
    accuracy = [1 - 0.5 * (s / fracs[0]) ** -0.2 for s in fractions]
    law = fit_law(study(sizes, accuracy, **{"optim.data_frac": fractions}), devices=1, unit="CPU-hours")
    assert law.exponents["optim.data_frac"].value == pytest.approx(0.2)
    more = {"twice the": 2.0, "all": 1.0, "80% of the": 0.8}[number]
    expected = 100 * (1 - 0.5 * (more / fracs[0]) ** -0.2)
    assert f"With {number} training images, the best trial would reach {expected:.1f}%" in law.answer
    assert "trained parameters, the best trial would reach" in law.answer


def test_a_law_without_an_effect_promises_nothing() -> None:
    law = law_of(0.0, noise=0.05)
    assert "No effect is clear" in law.answer
    assert "instead of" not in law.answer
    point = law.points[-1].predicted
    assert point.low < point.value < point.high


def test_of_trials_of_one_scale_the_best_counts() -> None:
    epochs = [float(e) for e in (1, 1, 2, 4, 8, 16, 32)]
    accuracy = [0.01, *(1 - 0.8 * e**-0.25 for e in epochs[1:])]
    law = fit_law(study([1e4] * 7, accuracy, **{"optim.epochs": epochs}), 1, "CPU-hours")
    assert law.exponents["optim.epochs"].value == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("epochs", "words"),
    [
        ([2.0] * 8, "Cannot tell: the trials do not vary enough in training images"),
        (
            [1.0, 2.0, 3.0],
            "Cannot tell: 6 trials that differ in epochs are required to fit and check a law, but there are 3.",
        ),
    ],
)
def test_without_several_scales_there_is_no_law(epochs: list[float], words: str) -> None:
    law = fit_law(study([1e4] * len(epochs), [0.5] * len(epochs), **{"optim.epochs": epochs}), 1, "CPU-hours")
    assert law.answer.startswith(words)
    assert law.points == []


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ([0.38, 0.39], "every seed of the best settings is above every seed of the recipe"),
        ([0.38, 0.45], "the seeds overlap, so the difference may be due to chance"),
        ([0.5, 0.9], "the best settings are not better on average"),
    ],
)
def test_repeated_seeds_show_whether_another_seed_would_change_the_winner(theirs: list[float], words: str) -> None:
    runs = [("best found", v) for v in (0.4, 0.5, 0.6)] + [("the recipe", v) for v in theirs]
    about = {"seeds": [{"label": label, "test/mean_class_accuracy": value} for label, value in runs]}
    text = seed_spread(replace(study([1e4], [0.4]), about=about))
    assert text.startswith("Over 3 seeds, the best settings reach 50.0 ± 10.0% on test and the recipe ")
    assert words in text


def test_one_seed_says_nothing_about_others() -> None:
    assert "a single seed" in seed_spread(study([1e4], [0.4]))


def test_reliability_bins_hold_every_image() -> None:
    found = Predictions(np.zeros(4, int), np.array([0, 0, 1, 1]), np.array([0.99, 0.98, 0.01, 0.5]))
    bins = reliability(found)
    assert sum(images for _, _, images in bins) == 4
    assert bins[-1] == (pytest.approx(0.985), 1.0, 2)


def test_two_ranks_collect_what_one_finds() -> None:
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    whole, halves = (
        PredictionCollector(10, 0, torch.device("cpu")),
        [PredictionCollector(10, at, torch.device("cpu")) for at in (0, 5)],
    )
    for batch in logits.split(3):
        whole.add(batch)
    for half, mine in zip(halves, logits.split(5), strict=True):
        half.add(mine)
    halves[0].tensors()[0].add_(halves[1].tensors()[0])
    for ours, theirs in zip(whole.result(), halves[0].result(), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert whole.result()[0].tolist() == logits.argmax(1).tolist()


def test_what_is_kept_of_each_image_gives_the_same_accuracy(small_data: str, small_clip: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate({"backbone": {"model": small_clip}, "tuner": {"kind": "zero_shot"}})
    workspace = Workspace(small_data, Ranks.alone(use_gpu=False, num_cpus=1))
    found, table = predicted_by(Run(config, workspace))
    write_predictions(table, Output(str(tmp_path)), "predictions/00")
    (tmp_path / "study.json").write_text('{"compared": [{"label": "zero-shot"}], "space": {"space": {}}}')
    kept = read_study(tmp_path, "out").predictions[0]
    assert kept
    assert kept.label.tolist() == workspace.dataset.split("test").labels.tolist()
    assert kept.hits.mean() == pytest.approx(found.metrics["accuracy"])
    assert found.metrics == pytest.approx(Run(config, workspace).evaluate("test").metrics)
