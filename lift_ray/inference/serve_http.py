"""What stands at the port of a Ray Serve application: the page, the health check, and limits. Without torch, so it is small."""

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

TRIES = 5  # of a picture whose replica died
BYTES_AT_ONCE = 128_000_000  # of uploads in one process; what comes beyond is sent away
FRESH_S, PATIENCE_S = 2.0, 3.0  # how long an answer of the model says that it lives; how long it may take to say so
MAY_BE_0 = ("gpus", "posthoc_tau")
PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)


@dataclass(frozen=True)
class Options:
    """What is served; every field can be an argument of `serve run`, or LIFT_CHECKPOINT, LIFT_TEMPERATURE, ... .

    Attributes:
        checkpoint: folder or URL that every replica reaches.
        temperature: divides the logits; None for the fitted one.
        posthoc_tau: strength of the post-hoc adjustment; None for that of the run.
        max_mb: largest upload.
        max_megapixels: largest picture; a small file may hold a huge one.
        replicas: of the model.
        cpus: cores of each.
        gpus: of each, may be a part.
    """

    checkpoint: str = ""
    temperature: float | None = None
    posthoc_tau: float | None = None
    max_mb: float = 20.0
    max_megapixels: float = 50.0
    replicas: int = 1
    cpus: int = 1
    gpus: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From `serve run`'s arguments, and the environment. Raises BadInput."""
        known = cls.__dataclass_fields__
        if unknown := sorted(set(given) - set(known)):
            raise BadInput(f"{unknown[0]}: unknown argument of lift_ray.serve:app; known: {', '.join(known)}")
        values: dict[str, Any] = {}
        for name, default in asdict(cls()).items():
            text = given.get(name, os.environ.get(f"LIFT_{name.upper()}"))
            kind = float if default is None else type(default)
            try:
                values[name] = default if text is None else kind(text)
            except ValueError:
                raise BadInput(f"{name}: must be a number, but got {text!r}; mend it") from None
        if not values["checkpoint"]:
            raise BadInput("checkpoint: must be given, but got none; add checkpoint=FOLDER, or set LIFT_CHECKPOINT")
        for name, value in values.items():
            if isinstance(value, int | float) and (value < 0 or (value == 0 and name not in MAY_BE_0)):
                rule = "at least" if name in MAY_BE_0 else "more than"
                raise BadInput(f"{name}: must be {rule} 0, but got {value:g}; mend it")
        return cls(**values | {"checkpoint": absolute(values["checkpoint"])})


class HttpFront:
    """What stands at the port: the page, the health check, and limits on what is sent on to the model."""

    def __init__(self, model: Any, options: Options) -> None:
        self._model, self._max_bytes = model, int(options.max_mb * 1e6)
        self._bytes, self._bytes_at_once = 0, max(BYTES_AT_ONCE, self._max_bytes)
        self._answered = -FRESH_S
        self._page = (importlib.resources.files("lift_ray") / "inference" / "serving.html").read_text()

    async def __call__(self, request: Request) -> Response:
        """GET / and /health, POST /predict[?top=N] with an encoded picture as the body."""
        routes = {"/": ("GET", self._show), "/health": ("GET", self._health), "/predict": ("POST", self._predict)}
        if request.url.path not in routes:
            return _fault(404, f"path: must be {', '.join(routes)}, but got {request.url.path}")
        method, answer = routes[request.url.path]
        if request.method != method:
            return _fault(
                405, f"method: must be {method} for {request.url.path}, but got {request.method}", Allow=method
            )
        return await answer(request)

    async def _show(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": PAGE_RULES})

    async def _health(self, request: Request) -> Response:
        if time.monotonic() - self._answered > FRESH_S:
            try:
                await asyncio.wait_for(self._model.alive.remote(), PATIENCE_S)
            except (TimeoutError, RayActorError, DeploymentUnavailableError):
                return _fault(
                    503, f"model: must answer, but no replica did in {PATIENCE_S:g} s", **{"Retry-After": "5"}
                )
            self._answered = time.monotonic()
        return JSONResponse({"status": "ok"})

    async def _predict(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not (kind.startswith("image/") or kind == "application/octet-stream"):
            return _fault(
                415, f"Content-Type: must be image/..., but got {kind or 'none'}; send the picture as the body"
            )
        top = request.query_params.get("top", "5")
        if not (top.isascii() and top.isdigit() and len(top) < 7):
            return _fault(400, f"top: must be a number, but got {top[:20]!r}")
        told = request.headers.get("content-length", "0")
        if told.isdigit() and int(told) > self._max_bytes:
            return self._too_large()
        body = bytearray()
        try:
            async for chunk in request.stream():
                if len(body) + len(chunk) > self._max_bytes:
                    return self._too_large()
                if self._bytes + len(chunk) > self._bytes_at_once:
                    return _fault(503, "server: has too many uploads at once; send it again", **{"Retry-After": "1"})
                body += chunk
                self._bytes += len(chunk)
            if not body:
                return _fault(400, "body: must be a picture, but got 0 bytes")
            status, answer = await self._classified(bytes(body), int(top))
            return JSONResponse(answer, status)
        except ClientDisconnect:
            return _fault(400, "body: must come whole, but the client left")
        finally:
            self._bytes -= len(body)

    async def _classified(self, body: bytes, top: int) -> tuple[int, dict[str, Any]]:
        for _ in range(TRIES - 1):
            try:
                found: tuple[int, dict[str, Any]] = await self._model.classify.remote(body, top)
                self._answered = time.monotonic()
                return found
            except RayActorError:  # its replica died; Serve starts another
                await asyncio.sleep(0.2)
        last: tuple[int, dict[str, Any]] = await self._model.classify.remote(body, top)
        return last

    def _too_large(self) -> Response:
        return _fault(413, f"body: must be at most {self._max_bytes:,} bytes, but got more")


def _fault(status: int, line: str, **headers: str) -> Response:
    return JSONResponse({"error": line}, status, headers=headers)
