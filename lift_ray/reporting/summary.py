"""What a study found, in plain words, and the numbers behind the words as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lift_ray.evaluation.metrics import GROUPS
from lift_ray.reporting.confidence import Interval, accuracy_gains, accuracy_intervals, heavy_tuning, seed_spread
from lift_ray.reporting.figures.charts import HEAVY, WORDS, scale_of, short_count, tell
from lift_ray.reporting.scaling_law import Law
from lift_ray.reporting.study_files import BEST_FOUND, Predictions, StudyFiles
from lift_ray.terminal.tables import mean_and_deviation

MEASURE = "mean_class_accuracy"
ORDER = (MEASURE, *GROUPS, "accuracy")
Compared = tuple[dict[str, Any], Predictions | None]


def summary(study: StudyFiles) -> list[str]:
    """Sentences: what won, by how much, how sure. The first is the headline."""
    heavy = f"{HEAVY} {heavy_tuning(study).short}" if study.finished else ""
    seeds = seed_spread(study) if study.finished else ""
    return [text for text in (*_on_test(study), heavy, seeds, _what_won(study), _trials(study)) if text]


def _what_won(study: StudyFiles) -> str:
    best, (metric, mode) = study.best_trial, study.objective
    if best is None:
        return "No trial has finished yet." if not study.is_done else "No trial finished."
    scale, title = scale_of(metric)
    value = f"{title.removesuffix(' in %')} {f'{100 * best[metric]:.1f}%' if scale == 100 else f'{best[metric]:,.4g}'}"
    so_far = "" if study.is_done else " so far"
    end = "highest" if mode == "max" else "lowest"
    return f"Best{so_far} is {tell(best)}. Its {metric.split('/')[0]} {value} is the {end} of {len(study.finished)} finished trials."


def _on_test(study: StudyFiles) -> list[str]:
    """The best against the yardsticks, on images that the search did not see."""
    found = study.entry(BEST_FOUND)
    if not study.is_done:
        text = "This search has not ended: the comparison on the test split comes at its end."
        return [text if study.best_trial is None else f"{text} What is said so far is about validation."]
    if found is None or f"test/{MEASURE}" not in found[0]:
        return [
            "There are no figures of a test split, so what is said here is what the search itself looked at: expect a little less."
        ]
    others = [pair for pair in baselines(study) if f"test/{MEASURE}" in pair[0]]
    gains = [f"{_points(_gain(found[0], theirs, MEASURE))} {theirs['label']}" for theirs, _ in others]
    gains = gains[:1] + [text.replace(" points", "") for text in gains[1:]]
    value = _percent(found[0], MEASURE)
    head = f"The best settings recognise {value} of the test images, which the search did not see (mean over classes)"
    return [head + (f": {_listed(gains)}." if gains else "."), _luck(found, others, study), _few(found, others)]


def baselines(study: StudyFiles) -> list[Compared]:
    """Zero-shot first, then the baselines by their test accuracy, the best last."""
    known = zip(study.compared, study.answers, strict=True)
    others = [(f, a) for f, a in known if not f["label"].startswith(BEST_FOUND) and not f["label"].endswith(", TTE")]
    return others[:1] + sorted(others[1:], key=lambda pair: pair[0].get(f"test/{MEASURE}", 0.0))


def _luck(found: Compared, others: Sequence[Compared], study: StudyFiles) -> str:
    """Which of the differences may be luck of the test images."""
    pairs = [(theirs, answers) for theirs, answers in others if answers and found[1] and study.class_counts]
    if not pairs:
        return ""
    unsure = [
        theirs["label"]
        for theirs, answers in pairs
        if found[1] and answers and not accuracy_gains(found[1], answers, study.groups)[MEASURE].excludes_zero
    ]
    if unsure:
        return f"The difference to {_listed(unsure)} may be chance over the test images."
    return f"{'Each of these differences' if len(pairs) > 1 else 'That'} is more than chance over the test images."


def _few(found: Compared, others: Sequence[Compared]) -> str:
    """The rare classes, which a better mean may hide."""
    known = [theirs for theirs, _ in others if "test/few" in theirs]
    if "test/few" not in found[0] or not known:
        return ""
    strongest = max(known, key=lambda theirs: theirs["test/few"])
    gain = _gain(found[0], strongest, "few")
    return (
        f"On the few-shot classes it recognises {_percent(found[0], 'few')}, {_points(gain)} the strongest yardstick there "
        f"({strongest['label']})."
    )


def _gain(ours: dict[str, Any], theirs: dict[str, Any], measure: str) -> float:
    return float(100 * (ours[f"test/{measure}"] - theirs[f"test/{measure}"]))


def _points(gain: float) -> str:
    return "as much as" if abs(gain) < 0.05 else f"{abs(gain):.1f} points {'more' if gain > 0 else 'less'} than"


def _percent(figures: dict[str, Any], measure: str) -> str:
    return f"{100 * figures[f'test/{measure}']:.1f}%"


def _listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


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
    return f"{len(states)} trials: {counts or 'none yet'}." + (f" Of the failures: {errors[0]}" if errors else "")


def law_in_words(law: Law) -> str:
    """What more training would buy, where the law predicts held-out trials better than the mean of the others does."""
    held, small = ([p for p in law.points if p.held_out is side] for side in (True, False))
    if not held:
        return law.answer
    mean = sum(p.found for p in small) / len(small)
    if sum(abs(p.found - p.predicted.value) for p in held) < sum(abs(p.found - mean) for p in held):
        return law.answer
    return (
        "Cannot tell: a power law fitted to the smaller trials predicts the larger ones no better than their mean does."
    )


@dataclass(frozen=True)
class Cell:
    """A number of a table, and what stands below it in small."""

    text: str
    below: str = ""


Row = dict[str, str | Cell]


def accuracy_rows(study: StudyFiles) -> list[Row]:
    """What was compared, accuracy on test in percent with 95% intervals (on validation where there is no test)."""
    split = "test" if any("test/accuracy" in f for f in study.compared) else "validation"
    rows: list[Row] = []
    for figures, answers in zip(study.compared, study.answers, strict=True):
        spread = accuracy_intervals(answers, study.groups) if answers and study.class_counts and split == "test" else {}
        cells = {
            WORDS[m]: Cell(f"{100 * figures[f'{split}/{m}']:.1f}", _ends(spread.get(m)))
            for m in ORDER
            if f"{split}/{m}" in figures
        }
        rows.append(
            {"model": figures["label"], **cells, "parameters": short_count(figures.get("trained_parameters", 0))}
        )
    return rows


def gain_rows(study: StudyFiles) -> list[Row]:
    """By how many points the best is better on test than each yardstick, with 95% intervals."""
    found = study.entry(BEST_FOUND)
    if found is None or found[1] is None or not study.class_counts:
        return []
    rows: list[Row] = []
    for figures, answers in baselines(study):
        if answers is not None:
            gains = accuracy_gains(found[1], answers, study.groups)
            cells = {WORDS[m]: Cell(f"{100 * gains[m].value:+.1f}", _signed(gains[m])) for m in ORDER if m in gains}
            rows.append({"better than": figures["label"], **cells})
    return rows


def seed_rows(study: StudyFiles) -> list[Row]:
    """Mean and standard deviation on test of settings that were trained with several seeds."""
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
