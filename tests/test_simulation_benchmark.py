"""benchmarks/simulation.py: its played slots run a whole search, and its figures are those of the windows that it names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simulated_search
from simulated_data import long_tail
from simulated_search import Marks, call_methods


def test_the_methods_alone_end_each_trial_once_and_a_driver_that_resumes_finds_all(tmp_path: Path) -> None:
    found = call_methods(str(tmp_path), slots=16, trials=40, sampler="random", every=10, minutes=2)
    assert (found["trials"], found["resumed"]) == (40, 40)
    assert 40 < found["epochs"] < 3 * 40, "early stopping is part of it"
    assert [window["trials"] for window in found["windows"]][-1] == 40
    assert found["journal_bytes"] > 1000 * found["epochs"]


def test_a_window_has_the_mean_of_the_trials_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(simulated_search.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(simulated_search.time, "process_time", lambda: clock.now / 4)
    marks = Marks(every=2)
    marks.note(0)
    for number in (1, 2, 2, 3, 4):
        clock.now += 1.0
        marks.ended(number)
    marks.note(4)
    assert [(w["trials"], w["wall_ms"], w["cpu_ms"]) for w in marks.windows()] == [(2, 1000, 250), (4, 1500, 375)]


def test_the_made_up_labels_are_a_long_tail_with_each_class() -> None:
    counts = np.bincount(long_tail(20_000, 50))
    assert counts.sum() == 20_000
    assert counts.min() >= 4
    assert counts[0] > 50 * counts[-1]
