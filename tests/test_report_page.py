"""The report in a real browser: no fault in the console, no request, nothing wider than a phone; and its figures as pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_study import make_trials, write_study
from PIL import Image

from lift_ray import report
from lift_ray.errors import BadInput, RunFailed
from lift_ray.results.figures import Figure
from lift_ray.results.pictures import write_pictures

CHROME = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
MEASURE = """<body style="margin:0"><iframe src="{page}" width="{width}" height="900"></iframe><script>
onload = () => setTimeout(() => {{
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const plots = [...inside.querySelectorAll(".plot")];
  const unnamed = [...inside.querySelectorAll(".plot, img")].filter((x) => !x.getAttribute("aria-label") && !x.alt);
  document.title = JSON.stringify({{width: root.scrollWidth, plots: plots.length, unnamed: unnamed.length,
    drawn: plots.filter((x) => x.querySelector("svg.main-svg")).length, requests: inside.defaultView.performance
      .getEntriesByType("resource").map((x) => x.name).filter((x) => !x.startsWith("data:"))}});
}}, 4000);
</script>"""


@pytest.mark.skipif(CHROME is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_without_a_fault(width: int, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "out", make_trials(24))
    assert not report.main([str(folder)])
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(page=(folder / "report" / "index.html").as_uri(), width=width))
    assert CHROME
    done = subprocess.run(
        [CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--window-size=1400,1000",
         f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
         "--virtual-time-budget=15000", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    seen = json.loads(title[1])
    assert seen == {"width": seen["width"], "plots": 14, "unnamed": 0, "drawn": 14, "requests": []}
    assert seen["width"] <= width
    assert "CONSOLE" not in done.stderr


@pytest.mark.skipif(CHROME is None, reason="needs Chromium or Chrome")
def test_every_figure_is_a_picture_that_shows_something_and_a_table(tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    folder = write_study(tmp_path / "out", make_trials(24))
    assert not report.main([str(folder), "--png"])
    page = (folder / "report" / "index.html").read_text()
    names = re.findall(r'data-figure="([^"]+)"', page)
    assert len(names) == 14
    for name in names:
        assert (folder / "report" / f"{name}.csv").stat().st_size > 0
        pixels = np.asarray(Image.open(folder / "report" / f"{name}.png").convert("RGB")).astype(int)
        assert pixels.shape[1] == 1600
        coloured = np.ptp(pixels, axis=2) > 60  # axes and words are grey
        assert coloured[150:].sum() > 300, f"{name}.png shows no mark below its heading"


@pytest.mark.skipif(CHROME is None, reason="needs Chromium or Chrome")
def test_a_figure_that_cannot_be_drawn_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    good = Figure("good", "Good", "", [{"type": "scatter", "x": [1, 2], "y": [1, 2]}], {})
    with pytest.raises(RunFailed, match=r"^--png: all figures must be drawn, but 1 were not: .*; leave out --png$"):
        write_pictures([("good", good), ("no such folder/bad", good)], tmp_path)


def test_pictures_without_chrome_or_kaleido_are_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kaleido = pytest.importorskip("kaleido")
    import choreographer.browsers.chromium as chromium

    monkeypatch.setattr(chromium.Chromium, "find_browser", lambda *_, **__: None)
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    figure = Figure("good", "Good", "", [{"type": "scatter", "x": [1, 2], "y": [1, 2]}], {})
    with pytest.raises(BadInput, match=r"^--png: needs Chrome or Chromium, but finds none; install one"):
        write_pictures([("good", figure)], tmp_path)
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(BadInput, match=r"^--png: needs the package kaleido, .*; pip install"):
        write_pictures([("good", figure)], tmp_path)
    assert kaleido
