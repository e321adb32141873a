"""Images in a real S3 server (moto) on loopback, behind a small proxy that counts requests and makes them fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from embedded import jpegs
from moto.server import ThreadedMotoServer

from lift_ray.data.convert.shards import publish, write_split
from lift_ray.data.dataset import Split
from lift_ray.data.open import open_dataset

NAMES = ("cat", "dog", "wild cat")
CONFIG = {
    "key": "key",
    "secret": "secret",  # pragma: allowlist secret
    "config_kwargs": {"retries": {"max_attempts": 1}, "read_timeout": 1.0},  # what lift_ray does itself shows
}
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
STATUSES = {
    "500": (500, "InternalError", "We encountered an internal error"),
    "503": (503, "ServiceUnavailable", "Reduce your rate"),
    "429": (429, "TooManyRequests", "Too many requests"),
    "403": (403, "AccessDenied", "Access Denied"),
}


@dataclass
class Store:
    """What the proxy saw and is to do.

    Attributes:
        endpoint: its URL.
        reads: (object, range) of every read of an object since the last `forget`.
        faults: what goes wrong with the next reads of objects, one for each.
        always: what goes wrong with all of them.
        listing: what goes wrong with listings.
    """

    endpoint: str = ""
    reads: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    always: str = ""
    listing: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def forget(self) -> None:
        """Count from zero, and let everything succeed."""
        self.reads, self.faults, self.always, self.listing = [], [], "", ""

    def fault(self, is_read: bool) -> str:
        if not is_read:
            return self.listing
        return self.faults.pop(0) if self.faults else self.always


def write(url: str, count: int = 60) -> None:
    """The first images as a training split: 20 in a shard, 4 in a row group, labels 0, 1, 2, 0, ..."""
    samples = [(image, f"{row}.jpg", row % 3) for row, image in enumerate(jpegs(count))]
    record = write_split(url, "train", samples, NAMES, rows_per_shard=20, row_group_rows=4)
    publish(url, NAMES, {"train": record})


@contextmanager
def flaky_store() -> Iterator[Store]:
    """Start server and proxy, with 60 images in s3://pets/set; end both."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    store = Store()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler(store, f"{host}:{port}"))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    store.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(fsspec.config.conf, "s3", {**CONFIG, "endpoint_url": store.endpoint})
            fsspec.filesystem("s3").makedirs("pets", exist_ok=True)  # moto keeps buckets beyond its end
            write("s3://pets/set")
            yield store
    finally:
        store.released.set()
        proxy.shutdown()
        proxy.server_close()
        moto.stop()


def handler(store: Store, address: str) -> type[BaseHTTPRequestHandler]:
    """The class that answers one request for `store`, through the server at `address`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

        def do_GET(self) -> None:
            name, _, query = self.path.partition("?")
            is_read = "list-type" not in query
            if is_read:
                store.reads.append((name.rsplit("/", 1)[-1], self.headers.get("Range", "")))
            fault = store.fault(is_read)
            if fault in STATUSES:
                status, code, message = STATUSES[fault]
                self.answer(
                    status, {"Content-Type": "application/xml"}, ERROR.format(code=code, message=message).encode()
                )
            elif fault in ("hang", "drop"):
                if fault == "hang":
                    store.released.wait(20)
                self.close_connection = True
            else:
                self.forward(fault)

        def forward(self, fault: str = "") -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
            connection = HTTPConnection(address, timeout=30)
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            data = bytearray(response.read())
            if fault == "flip":
                data[len(data) // 2] ^= 0xFF
            if fault == "short":
                del data[len(data) // 2 :]
            self.answer(response.status, dict(response.getheaders()), bytes(data), cut=fault == "cut")
            connection.close()

        do_HEAD = do_PUT = do_POST = do_DELETE = forward

        def answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
            self.send_response(status)
            for key, value in headers.items():
                if key.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                    self.send_header(key, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = self.close_connection or cut

    return Handler


def opened(patience_s: float = 30.0) -> Split:
    """The training split of the data set in the store."""
    return open_dataset("s3://pets/set", patience_s=patience_s).split("train")
