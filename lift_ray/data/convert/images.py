"""Check encoded images, and shrink them if requested."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

from lift_ray.data.bad_image import MAX_PIXELS, BadImage
from lift_ray.data.bit_depth import AS_STORED, Rendering, ValueRange, value_range
from lift_ray.data.convert.index import encode_lossless
from lift_ray.data.decode import opened, upright
from lift_ray.data.deep_samples import deep_samples, is_deep
from lift_ray.data.jpeg_header import orientation


@dataclass(frozen=True)
class Encoding:
    """Storage format of images.

    Attributes:
        short_side_px: shrink larger images to this short side; all become upright RGB JPEGs. None keeps the bytes.
        quality: JPEG quality, 1 to 100.
        max_pixels: images with more pixels are bad; they are not decoded.
        rendering: page, window and background. An image that they change becomes an upright 8-bit PNG, if not a JPEG.
    """

    short_side_px: int | None = None
    quality: int = 90
    max_pixels: int = MAX_PIXELS
    rendering: Rendering = AS_STORED

    def __call__(self, data: bytes) -> bytes:
        """Return the bytes to store, after one full decode. Raises BadImage with the reason, as training would later."""
        image = upright(data, max_pixels=self.max_pixels, rendering=self.rendering)
        if self.short_side_px is not None:
            return self._shrunk(data, image, self.short_side_px)
        return encode_lossless(image) if self._is_changed(data) else data

    def _is_changed(self, data: bytes) -> bool:
        """Return True if the rendering changes an image. Without one, deep images are refused and others stay as they are."""
        if self.rendering == AS_STORED:
            return False
        with opened(data, self.max_pixels, self.rendering.page) as image:
            return self.rendering.changes(image)

    def value_range(self, data: bytes) -> ValueRange | None:
        """Return the range of the values of an image with more than 8 bits per channel; None for other, too large and bad images."""
        with (
            suppress(BadImage),
            opened(data, self.max_pixels, self.rendering.page) as image,
        ):  # reported when it is converted
            return value_range(deep_samples(image)[0]) if is_deep(image) else None
        return None

    def _shrunk(self, data: bytes, image: Image.Image, short_side_px: int) -> bytes:
        scale = short_side_px / min(image.size)
        if scale >= 1 and not self._is_changed(data) and _is_plain_jpeg(data):
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
