"""What a study found, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lift_ray.results.evidence import Interval, accuracy_gains, accuracy_intervals, seed_spread
from lift_ray.results.figures import WORDS, scale_of, tell
from lift_ray.results.metrics import GROUPS
from lift_ray.results.studies import BEST, Answers, StudyFiles

MEASURE = "mean_class_accuracy"


def summary(study: StudyFiles) -> list[str]:
    """Sentences: what won, by how much, how sure."""
    return [
        text
        for text in (_what_won(study), *_on_test(study), seed_spread(study) if study.finished else "", _trials(study))
        if text
    ]


def _what_won(study: StudyFiles) -> str:
    best, (metric, mode) = study.best_trial, study.objective
    if best is None:
        return "No trial has finished yet." if not study.is_done else "No trial finished."
    scale, title = scale_of(metric)
    value = f"{title.removesuffix(' in %')} {f'{100 * best[metric]:.1f}%' if scale == 100 else f'{best[metric]:,.4g}'}"
    so_far = "" if study.is_done else " so far"
    end = "highest" if mode == "max" else "lowest"
    return f"Best{so_far} is {tell(best)}: {metric.split('/')[0]} {value}, the {end} of {len(study.finished)} finished trials."


def _on_test(study: StudyFiles) -> list[str]:
    """The best against the strongest yardstick, on images that the search did not see."""
    if not study.is_done:
        return [
            "The comparison on the test split comes at the end of the search; nothing below is about test images yet."
        ]
    found = study.entry(BEST)
    if found is None or f"test/{MEASURE}" not in found[0]:
        return [
            "There are no figures of a test split, so what is said here is what the search itself looked at: expect a little less."
        ]
    figures, answers = found
    spread = accuracy_intervals(answers, study.groups) if answers and study.class_counts else {}
    groups = ", ".join(f"{WORDS[g]} {100 * figures[f'test/{g}']:.1f}%" for g in GROUPS if f"test/{g}" in figures)
    out = [f"On the test split, which the search did not see, it recognises {100 * figures[f'test/{MEASURE}']:.1f}% "
           f"(mean over classes{_around(spread.get(MEASURE))}): {groups}."]  # fmt: skip
    return out + [_against(figures, answers, other, theirs, study) for other, theirs in yardsticks(study)]


def _around(spread: Interval | None) -> str:
    return "" if spread is None else f"; 95% interval {100 * spread.low:.1f} to {100 * spread.high:.1f}"


def yardsticks(study: StudyFiles) -> list[tuple[dict[str, Any], Answers | None]]:
    """Zero-shot and the start points, best on test last but for zero-shot, which comes first."""
    known = zip(study.compared, study.answers, strict=True)
    others = [(f, a) for f, a in known if not f["label"].startswith(BEST) and not f["label"].endswith(", TTE")]
    return others[:1] + sorted(others[1:], key=lambda pair: pair[0].get(f"test/{MEASURE}", 0.0))


def _against(
    ours: dict[str, Any], answers: Answers | None, theirs: dict[str, Any], others: Answers | None, study: StudyFiles
) -> str:
    gain = 100 * (ours[f"test/{MEASURE}"] - theirs[f"test/{MEASURE}"])
    text = f"That is {abs(gain):.1f} points {'more' if gain >= 0 else 'less'} than {theirs['label']}"
    if not (answers and others and study.class_counts):
        return text + "."
    gains = accuracy_gains(answers, others, study.groups)
    sure = (
        "more than chance over the test images"
        if gains[MEASURE].excludes_zero
        else "which may be chance over the test images"
    )
    text += f" (95% interval {_signed(gains[MEASURE])}: {sure})"
    return text + (
        f"; on the few-shot classes {100 * gains['few'].value:+.1f} ({_signed(gains['few'])})."
        if "few" in gains
        else "."
    )


def _signed(gain: Interval) -> str:
    return f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"


def _trials(study: StudyFiles) -> str:
    states = [t["state"] for t in study.trials]
    names = {"finished": "finished", "pruned": "stopped early", "infeasible": "outside the constraints", "failed": "failed",
             "running": "running", "waiting": "waiting", "paused": "paused"}  # fmt: skip
    counts = ", ".join(f"{states.count(s)} {word}" for s, word in names.items() if s in states)
    errors = sorted({t["error"] for t in study.trials if t["state"] == "failed" and t.get("error")})
    return f"{len(states)} trials: {counts or 'none yet'}." + (f" Of the failures: {errors[0]}" if errors else "")


def accuracy_rows(study: StudyFiles) -> Sequence[dict[str, Any]]:
    """What was compared, accuracy on test in percent (on validation where there is no test), for a table."""
    split = "test" if any("test/accuracy" in f for f in study.compared) else "validation"
    measures = ("accuracy", MEASURE, *GROUPS)
    return [
        {"model": figures["label"],
         **{WORDS[m]: f"{100 * figures[f'{split}/{m}']:.1f}" if f"{split}/{m}" in figures else "-" for m in measures},
         "parameters": f"{figures.get('trained_parameters', 0):,.0f}"}
        for figures in study.compared
    ]  # fmt: skip
