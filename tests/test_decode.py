"""Encoded images to pixels: every kind, upright, whole or refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from embedded import jpegs
from PIL import Image, ImageOps

from lift_ray.data.decode import decode, decode_on, jpeg_size


def photos() -> list[bytes]:
    return jpegs(12, "test", step=9)


def photo() -> Image.Image:
    return Image.open(io.BytesIO(photos()[0])).convert("RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": partial(encoded, kind="JPEG"),
    "progressive": partial(encoded, kind="JPEG", progressive=True),
    "full color": partial(encoded, kind="JPEG", subsampling=0),
    "gray jpeg": lambda image: encoded(image.convert("L"), "JPEG"),
    "cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    **{f"exif {n}": partial(encoded, kind="JPEG", exif=turned(n)) for n in range(1, 9)},
    "png": partial(encoded, kind="PNG"),
    "palette": lambda image: encoded(image.convert("P"), "PNG"),
    "gray and alpha": lambda image: encoded(image.convert("LA"), "PNG"),
    "turned png": partial(encoded, kind="PNG", exif=turned(6)),
    "webp": partial(encoded, kind="WEBP", lossless=True),
    "gif": partial(encoded, kind="GIF"),
    "bmp": partial(encoded, kind="BMP"),
}


@cache
def photo_as(kind: str) -> bytes:
    return KINDS[kind](photo())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_decoded_as_pillow_does_upright_and_rgb(kind: str) -> None:
    with Image.open(io.BytesIO(photo_as(kind))) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode(photo_as(kind)), expected)


def test_real_images_are_decoded_to_the_last_bit() -> None:
    for data in photos():
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "gray jpeg", "cmyk", "exif 6"])
def test_the_size_of_a_jpeg_is_read_from_its_header(kind: str) -> None:
    assert jpeg_size(photo_as(kind)) == photo().size
    assert jpeg_size(photo_as(kind)[:20]) == jpeg_size(b"") == (0, 0)


@pytest.mark.parametrize(("factor", "divisor"), [(1.0, 1), (1.9, 1), (2.0, 2), (5.0, 4), (40.0, 8)])
def test_a_jpeg_is_decoded_smaller_but_never_smaller_than_asked(factor: float, divisor: int) -> None:
    large = encoded(photo().resize((800, 640)), "JPEG")
    assert decode(large, lambda width, height: factor).shape == (640 // divisor, 800 // divisor, 3)
    assert decode(photo_as("png"), lambda width, height: factor).shape == decode(photo_as("png")).shape


@pytest.mark.parametrize(
    "broken",
    [
        lambda: photos()[0][:900],
        bytes,
        lambda: b"GIF89a",
        lambda: b"not an image",
        lambda: photo_as("png")[:700],
        lambda: photo_as("webp")[:300],
    ],
    ids=["cut", "empty", "GIF's first bytes", "text", "cut png", "cut webp"],
)
def test_a_broken_image_is_an_error_here_and_on_a_device(broken: Callable[[], bytes]) -> None:
    data = broken()
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode(data)
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode_on(torch.device("cpu"), [photos()[1], data])


def bomb(kind: str) -> bytes:
    """A header that says 60,000 x 60,000 pixels."""
    if kind == "jpeg":
        at = photo_as("jpeg").index(b"\xff\xc0")
        return photo_as("jpeg")[: at + 5] + struct.pack(">HH", 60000, 60000) + photo_as("jpeg")[at + 9 :]
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + photo_as("png")[24:29]
    return photo_as("png")[:12] + header + struct.pack(">I", zlib.crc32(header)) + photo_as("png")[33:]


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_an_image_bomb_is_refused_before_it_is_decoded(kind: str) -> None:
    data = bomb(kind)
    for attempt in (
        lambda: decode(data),
        lambda: decode(data, lambda w, h: 8.0),
        lambda: decode_on(torch.device("cpu"), [data]),
    ):
        with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
            attempt()
