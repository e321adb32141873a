"""The report in a real browser: no error in the console, no request, nothing wider than a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import seen_in_browser
from made_study import make_trials, write_study

from lift_ray import report


@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_without_an_error(width: int, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "out", make_trials(24))
    assert not report.main([str(folder)])
    seen = seen_in_browser(folder / "report" / "index.html", width, tmp_path)
    assert seen.pop("legend") < 50, "a legend has more than two lines"
    assert seen.pop("contents") == (width > 700), "on a phone, the contents must start closed"
    assert seen == {"width": seen["width"], "plots": 14, "unnamed": 0, "drawn": 14, "requests": []}
    assert seen["width"] <= width
