"""All samples of images with more than 8 bits per channel, of which Pillow keeps 8 for most formats."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from lift_ray.data.tiff import Samples, has_deep_samples, tiff_samples

DEEP_PNG = re.compile("(LA|RGB|RGBA);16B")


def is_deep(opened: Image.Image) -> bool:
    """Return True if an opened image that is not loaded yet has more than 8 bits per channel."""
    if opened.mode[0] in "IF":  # I, I;16, I;16B, F
        return True
    if isinstance(opened, TiffImageFile):
        return has_deep_samples(opened)
    return bool(DEEP_PNG.fullmatch(_raw_mode(opened))) or _ppm_maximum(opened) > 255


def deep_samples(opened: Image.Image) -> tuple[Samples, Samples | None]:
    """Return all bits of an image: samples (H, W), (H, W, 3), or (H, W, 4) for CMYK; and alpha (H, W) if it has one.

    Integers and floats are as stored. The samples are not rotated.

    Raises OSError, ValueError or SyntaxError for a broken image.
    """
    if isinstance(opened, TiffImageFile) and has_deep_samples(opened):
        samples, has_alpha = tiff_samples(opened, _bytes(opened))
        alpha = samples[..., -1] if has_alpha else None
        colors = samples[..., :-1] if has_alpha else samples
    elif found := DEEP_PNG.fullmatch(_raw_mode(opened)):
        colors, alpha = _png_samples(opened, found[1])
    elif _ppm_maximum(opened) > 255:
        colors, alpha = _ppm_samples(opened, _bytes(opened)), None
    else:
        gray = np.asarray(opened)
        colors, alpha = gray.astype(gray.dtype.newbyteorder("="))[..., None], None
    colors_only = colors.squeeze(-1) if colors.shape[-1] == 1 else colors
    return colors_only, _key_alpha(opened, colors) if alpha is None else alpha


def _png_samples(opened: Image.Image, channels: str) -> tuple[Samples, Samples | None]:
    """Return (H, W, C) and alpha (H, W), uint16, of a PNG with several channels of 16 bits, of which Pillow keeps 8."""
    data, page = _bytes(opened), opened.tell()
    opened.load()  # first, because its reads are limited, and for the metadata behind the pixels
    if channels == "LA":  # Pillow has no LA of 16 bits, but its bytes are as long as those of RGBA
        pairs = _loaded(data, page, "RGBA")
    else:  # in the other byte order, the low byte is the one that is kept
        pairs = np.stack([_loaded(data, page, f"{channels};16{order}") for order in "BL"], axis=-1)
    samples = pairs.reshape(opened.height, opened.width, -1).view(">u2").astype(np.uint16)
    return (samples, None) if channels == "RGB" else (samples[..., :-1], samples[..., -1])


def _loaded(data: bytes, page: int, raw_mode: str) -> Samples:
    """Read a PNG again, with its bytes taken for another raw mode."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
        again.seek(page)
        again.tile = [tile._replace(args=raw_mode) for tile in again.tile]
        return np.asarray(again)


def _bytes(opened: Image.Image) -> bytes:
    """Return the whole file of an image that is not loaded yet."""
    file = opened.fp  # type: ignore[attr-defined]
    before = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(before)
    return data


def _raw_mode(opened: Image.Image) -> str:
    tiles = getattr(opened, "tile", [])
    return str(tiles[0].args) if tiles else ""


def _key_alpha(opened: Image.Image, samples: Samples) -> Samples | None:
    """Return 0 where (H, W, C) samples are the transparent color of a PNG, and 255 elsewhere; None if it has none."""
    if opened.format != "PNG" or (key := opened.info.get("transparency")) is None:
        return None
    return np.where((samples == np.array(key)).all(-1), 0, 255).astype(np.uint8)


def _ppm_maximum(opened: Image.Image) -> int:
    """Return the largest value of a PGM or PPM that Pillow scales to 8 or 16 bits; 0 for other images."""
    tiles = getattr(opened, "tile", [])
    if opened.mode not in ("I", "RGB", "CMYK") or not tiles or tiles[0].codec_name not in ("ppm", "ppm_plain"):
        return 0
    return int(tiles[0].args[1])


def _ppm_samples(opened: Image.Image, data: bytes) -> Samples:
    tile, shape = opened.tile[0], (opened.height, opened.width, len(opened.getbands()))  # type: ignore[attr-defined]
    if tile.codec_name == "ppm":
        return np.frombuffer(data, ">u2", int(np.prod(shape)), tile.offset).reshape(shape).astype(np.uint16)
    text = re.sub(rb"#[^\r\n]*", b"", data[tile.offset :])
    if odd := re.search(rb"[^\s0-9]", text):
        raise ValueError(f"plain PNM with {odd[0]!r} instead of a number")
    numbers = np.fromstring(text, np.int64, sep=" ")[: np.prod(shape)]
    if len(numbers) < np.prod(shape) or numbers.max() > tile.args[1]:
        raise ValueError(f"plain PNM with fewer than {np.prod(shape):,} numbers, or numbers above {tile.args[1]}")
    return numbers.astype(np.uint16).reshape(shape)
