"""One image of a conversion: checked by a full decode, shrunk where that is asked for, and refused from its header."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable

import pytest
from embedded import jpegs
from PIL import Image, ImageFile

from lift_ray.data.convert.images import Encoding


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header tells this size; it has one black pixel."""
    encoded = io.BytesIO()
    Image.new("RGB", (1, 1)).save(encoded, "PNG")
    data = encoded.getvalue()
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_bytes_are_kept_unless_the_image_is_to_be_shrunk() -> None:
    photo = jpegs()[0]
    assert Encoding()(photo) == photo
    assert Encoding(short_side_px=84)(photo) == photo, "a second encoding would only lose"
    shrunk = Encoding(short_side_px=24)(photo)
    assert min(Image.open(io.BytesIO(shrunk)).size) == 24
    assert len(Encoding(short_side_px=24, quality=20)(photo)) < len(shrunk)


BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (bytes, "0 bytes"),
    "text": (lambda: b"no image", "bytes of no known format"),
    "PostScript, which Ghostscript would run": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "bytes of no known format",
    ),
    "cut": (lambda: jpegs()[0][:900], "image file is truncated"),
    "cut by one pixel row": (lambda: jpegs()[0][:-40], "image file is truncated"),
    "short PNG": (lambda: png_of(20, 20), "image file is truncated"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_reported_with_its_reason(name: str) -> None:
    data, reason = BAD_IMAGES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        Encoding()(data())


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (20_000, "400,000,000 pixels, more than 100,000,000"),
        (12_000, "12000 x 12000 pixels, more than 100,000,000"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_from_its_header(side: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        Encoding(max_pixels=100_000_000)(png_of(side, side))
