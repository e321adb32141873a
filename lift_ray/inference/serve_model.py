"""Ray Serve application that classifies images sent over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import torch
from ray import serve

from lift_ray.data.bad_image import MAX_PIXELS, BadImage, TooManyPixels, UnknownFormat
from lift_ray.data.decode import READABLE
from lift_ray.inference.classifier import Classifier, default_top
from lift_ray.inference.serve_http import HttpFront, Options
from lift_ray.methods.world import Ranks

LARGEST_BATCH, WAIT_S = 32, 0.005
FRONTS = 2  # so that one is left if the other dies
AT_ONCE = 64  # images in a replica; further ones wait in the HTTP fronts


class ModelReplica:
    """Replica of the model. Images are decoded in threads; images that arrive at the same time are classified as one batch."""

    def __init__(self, options: Options) -> None:
        ranks = Ranks.alone(use_gpu=bool(options.gpus_per_worker), num_cpus=options.cpus_per_worker)
        self._classifier = Classifier.load(
            options.checkpoint, temperature=options.temperature, posthoc_tau=options.posthoc_tau, ranks=ranks
        )
        self._max_pixels = min(MAX_PIXELS, options.max_pixels)
        self._decoding = asyncio.Semaphore(options.cpus_per_worker + 1)

    async def alive(self) -> bool:
        """Return True; a replica that is down does not respond."""
        return True

    async def classify(self, encoded: bytes, top: int | None) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the JSON content of the response; without `top`, the usual number of classes."""
        names = self._classifier.classes
        top = default_top(len(names)) if top is None else top
        if not 1 <= top <= len(names):
            return 400, {"error": f"top: must be 1 to {len(names)}, but got {top}"}
        async with self._decoding:
            status, image = await asyncio.to_thread(self._decoded, encoded)
        if isinstance(image, str):
            return status, {"error": image}
        found: np.ndarray[Any, np.dtype[np.float32]] = await self._probabilities(image)
        best = np.argsort(-found, kind="stable")[:top]
        return 200, {"classes": [{"name": names[k], "probability": round(float(found[k]), 6)} for k in best]}

    def _decoded(self, encoded: bytes) -> tuple[int, Any]:
        """Return 200 and the image, (3, H, W) or (5, 3, H, W) uint8; or another status and an error message."""
        try:
            return 200, np.ascontiguousarray(np.moveaxis(self._classifier.image(encoded, self._max_pixels), -1, -3))
        except TooManyPixels as error:
            return 413, f"image: must have at most {self._max_pixels:,} pixels, but got {error.seen}"
        except UnknownFormat as error:
            return 400, f"image: must be {', '.join(READABLE)}, but got {error}"
        except BadImage as error:
            return 400, f"image: must be complete and readable, but got: {error}"

    @serve.batch(max_batch_size=LARGEST_BATCH, batch_wait_timeout_s=WAIT_S)  # type: ignore[untyped-decorator]
    async def _probabilities(self, images: list[Any]) -> list[Any]:
        return list(await asyncio.to_thread(self._of_batch, images))

    def _of_batch(self, images: list[Any]) -> Any:
        return self._classifier.probabilities(torch.from_numpy(np.stack(images))).cpu().numpy()


def application(options: Options) -> Any:
    """Return the application to pass to `serve.run`."""
    resources = {"num_cpus": options.cpus_per_worker, "num_gpus": options.gpus_per_worker}
    model = serve.deployment(
        ModelReplica,
        num_replicas=options.replicas,
        ray_actor_options=resources,
        max_ongoing_requests=AT_ONCE,
        health_check_period_s=2,
    ).bind(options)
    front = serve.deployment(
        HttpFront,
        num_replicas=FRONTS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        health_check_period_s=2,
    )
    return front.bind(model, options)
