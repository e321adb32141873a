"""Summary of a study in words, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lift_ray.epoch_metrics import MAIN, TRAINED_PARAMETERS
from lift_ray.reporting.confidence import Interval, accuracy_gains, accuracy_intervals, heavy_tuning, seed_spread
from lift_ray.reporting.figures.charts import HEAVY, WORDS, posthoc_advice, short_count
from lift_ray.reporting.scaling_law import Law
from lift_ray.reporting.study_files import BEST_FOUND, ZERO_SHOT, Predictions, StudyFiles
from lift_ray.reporting.winner import (
    ORDER,
    best_in_words,
    choice_in_words,
    estimate_in_words,
    estimates,
    groups_in_words,
    listed,
    refit_in_words,
    unseen_in_words,
    winner_news,
)
from lift_ray.terminal.tables import TTE_ROW, mean_and_deviation, tte_note

SCALING = "What would more training gain?"
Compared = tuple[dict[str, Any], Predictions | None]


def summary(study: StudyFiles) -> list[str]:
    """Return sentences on what won, by how much and how certain that is. The first is the headline."""
    heavy = heavy_tuning(study)
    about_winner = [
        choice_in_words(study),
        refit_in_words(study),
        unseen_in_words(study),
        groups_in_words(study),
        tte_note(study.about.get("tte", {}), BEST_FOUND),
        posthoc_advice(study) if study.about.get("posthoc", {}).get("recommended") else "",
    ]
    sentences = (
        *_on_test(study),
        *(about_winner if study.is_done else []),
        f"{HEAVY} {heavy.short}" if heavy.curve is not None else "",  # otherwise it is in `open_questions`
        seed_spread(study) if study.finished else "",
        best_in_words(study),
        _trials(study),
    )
    return [text for text in sentences if text]


def open_questions(study: StudyFiles, law: Law) -> list[str]:
    """Return a line for each question that this study cannot answer."""
    heavy = heavy_tuning(study)
    lines = [] if heavy.curve is not None else [f"{HEAVY} {heavy.answer}"]
    return lines if law.points else [*lines, f"{SCALING} {law_in_words(law)}"]


def _on_test(study: StudyFiles) -> list[str]:
    """Compare the best settings with the baselines on images that the search did not see."""
    found, news = study.winner, winner_news(study)
    if not study.is_done:
        text = "This search has not ended; test accuracy is measured at its end."
        return [text if study.best_trial is None else f"{text} The results so far are on validation."]
    if not study.has_test:
        return [f"{news} Expect slightly lower accuracy on new images.", estimate_in_words(study)]
    if found is None or f"test/{MAIN}" not in found[0]:
        return [
            f"{news} This study has no test results. The validation results below are those that the search optimized: expect "
            "slightly lower accuracy on new images.".strip(),
            estimate_in_words(study),
        ]
    others = [pair for pair in baselines(study) if f"test/{MAIN}" in pair[0]]
    gains = [f"{_points(_gain(found[0], theirs, MAIN))} {theirs['label']}" for theirs, _ in others]
    gains = gains[:1] + [text.replace(" points", "") for text in gains[1:]]
    head = "Its test accuracy" if news else "Test accuracy of the best settings"
    head = f"{news} {head}: {_percent(found[0], MAIN)} (mean over classes, held out from the search)".strip()
    return [
        head + (f", {listed(gains)}." if gains else "."),
        _significance(found, others, study),
        _few(found, others),
        estimate_in_words(study),
    ]


def baselines(study: StudyFiles) -> list[Compared]:
    """Return zero-shot, then the other baselines by their test accuracy, the best last."""
    known = zip(study.compared, study.predictions, strict=True)
    ours = {BEST_FOUND, study.choice.baseline}
    others = [
        (f, a) for f, a in known if f["label"].split(", tau ")[0] not in ours and not f["label"].endswith(TTE_ROW)
    ]
    return sorted(
        others, key=lambda pair: (not pair[0]["label"].startswith(ZERO_SHOT), pair[0].get(f"test/{MAIN}", 0.0))
    )


def _significance(found: Compared, others: Sequence[Compared], study: StudyFiles) -> str:
    """Name the baselines whose difference from the best may be chance over the test images."""
    ours = found[1]
    pairs = [(figures["label"], theirs) for figures, theirs in others if theirs and study.class_counts]
    if not pairs or ours is None:
        return ""
    unsure = [label for label, theirs in pairs if not accuracy_gains(ours, theirs, study.groups)[MAIN].excludes_zero]
    if unsure:
        differences = "The differences" if len(unsure) > 1 else "The difference"
        return f"{differences} from {listed(unsure)} may be due to chance (bootstrap over test images)."
    return f"{'Each difference' if len(pairs) > 1 else 'This difference'} is significant (bootstrap over test images)."


def _few(found: Compared, others: Sequence[Compared]) -> str:
    """Report the rare classes separately: a better mean may hide a loss there."""
    known = [theirs for theirs, _ in others if "test/few" in theirs]
    if "test/few" not in found[0] or not known:
        return ""
    strongest = max(known, key=lambda theirs: theirs["test/few"])
    gain = _gain(found[0], strongest, "few")
    return (
        f"Few-shot test accuracy: {_percent(found[0], 'few')}, {_points(gain)} the strongest baseline there "
        f"({strongest['label']})."
    )


def _gain(ours: dict[str, Any], theirs: dict[str, Any], measure: str) -> float:
    return float(100 * (ours[f"test/{measure}"] - theirs[f"test/{measure}"]))


def _points(gain: float) -> str:
    return "equal to" if abs(gain) < 0.05 else f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"


def _percent(figures: dict[str, Any], measure: str) -> str:
    return f"{100 * figures[f'test/{measure}']:.1f}%"


def _trials(study: StudyFiles) -> str:
    states = [t["state"] for t in study.trials]
    names = {
        "finished": "finished",
        "pruned": "stopped early",
        "infeasible": "outside the constraints",
        "failed": "failed",
        "running": "running",
        "waiting": "waiting",
        "paused": "paused",
    }
    counts = ", ".join(f"{states.count(s)} {word}" for s, word in names.items() if s in states)
    errors = sorted({t["error"] for t in study.trials if t["state"] == "failed" and t.get("error")})
    noun = "trial" if len(states) == 1 else "trials"
    drawn = len(study.drawn_numbers)
    sample = f" Plots show {drawn:,} of them, the best and an even sample of the others; the CSV files have all."
    return (
        f"{len(states)} {noun}: {counts or 'none yet'}."
        + (sample if drawn < len(states) else "")
        + (f" Error of a failed trial: {errors[0]}" if errors else "")
    )


def law_in_words(law: Law) -> str:
    """Return the law's answer if it predicts the held-out trials better than the mean of the smaller trials does."""
    held, small = ([p for p in law.points if p.held_out is side] for side in (True, False))
    if not held:
        return law.answer
    mean = sum(p.found for p in small) / len(small)
    if sum(abs(p.found - p.predicted.value) for p in held) < sum(abs(p.found - mean) for p in held):
        return law.answer
    return (
        "Cannot tell: a power law fitted to the smaller trials predicts the larger trials no better than the mean of the "
        "smaller trials does."
    )


@dataclass(frozen=True)
class Cell:
    """Number in a table, with small print below it."""

    text: str
    below: str = ""


Row = dict[str, str | Cell]


def compared_split(study: StudyFiles) -> str:
    """Return `test`, or `validation` for a dataset without a test split."""
    return "test" if any("test/accuracy" in f for f in study.compared) else "validation"


def accuracy_rows(study: StudyFiles) -> list[Row]:
    """Return the accuracy (%) of each compared model on `compared_split`, on test with 95% intervals."""
    split = compared_split(study)
    rows: list[Row] = []
    for figures, predictions in zip(study.compared, study.predictions, strict=True):
        spread = (
            accuracy_intervals(predictions, study.groups)
            if predictions and study.class_counts and split == "test"
            else {}
        )
        values = {m: figures[name] for m in ORDER if (name := f"{split}/{m}") in figures}
        rows.append(
            {
                "model": figures["label"],
                **_accuracy_cells(values, spread),
                "parameters": short_count(figures.get(TRAINED_PARAMETERS, 0)),
            }
        )
    return rows


def estimate_rows(study: StudyFiles) -> list[Row]:
    """Return the accuracy (%) of the best settings on the predictions that chose them and on test, with 95% intervals."""
    found, tested = estimates(study), study.winner
    if not found:
        return []
    values = {m: v.value if isinstance(v, Interval) else v for m, v in found.items()}
    spread = {m: v for m, v in found.items() if isinstance(v, Interval)}
    rows: list[Row] = [{"images": f"{study.estimate} estimate", **_accuracy_cells(values, spread)}]
    if tested is not None and f"test/{MAIN}" in tested[0]:
        figures, predictions = tested
        spread = accuracy_intervals(predictions, study.groups) if predictions and study.class_counts else {}
        tests = {m: figures[f"test/{m}"] for m in ORDER if f"test/{m}" in figures}
        rows.append({"images": "test", **_accuracy_cells(tests, spread)})
    columns = [name for name in ("images", *(WORDS[m] for m in ORDER)) if any(name in row for row in rows)]
    return [{name: row.get(name, "-") for name in columns} for row in rows]


def _accuracy_cells(values: Mapping[str, float], spread: Mapping[str, Interval]) -> dict[str, Cell]:
    return {WORDS[m]: Cell(f"{100 * values[m]:.1f}", _ends(spread.get(m))) for m in ORDER if m in values}


def gain_rows(study: StudyFiles) -> list[Row]:
    """Return the gain of the best settings over each baseline on test, in points with 95% intervals."""
    found = study.winner
    if found is None or found[1] is None or not study.class_counts:
        return []
    rows: list[Row] = []
    for figures, predictions in baselines(study):
        if predictions is not None:
            gains = accuracy_gains(found[1], predictions, study.groups)
            cells = {WORDS[m]: Cell(f"{100 * gains[m].value:+.1f}", _signed(gains[m])) for m in ORDER if m in gains}
            rows.append({"baseline": figures["label"], **cells})
    return rows


def seed_rows(study: StudyFiles) -> list[Row]:
    """Return mean and standard deviation on test of settings that were trained with several seeds."""
    runs = study.about.get("seeds", [])
    rows: list[Row] = []
    for label in dict.fromkeys(run["label"] for run in runs):
        mine = [run for run in runs if run["label"] == label]
        values = {m: [run[f"test/{m}"] for run in mine if f"test/{m}" in run] for m in ORDER}
        cells = {WORDS[m]: Cell(*mean_and_deviation(v).split(" ", 1)) for m, v in values.items() if len(v) > 1}
        rows.append({"model": f"{label}, {len(mine)} seeds", **cells})
    return rows


def _ends(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:.1f}\u2013{100 * interval.high:.1f}"


def _signed(interval: Interval) -> str:
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"
