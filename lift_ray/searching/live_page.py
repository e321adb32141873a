"""Live page of a running search, served to this machine only: its trials, and its report as soon as there is one."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from urllib.parse import urlsplit

from lift_ray.errors import BadInput
from lift_ray.reporting.templates import template
from lift_ray.reporting.trial_rows import TrialRow, best_row
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.layout import PAGE, REPORT
from lift_ray.terminal.tables import describe

HOST = "127.0.0.1"
REFRESH_S = 5
MOST_ROWS = 200
METADATA = "lift_ray_page"  # in the entry of Ray's dashboard for the job


class Status:
    """Line of progress that a search's monitor keeps up to date."""

    text = ""

    def show(self, text: str) -> None:
        """Replace the line."""
        self.text = text


@contextmanager
def served(
    space: SpaceFile, rows: Mapping[int, TrialRow], folder: Path, port: int | None, status: Status | None = None
) -> Iterator[str | None]:
    """Serve the page on 127.0.0.1 while a search runs, and yield its address.

    Args:
        rows: the trials by number, which the search fills.
        folder: folder of the search; its report/ is served once it is written.
        port: 0 for a free one, None for no page.
        status: shown below the counts.

    Raises:
        BadInput: the port is in use.
    """
    if port is None:
        yield None
        return
    began, now = time.monotonic(), status or Status()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # DNS rebinding: a foreign page whose host name resolves to this machine must not read this one.
            local = urlsplit(f"//{self.headers.get('Host', '')}").hostname in (HOST, "localhost")
            path = urlsplit(self.path).path
            if local and path == "/":
                page = live_page(space, rows, folder, time.monotonic() - began, now.text)
                self._answer(200, "text/html; charset=utf-8", page.encode())
            elif local and (file := _report_file(folder, path)) is not None:
                self._answer(200, guess_type(file.name)[0] or "text/plain", file.read_bytes())
            else:
                self._answer(404 if local else 403, "text/plain", b"not here\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise BadInput(
            "--live-port", "must be a free port", f"{port} ({error.strerror})", "give another, or leave it out"
        ) from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _report_file(folder: Path, path: str) -> Path | None:
    """Return the report file that a request path names; None for anything but the report's own files."""
    place, _, name = path.removeprefix("/").partition("/")
    file = folder / REPORT / (name or PAGE)
    return file if place == REPORT and file.parent == folder / REPORT and file.is_file() and name != ".." else None


@dataclass(frozen=True)
class _Row:
    """One trial as the template shows it; a value that is not known yet is empty."""

    number: int
    state: str
    epochs: str
    value: str
    images_per_s: str
    data_wait: str
    settings: str


def live_page(space: SpaceFile, rows: Mapping[int, TrialRow], folder: Path, seconds: float, status: str = "") -> str:
    """Return the state of a search as HTML that reloads itself."""
    trials = sorted(rows.values(), key=lambda row: (row.has_ended, -row.number))
    metric, mode = space.objective
    states = Counter(row.state for row in trials)
    best = best_row(trials, metric, mode)
    measure = metric.split("/")[-1].replace("_", " ")
    return template("lift_ray.searching", "live_page.html").render(
        name=space.name,
        refresh_s=REFRESH_S,
        ended=sum(row.has_ended for row in trials),
        total=space.num_trials,
        seconds=seconds,
        counts=", ".join(f"{number} {state}" for state, number in states.items()),
        status=status,
        metric=metric,
        best=_row(best, metric) if best else None,
        has_report=(folder / REPORT / PAGE).exists(),
        report_url=f"/{REPORT}/",
        headings=("trial", "state", "epoch", measure, "images/s", "waiting for data", "settings"),
        rows=[_row(row, metric) for row in trials[:MOST_ROWS]],
        rows_left=max(0, len(trials) - MOST_ROWS),
    )


def _row(row: TrialRow, metric: str) -> _Row:
    last, train_s = row.last, row.last.seconds.get("train_s")
    speed, wait = last.train.get("images_per_s"), last.seconds.get("data_wait_s", 0.0) / train_s if train_s else None
    return _Row(
        number=row.number,
        state=row.state,
        epochs=f"{len(row.history)}/{row.num_epochs}",
        value=f"{last[metric]:.4f}" if metric in last else "",
        images_per_s="" if speed is None else f"{speed:.0f}",
        data_wait="" if wait is None else f"{100 * wait:.0f}%",
        settings=f"{describe(row.values)} {row.error}".rstrip(),
    )


def job_metadata(space: SpaceFile, address: str | None) -> dict[str, str]:
    """Return the metadata that Ray's dashboard shows for a driver that was not submitted as a job."""
    return (
        {"job_name": f"{space.name}, live page {address}", METADATA: address} if address else {"job_name": space.name}
    )


def tell_job(address: str) -> None:
    """Add the page's address to the dashboard's entry of this driver, if it was submitted as a job.

    Ray 2.60 has no call that changes a submitted job's metadata, so this writes the record that the dashboard reads. A driver
    that was not submitted gives its metadata to `ray.init` instead (`session.connected`).
    """
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    given = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    key = f"_ray_internal_job_info_{given.get('job_submission_id')}".encode()
    if "job_submission_id" in given and (record := _internal_kv_get(key, namespace="job")):
        info = json.loads(record)
        info["metadata"] = {**(info.get("metadata") or {}), METADATA: address}
        _internal_kv_put(key, json.dumps(info).encode(), overwrite=True, namespace="job")
