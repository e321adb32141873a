"""Encoded images to pixels: JPEG through torchcodec, everything else (and what it cannot read) through Pillow."""

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

Pixels = NDArray[np.uint8]
MAX_PIXELS = 178_956_970  # what Pillow takes for a decompression bomb
JPEG = b"\xff\xd8\xff"


def decode(encoded: bytes, spare: Callable[[int, int], float] | None = None) -> Pixels:
    """The picture as (H, W, 3) uint8, RGB and upright; transparency is dropped.

    Args:
        encoded: JPEG, PNG, WebP or anything else that Pillow reads.
        spare: given (width, height), how many times smaller the picture may be. A JPEG is then decoded at 1/2, 1/4 or 1/8,
            which saves most of the work; a crop of it may move by up to a pixel. None decodes exactly.

    Raises:
        OSError, ValueError, SyntaxError: as Pillow raises them for a broken image; ValueError for one over MAX_PIXELS.
    """
    jpeg = encoded.startswith(JPEG)
    if spare is None and jpeg:
        width, height = jpeg_size(encoded)
        check_pixels(width, height)
        with suppress(
            RuntimeError
        ):  # Pillow reads more of what is out of the ordinary, and says what is wrong with the rest
            picture: Pixels = decode_jpeg(encoded).permute(1, 2, 0).numpy()  # type: ignore[union-attr]
            return picture
    with Image.open(io.BytesIO(encoded)) as image:
        check_pixels(*image.size)
        if spare is not None and jpeg:
            factor = max(1.0, spare(*image.size))
            image.draft("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def decode_on(device: torch.device, encoded: list[bytes]) -> list[torch.Tensor]:
    """The pictures as (3, H, W) uint8 on a device: JPEG decoded there (nvJPEG on a GPU), others here and copied.

    Raises what `decode` raises.
    """
    jpegs = [index for index, data in enumerate(encoded) if data.startswith(JPEG)]
    for index in jpegs:
        check_pixels(*jpeg_size(encoded[index]))
    pictures: dict[int, torch.Tensor] = {}
    if jpegs:
        data = [encoded[index] for index in jpegs]
        with suppress(RuntimeError):  # the loop below finds out which one it is, and whether Pillow can read it
            pictures = dict(zip(jpegs, decode_jpeg(data, device=device), strict=True))
    for index, one in enumerate(encoded):
        if index not in pictures:
            pictures[index] = torch.from_numpy(decode(one)).permute(2, 0, 1).to(device)
    return [pictures[index] for index in range(len(encoded))]


def jpeg_size(encoded: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG from its frame header, as stored; (0, 0) when there is none."""
    at = 2
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(encoded[at + 7 : at + 9]), int.from_bytes(encoded[at + 5 : at + 7])
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4])
    return 0, 0


def check_pixels(width: int, height: int) -> None:
    """Raises ValueError for a picture that would take gigabytes to decode."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
