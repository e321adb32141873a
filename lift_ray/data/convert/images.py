"""Check encoded images, and shrink them if requested."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from lift_ray.data.decode import MAX_PIXELS, opened, orientation, upright


@dataclass(frozen=True)
class Encoding:
    """Storage format of images.

    Attributes:
        short_side_px: shrink larger images to this short side; all become upright RGB JPEGs. None keeps the bytes.
        quality: JPEG quality, 1 to 100.
        max_pixels: images with more pixels are bad; they are not decoded.
    """

    short_side_px: int | None = None
    quality: int = 90
    max_pixels: int = MAX_PIXELS

    def __call__(self, data: bytes) -> bytes:
        """Return the bytes to store, after one full decode. Raises BadImage with the reason, as training would later."""
        image = upright(data, max_pixels=self.max_pixels)
        return data if self.short_side_px is None else self._shrunk(data, image, self.short_side_px)

    def _shrunk(self, data: bytes, image: Image.Image, short_side_px: int) -> bytes:
        scale = short_side_px / min(image.size)
        if scale >= 1 and _is_plain_jpeg(data):
            return data  # encoding it again would only lose quality
        if scale < 1:
            width, height = (max(1, round(scale * side)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=self.quality)
        return encoded.getvalue()


def _is_plain_jpeg(data: bytes) -> bool:
    with opened(data) as image:
        return image.format == "JPEG" and image.mode == "RGB" and orientation(image) == 1
