"""Decode images: JPEG with torchcodec, other formats (and JPEGs that it cannot read) with Pillow."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]

from lift_ray.data.bit_depth import AS_STORED, Rendering

Pixels = NDArray[np.uint8]
MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs
JPEG = b"\xff\xd8\xff"


def decode(
    encoded: bytes, spare: Callable[[int, int], float] | None = None, rendering: Rendering = AS_STORED
) -> Pixels:
    """Decode an image to (H, W, 3) uint8, RGB and upright.

    Args:
        encoded: JPEG, PNG, WebP or any other format that Pillow reads.
        spare: returns, for (width, height), by which factor the image may be smaller. A JPEG is then decoded at 1/2, 1/4
            or 1/8, which saves most of the work; a crop may shift by up to a pixel. None decodes exactly.
        rendering: page, window for more than 8 bits per channel, and background of transparent pixels. The images of a dataset
            were rendered when it was converted.

    Raises:
        OSError, ValueError, SyntaxError: the image is broken (Pillow's exceptions); ValueError also above MAX_PIXELS, and for an
            image that the rendering refuses (NeedsWindow).
    """
    jpeg = encoded.startswith(JPEG)
    if spare is None and jpeg and rendering.page == 1:
        width, height = jpeg_size(encoded)
        check_pixels(width, height)
        # Pillow reads more unusual files, and explains what is wrong with broken ones
        with suppress(RuntimeError):
            image: Pixels = decode_jpeg(encoded).permute(1, 2, 0).numpy()  # type: ignore[union-attr]
            return image
    with Image.open(io.BytesIO(encoded)) as opened:
        check_pixels(*opened.size)
        if spare is not None and jpeg:
            factor = max(1.0, spare(*opened.size))
            opened.draft("RGB", (math.ceil(opened.width / factor), math.ceil(opened.height / factor)))
        return np.array(ImageOps.exif_transpose(rendering.applied(opened)).convert("RGB"))


def decode_on(device: torch.device, encoded: list[bytes]) -> list[torch.Tensor]:
    """Decode images to (3, H, W) uint8 on a device: JPEG there (nvJPEG on a GPU), other formats on the CPU and copied.

    Raises what `decode` raises.
    """
    jpegs = [index for index, data in enumerate(encoded) if data.startswith(JPEG)]
    for index in jpegs:
        check_pixels(*jpeg_size(encoded[index]))
    images: dict[int, torch.Tensor] = {}
    if jpegs:
        data = [encoded[index] for index in jpegs]
        with suppress(RuntimeError):  # the loop below finds the broken image, and Pillow may still read it
            images = dict(zip(jpegs, decode_jpeg(data, device=device), strict=True))
    for index, one in enumerate(encoded):
        if index not in images:
            images[index] = torch.from_numpy(decode(one)).permute(2, 0, 1).to(device)
    return [images[index] for index in range(len(encoded))]


def jpeg_size(encoded: bytes) -> tuple[int, int]:
    """Return (width, height) from the frame header of a JPEG, before rotation; (0, 0) if it has none."""
    at = 2
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(encoded[at + 7 : at + 9]), int.from_bytes(encoded[at + 5 : at + 7])
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4])
    return 0, 0


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for an image that would take gigabytes to decode."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
