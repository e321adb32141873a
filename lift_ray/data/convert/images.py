"""Check encoded images, and shrink them if requested."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from lift_ray.data.bit_depth import AS_STORED, NeedsWindow, Rendering, ValueRange
from lift_ray.data.convert.index import encode_lossless
from lift_ray.errors import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not all that Pillow reads: EPS would run Ghostscript
MAX_PIXELS = 178_956_970  # above this, Pillow and therefore training refuse an image
ORIENTATION = 0x0112

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `max_pixels` is the only limit here


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
        """Return the bytes to store, after one full decode.

        Raises ValueError with the reason if the image is bad, or NeedsWindow.
        """
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > self.max_pixels:
                    raise ValueError(f"{opened.width} x {opened.height} pixels, more than {self.max_pixels:,}")
                image = self.rendering.applied(opened)
                image.load()
                if self.short_side_px is not None:
                    return self._shrunk(data, image, self.short_side_px)
                as_it_is = image is opened and self.rendering.page == 1
                return data if as_it_is else encode_lossless(ImageOps.exif_transpose(image))
        except (MemoryError, NeedsWindow):
            raise
        except UnidentifiedImageError:
            raise ValueError("bytes of no known format" if data else "0 bytes") from None
        except Exception as error:  # decoders raise many types for broken input
            raise ValueError(one_line(error)) from None

    def value_range(self, data: bytes) -> ValueRange | None:
        """Return the range of the values of an image with more than 8 bits per channel; None for other, too large and bad images."""
        # decoders raise many types for broken input, which is reported when the image is converted
        with suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height <= self.max_pixels:
                return self.rendering.value_range(opened)
        return None

    def _shrunk(self, data: bytes, image: Image.Image, short_side_px: int) -> bytes:
        scale = short_side_px / min(image.size)
        as_it_is = image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1
        if scale >= 1 and as_it_is:
            return data  # encoding it again would only lose quality
        upright = ImageOps.exif_transpose(image).convert("RGB")
        if scale < 1:
            width, height = (max(1, round(scale * side)) for side in upright.size)
            upright = upright.resize((width, height), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        upright.save(encoded, "JPEG", quality=self.quality)
        return encoded.getvalue()
