"""Decode images: JPEG with torchcodec, other formats (and JPEGs that it cannot read) with Pillow.

Every verb decodes here, so all accept the same formats and refuse the same images, and for the same reason. No format starts a program.
The time and memory for one image are bounded before it is decoded, because a decoder in a thread cannot be stopped. `MAX_PIXELS` bounds
the pixels, `MAX_SCANS` the passes of a progressive JPEG over them, `MAX_OPEN_READS` and `MAX_READS` the pieces that a file is read in
(chunks, segments, tags, pages), and the strips of a TIFF must not hold more than a few times its bytes. What remains is proportional to
pixels and bytes: an image at the limit takes seconds and about 2 GB.
"""

from __future__ import annotations

import importlib
import io
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from lift_ray.errors import one_line

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]
Spare = Callable[[int, int], float]

MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs
MAX_SCANS = 16  # of a JPEG with MAX_PIXELS; a smaller one may have proportionally more
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

JPEG = b"\xff\xd8\xff"
START_OF_SCAN, APP1 = 0xDA, 0xE1
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
PLAIN_MARKERS = {0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # with a length, and without meaning for the size
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
ORIENTATION, SHORT = 0x0112, 3
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # of a value in EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis"}
STRIPS, TILES, TILE_WIDTH, TILE_HEIGHT = (
    279,
    325,
    322,
    323,
)  # tags of TIFF: bytes of each strip and tile, side of the tiles

# Pillow warns about large images and broken metadata; the limits here are the only ones, and broken metadata is ignored
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(ValueError):
    """An image that cannot be decoded; the message is the reason, on one line."""


class TooManyPixels(BadImage):
    """An image above the limit on pixels."""


class UnknownFormat(BadImage):
    """Bytes of no format that is read."""


class RequiresExtra(UnknownFormat):
    """An image of a format whose decoder is not installed."""


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


def decode(encoded: bytes, spare: Spare | None = None) -> Pixels:
    """Decode an image to (H, W, 3) uint8, RGB and upright; transparency is dropped.

    Args:
        encoded: an image of one of `FORMATS`.
        spare: returns, for (width, height), by which factor the image may be smaller. A JPEG is then decoded at 1/2, 1/4
            or 1/8, which saves most of the work; a crop may shift by up to a pixel. None decodes exactly.

    Raises BadImage with the reason if the image is broken or above a limit.
    """
    if spare is None and (jpeg := JpegHeader.of(encoded)):
        jpeg.check(encoded)
        # Pillow reads more unusual files, and explains what is wrong with broken ones
        with suppress(RuntimeError):
            from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]

            image: Pixels = decode_jpeg(jpeg.without_metadata(encoded)).permute(1, 2, 0).numpy()  # type: ignore[union-attr]
            return image if jpeg.orientation == 1 else _turned(image, jpeg.orientation)
    return np.array(upright(encoded, spare))


def upright(encoded: bytes, spare: Spare | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image with Pillow, RGB and upright by EXIF or XMP; with broken metadata, its pixels as they lie.

    Args:
        spare: as in `decode`.
        max_pixels: more pixels are refused.

    Raises BadImage with the reason if the image is broken or above a limit.
    """
    with opened(encoded, max_pixels) as image:
        if spare is not None and image.format in ("JPEG", "MPO"):
            turned = orientation(image) >= 5
            factor = max(1.0, spare(*(image.size[::-1] if turned else image.size)))
            image.draft("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
        rgb = _rgb(image)
        method = TURNS.get(
            orientation(image)
        )  # after decoding: metadata may follow the pixels, and Pillow turns a TIFF itself
        return rgb if method is None else rgb.transpose(method)


@contextmanager
def opened(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Yield an image whose header is read and within the limits; its pixels are decoded when they are used.

    Raises BadImage for any exception of a decoder, also inside the block; only MemoryError is raised as it is.
    """
    try:
        source = _Source(encoded)
        with Image.open(source, formats=READABLE) as image:
            check_pixels(*image.size, max_pixels)
            _check_work(image, encoded)
            source.reads_left = MAX_READS
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise _unknown(encoded) from None
    except Image.DecompressionBombError as error:
        raise TooManyPixels(one_line(error)) from None
    except Exception as error:  # decoders raise many types for broken input
        raise BadImage(one_line(error)) from None


def _rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as RGB; this decodes it."""
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, that Pillow reads from EXIF or XMP; 1 if there is none or the metadata is broken."""
    with suppress(Exception):  # Pillow raises many types for broken metadata
        found = image.getexif().get(ORIENTATION, 1)
        if found in TURNS:  # also as a fraction
            return int(found)
    return 1


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


class JpegHeader(NamedTuple):
    """Header of an ordinary JPEG: one frame, and nothing between its segments.

    Attributes:
        width, height: size in pixels, before it is turned.
        metadata: (start, stop) of each segment that may hold EXIF or XMP.
        scan: position of the first scan.
        orientation: 1 to 8, as Pillow reads it.
    """

    width: int
    height: int
    metadata: list[tuple[int, int]]
    scan: int
    orientation: int

    @classmethod
    def of(cls, encoded: bytes) -> JpegHeader | None:
        """Return the header; None for another format, and for unusual headers, which readers may understand differently."""
        if not encoded.startswith(JPEG):
            return None
        at, last, size, metadata = 2, len(encoded) - 4, None, []
        while at <= last and encoded[at] == 0xFF:
            marker = encoded[at + 1]
            if marker == 0xFF:  # a fill byte
                at += 1
                continue
            if marker == START_OF_SCAN:
                return (
                    cls(*size, metadata, at, _jpeg_orientation(encoded, metadata) if metadata else 1) if size else None
                )
            stop = at + 2 + (encoded[at + 2] << 8) + encoded[at + 3]
            if marker in FRAMES and size is None:
                size = int.from_bytes(encoded[at + 7 : at + 9]), int.from_bytes(encoded[at + 5 : at + 7])
            elif marker == APP1:
                metadata.append((at, stop))
            elif marker not in PLAIN_MARKERS:
                return None
            at = stop
        return None

    def check(self, encoded: bytes) -> None:
        """Raise BadImage for an image that would take gigabytes or minutes to decode."""
        check_pixels(self.width, self.height)
        _check_scans(encoded, self.width * self.height, self.scan)

    def without_metadata(self, encoded: bytes) -> bytes:
        """Return the JPEG without EXIF and XMP, by which a decoder might turn it where Pillow would not."""
        starts, stops = [0, *(stop for _, stop in self.metadata)], [*(start for start, _ in self.metadata), None]
        return b"".join(encoded[a:b] for a, b in zip(starts, stops, strict=True)) if self.metadata else encoded


def _jpeg_orientation(encoded: bytes, metadata: list[tuple[int, int]]) -> int:
    """Return the orientation that Pillow reads from the segments of metadata of a JPEG."""
    contents = [encoded[start + 4 : stop] for start, stop in metadata]
    exif = [content for content in contents if content.startswith(EXIF)]
    if len(exif) == 1 and (found := _plain_orientation(exif[0])):
        return found
    image = Image.Image()
    if exif:
        image.info["exif"] = EXIF + b"".join(content[len(EXIF) :] for content in exif)
    for content in contents:
        if content.startswith(XMP):
            image.info["xmp"] = content.split(b"\0", 1)[1]
    return orientation(image) if image.info else 1


def _plain_orientation(exif: bytes) -> int | None:
    """Return the orientation from EXIF as cameras write it, 50 times faster than Pillow; None if Pillow is to read it."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[6:10])
    with suppress(struct.error):
        if order:
            (start,) = struct.unpack_from(f"{order}L", exif, 10)
            (entries,) = struct.unpack_from(f"{order}H", exif, 6 + start)
            for number in range(entries):
                tag, kind, count, value = struct.unpack_from(f"{order}HHLH", exif, 8 + start + 12 * number)
                if tag == ORIENTATION:
                    return value if kind == SHORT and count == 1 and 1 <= value <= 8 else None
                # Pillow stops at an entry whose value is outside
                size, (at,) = (
                    TYPE_BYTES.get(kind, 0) * count,
                    struct.unpack_from(f"{order}L", exif, 16 + start + 12 * number),
                )
                if tag > ORIENTATION or (size > 4 and 6 + at + size > len(exif)):
                    return None
    return None


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


def check_pixels(width: int, height: int, most: int = MAX_PIXELS) -> None:
    """Raise TooManyPixels for an image that would take gigabytes to decode."""
    if width * height > most:
        raise TooManyPixels(f"{width} x {height} pixels, more than {most:,}")


def _check_work(image: Image.Image, encoded: bytes) -> None:
    """Raise BadImage for a small file that would keep a decoder busy for long, or take memory that its size does not show."""
    if image.format in ("JPEG", "MPO"):
        _check_scans(encoded, image.width * image.height)
    tags: Any = getattr(image, "tag_v2", {})
    if sum(min(part, len(encoded)) for tag in (STRIPS, TILES) for part in tags.get(tag, ())) > MAX_OVERLAP * len(
        encoded
    ):
        raise BadImage("the strips of the TIFF hold more bytes than the file")
    check_pixels(tags.get(TILE_WIDTH, 0), tags.get(TILE_HEIGHT, 0))


def _check_scans(encoded: bytes, pixels: int, start: int = 0) -> None:
    """Raise BadImage if the scans of a JPEG pass over too many pixels."""
    scans = encoded.count(bytes([0xFF, START_OF_SCAN]), start)
    if scans * pixels > MAX_SCANS * MAX_PIXELS:
        raise BadImage(f"{scans:,} scans of {pixels:,} pixels, more than {MAX_SCANS} of {MAX_PIXELS:,}")


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
