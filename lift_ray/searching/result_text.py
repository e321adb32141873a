"""The result of a search on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from lift_ray.reporting.study_files import BEST_FOUND
from lift_ray.searching.final_comparison import SearchResult
from lift_ray.searching.result_files import label_of
from lift_ray.searching.search_data import SearchData, unseen_line
from lift_ray.searching.tables import candidate_table, curve_table, measure, pareto_table, points
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.output import Output
from lift_ray.terminal.evaluation_tables import print_crossed, together_table
from lift_ray.terminal.tables import accuracy_table, console, describe, seeds_table, tte_note
from lift_ray.text import count, say


def print_result(space: SpaceFile, found: SearchResult, data: SearchData, out: Output) -> None:
    """Print the tables of a finished search, and what to know about it."""

    screen = console()
    states, best = [row.state for row in found.rows], found.choice.row
    say()
    if best.baseline is not None:
        say(f"The baseline {label_of(space, best)} is best: the search found nothing better.")
    ended = sum(row.has_ended for row in found.rows)
    screen.print(
        f"{count(ended, 'trial')}: {states.count('finished')} finished, {states.count('pruned')} stopped early, "
        + (f"{states.count('infeasible')} outside the constraints, " if space.constraints else "")
        + f"{states.count('failed')} failed"
        + (f"; {len(states) - ended} begun and left out" if ended < len(states) else "")
    )
    if space.search.sampler == "grid":
        screen.print(curve_table(found.rows, list(space.space)))
    if found.front:
        screen.print(pareto_table(found.front, space.objectives))
    say(f"best settings: {describe(best.values)}")
    screen.print(accuracy_table("Validation accuracy (%), used by the search", "validation", found.compared))
    if len(found.choice.candidates) > 1:
        screen.print(candidate_table(found.choice, [label_of(space, one.row) for one in found.choice.candidates]))
    if space.test == "split":
        screen.print(accuracy_table("Test accuracy (%), held out from the search", "test", found.compared))
    if found.together:
        screen.print(together_table(found.together))
        print_crossed(next(one["report"] for one in found.together if one["trial"] == best.number))
    if found.seeds:
        screen.print(seeds_table(found.seeds))
    for line in _notes(space, found, data):
        say(line)
    times = dict(found.time_s)
    total = times.pop("total")
    say(f"time: {total:.0f} s = " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in times.items()))
    say(f"files: {out}/best.yaml (settings), {out}/best/ (checkpoint), {out}/trials.csv, {out}/study.json")


def _notes(space: SpaceFile, found: SearchResult, data: SearchData) -> Iterator[str]:
    """Yield a line for each thing to know about the result: test split, post-hoc tau, training images, unseen classes, groups."""

    choice, posthoc = found.choice, found.choice.posthoc
    if space.test == "none":
        yield "There is no test split, so this result is not held out from the search: expect lower accuracy on new images."
    gain, bias = (points(value, choice.metric) for value in (posthoc.gain, posthoc.bias))
    if posthoc.is_recommended:
        yield (
            f"Post-hoc tau {posthoc.tau:g} is used: it improves out-of-fold {measure(choice.metric)} by {gain}, about {bias} of it "
            "selection bias"
        )
    elif posthoc.gain > 0:
        yield (
            f"No post-hoc tau is used: the best one, {posthoc.best:g}, improves out-of-fold {measure(choice.metric)} by {gain}, "
            f"but the selection bias is about {bias}"
        )
    if note := tte_note(found.tte, BEST_FOUND):
        yield note
    if found.final.refit is not None:
        yield f"best/ was trained again on {count(data.final_images, 'image')} ({data.train_on.replace('+', ' and ')})"
    if data.unseen:
        yield unseen_line(data.unseen, len(data.groups.names))
    if data.groups.note:
        yield data.groups.note
