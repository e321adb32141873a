"""Encoded images to pixels: every kind, upright, whole or refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lift_ray.data.decode import decode, decode_on, jpeg_size
from lift_ray.data.open import open_dataset
from lift_ray.data.reader import RowReader

ENCODED = RowReader(open_dataset("embedded:caltech101").split("test")).read(np.arange(0, 100, 9))
PHOTO = Image.open(io.BytesIO(ENCODED[0])).convert("RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


KINDS = {
    "jpeg": encoded(PHOTO, "JPEG"),
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "full colour": encoded(PHOTO, "JPEG", subsampling=0),
    "grey jpeg": encoded(PHOTO.convert("L"), "JPEG"),
    "cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    **{f"exif {n}": encoded(PHOTO, "JPEG", exif=turned(n)) for n in range(1, 9)},
    "png": encoded(PHOTO, "PNG"),
    "palette": encoded(PHOTO.convert("P"), "PNG"),
    "grey and alpha": encoded(PHOTO.convert("LA"), "PNG"),
    "16 bit": encoded(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "PNG"),
    "turned png": encoded(PHOTO, "PNG", exif=turned(6)),
    "webp": encoded(PHOTO, "WEBP", lossless=True),
    "gif": encoded(PHOTO, "GIF"),
    "bmp": encoded(PHOTO, "BMP"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_decoded_as_pillow_does_upright_and_rgb(kind: str) -> None:
    with Image.open(io.BytesIO(KINDS[kind])) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode(KINDS[kind]), expected)


def test_real_pictures_are_decoded_to_the_last_bit() -> None:
    for data in ENCODED:
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "grey jpeg", "cmyk", "exif 6"])
def test_the_size_of_a_jpeg_is_read_from_its_header(kind: str) -> None:
    assert jpeg_size(KINDS[kind]) == PHOTO.size
    assert jpeg_size(KINDS[kind][:20]) == jpeg_size(b"") == (0, 0)


@pytest.mark.parametrize(("factor", "divisor"), [(1.0, 1), (1.9, 1), (2.0, 2), (5.0, 4), (40.0, 8)])
def test_a_jpeg_is_decoded_smaller_but_never_smaller_than_asked(factor: float, divisor: int) -> None:
    large = encoded(PHOTO.resize((800, 640)), "JPEG")
    assert decode(large, lambda width, height: factor).shape == (640 // divisor, 800 // divisor, 3)
    assert decode(KINDS["png"], lambda width, height: factor).shape == decode(KINDS["png"]).shape


@pytest.mark.parametrize(
    "data", [ENCODED[0][:900], b"", b"GIF89a", b"not an image", KINDS["png"][:700], KINDS["webp"][:300]]
)
def test_a_broken_image_is_an_error_here_and_on_a_device(data: bytes) -> None:
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode(data)
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode_on(torch.device("cpu"), [ENCODED[1], data])


def bomb(kind: str) -> bytes:
    """A header that says 60,000 x 60,000 pixels."""
    if kind == "jpeg":
        at = KINDS["jpeg"].index(b"\xff\xc0")
        return KINDS["jpeg"][: at + 5] + struct.pack(">HH", 60000, 60000) + KINDS["jpeg"][at + 9 :]
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + KINDS["png"][24:29]
    return KINDS["png"][:12] + header + struct.pack(">I", zlib.crc32(header)) + KINDS["png"][33:]


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
