"""Decode images: JPEG with torchcodec, other formats (and JPEGs that it cannot read) with Pillow.

Every verb decodes here, so all accept the same formats and refuse the same images, and for the same reason. No format starts a program.
The time and memory for one image are bounded before it is decoded, because a decoder in a thread cannot be stopped. `MAX_PIXELS` bounds
the pixels, `MAX_SCANS` the passes of a progressive JPEG over them, `MAX_OPEN_READS` and `MAX_READS` the pieces that a file is read in
(chunks, segments, tags, pages), and the strips of a TIFF must not hold more than a few times its bytes. What remains is proportional to
pixels and bytes: an image at the limit takes seconds and about 2 GB, or 3 GB if it is composed over a background. With more than 8 bits
per channel it takes four times the bytes of its samples, of which a TIFF may have 1 GiB and a PNG of RGBA has 1.4 GB.
"""

from __future__ import annotations

import importlib
import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from lift_ray.data.bad_image import MAX_PIXELS, BadImage, RequiresExtra, TooManyPixels, UnknownFormat, check_pixels
from lift_ray.data.bit_depth import AS_STORED, Rendering
from lift_ray.data.bit_depth import Pixels as Pixels
from lift_ray.data.jpeg_header import TURNS, JpegHeader, check_scans, orientation
from lift_ray.errors import one_line

if TYPE_CHECKING:
    import torch

Spare = Callable[[int, int], float]

MAX_OPEN_READS = 20_000  # Pillow appends the comments of a GIF block by block, in quadratic time
MAX_READS = 2_000_000
MAX_OVERLAP = 8  # bytes of a TIFF's strips or tiles, as a multiple of its size

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}
"""The formats, by Pillow's name, and the suffixes of their files. Not all that Pillow reads: EPS would run Ghostscript."""
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis"}
# a JPEG with further images inside (MPO) has previews, not pages
PAGED_FORMATS = frozenset({"TIFF", "GIF", "WEBP", "PNG"})
PAGED_STARTS = (b"II", b"MM", b"GIF8", b"RIFF", b"\x89PNG")

# tags of TIFF: bytes of each strip and tile, side of the tiles
STRIPS, TILES, TILE_WIDTH, TILE_HEIGHT = 279, 325, 322, 323

# Pillow warns about large images and broken metadata; the limits here are the only ones, and broken metadata is ignored
warnings.filterwarnings("ignore", module=r"PIL\.")


def _readable() -> tuple[str, ...]:
    """Return the formats whose decoders are installed. The plugins are named here, so that Pillow never loads all of its own."""
    plugins = {"TIFF": TiffImagePlugin, "WEBP": WebPImagePlugin, "AVIF": AvifImagePlugin}
    missing = {name for name, plugin in plugins.items() if not getattr(plugin, "SUPPORTED", True)}
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        missing.add("HEIF")
    return tuple(name for name in FORMATS if name not in missing)


READABLE = _readable()


def decode(
    encoded: bytes, spare: Spare | None = None, max_pixels: int = MAX_PIXELS, rendering: Rendering = AS_STORED
) -> Pixels:
    """Decode an image to (H, W, 3) uint8, RGB and upright.

    Args:
        encoded: an image of one of `FORMATS`.
        spare: returns, for (width, height), by which factor the image may be smaller. A JPEG is then decoded at 1/2, 1/4
            or 1/8, which saves most of the work; a crop may shift by up to a pixel. None decodes exactly.
        max_pixels: more pixels are refused.
        rendering: page, window for more than 8 bits per channel, and background of transparent pixels. The images of a dataset
            were rendered when it was converted.

    Raises BadImage with the reason if the image is broken, above a limit, or refused by the rendering (NeedsWindow).
    """
    if spare is None and (jpeg := JpegHeader.of(encoded)):
        jpeg.check(encoded, max_pixels)
        # Pillow reads more unusual files, and explains what is wrong with broken ones
        with suppress(RuntimeError):
            from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]

            image: Pixels = decode_jpeg(jpeg.without_metadata(encoded)).permute(1, 2, 0).numpy()  # type: ignore[union-attr]
            return image if jpeg.orientation == 1 else _turned(image, jpeg.orientation)
    return np.array(upright(encoded, spare, max_pixels, rendering))


def upright(
    encoded: bytes, spare: Spare | None = None, max_pixels: int = MAX_PIXELS, rendering: Rendering = AS_STORED
) -> Image.Image:
    """Decode an image with Pillow, RGB and upright by EXIF or XMP; without rotation if the metadata is broken.

    Arguments and exceptions as in `decode`.
    """
    with opened(encoded, max_pixels, rendering.page) as image:
        if spare is not None and image.format in ("JPEG", "MPO"):
            turned = orientation(image) >= 5
            factor = max(1.0, spare(*(image.size[::-1] if turned else image.size)))
            image.draft("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
        rgb = rendering.applied(image).convert("RGB")
        # after decoding: metadata may follow the pixels, and Pillow turns a TIFF itself
        method = TURNS.get(orientation(image))
        return rgb if method is None else rgb.transpose(method)


@contextmanager
def opened(encoded: bytes, max_pixels: int = MAX_PIXELS, page: int = 1) -> Iterator[Image.Image]:
    """Yield an image whose header is read and within the limits; its pixels are decoded when they are used.

    Args:
        page: page of a TIFF, or frame of an animation, from 1. A still image of another format is used as it is: also the
            images that were converted with `--page`.

    Raises BadImage for any exception of a decoder, also inside the block; only MemoryError is raised as it is.
    """
    try:
        source = _Source(encoded)
        with Image.open(source, formats=READABLE) as image:
            _check_work(image, encoded, max_pixels)
            if page > 1:
                _turn_to(page, image, source, max_pixels)
            source.reads_left = MAX_READS
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise _unknown(encoded) from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))  # Image size (400000000 pixels) exceeds limit of ...
        pixels = f"{int(found[0]):,} pixels" if found else "too many pixels"
        raise TooManyPixels(pixels, f", more than {max_pixels:,}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImage(one_line(error)) from None
    except Exception as error:  # decoders raise many types for broken input, whose texts are not about images
        raise BadImage(f"broken image: {one_line(error)}") from None


def has_pages(encoded: bytes) -> bool:
    """Return True for a TIFF of several pages or an animation; False also if the image is broken."""
    if encoded.startswith(PAGED_STARTS):
        with suppress(BadImage), opened(encoded, page=2) as image:
            return image.tell() > 0
    return False


def decode_on(device: torch.device, encoded: list[bytes]) -> list[torch.Tensor]:
    """Decode images to (3, H, W) uint8 on a device: JPEG there (nvJPEG on a GPU), others on the CPU and copied.

    Raises what `decode` raises.
    """
    import torch
    from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]

    headers = {
        index: jpeg for index, data in enumerate(encoded) if (jpeg := JpegHeader.of(data)) and jpeg.orientation == 1
    }
    for index, jpeg in headers.items():
        jpeg.check(encoded[index])
    images: dict[int, torch.Tensor] = {}
    if headers:
        data = [jpeg.without_metadata(encoded[index]) for index, jpeg in headers.items()]
        with suppress(RuntimeError):  # the loop below finds the broken image, and Pillow may still read it
            images = dict(zip(headers, decode_jpeg(data, device=device), strict=True))
    for index, one in enumerate(encoded):
        if index not in images:
            images[index] = torch.from_numpy(decode(one)).permute(2, 0, 1).to(device)
    return [images[index] for index in range(len(encoded))]


def _turned(image: Pixels, orientation: int) -> Pixels:
    """Return an image turned upright, as Pillow's `exif_transpose` does."""
    pixels = image.view("V3")[..., 0]  # copied whole, not byte by byte, which takes a quarter of the time
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels).view(np.uint8).reshape(*pixels.shape, 3)


def _turn_to(page: int, image: Image.Image, source: _Source, max_pixels: int) -> None:
    """Go to a later page of an opened image. Raises what `opened` raises, also if there is no such page."""
    source.reads_left = MAX_OPEN_READS
    if image.format not in PAGED_FORMATS or not (image.format == "TIFF" or image.is_animated):  # type: ignore[attr-defined]
        return
    # the frames of an animation build on each other, so that each must be within the limits
    for number in (page,) if image.format == "TIFF" else range(2, page + 1):
        source.reads_left = MAX_OPEN_READS
        try:
            image.seek(number - 1)
        except EOFError:
            raise BadImage(f"no page {page}, which convert --page asked for") from None
        _check_work(image, source.getvalue(), max_pixels)


def _check_work(image: Image.Image, encoded: bytes, max_pixels: int) -> None:
    """Raise BadImage for too many pixels, or a small file that would keep a decoder busy for long or take much memory."""
    check_pixels(*image.size, max_pixels)
    if image.format in ("JPEG", "MPO"):
        check_scans(encoded, image.width * image.height)
    tags: Any = getattr(image, "tag_v2", {})
    if sum(min(part, len(encoded)) for tag in (STRIPS, TILES) for part in tags.get(tag, ())) > MAX_OVERLAP * len(
        encoded
    ):
        raise BadImage("the strips of the TIFF hold more bytes than the file")
    check_pixels(tags.get(TILE_WIDTH, 0), tags.get(TILE_HEIGHT, 0))


def _unknown(encoded: bytes) -> BadImage:
    if encoded[4:8] == b"ftyp" and (brands := set(struct.unpack("4s" * 8, encoded[8:40].ljust(32)))) & HEIC_BRANDS:
        kind, format = ("AVIF", "AVIF") if brands & {b"avif", b"avis"} else ("HEIC", "HEIF")
        if format in READABLE:
            return BadImage(f"a broken {kind} image")
        return RequiresExtra(f"{kind}, which requires pip install 'lift_ray[heif]'")
    return UnknownFormat("bytes of no known format" if encoded else "0 bytes")


class _Source(io.BytesIO):
    """Encoded bytes that can be read a limited number of times."""

    reads_left = MAX_OPEN_READS

    def read(self, size: int | None = -1) -> bytes:
        """Read. Raises BadImage above the limit."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise BadImage("too many pieces: chunks, segments, comments, tags or pages")
        return super().read(size)
