"""The contenders of benchmarks/stream_s3.py load the same images from one S3 server, whose proxy counts what they ask for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import data
import pytest
import stream_s3
import torch
from data_contenders import Sample
from s3_server import KEYS, CountingProxy, s3_server
from s3fs import S3FileSystem
from stream_s3_contenders import BUCKET, CONTENDERS, LiftRay, Source

PX, BATCH, BATCHES = 24, 8, 5
THERE = [
    name
    for name, contender in CONTENDERS.items()
    if find_spec(contender.imports[0].split(".")[0]) and ("webdataset" not in name or shutil.which("curl"))
]
KEEP = {"lift_ray_copies", "webdataset_copies", "mosaicml", "litdata"}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return data.samples_of("embedded:caltech101-lt", BATCH * BATCHES)[0]


@pytest.fixture(scope="module")
def class_names() -> list[str]:
    return data.samples_of("embedded:caltech101-lt", BATCH * BATCHES)[1]


@pytest.fixture(scope="module")
def served(
    samples: list[Sample], class_names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[CountingProxy, Source]]:
    """The images in moto's server, behind the proxy."""
    folder = tmp_path_factory.mktemp("served")
    tars = stream_s3.written(THERE, samples, class_names, folder / "files")
    with s3_server("moto", folder, BUCKET, folder / "files") as port, CountingProxy(port) as proxy:
        yield proxy, Source(f"s3://{BUCKET}", "classic", PX, BATCH, endpoint=proxy.url, tars=tars)


@pytest.fixture
def source(served: tuple[CountingProxy, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """What a contender in this process loads: it finds the server in the environment."""
    urls = {"AWS_ENDPOINT_URL": served[1].endpoint, "S3_ENDPOINT_URL": served[1].endpoint}
    for name, value in {**KEYS, **urls, "LIFT_CACHE": "", "LIFT_CACHE_GB": ""}.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    yield replace(served[1], copies=str(tmp_path))
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", THERE)
def test_every_image_comes_once_an_epoch_and_copies_save_the_second_its_requests(
    name: str, source: Source, served: tuple[CountingProxy, Source], samples: list[Sample]
) -> None:
    proxy, sums = served[0], []
    before = proxy.requests
    contender = CONTENDERS[name](source)
    for epoch in range(2):
        images, labels = zip(*contender.batches(epoch), strict=True)
        assert [tuple(batch.shape) for batch in images] == [(BATCH, 3, PX, PX)] * BATCHES
        assert sorted(torch.cat(labels).tolist()) == sorted(label for _, _, label in samples)
        sums.append(proxy.requests - before)
        if isinstance(contender, LiftRay):
            contender.reader.close()  # what it still has in memory is no copy
    assert sums[0] > 0
    assert (sums[1] == sums[0]) == (name in KEEP)


def test_the_figures_are_those_of_a_new_process_with_an_empty_folder(
    served: tuple[CountingProxy, Source], samples: list[Sample], tmp_path: Path
) -> None:
    proxy, setup = served
    found = stream_s3.two_epochs("lift_ray_copies", replace(setup, copies=str(tmp_path)), [0], proxy)
    first, second = (found[epoch] for epoch in stream_s3.EPOCHS)
    assert first["images"] == second["images"] == BATCH * BATCHES
    assert first["bytes"] > sum(len(image) for image, _, _ in samples)
    assert first["opening_s"] > 0
    assert first["images_per_s"] < first["images"] / first["opening_s"]
    assert (second["requests"], second["bytes"], second["opening_s"]) == (0, 0, 0)
    # The system counts a process's time in ticks of 10 ms, and the second epoch can be over before the first tick.
    assert first["processor_s_per_1000"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_proxy_counts_requests_and_bytes_and_holds_them_back() -> None:
    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Content-Length", "3000000")
            self.end_headers()
            self.wfile.write(bytes(3_000_000))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with CountingProxy(server.server_address[1], latency_s=0.2) as proxy:
            connection = HTTPConnection(proxy.url.removeprefix("http://"), timeout=20)
            for number in range(1, 4):
                began = time.monotonic()
                connection.request("GET", "/x")
                assert len(connection.getresponse().read()) == 3_000_000
                assert time.monotonic() - began > 0.2
                assert proxy.requests == number
                assert 0 < proxy.sent_bytes - number * 3_000_000 < number * 100
            connection.close()
    finally:
        server.shutdown()
        server.server_close()


def test_ratios_are_formed_within_a_round_and_an_epoch() -> None:
    def both(first: float, second: float) -> dict[str, dict[str, Any]]:
        return {"first": {"images_per_s": first}, "second": {"images_per_s": second}}

    rounds = [
        {"lift_ray": both(100, 200), "litdata": both(50, 400)},
        {"lift_ray": both(10, 20), "litdata": both(5, 40)},
    ]
    found = stream_s3.evaluate(rounds)
    assert found["litdata"]["first"]["times_lift_ray_range"] == [0.5, 0.5]
    assert found["litdata"]["second"]["times_lift_ray"] == 2
    assert found["lift_ray"]["second"]["images_per_s"] == 110
