"""A Ray Serve application: pictures over HTTP to class names and probabilities."""

from __future__ import annotations

import asyncio
import importlib.resources
import io
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from ray import serve
from ray.exceptions import RayActorError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from lift_ray.data.augment import evaluation_picture, five_crops
from lift_ray.data.images import FORMATS
from lift_ray.data.index import absolute
from lift_ray.data.store import one_line
from lift_ray.data.stream import PICTURE_ERRORS, Batch
from lift_ray.distributed import checkpoint
from lift_ray.distributed.calibration import Calibration, calibrated
from lift_ray.distributed.finished import Finished
from lift_ray.distributed.ranks import Ranks
from lift_ray.errors import BadInput

LARGEST_BATCH, WAIT_S = 32, 0.005
AT_ONCE = 64  # pictures in a replica; the others wait where they came in
TRIES = 5  # of a picture whose replica died
PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)


@dataclass(frozen=True)
class Options:
    """What is served; every field can be an argument of `serve run`, or LIFT_CHECKPOINT, LIFT_TEMPERATURE, ... .

    Attributes:
        checkpoint: folder or URL that every replica reaches.
        temperature: divides the logits; None for the fitted one.
        max_mb: largest upload.
        max_megapixels: largest picture; a small file may hold a huge one.
        replicas: of the model.
        cpus: cores of each.
        gpus: of each, may be a part.
    """

    checkpoint: str = ""
    temperature: float | None = None
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
            if isinstance(value, int | float) and value <= 0 and name != "gpus":
                raise BadInput(f"{name}: must be more than 0, but got {value:g}; mend it")
        return cls(**values | {"checkpoint": absolute(values["checkpoint"])})


class Classifier:
    """A replica of the model. Pictures are decoded in threads; those that come together are classified together."""

    def __init__(self, options: Options) -> None:
        ranks = Ranks.alone(use_gpu=bool(options.gpus), num_cpus=options.cpus)
        with checkpoint.opened(options.checkpoint) as folder:
            self._finished = Finished(folder, ranks)
            fixed = options.temperature
            self._temperature = (Calibration(fixed) if fixed else calibrated(folder, self._finished)).temperature
        self._max_pixels, self._decoding = int(1e6 * options.max_megapixels), asyncio.Semaphore(options.cpus + 1)

    async def classify(self, encoded: bytes, top: int) -> tuple[int, dict[str, Any]]:
        """HTTP status, and what to answer."""
        names = self._finished.record.class_names
        if not 1 <= top <= len(names):
            return 400, {"error": f"top: must be 1 to {len(names)}, but got {top}"}
        async with self._decoding:
            status, picture = await asyncio.to_thread(self._decoded, encoded)
        if isinstance(picture, str):
            return status, {"error": picture}
        found: np.ndarray[Any, np.dtype[np.float32]] = await self._probabilities(picture)
        best = np.argsort(-found, kind="stable")[:top]
        return 200, {"classes": [{"name": names[k], "probability": round(float(found[k]), 6)} for k in best]}

    def _decoded(self, encoded: bytes) -> tuple[int, Any]:
        """The picture, (3, H, W) or (5, 3, H, W) uint8; or a status and what is wrong."""
        make = five_crops if self._finished.five_crops else evaluation_picture
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                width, height = image.size
            if width * height > self._max_pixels:
                return 413, f"picture: must have at most {self._max_pixels:,} pixels, but got {width} x {height}"
            return 200, np.ascontiguousarray(np.moveaxis(make(encoded, self._finished.size_px), -1, -3))
        except Image.DecompressionBombError:
            return 413, f"picture: must have at most {self._max_pixels:,} pixels, but got more"
        except UnidentifiedImageError:
            return 400, f"picture: must be {', '.join(FORMATS)}, but got something else"
        except PICTURE_ERRORS as error:
            return 400, f"picture: must be whole, but got: {one_line(error)}"

    @serve.batch(max_batch_size=LARGEST_BATCH, batch_wait_timeout_s=WAIT_S)  # type: ignore[untyped-decorator]
    async def _probabilities(self, pictures: list[Any]) -> list[Any]:
        return list(await asyncio.to_thread(self._of_batch, pictures))

    def _of_batch(self, pictures: list[Any]) -> Any:
        batch = Batch(torch.from_numpy(np.stack(pictures)), torch.empty(0))
        (logits, _), *_ = self._finished.logits([batch])
        return torch.softmax(logits / self._temperature, dim=1).cpu().numpy()


class Gate:
    """What stands at the port: the page, the health check, and limits on what is sent on to the model."""

    def __init__(self, model: Any, options: Options) -> None:
        self._model, self._max_bytes = model, int(options.max_mb * 1e6)
        self._page = (importlib.resources.files("lift_ray") / "distributed" / "serving.html").read_text()

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
                body += chunk
                if len(body) > self._max_bytes:
                    return self._too_large()
        except ClientDisconnect:
            return _fault(400, "body: must come whole, but the client left")
        if not body:
            return _fault(400, "body: must be a picture, but got 0 bytes")
        status, answer = await self._classified(bytes(body), int(top))
        return JSONResponse(answer, status)

    async def _classified(self, body: bytes, top: int) -> tuple[int, dict[str, Any]]:
        for _ in range(TRIES - 1):
            try:
                found: tuple[int, dict[str, Any]] = await self._model.classify.remote(body, top)
                return found
            except RayActorError:  # its replica died; Serve starts another
                await asyncio.sleep(0.2)
        last: tuple[int, dict[str, Any]] = await self._model.classify.remote(body, top)
        return last

    def _too_large(self) -> Response:
        return _fault(413, f"body: must be at most {self._max_bytes:,} bytes, but got more")


def _fault(status: int, line: str, **headers: str) -> Response:
    return JSONResponse({"error": line}, status, headers=headers)


def application(options: Options) -> Any:
    """The application to give to `serve.run`."""
    actor = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    model = serve.deployment(
        Classifier, num_replicas=options.replicas, ray_actor_options=actor, max_ongoing_requests=AT_ONCE,
        health_check_period_s=2,
    ).bind(options)  # fmt: skip
    gate = serve.deployment(Gate, num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    return gate.bind(model, options)
