"""Headers of JPEGs, and the orientation of any image, which all decoders take from here."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import NamedTuple

from PIL import Image

from lift_ray.data.bad_image import MAX_PIXELS, BadImage, check_pixels

MAX_SCANS = 16  # of a JPEG with MAX_PIXELS; a smaller one may have proportionally more

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

    def check(self, encoded: bytes, max_pixels: int = MAX_PIXELS) -> None:
        """Raise BadImage for an image that would take gigabytes or minutes to decode."""
        check_pixels(self.width, self.height, max_pixels)
        check_scans(encoded, self.width * self.height, self.scan)

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
                size = TYPE_BYTES.get(kind, 0) * count
                (at,) = struct.unpack_from(f"{order}L", exif, 16 + start + 12 * number)
                if tag > ORIENTATION or (size > 4 and 6 + at + size > len(exif)):
                    return None
    return None


def check_scans(encoded: bytes, pixels: int, start: int = 0) -> None:
    """Raise BadImage if the scans of a JPEG pass over too many pixels."""
    scans = encoded.count(bytes([0xFF, START_OF_SCAN]), start)
    if scans * pixels > MAX_SCANS * MAX_PIXELS:
        raise BadImage(f"{scans:,} scans of {pixels:,} pixels, more than {MAX_SCANS} of {MAX_PIXELS:,}")


def orientation(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, that Pillow reads from EXIF or XMP; 1 if there is none or the metadata is broken."""
    with suppress(Exception):  # Pillow raises many types for broken metadata
        found = image.getexif().get(ORIENTATION, 1)
        if found in TURNS:  # also as a fraction
            return int(found)
    return 1
