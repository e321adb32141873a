"""How often the report's 95% intervals hold the truth, on made-up data where the truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
from record import record

from lift_ray.epoch_metrics import MAIN
from lift_ray.reporting.confidence import (
    Interval,
    accuracy_gains,
    accuracy_intervals,
    heavy_tuning,
    regression_intervals,
)
from lift_ray.reporting.scaling_law import PowerLaw
from lift_ray.reporting.study_files import Predictions, StudyFiles

TIMES = 1000
CLASSES = 40
GROUPS = np.array(["many"] * 20 + ["few"] * 20)


def holds(interval: Interval, truth: float) -> bool:
    """Is the truth inside?"""
    return interval.low <= truth <= interval.high


def slope(number: int, random: np.random.Generator) -> bool:
    """Of a line through so many points that have no slope."""
    design = np.column_stack([np.ones(number), random.uniform(3, 6, number)])
    return holds(regression_intervals(design, random.normal(0, 1, number), np.array([[0.0, 1.0]]))[0], 0.0)


def heavy(trials: int, random: np.random.Generator) -> bool:
    """Of few-shot accuracy over 7 sizes that do not matter, the best of so many trials of each; the rates that ruin some do."""
    sizes = np.repeat(10.0 ** np.linspace(3, 6, 7), trials)
    few = 0.4 + random.normal(0, 0.02, len(sizes)) - 0.3 * (random.random(len(sizes)) < 0.3)
    rows = [
        {"number": i, "state": "finished", "trained_parameters": float(s), "validation/few": float(v)}
        for i, (s, v) in enumerate(zip(sizes, few, strict=True))
    ]
    found = heavy_tuning(StudyFiles("", "", "", {"validation/few": "max"}, {}, rows)).slope
    return found is not None and holds(found, 0.0)


def exponent(number: int, random: np.random.Generator) -> bool:
    """Of a power law of the error over so many trials between 1 and 16 epochs."""
    return holds(_law(number, random)[0].exponents()[0], 0.25)


def prediction(number: int, random: np.random.Generator) -> bool:
    """Of one more trial at 32 epochs."""
    law, noise = _law(number, random)
    return holds(law.predict(np.array([[32.0]]))[0], 1 - 0.8 * 32**-0.25 * float(np.exp(noise * random.normal())))


def _law(number: int, random: np.random.Generator) -> tuple[PowerLaw, float]:
    epochs = np.exp2(random.uniform(0, 4, number))
    accuracy = 1 - 0.8 * epochs**-0.25 * np.exp(0.03 * random.normal(size=number))
    return PowerLaw(epochs[:, None], accuracy), 0.03


def accuracy(images: int, random: np.random.Generator) -> bool:
    """Mean class accuracy, so many test images of each class, of which 0.3 to 0.9 are recognised."""
    share = np.linspace(0.3, 0.9, CLASSES)
    found = accuracy_intervals(_answers(images, share, random), GROUPS)[MAIN]
    return holds(found, float(share.mean()))


def gain(images: int, random: np.random.Generator) -> bool:
    """Of a model that is 5 points better, on the same images."""
    share = np.linspace(0.3, 0.9, CLASSES)
    ours, theirs = _answers(images, share + 0.05, random), _answers(images, share, random)
    return holds(accuracy_gains(ours, theirs, GROUPS)[MAIN], 0.05)


def _answers(images: int, share: Any, random: np.random.Generator) -> Predictions:
    label = np.repeat(np.arange(CLASSES), images)
    hit = random.random(len(label)) < np.repeat(share, images)
    return Predictions(label, np.where(hit, label, (label + 1) % CLASSES), np.full(len(label), 0.5))


CASES = {
    slope: (5, 8, 14, 30),
    heavy: (1, 2, 4),
    exponent: (6, 8, 14),
    prediction: (6, 8, 14),
    accuracy: (1, 2, 3, 10, 40),
    gain: (1, 2, 3, 10, 40),
}


def main() -> None:
    """Measure each case and write a row with the shares in percent."""
    figures: dict[str, Any] = {"times": TIMES}
    for case, numbers in CASES.items():
        for number in numbers:
            random = np.random.default_rng(number)
            share = 100 * float(np.mean([case(number, random) for _ in range(TIMES)]))
            figures[f"{case.__name__} {number}"] = round(share, 1)
            print(f"{case.__name__:10s} {number:3d}  {share:5.1f}%")
    record(
        "intervals",
        "python benchmarks/intervals.py",
        figures,
        seeds=sorted({n for numbers in CASES.values() for n in numbers}),
    )


if __name__ == "__main__":
    main()
