"""python -m lift_ray.report --png: an image of each figure, or a line that says what is missing."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import CHROME
from choreographer.browsers.chromium import Chromium
from made_study import make_trials, write_study
from PIL import Image

from lift_ray import report
from lift_ray.errors import BadInput, RunFailed
from lift_ray.reporting.figures.charts import Figure
from lift_ray.reporting.png import write_png

NEEDS_CHROME = pytest.mark.skipif(CHROME is None and not os.environ.get("CI"), reason="needs Chromium or Chrome")
GOOD = Figure("good", "Good", "", [{"type": "scatter", "x": [1, 2], "y": [1, 2]}], {})


@NEEDS_CHROME
def test_every_figure_is_an_image_that_shows_something_and_a_table(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "out", make_trials(24))
    assert not report.main([str(folder), "--png"])
    page = (folder / "report" / "index.html").read_text()
    names = re.findall(r'data-figure="([^"]+)"', page)
    assert len(names) == 16
    for name in names:
        assert (folder / "report" / f"{name}.csv").stat().st_size > 0
        pixels = np.asarray(Image.open(folder / "report" / f"{name}.png").convert("RGB")).astype(int)
        assert pixels.shape[1] == 1600
        coloured = np.ptp(pixels, axis=2) > 60  # axes and words are grey
        assert coloured[150:].sum() > 300, f"{name}.png shows no mark below its heading"


@NEEDS_CHROME
def test_a_figure_that_cannot_be_drawn_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"^--png: must draw all figures, but 1 failed: .*; omit --png$"):
        write_png([("good", GOOD), ("no such folder/bad", GOOD)], tmp_path)


def test_images_without_chrome_or_kaleido_give_a_one_line_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chromium, "find_browser", lambda *_, **__: None)
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    with pytest.raises(BadInput, match=r"^--png: requires Chrome or Chromium, but found none; install one"):
        write_png([("good", GOOD)], tmp_path)
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(
        BadInput, match=r"^--png: requires the package kaleido, but it is not installed or older than 1.5; pip install"
    ):
        write_png([("good", GOOD)], tmp_path)
