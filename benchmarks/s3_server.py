"""A local S3 server, and a proxy that counts requests and bytes and can add latency."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from ports import free_ports

KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",  # pragma: allowlist secret
    "AWS_DEFAULT_REGION": "us-east-1",
}
START_S, ENDED_S = 60.0, 20.0
MOST_BYTES = 2**20  # passed on at a time
END_OF_HEAD = b"\r\n\r\n"


def seaweed() -> str | None:
    """Return the path of SeaweedFS's program, from beside this Python or from the PATH."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@contextmanager
def s3_server(kind: str, folder: Path, bucket: str, files: Path) -> Iterator[int]:
    """Start a server with a bucket that holds these files, which anybody may read; yield its port.

    Args:
        kind: "seaweedfs", or "moto", which is slower.
        folder: empty, for its data.
    """
    ports = free_ports(8)
    with subprocess.Popen(
        _command(kind, ports, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _fill(process, ports[0], bucket, files)
            yield ports[0]
        finally:
            process.terminate()
            try:
                process.wait(ENDED_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _command(kind: str, ports: list[int], folder: Path) -> list[str]:
    if kind == "moto":
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports[0])]
    options = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "volume.max": 0, "volume.preStopSeconds": 0}
    options |= {"filer": "true", "s3": "true", "s3.port.iceberg": 0, "s3.port.lance": 0}
    options |= {"master.volumeSizeLimitMB": 1024}
    parts = ("s3", "master", "volume", "filer")
    for part, port, grpc_port in zip(parts, ports[:4], ports[4:], strict=True):
        options |= {f"{part}.port": port, f"{part}.port.grpc": grpc_port}
    return [str(seaweed()), "server", *(f"-{name}={value}" for name, value in options.items())]


def _fill(process: subprocess.Popen[bytes], port: int, bucket: str, files: Path) -> None:
    """Make the bucket as soon as the server can, and copy the files to it."""
    store = fsspec.filesystem(
        "s3",
        key=KEYS["AWS_ACCESS_KEY_ID"],
        secret=KEYS["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=f"http://127.0.0.1:{port}",
        s3_additional_kwargs={"ACL": "public-read"},
        skip_instance_cache=True,
    )
    ends = time.monotonic() + START_S
    while True:
        try:
            store.makedirs(bucket, exist_ok=True)
            store.pipe(f"{bucket}/first", b"first")
            break
        except Exception:  # there are many kinds until all parts of the server are there
            if process.poll() is not None or time.monotonic() > ends:
                raise
            time.sleep(0.2)
    store.put(f"{files}/", f"{bucket}/", recursive=True)


class CountingProxy:
    """Passes connections on to a server on loopback, in a thread of its own, and counts. None of the requests may have a body.

    Args:
        port: of the server.
        latency_s: how long each request is held back.

    Attributes:
        url: its own.
        requests: number of requests so far.
        sent_bytes: bytes of the answers so far, with their headers.
    """

    def __init__(self, port: int, latency_s: float = 0.0) -> None:
        self._port, self._latency_s = port, latency_s
        self.requests = self.sent_bytes = 0
        self._started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True)

    def __enter__(self) -> CountingProxy:
        self._thread.start()
        self.url, self._loop, self._done = self._started.result(START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(ENDED_S)

    async def _serve(self) -> None:
        server, done = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=MOST_BYTES), asyncio.Event()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set_result((url, asyncio.get_running_loop(), done))
        await done.wait()
        server.close()

    async def _connected(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._port, limit=MOST_BYTES)
        await asyncio.gather(self._requests(client, to_server), self._answers(server, to_client))

    async def _requests(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        last = b""
        with suppress(OSError):
            while data := await client.read(MOST_BYTES):
                heads = (last + data).count(END_OF_HEAD)
                last = (last + data)[1 - len(END_OF_HEAD) :]
                self.requests += heads
                if heads and self._latency_s:
                    await asyncio.sleep(self._latency_s)
                server.write(data)
                await server.drain()
        server.close()

    async def _answers(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await server.read(MOST_BYTES):
                self.sent_bytes += len(data)
                client.write(data)
                await client.drain()
        client.close()
