"""Chromium, headless: what it says of a page of ours, opened from its file with the network cut off."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROME = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
MEASURE = """<body style="margin:0"><iframe src="{page}" width="{width}" height="900"></iframe><script>
onload = () => setTimeout(() => {{
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  const plots = [...inside.querySelectorAll(".plot")];
  const unnamed = [...inside.querySelectorAll(".plot, img")].filter((x) => !x.getAttribute("aria-label") && !x.alt);
  const legends = [...inside.querySelectorAll(".legend")].map((x) => x.getBoundingClientRect().height);
  document.title = JSON.stringify({{contents: inside.getElementById("contents").open, legend: Math.max(0, ...legends),
    width: root.scrollWidth, plots: plots.length, unnamed: unnamed.length,
    drawn: plots.filter((x) => x.querySelector("svg.main-svg")).length, requests: inside.defaultView.performance
      .getEntriesByType("resource").map((x) => x.name).filter((x) => !x.startsWith("data:"))}});
}}, 4000);
</script>"""


def seen_in_browser(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """Width of the page in pixels, its plots, those drawn, what has no name for a screen reader, and requests that it made;
    whether its contents are open, and pixels of the highest legend.

    Args:
        width: of the window.
        folder: for the browser's files.

    Skips the test without a browser, which CI has. Raises AssertionError for a line in the console.
    """
    frame = folder / "frame.html"
    frame.write_text(MEASURE.format(page=page.as_uri(), width=width))
    done = _opened(frame.as_uri(), folder, "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND")
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(title[1])
    return seen


def dom_in_browser(url: str, folder: Path) -> str:
    """What a page has become after some seconds; `folder` and skipping as above."""
    return _opened(url, folder).stdout


def _opened(url: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    if CHROME is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium or Chrome")
    assert CHROME, "CI installs Chromium"
    return subprocess.run(
        [
            CHROME,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1400,1000",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=15000",
            *options,
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
