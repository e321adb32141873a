"""python -m lift_ray.serve: many requests at once, bad ones, and a replica that is killed."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from made_run import predicted_by
from PIL import Image
from ports import free_ports

from lift_ray import serve
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # in Ray Serve
]
MAX_BYTES, MAX_PIXELS = 200_000, 500_000


@dataclass
class Server:
    port: int
    process: psutil.Process
    images: list[bytes]
    classes: list[str]
    names: list[str]
    statuses: list[int] = field(default_factory=list)

    def ask(
        self, body: bytes = b"", path: str = "/predict", method: str = "POST", kind: str | None = "image/jpeg"
    ) -> tuple[int, str, str]:
        """Status, kind and text of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            self.statuses.append(answer.status)
            return answer.status, answer.getheader("Content-Type", ""), answer.read().decode()
        finally:
            connection.close()

    def processes(self, *names: str) -> list[psutil.Process]:
        """Those of the model (ModelReplica), of what takes requests in (HttpFront), and of the port (ProxyActor), oldest first."""
        found = []
        for process in self.process.children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                if any(name in " ".join(process.cmdline()) for name in names):
                    found.append(process)
        return sorted(found, key=lambda p: p.create_time())

    def until(self, holds: Callable[[], bool]) -> bool:
        """Whether it came to hold in 90 s."""
        ends = time.monotonic() + 90
        while not (held := holds()) and time.monotonic() < ends:
            time.sleep(0.2)
        return held

    def health(self) -> int:
        """Status of /health, which may be 503."""
        status = self.ask(path="/health", method="GET", kind=None)[0]
        self.statuses.pop()
        return status


@pytest.fixture(scope="module")
def server(small_data: str, small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The verb, as a user starts it, with two replicas, on a free port."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    threads = torch.get_num_threads()
    config = {"backbone": {"model": small_clip}, "optim": {"epochs": 1, "global_batch_size": 16, "lr": 0.05}}
    run = Run(RunConfig.model_validate(config), Workspace(small_data, Ranks.alone()))
    run.train_epoch()
    run.save(folder)
    _, table = predicted_by(run)
    torch.set_num_threads(threads)
    dataset = open_dataset(small_data)
    with RowReader(dataset.split("test")) as reader:
        images = reader.read(np.arange(24))
    (port,) = free_ports(1)
    words = [
        sys.executable,
        "-m",
        "lift_ray.serve",
        str(folder),
        "--port",
        str(port),
        "--replicas",
        "2",
        "--max-mb",
        str(MAX_BYTES / 1e6),
        "--max-pixels",
        str(MAX_PIXELS),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert "fitted on 24 validation images" in process.stdout.readline()
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/\n"
        names = list(dataset.class_names)
        yield Server(
            port, psutil.Process(process.pid), images, [names[k] for k in table["predicted"].to_pylist()], names
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def png(width: int, height: int) -> bytes:
    """An image of one color: few bytes for any size."""
    encoded = io.BytesIO()
    Image.new("L", (width, height)).save(encoded, "PNG")
    return encoded.getvalue()


def photo() -> bytes:
    """A real image of the package."""
    split = open_dataset("embedded:caltech101-lt").split("test")
    with RowReader(split) as reader:
        return reader.read(np.arange(1))[0]


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels; never decoded here."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_the_page_needs_no_network_and_health_is_ok(server: Server) -> None:
    status, kind, page = server.ask(path="/", method="GET", kind=None)
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert "http://" not in page
    assert "https://" not in page
    assert server.ask(path="/health", method="GET", kind=None)[::2] == (200, '{"status":"ok"}')
    connections = [
        each
        for each in server.process.children(recursive=True)
        for each in each.net_connections()
        if each.status == "LISTEN" and each.laddr.port == server.port
    ]
    assert {each.laddr.ip for each in connections} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("body", "kind", "path", "status", "message"),
    [
        (b"", "image/png", "/predict", 400, "body: must be an image, but got 0 bytes"),
        (b"no image at all", "image/jpeg", "/predict", 400, "image: must be JPEG, PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(300), "image/jpeg", "/predict", 400, "image: must be"),
        (photo()[:-900], "image/jpeg", "/predict", 400, "image: must be complete and readable, but got:"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "application/octet-stream", "/predict", 400, "image: must be JPEG, PNG"),
        (png(20, 20), "text/plain", "/predict", 415, "Content-Type: must be image/..., but got text/plain"),
        (png(20, 20), None, "/predict", 415, "Content-Type: must be image/..., but got none"),
        (bytes(MAX_BYTES + 1), "image/png", "/predict", 413, "body: must be at most 200,000 bytes, but got more"),
        (png(1000, 501), "image/png", "/predict", 413, "image: must have at most 500,000 pixels, but got 1000 x 501"),
        (bomb(13_000, 13_000), "image/png", "/predict", 413, "image: must have at most 500,000 pixels"),
        (bomb(60_000, 60_000), "image/png", "/predict", 413, "image: must have at most 500,000 pixels"),
        (png(20, 20), "image/png", "/predict?top=0", 400, "top: must be 1 to 8, but got 0"),
        (png(20, 20), "image/png", "/predict?top=x", 400, "top: must be a number, but got 'x'"),
        (png(20, 20), "image/png", "/nothing", 404, "path: must be /, /health, /predict, but got /nothing"),
        (png(20, 20), "image/png", "/health", 405, "method: must be GET for /health, but got POST"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_a_bad_upload_is_a_client_error_in_one_line(
    body: bytes, kind: str | None, path: str, status: int, message: str, server: Server
) -> None:
    got, answered, text = server.ask(body, path, kind=kind)
    assert (got, answered) == (status, "application/json")
    assert message in json.loads(text)["error"]
    assert "\n" not in text


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    chunks = (bytes(50_000) for _ in range(6))
    connection.request("POST", "/predict", chunks, {"Content-Type": "image/png"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_200_requests_at_once_are_answered_as_the_evaluation_does_and_memory_stays_flat(server: Server) -> None:
    bad = [
        (bytes(MAX_BYTES + 1), 413),
        (png(1000, 501), 413),
        (bomb(60_000, 60_000), 413),
        (photo()[:-900], 400),
        (b"no", 400),
    ]

    def one(number: int) -> bool:
        if number % 8 == 0:
            body, expected = bad[number // 8 % len(bad)]
            return server.ask(body)[0] == expected
        status, _, text = server.ask(server.images[number % 24], "/predict?top=8")
        answer = json.loads(text)["classes"]
        assert status == 200
        assert sum(each["probability"] for each in answer) == pytest.approx(1, abs=1e-4)
        return bool(answer[0]["name"] == server.classes[number % 24])

    with ThreadPoolExecutor(200) as pool:
        for _ in range(5):  # until allocators and Ray hold what they need
            assert all(pool.map(one, range(200)))
        processes = server.processes("ModelReplica", "HttpFront", "ProxyActor")
        before = [p.memory_info().rss for p in processes]
        for _ in range(3):
            assert all(pool.map(one, range(200)))
        after = [p.memory_info().rss for p in processes]
    assert len(before) == 5
    assert sum(after) - sum(before) < 40 * 2**20


def test_a_killed_replica_costs_no_request(server: Server) -> None:
    victim = server.processes("ModelReplica")[0]
    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(server.ask, server.images[n % 24]) for n in range(400)]
        while sum(future.done() for future in asked) < 50:
            time.sleep(0.001)
        victim.suspend()  # with requests that it took on already
        wait(asked, timeout=4)
        assert not all(future.done() for future in asked)
        victim.kill()
        found = [future.result()[0] for future in asked]
    assert found == [200] * 400
    assert server.until(lambda: len({*server.processes("ModelReplica")} - {victim}) == 2)
    assert max(server.statuses) < 500


def test_when_a_front_end_is_killed_the_next_requests_go_to_the_other_one(server: Server) -> None:
    victim, so_far = server.processes("HttpFront")[0], len(server.statuses)
    with ThreadPoolExecutor(20) as pool:
        inside = [pool.submit(server.ask, server.images[n % 24]) for n in range(100)]
        while sum(future.done() for future in inside) < 30:
            time.sleep(0.001)
        victim.kill()
        victim.wait(60)
        while sum(future.done() for future in inside) < 100:
            time.sleep(0.001)
        found = [future.result()[0] for future in inside]
        assert found.count(200) >= 100 - 20  # at most those that were under way
        del server.statuses[so_far:]
        assert [status for status, *_ in pool.map(server.ask, server.images * 4)] == [200] * 96
    assert server.until(lambda: len({*server.processes("HttpFront")} - {victim}) == 2)


def test_health_is_503_while_no_replica_lives_and_ok_again_when_one_does(server: Server) -> None:
    assert server.health() == 200
    for process in server.processes("ModelReplica"):
        process.kill()
    assert server.until(lambda: server.health() == 503)
    assert server.until(lambda: server.health() == 200)
    assert server.ask(server.images[0])[0] == 200


def test_bad_options_give_a_one_line_error(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=rf"^--port: must be free, but 127.0.0.1:{server.port} is not"):
        serve.main([str(tmp_path), "--port", str(server.port)])
    with pytest.raises(BadInput, match=r"must be a checkpoint folder, but there is no run.json"):
        serve.main([str(tmp_path), "--port", "65000"])
    monkeypatch.delenv("LIFT_CHECKPOINT", raising=False)
    with pytest.raises(BadInput, match=r"^checkpoint: is required; add checkpoint=FOLDER"):
        serve.app({})
    with pytest.raises(BadInput, match=r"^replica: unknown argument of lift_ray.serve:app"):
        serve.app({"checkpoint": "x", "replica": "2"})
    monkeypatch.setenv("LIFT_CHECKPOINT", "runs/x")
    monkeypatch.setenv("LIFT_REPLICAS", "two")
    with pytest.raises(BadInput, match=r"^replicas: must be a number, but got 'two'; fix it$"):
        serve.app({})
