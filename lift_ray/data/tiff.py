"""All samples of a TIFF with more than 8 bits per channel: integers and floats, gray, RGB or CMYK, with or without alpha.

Pillow reads some of these layouts, cuts others to 8 bits, swaps the bytes of compressed big-endian ones, and refuses the rest.
But it decompresses them all. So a TIFF is read as a gray image of bytes, which Pillow (with libtiff) has only to decompress,
and the bytes are put together here.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

Samples = NDArray[Any]

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, CHANNELS, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, PREDICTOR = 273, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, EXTRA, FORMAT = 322, 323, 324, 325, 338, 339
KEPT = (FILL_ORDER, COMPRESSION, STRIP_OFFSETS, ROWS_PER_STRIP, STRIP_BYTES, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES)
COLORS = {0: 1, 1: 1, 2: 3, 5: 4}  # photometric interpretation -> channels of color
TYPES = {1: "u", 2: "i", 3: "f"}  # sample format -> letter of numpy
LOSSLESS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "packbits", 34925: "LZMA", 50000: "zstd"}
ALPHA_KINDS = (1, 2)  # premultiplied, straight
PIXELS_AT_ONCE = 2**16
MOST_BYTES = 2**30  # of samples; a small file can claim any number of them


class DeepTiff(TiffImagePlugin.TiffImageFile):
    """A TIFF that Pillow opens also if its samples fit none of Pillow's modes; `tiff_samples` reads them."""

    def _setup(self) -> None:
        try:
            super()._setup()  # type: ignore[no-untyped-call, unused-ignore]
        except (SyntaxError, KeyError):
            if not has_deep_samples(self):
                raise
            self._mode = "RGB"
            self._tile_size = self._size = self.tag_v2[WIDTH], self.tag_v2[HEIGHT]
            self.tile = []  # Pillow's own `load` raises an OSError


Image.register_open(DeepTiff.format, DeepTiff, TiffImagePlugin._accept)


def has_deep_samples(opened: TiffImagePlugin.TiffImageFile) -> bool:
    """Return True for whole samples of 16, 32 or 64 bits, whether or not their layout can be read."""
    return bool(max(opened.tag_v2.get(BITS, (1,))) >= 16)


def tiff_samples(opened: TiffImagePlugin.TiffImageFile, data: bytes) -> tuple[Samples, bool]:
    """Return the samples (H, W, C) of the current page, not rotated, and whether the last channel is alpha.

    Premultiplied colors are divided by alpha. Further channels without a meaning are left out, as by Pillow.

    Args:
        data: the whole file.

    Raises ValueError if the layout is not supported, OSError if the file is broken.
    """
    tags = opened.tag_v2
    colors, channels = COLORS.get(tags.get(PHOTOMETRIC, 0), 0), tags.get(CHANNELS, 1)
    extra = tags.get(EXTRA, ())
    has_alpha = channels > colors and (not extra or extra[0] in ALPHA_KINDS)
    if not colors or channels < colors or (colors == 1 and channels > 2):
        raise ValueError(f"TIFF of {channels} channels that are not gray, RGB or CMYK")
    samples = _all_channels(opened, data, channels, _sample_type(opened))
    if extra[:1] == (1,):
        _make_straight(samples, colors)
    return samples[..., : colors + has_alpha], has_alpha


def _sample_type(opened: TiffImagePlugin.TiffImageFile) -> np.dtype[Any]:
    bits, formats = set(opened.tag_v2.get(BITS, (1,))), set(opened.tag_v2.get(FORMAT, (1,)))
    kind = TYPES.get(min(formats), "") if len(formats) == 1 else ""
    if len(bits) > 1 or not kind or not bits <= {16, 32, 64}:
        raise ValueError(f"TIFF samples of {' and '.join(map(str, sorted(bits)))} bits in format {sorted(formats)}")
    return np.dtype(f"{_order(opened)}{kind}{min(bits) // 8}")


def _order(opened: TiffImagePlugin.TiffImageFile) -> str:
    return "<" if opened.tag_v2.prefix == b"II" else ">"


def _all_channels(opened: TiffImagePlugin.TiffImageFile, data: bytes, channels: int, stored: np.dtype[Any]) -> Samples:
    """Return (H, W, C) samples in the byte order of this machine."""
    tags, width, height = opened.tag_v2, opened.tag_v2[WIDTH], opened.tag_v2[HEIGHT]
    if tags.get(COMPRESSION, 1) not in LOSSLESS:
        raise ValueError(f"TIFF of more than 8 bits with compression {tags[COMPRESSION]}")
    if width * height * channels * stored.itemsize > MOST_BYTES:
        raise ValueError(
            f"TIFF of {width} x {height} pixels with {channels} x {8 * stored.itemsize} bits, more than 1 GiB"
        )
    planes, together = (channels, 1) if tags.get(PLANAR, 1) == 2 else (1, channels)
    found = []
    for plane in range(planes):
        rows = _bytes_of_plane(opened, data, plane, planes, together * stored.itemsize)
        found.append(_undone(opened, rows, together, stored).reshape(height, width, together))
    return np.concatenate(found, axis=-1) if planes > 1 else found[0]


def _bytes_of_plane(
    opened: TiffImagePlugin.TiffImageFile, data: bytes, plane: int, planes: int, pixel_bytes: int
) -> NDArray[np.uint8]:
    """Return the decompressed bytes of a plane, (H, W * pixel_bytes), that Pillow reads as a gray image of 8 bits."""
    tags = opened.tag_v2
    kept: dict[int, Any] = {tag: tags[tag] for tag in KEPT if tag in tags}
    if len(kept.get(STRIP_OFFSETS, kept.get(TILE_OFFSETS, ()))) < planes * _num_parts(tags):
        raise OSError("image file is truncated: it has fewer strips than rows require")  # Pillow would show them black
    for tag in (STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES):
        if tag in kept:
            part = len(kept[tag]) // planes
            kept[tag] = kept[tag][plane * part : (plane + 1) * part]
    kept |= {WIDTH: tags[WIDTH] * pixel_bytes, HEIGHT: tags[HEIGHT], BITS: 8, CHANNELS: 1, PHOTOMETRIC: 1}
    if TILE_WIDTH in tags:
        kept[TILE_WIDTH] = tags[TILE_WIDTH] * pixel_bytes
    with TiffImagePlugin.TiffImageFile(io.BytesIO(_with_directory(data, _order(opened), kept))) as flat:
        flat.im = Image.core.new("L", flat.size)  # type: ignore[attr-defined]  # without Pillow's limit, which is for pixels and not for bytes
        return np.asarray(flat)


def _num_parts(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    """Return the number of strips or tiles of a plane."""
    across = -(-tags[WIDTH] // tags.get(TILE_WIDTH, tags[WIDTH]))
    return int(across * -(-tags[HEIGHT] // tags.get(TILE_HEIGHT, tags.get(ROWS_PER_STRIP, tags[HEIGHT]))))


def _with_directory(data: bytes, order: str, tags: dict[int, Any]) -> bytes:
    """Return a TIFF with a new directory of integer tags behind its data, as its first page."""
    big = data[2:4] in (b"+\0", b"\0+")  # BigTIFF
    word, head_at = ("Q", 8) if big else ("I", 4)
    size, start = struct.calcsize(word), len(data) + len(data) % 2
    entries, further = b"", b""
    beyond = start + (8 if big else 2) + len(tags) * (20 if big else 12) + size
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}{word}", *values)
        entries += struct.pack(f"{order}HH{word}", tag, 16 if big else 4, len(values))
        entries += packed if len(packed) <= size else struct.pack(f"{order}{word}", beyond + len(further))
        further += packed if len(packed) > size else b""
    directory = struct.pack(f"{order}{'Q' if big else 'H'}", len(tags)) + entries + bytes(size) + further
    head = data[:head_at] + struct.pack(f"{order}{word}", start)
    return head + data[len(head) :].ljust(start - len(head), b"\0") + directory


def _undone(
    opened: TiffImagePlugin.TiffImageFile, rows: NDArray[np.uint8], together: int, stored: np.dtype[Any]
) -> Samples:
    """Undo the predictor, which stores differences to the pixel on the left: (H, W * together) samples in native byte order.

    Args:
        rows: (H, W * together * bytes).
        together: channels next to each other.
    """
    tags, native, size = opened.tag_v2, stored.newbyteorder("="), stored.itemsize
    predictor, columns = tags.get(PREDICTOR, 1), tags.get(TILE_WIDTH, tags[WIDTH]) * together
    out: Samples = rows.view(f"{_order(opened)}u{size}").astype(f"u{size}")
    whole = out.shape[1]
    if predictor == 1:
        return out.view(native)
    if predictor == 2:
        for left in range(0, whole, columns):  # it starts anew in each tile
            part = out[:, left : left + columns].reshape(len(out), -1, together)
            out[:, left : left + columns] = np.cumsum(part, axis=1, dtype=out.dtype).reshape(len(out), -1)
        return out.view(native)
    if predictor == 3 and whole % columns == 0:  # bytes of equal weight are next to each other, the highest first
        parts = rows.reshape(len(rows), -1, columns * size // together, together)
        summed = np.cumsum(parts, axis=2, dtype=np.uint8).reshape(len(rows), -1, size, columns)
        floats = np.ascontiguousarray(summed.swapaxes(2, 3)).view(f">f{size}")
        return floats.astype(native).reshape(len(rows), whole)
    raise ValueError(f"TIFF predictor {predictor} is not supported")


def _make_straight(samples: Samples, colors: int) -> None:
    """Divide the colors of (H, W, C) samples by alpha, the channel behind them, in place."""
    largest = 1.0 if samples.dtype.kind == "f" else float(np.iinfo(samples.dtype).max)
    pixels = samples.reshape(-1, samples.shape[-1])
    for start in range(0, len(pixels), PIXELS_AT_ONCE):
        part = pixels[start : start + PIXELS_AT_ONCE]
        color, alpha = part[:, :colors].astype(np.float64), part[:, colors : colors + 1]
        part[:, :colors] = np.minimum(largest, color * largest / np.where(alpha > 0, alpha, largest))
