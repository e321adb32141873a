"""Images with more than 8 bits per channel, written by hand because Pillow writes only some of them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

Samples = np.ndarray[Any, Any]


def png16(samples: Samples, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits, (H, W) or (H, W, C), with further chunks before its pixels; its rows use the filter Sub."""
    height, width, channels = (*samples.shape, 1)[:3]
    rows = samples.astype(">u2").tobytes()
    rows = np.frombuffer(rows, np.uint8).reshape(height, width, 2 * channels).copy()
    rows[:, 1:] -= rows[:, :-1].copy()
    filtered = b"".join(b"\1" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(filtered)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def tiff(
    samples: Samples,
    *,
    order: str = "<",
    deflate: bool = False,
    planar: bool = False,
    extra: int | None = None,
    photometric: int | None = None,
    rows_per_strip: int | None = None,
    tags: Mapping[int, int] = MappingProxyType({}),
) -> bytes:
    """A TIFF of (H, W) or (H, W, C) samples of any type.

    Args:
        order: < or >, the byte order.
        extra: meaning of the last channel: 0 unspecified, 1 premultiplied alpha, 2 alpha.
        tags: further tags, or others.
    """
    height, width, channels = (*samples.shape, 1)[:3]
    bits, kind = 8 * samples.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    stored = samples.astype(samples.dtype.newbyteorder(order)).reshape(height, width, channels)
    step = rows_per_strip or height
    planes = [stored[..., channel] for channel in range(channels)] if planar else [stored]
    strips = [plane[top : top + step].tobytes() for plane in planes for top in range(0, height, step)]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    offsets = np.cumsum([8, *map(len, strips)]).tolist()
    colors = channels - (extra is not None)
    directory: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * channels),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric if photometric is not None else 1 if colors == 1 else 2]),
        273: ("I", offsets[:-1]),
        277: ("H", [channels]),
        278: ("I", [step]),
        279: ("I", list(map(len, strips))),
        284: ("H", [2 if planar else 1]),
        339: ("H", [kind] * channels),
    }
    if extra is not None:
        directory[338] = ("H", [extra])
    directory |= {tag: ("I", [value]) for tag, value in tags.items()}
    directory_at = offsets[-1] + offsets[-1] % 2
    beyond = directory_at + 2 + 12 * len(directory) + 4
    entries, further = b"", b""
    for tag, (form, values) in sorted(directory.items()):
        data = struct.pack(f"{order}{len(values)}{form}", *values)
        entries += struct.pack(f"{order}HHI", tag, 3 if form == "H" else 4, len(values))
        entries += data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(f"{order}I", beyond + len(further))
        further += data if len(data) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory_at)
    body = b"".join(strips).ljust(directory_at - 8, b"\0")
    return head + body + struct.pack(f"{order}H", len(directory)) + entries + bytes(4) + further


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image in a format that Pillow writes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
