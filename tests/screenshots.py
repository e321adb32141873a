"""docs/monitoring-*.png and docs/report-*.png in headless Chromium, of a real search and a real run. `make screenshots`.

    python tests/screenshots.py [FOLDER]    FOLDER: the results of a search, to take the screenshots of its report alone

Needs Chromium (`apt-get install chromium`). Prometheus, where it is on the PATH, adds a screenshot of its graphs.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from browser import CHROME
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from plotly.offline import get_plotlyjs
from ray._private.authentication.authentication_constants import AUTHENTICATION_TOKEN_COOKIE_NAME

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SIZE = {"width": 1280, "height": 800}
PROMETHEUS = "127.0.0.1:9099"
PATIENCE_S = 3600.0
LARGEST_BYTES = 400_000
SEARCH = ["lift_ray.tune", "search_spaces/quickstart.yaml"]
TRAIN = ["lift_ray.train", "search_spaces/lift_plus.yaml", "--workers", "2", "--dashboard"]
RUNS = "/api/train/v2/runs/v1"
VIEWS = ("jobs", "cluster", "actors")
POINTS = 30  # of a graph, 2 s apart
ENDED = 4  # trials, so that there is something to see
REPORT = {  # screenshot: sections of the page that it shows
    "desktop": ("header", "#posthoc-tau"),
    "classes": ("section:has(+ section > .cards)", "section:has(> .cards)"),
    "search": ("#history", "#parallel", "#cost"),
}


def main() -> None:
    """Take all screenshots, or those of a report."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name,
        sync_playwright() as browsers,
    ):
        browser, folder = browsers.chromium.launch(executable_path=CHROME, args=["--no-sandbox"]), Path(name)
        if not (study := next(iter(sys.argv[1:]), "")):
            study = time.strftime("runs/screenshots-%Y%m%d-%H%M%S")
            watch_search(browser, folder, study)
            watch_training(browser, folder, f"{study}/run")
        look_at_report(browser, ROOT / study / "report" / "index.html")
        browser.close()


def watch_search(browser: Browser, folder: Path, out: str) -> None:
    """The live page, the dashboard and the graphs of a search; returns when it has ended."""
    with running([*SEARCH, "--out", out], folder) as (driver, log), prometheus(folder) as graphs:
        page = until(lambda: address("live page", log), "the live page")
        until(
            lambda: len(re.findall('<td class="text">(finished|pruned)', read(page))) >= ENDED,
            f"the end of {ENDED} trials",
        )
        dashboard = str(address("dashboard", log))
        seen = signed_in(browser, dashboard)
        shoot(seen, page, "live")
        for name in VIEWS:
            shoot(seen, f"{dashboard}/#/{name}", name)
        if graphs:
            until(lambda: len(points(graphs)) >= POINTS, "points to draw")
            (folder / "metrics.html").write_text(panels(graphs))
            shoot(seen, f"file://{folder}/metrics.html", "metrics")
        else:
            print("docs/monitoring-metrics.png stays as it is: prometheus is not on the PATH")
        seen.close()
        until(lambda: driver.poll() is not None, "the end of the search")
        assert address("report", log), log.read_text()


def watch_training(browser: Browser, folder: Path, out: str) -> None:
    """What the dashboard has of a run of Ray Train."""
    with running([*TRAIN, "--out", out], folder) as (_, log):
        until(lambda: "epoch 1/" in log.read_text(), "the first epoch")
        dashboard = str(address("dashboard", log))
        seen = signed_in(browser, dashboard)
        seen.goto(f"{dashboard}{RUNS}")
        (folder / "train.html").write_text(train_runs(json.loads(seen.inner_text("body"))))
        shoot(seen, f"{dashboard}/#/actors", "train-actors")
        shoot(seen, f"file://{folder}/train.html", "train")
        seen.close()


def look_at_report(browser: Browser, page: Path) -> None:
    """The report on a desktop and on a phone, and some of its figures, with the network cut off."""
    for width, height, dark in ((1280, 800, False), (390, 2300, True)):
        seen = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", offline=True
        )
        faults: list[str] = []
        seen.on("console", lambda message, faults=faults: faults.append(message.text))
        seen.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
        seen.on("requestfailed", lambda request, faults=faults: faults.append(request.url))
        seen.goto(page.as_uri())
        seen.wait_for_timeout(4000)
        if dark:
            keep(seen, "report-phone")
        else:
            for name, sections in REPORT.items():
                boxes = [seen.locator(section).first.bounding_box() for section in sections]
                keep(seen, f"report-{name}", around([box for box in boxes if box]))
        assert not faults, faults
        seen.close()


def around(boxes: list[Any], margin: float = 12) -> dict[str, float]:
    """The part of a page that holds all of them."""
    x, y = (max(0, min(box[side] for box in boxes) - margin) for side in ("x", "y"))
    right, bottom = (max(box[a] + box[b] for box in boxes) + margin for a, b in (("x", "width"), ("y", "height")))
    return {"x": x, "y": y, "width": right - x, "height": bottom - y}


def signed_in(browser: Browser, dashboard: str) -> Page:
    """A page with the token in the cookie that the dashboard keeps it in: nothing prints it."""
    seen = browser.new_page(viewport=SIZE)
    ray = Path(sys.executable).with_name("ray")
    token = subprocess.run([ray, "get-auth-token"], capture_output=True, text=True, check=True).stdout.split()[-1]
    seen.context.add_cookies([{"name": AUTHENTICATION_TOKEN_COOKIE_NAME, "value": token, "url": dashboard}])
    return seen


def shoot(seen: Page, address: str, name: str) -> None:
    """docs/monitoring-NAME.png"""
    seen.goto(address)
    seen.wait_for_timeout(6000)  # the dashboard keeps asking, so there is no moment without traffic to wait for
    keep(seen, f"monitoring-{name}")


def keep(seen: Page, name: str, clip: Any = None) -> None:
    """docs/NAME.png of what the window shows, or of a part of the page; in few colours when it is large."""
    path = DOCS / f"{name}.png"
    seen.screenshot(path=path, full_page=clip is not None, clip=clip)
    if path.stat().st_size > LARGEST_BYTES:
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    assert path.stat().st_size < LARGEST_BYTES, f"{path}: {path.stat().st_size} bytes"
    print(path.relative_to(ROOT), path.stat().st_size)


def address(name: str, log: Path) -> str | None:
    """What a verb printed as `NAME: ADDRESS`."""
    found = re.search(rf"^{name}: (\S+)", log.read_text(), re.MULTILINE)
    return found[1] if found else None


def read(address: str) -> str:
    with urlopen(address, timeout=20) as answer:
        return str(answer.read().decode())


def until(found: Callable[[], Any], what: str) -> Any:
    """What `found` returns once it is true."""
    ends = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < ends, f"{what} did not come in {PATIENCE_S:.0f} s"
        time.sleep(1)
    return value


def train_runs(answer: Mapping[str, Any]) -> str:
    """What the dashboard answers about runs of Ray Train, as tables."""
    parts = [f"<h1>GET {RUNS}</h1><p>Ray's dashboard answers in JSON; here as tables, a part of it.</p>"]
    for run in answer["train_runs"]:
        settings = run["run_settings"]
        about = {
            "run": run["name"],
            "status": run["status"],
            "job": run["job_id"],
            "entrypoint": run["job_details"]["entrypoint"],
            "versions": ", ".join(f"{name} {version}" for name, version in run["framework_versions"].items()),
            "workers": settings["scaling_config"]["num_workers"],
            "each": settings["scaling_config"]["resources_per_worker"],
            "failures allowed": settings["run_config"]["failure_config"]["max_failures"],
            "settings": settings["train_loop_config"]["job"],
        }
        parts.append(table([{"": name, " ": value} for name, value in about.items()]))
        for attempt in run["attempts"]:
            parts.append(f"<h2>Attempt {attempt['attempt_id'][:8]}: {attempt['status']}</h2>")
            parts.append(
                table(
                    [
                        {
                            "rank": worker["world_rank"],
                            "status": worker["status"],
                            "node": worker["node_ip"],
                            "process": worker["pid"],
                            "actor": worker["actor_id"][:8],
                            "processor": f"{worker['processStats']['cpuPercent']:.0f} %",
                            "memory": f"{worker['processStats']['memoryInfo']['rss'] / 2**30:.1f} GiB",
                            "log": Path(worker["log_file_path"]).name,
                        }
                        for worker in attempt["workers"]
                    ]
                )
            )
    style = "body{font:15px/1.5 'DejaVu Sans',sans-serif;margin:24px}td,th{padding:4px 14px 4px 0;text-align:left;vertical-align:top}"
    return f"<!doctype html><meta charset=utf-8><style>{style}h1{{font-size:20px}}h2{{font-size:17px}}</style>{''.join(parts)}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    cells = ["".join(f"<td>{escape(str(cell))}</td>" for cell in line) for line in lines]
    return f"<table><tr>{'<tr>'.join(cells)}</table>"


def points(address: str) -> list[Any]:
    """Of the slowest of the series that are drawn: Prometheus finds a node some time after it is there."""
    query = {"query": "ray_lift_ray_study_trials", "start": time.time() - 150, "end": time.time(), "step": 2}
    found = json.loads(read(f"{address}/api/v1/query_range?{urlencode(query)}"))["data"]["result"]
    return min((series["values"] for series in found), key=len, default=[])


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
            layout = {
                "title": {"text": panel["title"], "font": {"size": 13}},
                "height": 250,
                "width": 620,
                "showlegend": True,
                "xaxis": {"type": "date", "nticks": 4, "tickangle": 0},
                "yaxis": {"rangemode": "tozero"},
                "margin": {"l": 50, "r": 10, "t": 30, "b": 30},
            }
            drawn.append((traces, layout))
    return (
        f"<!doctype html><body style='margin:0;display:flex;flex-wrap:wrap'><script>{get_plotlyjs()}</script><script>"
        f"for (const [data, layout] of {json.dumps(drawn)}) "
        "Plotly.newPlot(document.body.appendChild(document.createElement('div')), data, layout, {staticPlot: true})</script>"
    )


@contextmanager
def running(command: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A verb in a process of its own, and its log."""
    log, environment = folder / f"{command[0]}.log", os.environ | {"RAY_TMPDIR": str(folder)}
    environment.pop("RAY_ADDRESS", None)
    environment["PATH"] = (
        f"{Path(sys.executable).parent}:{environment['PATH']}"  # no path of this machine in the screenshots
    )
    with log.open("w") as out:
        driver = subprocess.Popen(
            ["python", "-m", *command], stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
    try:
        until(lambda: driver.poll() is not None or address("dashboard", log), "the dashboard")
        assert driver.poll() is None, log.read_text()
        yield driver, log
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
    command = [
        program,
        f"--config.file={folder}/prometheus.yml",
        f"--web.listen-address={PROMETHEUS}",
        f"--storage.tsdb.path={folder}/prometheus",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{PROMETHEUS}"
    finally:
        process.terminate()
        process.wait(timeout=20)


if __name__ == "__main__":
    main()
