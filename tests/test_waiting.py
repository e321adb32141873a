"""The spinner of work without progress."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from lift_ray.terminal import waiting


@pytest.mark.parametrize("is_terminal", [True, False])
def test_something_moves_on_a_terminal_and_nothing_is_written_elsewhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(waiting, "console", lambda error: Console(file=screen, force_terminal=is_terminal))
    with waiting.waiting("starting\x1b[2J Ray"):
        print("for stdout")
        time.sleep(0.5)
        frames = screen.getvalue()
    assert ("starting\\x1b[2J Ray ..." in frames) == is_terminal
    assert "for stdout" not in frames
    assert frames.count("starting") > 2 if is_terminal else not frames
