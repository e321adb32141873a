"""HTTP front of a Ray Serve application: page, health check, and limits on uploads. It does not import torch, to save memory."""

from __future__ import annotations

import asyncio
import importlib.resources
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from lift_ray.data.convert.index import absolute
from lift_ray.errors import BadInput

TRIES = 5  # for an image whose replica died
BYTES_AT_ONCE = 128_000_000  # of uploads held by one process; further uploads are rejected with 503
FRESH_S = 2.0  # a response of the model counts as a sign of health for this long
PATIENCE_S = 3.0  # timeout of a health check
MAY_BE_0 = ("gpus_per_worker", "posthoc_tau")
OLD_NAMES = {"cpus": "cpus_per_worker", "gpus": "gpus_per_worker"}  # which still work, as does max_megapixels
PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)


@dataclass(frozen=True)
class Options:
    """Options of a server. Each field can be an argument of `serve run`, or a variable LIFT_CHECKPOINT, LIFT_TEMPERATURE, ... .

    Attributes:
        checkpoint: folder or URL that every replica can read.
        temperature: divides the logits; None for the fitted temperature.
        posthoc_tau: strength of the post-hoc adjustment; None for the value of the run.
        max_mb: largest upload, in MB.
        max_pixels: pixels of the largest image; a small file can hold a huge image.
        replicas: number of replicas of the model, its workers.
        cpus_per_worker: cores of each replica.
        gpus_per_worker: GPUs of each replica, may be a fraction.
    """

    checkpoint: str = ""
    temperature: float | None = None
    posthoc_tau: float | None = None
    max_mb: float = 20.0
    max_pixels: int = 50_000_000
    replicas: int = 1
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Read the options from the arguments of `serve run` and the environment. Raises BadInput."""
        known, given = cls.__dataclass_fields__, _renamed(given)
        if unknown := sorted(set(given) - set(known)):
            raise BadInput(unknown[0], "unknown argument of lift_ray.serve:app", remedy=f"known: {', '.join(known)}")
        values: dict[str, Any] = {}
        for name, default in asdict(cls()).items():
            text = given.get(name, os.environ.get(f"LIFT_{name.upper()}"))
            kind = float if default is None else type(default)
            try:
                values[name] = default if text is None else kind(text)
            except ValueError:
                raise BadInput(name, "must be a number", repr(text), "fix it") from None
        if not values["checkpoint"]:
            raise BadInput("checkpoint", "is required", remedy="add checkpoint=FOLDER, or set LIFT_CHECKPOINT")
        for name, value in values.items():
            if isinstance(value, int | float) and (value < 0 or (value == 0 and name not in MAY_BE_0)):
                rule = "must be at least 0" if name in MAY_BE_0 else "must be more than 0"
                raise BadInput(name, rule, f"{value:g}", "fix it")
        return cls(**values | {"checkpoint": absolute(values["checkpoint"])})


def _renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments, and variables with old names, by their new names. Raises BadInput."""
    found = dict(given)
    for old in (*OLD_NAMES, "max_megapixels"):
        text = found.pop(old, os.environ.get(f"LIFT_{old.upper()}"))
        if text is None:
            continue
        if old in OLD_NAMES:
            found.setdefault(OLD_NAMES[old], text)
            continue
        try:
            found.setdefault("max_pixels", int(1e6 * float(text)))
        except (ValueError, OverflowError):
            raise BadInput(old, "must be a number", repr(text), "fix it") from None
    return found


class HttpFront:
    """The page, the health check, and limits on the uploads that are passed on to the model.

    Args:
        model: handle of the deployment of `ModelReplica`.
        options: options of the server.
    """

    def __init__(self, model: Any, options: Options) -> None:
        self._model, self._max_bytes = model, int(options.max_mb * 1e6)
        self._bytes, self._bytes_at_once = 0, max(BYTES_AT_ONCE, self._max_bytes)
        self._last_response = -FRESH_S
        self._page = (importlib.resources.files("lift_ray") / "inference" / "serving.html").read_text()

    async def __call__(self, request: Request) -> Response:
        """Handle GET / and /health, and POST /predict[?top=N] with an encoded image as the body."""
        # Starlette's router would also answer HEAD, redirect /health/ to /health, and describe errors as plain text instead of JSON.
        routes = {"/": ("GET", self._show), "/health": ("GET", self._health), "/predict": ("POST", self._predict)}
        path = request.scope["path"]  # request.url raises UnicodeDecodeError for some query strings
        if path not in routes:
            return _error(404, f"path: must be {', '.join(routes)}, but got {path}")
        method, handler = routes[path]
        if request.method != method:
            return _error(405, f"method: must be {method} for {path}, but got {request.method}", Allow=method)
        return await handler(request)

    async def _show(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": PAGE_RULES})

    async def _health(self, request: Request) -> Response:
        if time.monotonic() - self._last_response > FRESH_S:
            try:
                await asyncio.wait_for(self._model.alive.remote(), PATIENCE_S)
            except (TimeoutError, RayActorError, DeploymentUnavailableError):
                return _error(503, f"model: no replica responded within {PATIENCE_S:g} s", **{"Retry-After": "5"})
            self._last_response = time.monotonic()
        return JSONResponse({"status": "ok"})

    async def _predict(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not (kind.startswith("image/") or kind == "application/octet-stream"):
            remedy = "send the image as the body (curl --data-binary @FILE)"
            return _error(415, f"Content-Type: must be image/..., but got {kind or 'none'}; {remedy}")
        top = request.query_params.get("top")
        if top is not None and not (top.isascii() and top.isdigit() and len(top) < 7):
            return _error(400, f"top: must be a number, but got {top[:20]!r}")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_bytes:
            return self._too_large()
        body = bytearray()
        # `self._bytes` counts the uploads of all requests that this process holds, which bounds its memory. Requests share one
        # event loop, and there is no await between the check and the addition, so no lock is needed.
        try:
            async for chunk in request.stream():
                if len(body) + len(chunk) > self._max_bytes:
                    return self._too_large()
                if self._bytes + len(chunk) > self._bytes_at_once:
                    return _error(503, "server: too many uploads at once; try again", **{"Retry-After": "1"})
                body += chunk
                self._bytes += len(chunk)
            if not body:
                return _error(400, "body: must be an image, but got 0 bytes")
            status, content = await self._classified(bytes(body), None if top is None else int(top))
            return JSONResponse(content, status)
        except ClientDisconnect:
            return _error(400, "body: must be complete, but the client disconnected")
        finally:
            self._bytes -= len(body)

    async def _classified(self, body: bytes, top: int | None) -> tuple[int, dict[str, Any]]:
        for _ in range(TRIES - 1):
            try:
                found: tuple[int, dict[str, Any]] = await self._model.classify.remote(body, top)
                self._last_response = time.monotonic()
                return found
            except RayActorError:  # the replica died; Serve starts another, and classifying an image twice does no harm
                await asyncio.sleep(0.2)
        last: tuple[int, dict[str, Any]] = await self._model.classify.remote(body, top)
        return last

    def _too_large(self) -> Response:
        return _error(413, f"body: must be at most {self._max_bytes:,} bytes, but got more")


def _error(status: int, message: str, **headers: str) -> Response:
    return JSONResponse({"error": message}, status, headers=headers)
