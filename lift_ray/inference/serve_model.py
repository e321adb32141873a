"""A Ray Serve application: pictures over HTTP to class names and probabilities."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from ray import serve

from lift_ray.data.augment import evaluation_image, five_crops
from lift_ray.data.batches import IMAGE_ERRORS
from lift_ray.data.convert.images import FORMATS
from lift_ray.inference.calibration import Calibration, calibrated
from lift_ray.inference.classifier import Classifier
from lift_ray.inference.serve_http import HttpFront, Options
from lift_ray.methods.world import Ranks
from lift_ray.storage.store import one_line
from lift_ray.training import checkpoint

LARGEST_BATCH, WAIT_S = 32, 0.005
GATES = 2  # so that there is one when the other dies
AT_ONCE = 64  # pictures in a replica; the others wait where they came in


class ModelReplica:
    """A replica of the model. Pictures are decoded in threads; those that come together are classified together."""

    def __init__(self, options: Options) -> None:
        ranks = Ranks.alone(use_gpu=bool(options.gpus), num_cpus=options.cpus)
        with checkpoint.opened(options.checkpoint) as folder:
            self._finished = Classifier(folder, ranks, options.posthoc_tau)
            fixed = options.temperature
            self._temperature = (Calibration(fixed) if fixed else calibrated(folder, self._finished)).temperature
        self._max_pixels, self._decoding = int(1e6 * options.max_megapixels), asyncio.Semaphore(options.cpus + 1)

    async def alive(self) -> bool:
        """True, when the replica answers at all."""
        return True

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
        make = five_crops if self._finished.five_crops else evaluation_image
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
        except IMAGE_ERRORS as error:
            return 400, f"picture: must be whole, but got: {one_line(error)}"

    @serve.batch(max_batch_size=LARGEST_BATCH, batch_wait_timeout_s=WAIT_S)  # type: ignore[untyped-decorator]
    async def _probabilities(self, pictures: list[Any]) -> list[Any]:
        return list(await asyncio.to_thread(self._of_batch, pictures))

    def _of_batch(self, pictures: list[Any]) -> Any:
        logits = self._finished.logits(torch.from_numpy(np.stack(pictures)))
        return torch.softmax(logits / self._temperature, dim=1).cpu().numpy()


def application(options: Options) -> Any:
    """The application to give to `serve.run`."""
    actor = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    model = serve.deployment(
        ModelReplica,
        num_replicas=options.replicas,
        ray_actor_options=actor,
        max_ongoing_requests=AT_ONCE,
        health_check_period_s=2,
    ).bind(options)
    gate = serve.deployment(
        HttpFront,
        num_replicas=GATES,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        health_check_period_s=2,
    )
    return gate.bind(model, options)
