"""Searches of thousands of trials: what is done for each reply of a slot does not look at all trials again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from played import DATA, METRIC, Played, metrics_of, space
from rich.console import Console

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.reporting.trial_rows import TrialRow, pareto_front
from lift_ray.searching import progress_table
from lift_ray.searching.progress_table import Monitor
from lift_ray.searching.state import Search
from lift_ray.searching.stopping import Stopping
from lift_ray.searching.study import Study
from lift_ray.storage.output import Output

COUNT = "trained_parameters"


def ended(number: int, seconds: float = 2.0) -> TrialRow:
    metrics = EpochMetrics(1, seconds={"train_s": seconds, "evaluate_s": 1.0}, validation={"mean_class_accuracy": 0.5})
    return TrialRow(number, {"optim.lr": 0.1}, 1, "finished", [metrics])


def monitor(folder: Path, trials: int) -> Monitor:
    study = Study(space(trials=trials, tte_best=0), "d", InMemoryStorage())
    return Monitor(Search(study, Output(str(folder)), DATA))


class Untouched(list[EpochMetrics]):
    """Epochs that must not be looked at."""

    def __len__(self) -> int:
        raise AssertionError("all trials are looked at")

    __getitem__ = __iter__ = __len__  # type: ignore[assignment]


class Unread(str):
    """The state of a trial that must not be looked at."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("all trials are looked at")

    __ne__ = __eq__  # str has its own
    __hash__ = str.__hash__


@pytest.mark.parametrize("kind", ["asha", "hyperband", "median"])
def test_a_decision_looks_at_no_other_trial(kind: str) -> None:
    wanted = space(9, trials=100, scheduler={"kind": kind})
    config = wanted.config({}).to_dict()
    others = [TrialRow(number, {}, 9, history=[metrics_of(config, 1)]) for number in range(1, 40)]
    row = TrialRow(0, {}, 9, history=[EpochMetrics(1, validation={"mean_class_accuracy": 0.0})])
    stopping = Stopping(wanted, [*others, row])
    for other in others:
        other.history = Untouched()
    assert stopping.decide(row) == "stop"


def test_a_draw_and_a_free_slot_look_at_no_trial_that_has_ended(tmp_path: Path) -> None:
    search = Search(
        Study(space(trials=60, scheduler={"kind": "none"}), "d", InMemoryStorage()), Output(str(tmp_path)), DATA
    )
    worker = Played()
    for _ in range(20):
        job = search.next_job()
        assert job
        worker.begin(job)
        while search.take(job, next(worker.replies)):
            pass
    for row in search.rows():
        assert row.has_ended
        row.state = Unread(row.state)
    assert search.next_job()


def test_the_time_of_a_trial_that_has_ended_is_added_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, added = monitor(tmp_path, 12), list[int]()
    slot_seconds = progress_table._slot_seconds
    monkeypatch.setattr(progress_table, "_slot_seconds", lambda row: added.append(row.number) or slot_seconds(row))
    assert watcher.seconds_left() is None
    watcher.rows.update({number: ended(number) for number in range(6)})
    first = watcher.seconds_left()
    watcher.rows[6] = ended(6, 16.0)
    watcher.rows[7] = TrialRow(7, {}, 2, "running")
    assert first is not None
    assert (later := watcher.seconds_left()) is not None
    assert later > first
    assert added == list(range(7))


def test_a_live_table_is_not_drawn_for_each_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(progress_table, "console", lambda: screen)
    monkeypatch.setattr(progress_table, "DRAW_EVERY_S", 3600.0)
    watcher, drawn = monitor(tmp_path, 200), list[int]()
    monkeypatch.setattr(watcher, "_status", lambda: drawn.append(1) or "")
    with watcher:
        for number in range(100):
            row = watcher.rows[number] = ended(number)
            watcher.started(row)
            watcher.reported(row)
            watcher.ended(row)
    assert len(drawn) == 1


@limits(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.integers(1, 4)), max_size=12))
def test_a_front_is_what_comparing_each_trial_with_each_other_gives(values: list[tuple[float, int]]) -> None:
    rows = [
        TrialRow(i, {}, 1, "finished", [EpochMetrics(1, validation={"mean_class_accuracy": a}, trained_parameters=c)])
        for i, (a, c) in enumerate(values)
    ]
    beaten = {i for i, (a, c) in enumerate(values) for b, d in values if b >= a and d <= c and (a, c) != (b, d)}
    front = pareto_front(rows, {METRIC: "max", COUNT: "min"})
    assert {row.number for row in front} == set(range(len(values))) - beaten
    assert [row.number for row in front] == sorted(
        (row.number for row in front), key=lambda i: (-values[i][0], values[i][1], i)
    )
