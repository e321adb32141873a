"""The HTTP front of a server without Ray: retries, limits on uploads, and batches."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError
from starlette.requests import Request
from starlette.responses import Response

from lift_ray.errors import BadInput
from lift_ray.inference import serve_http, serve_model
from lift_ray.inference.serve_http import HttpFront, Options

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # in Ray Serve


def test_a_request_whose_replica_died_is_retried() -> None:
    class Model:
        calls = 0

        @property
        def classify(self) -> Model:
            return self

        async def remote(self, body: bytes, top: int) -> tuple[int, dict[str, str]]:
            self.calls += 1
            if self.calls < 3:
                raise RayActorError
            return 200, {"body": body.decode()}

    model = Model()
    assert asyncio.run(HttpFront(model, Options("x"))._classified(b"image", 5)) == (200, {"body": "image"})
    assert model.calls == 3


def test_uploads_beyond_the_limit_of_bytes_at_once_are_rejected_until_others_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_http, "BYTES_AT_ONCE", 2500)
    let_go, inside = asyncio.Event(), []

    class Model:
        classify = property(lambda self: self)

        async def remote(self, body: bytes, top: int) -> tuple[int, dict[str, str]]:
            inside.append(body)
            await let_go.wait()
            return 200, {}

    async def ask(at: HttpFront) -> Response:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "query_string": b"",
            "headers": [(b"content-type", b"image/png")],
        }
        sent = iter([{"type": "http.request", "body": bytes(500), "more_body": more} for more in (True, False)])

        async def receive() -> dict[str, Any]:
            return next(sent)

        return await at(Request(scope, receive))

    async def main() -> list[Response]:
        at = HttpFront(Model(), Options("x", max_mb=0.002))
        held = [asyncio.create_task(ask(at)) for _ in range(2)]
        while len(inside) < 2:
            await asyncio.sleep(0)
        too_many = [await ask(at) for _ in range(3)]
        let_go.set()
        return [*too_many, *[await task for task in held], *[await ask(at) for _ in range(3)]]

    answers = asyncio.run(main())
    assert [answer.status_code for answer in answers] == [503] * 3 + [200] * 5
    assert answers[0].headers["Retry-After"] == "1"


def test_images_that_arrive_at_the_same_time_are_classified_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def of_batch(self: Any, images: list[int]) -> list[int]:
        sizes.append(len(images))
        return [2 * image for image in images]

    monkeypatch.setattr(serve_model.ModelReplica, "_of_batch", of_batch)
    settings = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=serve_model.AT_ONCE))
    monkeypatch.setattr("ray.serve.get_replica_context", lambda: settings)

    async def main() -> list[int]:
        model = object.__new__(serve_model.ModelReplica)
        return list(await asyncio.gather(*[model._probabilities(n) for n in range(40)]))

    assert asyncio.run(main()) == [2 * n for n in range(40)]
    assert sizes == [32, 8]


@pytest.mark.parametrize(
    ("query", "num_classes", "answer"),
    [(b"", 1, 1), (b"", 2, 2), (b"", 8, 5), (b"top=1", 2, 1), (b"top=8", 8, 8), (b"top=3", 2, None)],
)
def test_without_top_a_model_of_few_classes_names_all_of_them(
    query: bytes, num_classes: int, answer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica: Any = object.__new__(serve_model.ModelReplica)
    replica._classifier = SimpleNamespace(classes=[f"{k}" for k in range(num_classes)])

    async def probabilities(image: object) -> Any:
        return np.full(num_classes, 1 / num_classes, np.float32)

    monkeypatch.setattr(replica, "_decoded", lambda encoded: (200, np.zeros(1)), raising=False)
    replica._probabilities, replica._decoding = probabilities, asyncio.Semaphore(1)

    class Model:
        classify = property(lambda self: self)

        async def remote(self, body: bytes, top: int | None) -> tuple[int, dict[str, Any]]:
            status, content = await replica.classify(body, top)
            return status, content

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"image"}

    headers = [(b"content-type", b"image/png")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": query, "headers": headers}
    response = asyncio.run(HttpFront(Model(), Options("x"))(Request(scope, receive)))
    content = json.loads(bytes(response.body))
    if answer is None:
        assert (response.status_code, content) == (400, {"error": "top: must be 1 to 2, but got 3"})
    else:
        assert (response.status_code, len(content["classes"])) == (200, answer)


def test_old_names_of_arguments_and_variables_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_GPUS", "0.5")
    options = Options.of({"checkpoint": "x", "max_megapixels": "2.5", "cpus": 3})
    assert (options.max_pixels, options.cpus_per_worker, options.gpus_per_worker) == (2_500_000, 3, 0.5)
    assert Options.of({"checkpoint": "x", "max_pixels": 7, "max_megapixels": 2}).max_pixels == 7
    with pytest.raises(BadInput, match=r"^max_megapixels: must be a number, but got 'x'"):
        Options.of({"checkpoint": "x", "max_megapixels": "x"})
