"""The report in a real browser: no fault in the console, no request, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_study import make_trials, write_study

from lift_ray import report

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
