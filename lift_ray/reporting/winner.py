"""How the best settings were chosen, what best/ was trained on, and how well it does on out-of-fold predictions: words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lift_ray.epoch_metrics import GROUPS, MAIN
from lift_ray.reporting.confidence import Interval, accuracy_intervals
from lift_ray.reporting.figures.charts import PERCENT, describe_settings, scale_of, short_count
from lift_ray.reporting.study_files import BEST_FOUND, Candidate, StudyFiles
from lift_ray.text import count

ORDER = (MAIN, *GROUPS, "accuracy")
MOST_NAMES = 5  # of classes in a sentence


def listed(words: Sequence[str]) -> str:
    """Join words as `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def winner_news(study: StudyFiles) -> str:
    """Say that a baseline won, or that the result is not held out; "" if neither is so."""
    baseline = study.choice.baseline
    news = f"The baseline {baseline} is best: the search found nothing better" if baseline else ""
    if study.has_test:
        return f"{news}." if news else ""
    unheld = "is not held out, because there is no test split (test: none)."
    return f"{news}; this result {unheld}" if news else f"The result of this search {unheld}"


def choice_in_words(study: StudyFiles) -> str:
    """Say what the winner has that the other candidates have not, and which of them are close; "" without confirmation."""
    choice = study.choice
    if not choice.is_confirmed:
        return ""
    winner, *others = choice.candidates
    sign, end = (1, "highest") if choice.mode == "max" else (-1, "lowest")
    measure, images = measure_of(choice.metric), f"{choice.images:,} " if choice.images else ""
    merit = f"the {end} {measure}"
    if any(sign * one.difference > 0 for one in others):
        merit = f"the fewest trained parameters within one standard error of the best {measure}"
    trained = f", each trained on {choice.folds} folds," if choice.folds > 1 else ","
    value = f" ({valued(choice.metric, winner.value)})" if winner.value is not None else ""
    return (
        f"Of {len(choice.candidates)} candidates{trained} {winner.label} has {merit} on all {images}{study.estimate} "
        f"predictions{value}; {_close_in_words([one.label for one in others if one.is_close])}."
    )


def _close_in_words(labels: Sequence[str]) -> str:
    if not labels:
        return "no other is within one standard error"
    return f"{listed(labels)} {'is' if len(labels) == 1 else 'are'} within one standard error of it"


def measure_of(metric: str) -> str:
    """Return a metric in words, without its unit: `mean class accuracy`."""
    return scale_of(metric)[1].removesuffix(PERCENT)


def valued(metric: str, value: float) -> str:
    """Return the value of a metric with its unit: accuracies in percent."""
    return f"{100 * value:.1f}%" if scale_of(metric)[0] == 100 else f"{value:,.4g}"


def refit_in_words(study: StudyFiles) -> str:
    """Say which images the model in best/ was trained on; "" if the study does not know."""
    refit = study.about.get("refit", {})
    data = {"train": "the training split", "train+validation": "the training and validation images"}.get(
        refit.get("data", "")
    )
    if data is None:
        return ""
    images = f" ({count(refit['images'], 'image')})" if refit.get("images") else ""
    if refit.get("retrained"):
        return f"The model in best/ was trained again with the best settings, on {data}{images}."
    return f"The model in best/ is that of the best trial, trained on {data}{images}."


def unseen_in_words(study: StudyFiles) -> str:
    """Name the classes that no out-of-fold image measures; "" if there are none."""
    unseen = study.unseen
    if not unseen:
        return ""
    more = len(unseen) - MOST_NAMES
    names = [*unseen[:MOST_NAMES], f"{more:,} more"] if more > 0 else unseen
    noun, verb = ("class has", "does") if len(unseen) == 1 else ("classes have", "do")
    return f"{len(unseen):,} {noun} no {study.estimate} image and {verb} not count in the choice of the winner: {listed(names)}."


def groups_in_words(study: StudyFiles) -> str:
    """Return the remark on the bounds of the groups as a sentence, "" if there is none."""
    note = study.class_groups.note.strip().removesuffix(".")
    return f"{note[0].upper()}{note[1:]}." if note else ""


def estimates(study: StudyFiles) -> dict[str, Interval | float]:
    """Return the winner's metrics on the predictions that chose it; with an interval if the predictions were kept."""
    stored = study.about.get("out_of_fold", {})
    found: dict[str, Interval | float] = {m: v for m in ORDER if (v := stored.get(f"validation/{m}")) is not None}
    if study.out_of_fold is not None and study.class_counts:
        found |= accuracy_intervals(study.out_of_fold, study.groups)
    return found


def estimate_in_words(study: StudyFiles) -> str:
    """Return the mean class accuracy on the predictions that chose the winner, beside the test result if there is one."""
    found = estimates(study).get(MAIN)
    if found is None:
        return ""
    value = found.value if isinstance(found, Interval) else found
    text = f"{study.estimate.capitalize()} estimate of the mean class accuracy: {100 * value:.1f}%"
    tested = study.winner[0].get(f"test/{MAIN}") if study.winner else None
    if tested is not None:
        gap = 100 * (value - tested)
        beside = "equal to" if abs(gap) < 0.05 else f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
        text += f", {beside} the test result"
    text += ". These predictions also chose the winner, which makes the estimate too high"
    fewer = ", and come from models that were trained on fewer images, which makes it too low"
    return f"{text}{fewer if study.choice.folds > 1 else ''}."


def best_in_words(study: StudyFiles) -> str:
    """Return number and settings of the best trial, and its objective if this is the best one."""
    best, (metric, mode) = study.best_trial, study.objective
    if best is None:
        return "No trial finished." if study.is_done else "No trial has finished yet."
    lead = "Best trial" if study.is_done else "Best trial so far"
    text = f"{lead}: {best['number']} ({describe_settings(best)})."
    if not study.is_best_on_top:
        return text
    end = "highest" if mode == "max" else "lowest"
    return (
        f"{text} Its {metric.split('/')[0]} {measure_of(metric)}, {valued(metric, best[metric])}, is the {end} of "
        f"{count(len(study.finished), 'finished trial')}."
    )


def candidate_rows(study: StudyFiles) -> list[dict[str, Any]]:
    """Return a row for each candidate of a confirmed choice: its value, and its difference from the winner ± standard error."""
    choice = study.choice
    if not choice.is_confirmed:
        return []
    return [
        {
            "candidate": one.label,
            measure_of(choice.metric): "-" if one.value is None else valued(choice.metric, one.value),
            "difference": _difference(one, scale_of(choice.metric)[0]) if number else "winner",
            "within one standard error": "yes" if one.is_close else "-" if one.error is None else "no",
            "post-hoc tau": f"{one.tau:g}",
            "parameters": "-" if one.trained_parameters is None else short_count(one.trained_parameters),
        }
        for number, one in enumerate(choice.candidates)
    ]


def _difference(one: Candidate, scale: float) -> str:
    digits = "+.1f" if scale == 100 else "+.3g"
    error = "unknown" if one.error is None else f"{scale * one.error:{digits[1:]}}"
    return f"{scale * one.difference:{digits}} \u00b1 {error}"


def winner_label(study: StudyFiles) -> str:
    """Return the label of the best settings in the comparison."""
    return study.winner[0]["label"] if study.winner else BEST_FOUND
