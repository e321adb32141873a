"""The end of a search: the best settings and the yardstick once more, with other seeds."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from lift_ray.distributed.slot import DIVERGED, Exam, Order, Pool, folder_of, in_one_line
from lift_ray.errors import RunFailed
from lift_ray.results.rows import TrialRow
from lift_ray.results.studies import BEST
from lift_ray.settings.run import apply_overrides
from lift_ray.settings.space import SpaceFile

MAX_FAILURES = 2
Talk = Generator[tuple[Any, ...], Any, dict[str, Any] | None]
FIRST = 1_000_000  # of the numbers of these runs, whose checkpoints lie among the trials'


@dataclass(frozen=True)
class Repeat:
    """A run to do: the settings of a trial with another seed than its own. Its number names its checkpoint, so that no run is
    done twice."""

    label: str
    own_seed: int
    seed: int
    number: int
    config: dict[str, Any]


def repeats(space: SpaceFile, rows: Sequence[TrialRow], best: TrialRow) -> list[Repeat]:
    """What `search.seeds_best` asks for: the best trial again, and the first start point, if it is another."""
    start = next((row for row in rows if row.start == 0 and row.state == "finished" and row is not best), None)
    pairs = [(BEST, best)] + ([] if start is None else [(space.start_labels()[0], start)])
    out = []
    for label, row in pairs:
        config = space.config(row.values).to_dict()
        for k in range(1, space.search.seeds_best):
            seed = (config["seed"] + k) % 2**32
            number = FIRST + 1000 * row.number + k
            out.append(Repeat(label, config["seed"], seed, number, apply_overrides(config, {"seed": seed})))
    return out


def train_again(jobs: Sequence[Repeat], pool: Pool) -> list[dict[str, Any]]:
    """Label, seed, and metrics of validation and test of each; one that diverged is left out.

    Raises RunFailed when they keep failing.
    """
    found: dict[int, dict[str, Any] | None] = {}
    talks: dict[int, Talk] = {}
    waiting, failures = list(jobs), 0
    while len(found) < len(jobs):
        for slot in pool.idle()[: len(waiting)]:
            job = waiting.pop(0)
            talks[job.number] = _talk(job)
            method, *args = next(talks[job.number])
            slot.ask(method, job, *args)
        for answer in pool.wait():
            job = answer.job
            if answer.error is not None:
                failures += 1
                waiting.append(job)
                if failures > MAX_FAILURES:
                    raise RunFailed(
                        f"the runs with other seeds must finish, but {in_one_line(answer.error)}; add --resume to try again"
                    )
                continue
            try:
                method, *args = talks[job.number].send(answer.value)
                answer.slot.ask(method, job, *args)
            except StopIteration as end:
                found[job.number] = end.value
    return [figures for job in jobs if (figures := found[job.number]) is not None]


def _talk(job: Repeat) -> Talk:
    """What a slot is asked, one after another, given its answers: train to the end, then evaluate on test."""
    about = yield "begin", Order(job.number, job.config, resume=True)
    history = list(about["history"])
    while not history or history[-1]["epoch"] < about["num_epochs"]:
        history.append((yield ("epoch",)))
        if DIVERGED in history[-1]:
            return None
    where = folder_of(job.number, int(history[-1]["epoch"]))
    figures = yield "examine", Exam(job.config, where, ["test"]), f"checkpoints/{job.number}/answers"
    known = {name: value for name, value in history[-1].items() if name.startswith("validation/")}
    return {"label": job.label, "seed": job.seed, **known, **figures}


def with_their_own(
    jobs: Sequence[Repeat], again: Sequence[dict[str, Any]], compared: Sequence[tuple[str, dict[str, float]]]
) -> list[dict[str, Any]]:
    """The trials that were repeated, with their own seeds, as the comparison has them, then the repeats."""
    known = dict(compared)
    own = {job.label: {"label": job.label, "seed": job.own_seed, **known[job.label]} for job in jobs}
    return [*own.values(), *again]
