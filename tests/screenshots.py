"""docs/monitoring-*.png: Ray's dashboard and the live page in headless Chromium during a real search. `make screenshots`.

Needs Chromium (`apt-get install chromium`). Prometheus, where it is on the PATH, adds a picture of its graphs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright
from ray._private.authentication.authentication_constants import AUTHENTICATION_TOKEN_COOKIE_NAME

from lift_ray.results.page import plotly_js

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SIZE = {"width": 1280, "height": 800}
PROMETHEUS = "127.0.0.1:9099"
PATIENCE_S = 600.0
LARGEST_BYTES = 300_000
WORDS = ["search.trials=60", "search.scheduler.kind=none", "base.optim.epochs=1"]  # more trials than the pictures take
VIEWS = ("jobs", "cluster", "actors")
ENDED = 2  # trials, so that there is something to see


def main() -> None:
    """Start a search, take the pictures, end it."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        searching(Path(folder)) as (dashboard, page),
        prometheus(Path(folder)) as graphs,
        sync_playwright() as browsers,
    ):
        until(
            lambda: len(re.findall('<td class="text">(finished|pruned)', read(page))) >= ENDED,
            f"the end of {ENDED} trials",
        )
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        seen = browser.new_page(viewport=SIZE)
        sign_in(seen, dashboard)
        shoot(seen, page, "live")
        for name in VIEWS:
            shoot(seen, f"{dashboard}/#/{name}", name)
        if graphs:
            (Path(folder) / "metrics.html").write_text(panels(graphs))
            shoot(seen, f"file://{folder}/metrics.html", "metrics")
        else:
            print("docs/monitoring-metrics.png stays as it is: prometheus is not on the PATH")
        browser.close()


def sign_in(seen: Page, dashboard: str) -> None:
    """Hand the browser the token as the cookie that the dashboard keeps it in: nothing prints it."""
    ray = Path(sys.executable).with_name("ray")
    token = subprocess.run([ray, "get-auth-token"], capture_output=True, text=True, check=True).stdout.split()[-1]
    seen.context.add_cookies([{"name": AUTHENTICATION_TOKEN_COOKIE_NAME, "value": token, "url": dashboard}])


def shoot(seen: Page, address: str, name: str) -> None:
    """docs/monitoring-NAME.png"""
    seen.goto(address)
    seen.wait_for_timeout(6000)  # the dashboard keeps asking, so there is no moment without traffic to wait for
    path = DOCS / f"monitoring-{name}.png"
    seen.screenshot(path=path)
    assert path.stat().st_size < LARGEST_BYTES, f"{path}: {path.stat().st_size} bytes"
    print(path.relative_to(ROOT), path.stat().st_size)


def read(address: str) -> str:
    with urlopen(address, timeout=20) as answer:
        return str(answer.read().decode())


def until(found: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < ends, f"{what} did not come in {PATIENCE_S:.0f} s"
        time.sleep(1)


def panels(address: str) -> str:
    """The time series of the dashboard for Grafana, without Grafana: its queries to Prometheus, drawn by plotly."""
    board, drawn, now = json.loads((ROOT / "clusters/monitoring/grafana.json").read_text()), [], time.time()
    for panel in board["panels"]:
        traces = []
        for target in panel["targets"]:
            query = {"query": target["expr"].replace("$study", ".*"), "start": now - 150, "end": now, "step": 2}
            for series in json.loads(read(f"{address}/api/v1/query_range?{urlencode(query)}"))["data"]["result"]:
                name = re.sub(
                    r"{{(\w+)}}", lambda found, of=series: of["metric"].get(found[1], ""), target["legendFormat"]
                )
                times = [1000 * at for at, _ in series["values"]]
                traces.append(
                    {"x": times, "y": [float(value) for _, value in series["values"]], "name": name, "mode": "lines"}
                )
        if traces and panel["type"] == "timeseries":
            layout = {"title": {"text": panel["title"], "font": {"size": 13}}, "height": 250, "width": 620, "xaxis": {"type": "date"},
                      "margin": {"l": 50, "r": 10, "t": 30, "b": 30}, "showlegend": True, "yaxis": {"rangemode": "tozero"}}  # fmt: skip
            drawn.append((traces, layout))
    return (
        f"<!doctype html><body style='margin:0;display:flex;flex-wrap:wrap'><script>{plotly_js()}</script><script>"
        f"for (const [data, layout] of {json.dumps(drawn)}) "
        "Plotly.newPlot(document.body.appendChild(document.createElement('div')), data, layout, {staticPlot: true})</script>"
    )


@contextmanager
def searching(folder: Path) -> Iterator[tuple[str, str]]:
    """A search in a process of its own; the addresses of dashboard and live page."""
    log, environment = folder / "log", os.environ | {"RAY_TMPDIR": str(folder)}
    environment.pop("RAY_ADDRESS", None)
    environment["PATH"] = (
        f"{Path(sys.executable).parent}:{environment['PATH']}"  # no path of this machine in the pictures
    )
    command = ["python", "-m", "lift_ray.tune", "search_spaces/quickstart.yaml", *WORDS, "--out", str(folder / "out")]
    with log.open("w") as out:
        driver = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    try:
        until(lambda: "live page:" in log.read_text(), "the live page")
        text = log.read_text()
        yield tuple(re.search(rf"^{name}: (\S+)", text, re.MULTILINE)[1] for name in ("dashboard", "live page"))  # type: ignore
    finally:
        driver.send_signal(signal.SIGINT)
        try:
            driver.wait(timeout=60)
        except subprocess.TimeoutExpired:
            driver.kill()


@contextmanager
def prometheus(folder: Path) -> Iterator[str | None]:
    """Prometheus with the project's settings, where it is installed; its address."""
    if not (program := shutil.which("prometheus")):
        yield None
        return
    settings = (ROOT / "clusters/monitoring/prometheus.yml").read_text()
    (folder / "prometheus.yml").write_text(settings.replace("/tmp/ray/", f"{folder}/ray/").replace("10s", "2s"))
    command = [program, f"--config.file={folder}/prometheus.yml", f"--web.listen-address={PROMETHEUS}",
               f"--storage.tsdb.path={folder}/prometheus"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{PROMETHEUS}"
    finally:
        process.terminate()
        process.wait(timeout=20)


if __name__ == "__main__":
    main()
