"""A search seen from outside: Ray's metrics, the live page, the dashboard's entry, open ports, and secrets."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from lift_ray.searching.live_page import METADATA
from lift_ray.tracking.prometheus import SLOT_GAUGES, STUDY_GAUGES

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "clusters" / "monitoring"
pytestmark = pytest.mark.cluster
LONG = 100_000  # epochs of a trial that the test ends itself
SPACE = f"""\
name: watched
dataset: {{data}}
base:
  backbone: {{{{model: '{{clip}}'}}}}
  optim: {{{{global_batch_size: 16}}}}
space:
  optim.epochs: {{{{int: [1, {LONG}], log: true}}}}
  optim.lr:     {{{{float: [1.0e-3, 3.0e-1], log: true}}}}
baselines:
  - {{{{name: short, optim.epochs: 2, optim.lr: 0.02}}}}
  - {{{{name: long, optim.epochs: {LONG}, optim.lr: 0.02}}}}
search: {{{{trials: 2, scheduler: {{{{kind: none}}}}, tte_best: 0}}}}
"""
SUBMITTED = (  # it waits as a search does before it has a page: Ray first notes that the job runs, over what stands there
    "import time, ray; ray.init(); time.sleep(5); from lift_ray.searching.live_page import tell_job; tell_job('http://127.0.0.1:1/submitted')"
)
TOKEN, SECRET = (f"{secrets.token_hex(32)}" for _ in range(2))
Samples = dict[str, list[tuple[dict[str, str], float]]]


@dataclass
class Watched:
    """Observations of a search that ran in its own process."""

    text: str
    returncode: int
    page: str
    page_address: str
    samples: Samples
    jobs: list[dict[str, Any]]
    status_without_token: int
    listening: list[tuple[str, str]]
    files: list[Path]


def get(address: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Return status and text of a response."""
    request = urllib.request.Request(address, None if body is None else json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until(found: Callable[[], Any], what: str, seconds: float = 100) -> Any:
    """Wait until `found` returns a true value, and return it. A server may still be starting."""
    ends = time.monotonic() + seconds
    while True:
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if value := found():
                return value
        assert time.monotonic() < ends, f"{what} did not appear within {seconds:.0f} s"
        time.sleep(0.3)


def scraped(targets: list[str]) -> Samples:
    """Return every sample that the nodes export, as Prometheus would read them."""
    samples: Samples = {}
    for target in targets:
        for family in text_string_to_metric_families(get(f"http://{target}/metrics")[1]):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """Return the value of the one sample with these labels."""
    fits = [number for found, number in samples.get(name, []) if labels.items() <= found.items()]
    return fits[-1] if fits else None


@pytest.fixture(scope="module")
def watched(small_data: str, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    (folder / "space.yaml").write_text(SPACE.format(data=small_data, clip=small_clip))
    with driving(folder, "tune", "space.yaml") as (driver, ray_folder):
        yield _watch(driver, folder, ray_folder)


@contextmanager
def driving(folder: Path, verb: str, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a verb in its own process, which writes to `log` and `out`; yield the process and the folder of Ray's files."""
    (folder / "token").write_text(TOKEN)
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        environment |= {
            "RAY_TMPDIR": ray_folder,
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        with (folder / "log").open("w") as log:
            driver = subprocess.Popen(
                [sys.executable, "-m", f"lift_ray.{verb}", *words, "--out", "out"],
                cwd=folder,
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(
                    signal.SIGINT, signal.SIG_DFL
                ),  # ignored where tests run in the background
            )
        try:
            yield driver, Path(ray_folder)
        finally:
            family = [driver, *psutil.Process(driver.pid).children(recursive=True)] if driver.poll() is None else []
            for process in family:
                process.kill()
            driver.wait()


def listeners(driver: subprocess.Popen[bytes]) -> list[tuple[str, str]]:
    """Return name and address of every listening socket of a driver and its processes."""
    main = psutil.Process(driver.pid)
    return [
        (process.name(), found.laddr.ip.removeprefix("::ffff:"))
        for process in (main, *main.children(recursive=True))
        for found in process.net_connections()
        if found.status == psutil.CONN_LISTEN
    ]


def _watch(driver: subprocess.Popen[bytes], folder: Path, ray_folder: Path) -> Watched:
    def text() -> str:
        assert driver.poll() is None or "live page" in (folder / "log").read_text(), (folder / "log").read_text()
        return (folder / "log").read_text()

    page_address = until(lambda: re.search(r"live page: (\S+)", text()), "the live page")[1]
    dashboard = re.search(r"dashboard: (\S+)", text())[1]  # type: ignore[index]
    until(lambda: list((folder / "out").glob("checkpoints/0001/epoch-*")), "the first epochs")
    page = until(lambda: get(page_address)[1], "the page")
    members = psutil.Process(driver.pid).children(recursive=True)
    listening = listeners(driver)
    until(lambda: "trial   0 finished" in text(), "the end of the short trial")
    slots = [process for process in members if process.name().startswith("ray::Slot")]
    training = max(slots, key=lambda slot: slot.cpu_percent(interval=1))  # an idle one would not be missed
    training.kill()
    token = {"Authorization": f"Bearer {TOKEN}"}
    job = {"entrypoint": f'{sys.executable} -c "{SUBMITTED}"'}
    until(lambda: get(f"{dashboard}/api/jobs/", job, **token)[0] == 200, "the agent that takes jobs")
    groups = until(lambda: json.loads(get(f"{dashboard}/api/prometheus/sd", **token)[1]), "the list of nodes")
    targets = [target for group in groups for target in group["targets"]]
    study = "ray_lift_ray_study_"

    def all_seen() -> Samples | None:
        samples = scraped(targets)
        # The new slot is counted before it runs its trial again.
        counts = [value(samples, f"{study}trials", state=state) for state in ("finished", "running")]
        restarted = value(samples, f"{study}slot_restarts") == 1
        return samples if restarted and counts == [1, 1] and f"{study}slot_images_per_s" in samples else None

    samples = until(all_seen, "the metrics", 180)  # a new slot starts first, which a busy machine takes its time for

    def jobs() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(get(f"{dashboard}/api/jobs/", **token)[1])
        return found if all(METADATA in (job["metadata"] or {}) for job in found) and len(found) == 2 else []

    all_jobs = until(jobs, "the jobs' addresses")
    without = until(lambda: get(f"{dashboard}/api/jobs/")[0], "a refusal")
    driver.send_signal(signal.SIGINT)
    driver.wait(timeout=60)
    files = [
        path
        for place in (folder / "out", ray_folder)
        for path in place.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    assert any("gcs_server" in path.name for path in files)
    return Watched(
        text(), driver.returncode, page, page_address, samples, all_jobs, without, listening, [*files, folder / "log"]
    )


def test_a_study_publishes_its_figures_as_ray_metrics(watched: Watched) -> None:
    study = {"study": "watched"}
    assert value(watched.samples, "ray_lift_ray_study_trials", state="running", **study) == 1
    assert value(watched.samples, "ray_lift_ray_study_trials", state="pruned", **study) == 0
    best = value(watched.samples, "ray_lift_ray_study_best", objective="validation/mean_class_accuracy", **study)
    assert best is not None
    assert 0 <= best <= 1
    assert value(watched.samples, "ray_lift_ray_study_slots", **study) in (1, 2)
    speeds = {labels["slot"]: number for labels, number in watched.samples["ray_lift_ray_study_slot_images_per_s"]}
    assert set(speeds) <= {"0", "1"}
    assert all(number > 0 for number in speeds.values())
    waits = [number for _, number in watched.samples["ray_lift_ray_study_slot_data_wait_frac"]]
    assert all(0 <= number <= 1 for number in waits)


def test_the_live_page_shows_the_trials_of_the_running_search(watched: Watched) -> None:
    assert watched.page_address.startswith("http://127.0.0.1:")
    assert "<h1>watched</h1>" in watched.page
    assert "of 2 trials ended after" in watched.page
    assert f"/{LONG}</td>" in watched.page
    with pytest.raises(urllib.error.URLError):
        get(watched.page_address)  # ended with the search


def test_the_dashboards_entry_of_the_job_carries_the_address_of_the_page(watched: Watched) -> None:
    jobs = {job["type"]: job["metadata"] for job in watched.jobs}
    assert jobs["DRIVER"][METADATA] == watched.page_address
    assert jobs["DRIVER"]["job_name"] == f"watched, live page {watched.page_address}"
    assert jobs["SUBMISSION"][METADATA] == "http://127.0.0.1:1/submitted"
    assert not any(job["runtime_env"] for job in watched.jobs), "what is in a runtime environment, Ray shows"


def test_with_the_defaults_nothing_listens_beyond_loopback(watched: Watched) -> None:
    names = {name for name, _ in watched.listening}
    assert {"gcs_server", "raylet", "ray::DashboardAgent"} <= names
    assert {ip for _, ip in watched.listening} == {"127.0.0.1"}


def test_a_slot_of_two_workers_does_not_listen_beyond_loopback_either(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    (tmp_path / "space.yaml").write_text(SPACE.format(data=small_data, clip=small_clip))
    with driving(tmp_path, "tune", "space.yaml", "scale.workers_per_trial=2", "search.trials=1") as (driver, _):
        until(lambda: list((tmp_path / "out").glob("checkpoints/0000/epoch-*")), "the first epoch")
        listening = listeners(driver)
    slots = [ip for name, ip in listening if name.startswith("ray::RankWorker")]
    assert len(slots) > 2, "the meeting point, and gloo in both workers, beside what Ray opens"
    assert {ip for _, ip in listening} == {"127.0.0.1"}


def test_the_dashboard_knows_the_train_runs_but_not_where_their_data_is(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    model, optim = f"{{model: '{small_clip}'}}", f"{{epochs: {LONG}, global_batch_size: 16}}"
    text = f"name: my run\ndataset: {small_data}\nbackbone: {model}\noptim: {optim}\n"
    (tmp_path / "run.yaml").write_text(text)
    with driving(tmp_path, "train", "run.yaml", "--workers", "2", "--dashboard") as (_, _):
        log = tmp_path / "log"
        until(lambda: "epoch 1/" in log.read_text(), "the first epoch", 200)
        dashboard = re.search(r"dashboard: (\S+)", log.read_text())[1]  # type: ignore[index]
        status, answer = get(f"{dashboard}/api/train/v2/runs/v1", Authorization=f"Bearer {TOKEN}")
    assert status == 200, answer
    [run] = json.loads(answer)["train_runs"]
    assert (run["name"], run["status"], run["job_details"]["metadata"]) == ("my-run", "RUNNING", {"job_name": "my run"})
    assert [worker["status"] for attempt in run["attempts"] for worker in attempt["workers"]] == ["ALIVE", "ALIVE"]
    assert small_data not in answer, "a URL may hold credentials"


def test_token_authentication_stays_on_and_neither_token_nor_secrets_are_written_anywhere(watched: Watched) -> None:
    assert watched.status_without_token == 401
    assert watched.returncode == 130, watched.text
    for path in watched.files:
        data = path.read_bytes()
        assert TOKEN.encode() not in data, path
        assert SECRET.encode() not in data, path


def test_the_dashboard_for_grafana_asks_only_for_metrics_that_exist(watched: Watched) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    board = json.loads((MONITORING / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [item["query"]["query"] for item in board["templating"]["list"] if item["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    ours = {f"ray_lift_ray_study_{name}" for name in STUDY_GAUGES} | {
        f"ray_lift_ray_study_slot_{name}" for name in SLOT_GAUGES
    }
    assert asked == ours | {f"ray_{name}" for name in METRICS_GAUGES} & asked
    seen_on_this_machine = {name for name in ours if "gpu" not in name}
    assert seen_on_this_machine <= set(watched.samples)
    titles = " ".join(panel["title"] for panel in board["panels"]).lower()
    for word in (
        "running",
        "finished",
        "pruned",
        "best metric",
        "images a second",
        "data-wait",
        "gpu use",
        "gpu memory",
        "restarts",
    ):
        assert word in titles, word
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)), "panels lie over each other"


def test_prometheus_reads_the_list_of_nodes_that_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert set(config) == {"global", "scrape_configs"}
    [job] = config["scrape_configs"]
    assert job == {"job_name": "ray", "file_sd_configs": [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]}
    assert all(re.fullmatch(r"\d+s", text) for text in config["global"].values())


@pytest.mark.skipif(not shutil.which("promtool") and not os.environ.get("CI"), reason="needs Prometheus")
def test_prometheus_accepts_its_settings() -> None:
    promtool = shutil.which("promtool")
    assert promtool, "CI installs prometheus"
    done = subprocess.run([promtool, "check", "config", MONITORING / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
