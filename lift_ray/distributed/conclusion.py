"""The end of a search: the best against the yardsticks on the test split, and the files that say so."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import ray

import lift_ray
from lift_ray.distributed.checkpoint import Record, read_record
from lift_ray.distributed.monitor import Monitor
from lift_ray.distributed.slot import Exam, Pool, folder_of, in_one_line
from lift_ray.errors import RunFailed
from lift_ray.results.output import Output
from lift_ray.results.rows import TrialRow, pareto_front, write_json
from lift_ray.results.studies import predictions_of
from lift_ray.settings.files import dump_yaml
from lift_ray.settings.run import apply_overrides
from lift_ray.settings.space import SpaceFile

MAX_FAILURES = 2
POSTHOC = "validation/posthoc_tau"


@dataclass
class Found:
    """What a search found.

    Args:
        best: the finished trial with the best first objective.
        compared: (label, metrics of validation and test) for zero-shot, the start points, the best, and what costs no training:
            another tau after training, test-time ensembling.
        front: the Pareto front, where there are several objectives; otherwise empty.
        posthoc: validation metrics of the best for each tau after training.
        seeds: for `search.seeds_best` above 1, label, seed and metrics of each run of the best settings and the yardstick.
        together: of each finished trial of `method: backdoor`, as `answer_together` gives it.
    """

    rows: list[TrialRow]
    best: TrialRow
    compared: list[tuple[str, dict[str, float]]]
    front: list[TrialRow]
    time_s: dict[str, float]
    posthoc: list[dict[str, float]]
    seeds: list[dict[str, Any]] = field(default_factory=list)
    together: list[dict[str, Any]] = field(default_factory=list)


def best_of(rows: Sequence[TrialRow], space: SpaceFile, out: Output) -> TrialRow:
    """The finished trial with the best first objective, of several the best by the others. Raises RunFailed when there is none."""
    if front := pareto_front(rows, space.objectives):
        return front[0]
    errors = [row.error for row in rows if row.error]
    raise RunFailed(f"{out}: at least one trial must finish, but none of {len(rows)} did"
                    + (f"; the last error: {errors[-1]}" if errors else "") + "; see trials.csv")  # fmt: skip


def compare(
    space: SpaceFile, pool: Pool, rows: Sequence[TrialRow], best: TrialRow
) -> list[tuple[str, dict[str, float]]]:
    """Validation and test metrics of zero-shot, every start point, the best, and of what needs no training after it."""
    labels = space.start_labels()
    shown = [(labels[row.start], row) for row in rows if row.start is not None and row.state == "finished"]
    shown.append(("best found", best))
    both = ["validation", "test"]
    zero_shot = apply_overrides(space.base, {"method.kind": "lift", "tuner.kind": "zero_shot", "extra_tuner": None})
    exams = [("zero-shot", Exam(zero_shot, None, both))]
    exams += [(label, _exam(space, row, ["test"])) for label, row in shown]
    if tau := best.last.get(POSTHOC):
        exams.append(
            (f"best found, tau {tau:g} after training", _exam(space, best, both, {"evaluation.posthoc_tau": tau}))
        )
    for row in _ranked(space, rows)[: space.search.tte_best]:
        label = "best found, TTE" if row is best else f"trial {row.number}, TTE"
        exams.append((label, _exam(space, row, both, {"evaluation.tte": True})))
    figures = asked(pool, [("examine", exam, predictions_of(index)) for index, (_, exam) in enumerate(exams)])
    for (_, row), found in zip(shown, figures[1:], strict=False):
        found |= {k: v for k, v in row.last.items() if k.startswith("validation/")}
    return [(label, found) for (label, _), found in zip(exams, figures, strict=True)]


def _ranked(space: SpaceFile, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The finished trials, best first objective first."""
    metric, mode = space.objective
    sign = -1 if mode == "max" else 1
    return sorted(
        (row for row in rows if row.state == "finished"), key=lambda row: (sign * row.last[metric], row.number)
    )


def _exam(space: SpaceFile, row: TrialRow, splits: list[str], changes: dict[str, Any] | None = None) -> Exam:
    config = apply_overrides(space.config(row.values).to_dict(), changes or {})
    return Exam(config, folder_of(row.number, int(row.last["epoch"])), splits)


def posthoc_curve(space: SpaceFile, pool: Pool, best: TrialRow) -> list[dict[str, float]]:
    """Validation metrics of the best for each tau after training."""
    curve: list[dict[str, float]] = asked(pool, [("tau_curve", _exam(space, best, []))])[0]
    return curve


def answer_together(space: SpaceFile, pool: Pool, rows: Sequence[TrialRow]) -> list[dict[str, Any]]:
    """What the models of each finished trial of `method: backdoor` do together on the test split.

    Returns trial, values, metrics as `test/name`, and the report of results.crossed.Crossed.result with the cost.
    """
    finished = [row for row in rows if row.state == "finished" and space.config(row.values).members()]
    found = asked(pool, [("cross_examine", _exam(space, row, ["test"])) for row in finished])
    for row, figures in zip(finished, found, strict=True):
        figures["report"]["cost"] = {
            "trained_parameters": int(row.last["trained_parameters"]),
            "train_s": sum(epoch.get("cost/train_s", 0.0) for epoch in row.history),
            "evaluate_s": figures.pop("time/evaluate_s"),
        }
    return [
        {"trial": row.number, "values": row.values, **figures} for row, figures in zip(finished, found, strict=True)
    ]


def asked(pool: Pool, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What the slots answer to each (method, arguments ...). Raises RunFailed when one keeps failing."""
    found: dict[int, Any] = {}
    waiting, failures = list(range(len(jobs))), 0
    while len(found) < len(jobs):
        for slot in pool.idle()[: len(waiting)]:
            index = waiting.pop(0)
            method, *args = jobs[index]
            slot.ask(method, index, *args)
        for answer in pool.wait():
            if answer.error is None:
                found[answer.job] = answer.value
                continue
            failures += 1
            waiting.append(answer.job)
            if failures > MAX_FAILURES:
                raise RunFailed(
                    f"the final comparison must finish, but {in_one_line(answer.error)}; add --resume to try again"
                )
    return [found[index] for index in range(len(jobs))]


def where_time_went(
    rows: Sequence[TrialRow], monitor: Monitor, slots: int, searched_s: float, total_s: float
) -> dict[str, float]:
    """Seconds of wall time; the slots' own time is divided by their number."""
    search_s = max(0.0, monitor.last_result_s - (monitor.first_step_s or 0.0))
    names = ("train_s", "data_wait_s", "evaluate_s", "save_s")
    per_slot = {name: sum(row.seconds(name) for row in rows) / slots for name in names}
    return {
        "start": monitor.first_step_s or 0.0,
        "of which loading": sum(row.seconds("load_s") for row in rows) / slots,
        "training steps": per_slot["train_s"] - per_slot["data_wait_s"],
        "waiting for data": per_slot["data_wait_s"],
        "evaluation": per_slot["evaluate_s"],
        "saving": per_slot["save_s"],
        "between trials and idle": max(
            0.0, search_s - per_slot["train_s"] - per_slot["evaluate_s"] - per_slot["save_s"]
        ),
        "final comparison": total_s - searched_s,
        "total": total_s,
    }


def write_found(space: SpaceFile, dataset: str, found: Found, out: Output) -> None:
    """best/, best.yaml and study.json; the trials table is there already. study.json comes last: its presence means done."""
    figures = dict(found.compared)["best found"]
    record = _keep_best(found, out, figures)
    header = f"# Best of the search {space.name} (trial {found.best.number}); python -m lift_ray.train best.yaml trains it again.\n"
    dump_yaml({"name": f"{space.name}-best", "dataset": dataset, **record.config}, out.folder / "best.yaml", header)
    about: dict[str, Any] = {
        "name": space.name, "dataset": dataset, "space": space.model_dump(mode="json", by_alias=True),
        "best": {"trial": found.best.number, "values": found.best.values, "digest": record.digest, "config": record.config},
        "posthoc": {name.split("/")[1]: value for name, value in found.best.last.items() if "/posthoc_" in name},
        "posthoc_curve": found.posthoc,
        "compared": [{"label": label, **figures} for label, figures in found.compared],
        "seeds": found.seeds,
        "together": found.together,
        "pareto": [{"trial": row.number, "values": row.values, **{m: row.last[m] for m in space.objectives}} for row in found.front],
        "time_s": {name: round(seconds, 2) for name, seconds in found.time_s.items()},
        "versions": {"lift_ray": lift_ray.__version__, "ray": ray.__version__, "optuna": version("optuna"),
                     "python": platform.python_version()},
        "machine": machine(),
    }  # fmt: skip
    write_json(about, out.folder / "study.json")
    out.publish()


def machine() -> dict[str, Any]:
    """Where a search runs: the driver's system, and what each node of the cluster offers."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "nodes": nodes}


def _keep_best(found: Found, out: Output, figures: dict[str, float]) -> Record:
    """Copy the best checkpoint to best/, whole or not at all."""
    target, temporary = out.folder / "best", out.folder / "best.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with out.fetched(folder_of(found.best.number, int(found.best.last["epoch"]))) as folder:
        shutil.copytree(folder, temporary)
    write_json(figures, temporary / "metrics.json")
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    return read_record(target)


def front_of(rows: Sequence[TrialRow], space: SpaceFile) -> list[TrialRow]:
    """The Pareto front of a search with several objectives; empty for one."""
    return pareto_front(rows, space.objectives) if len(space.objectives) > 1 else []
