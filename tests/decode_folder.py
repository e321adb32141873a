"""Decode the files of a folder as `convert`, training and `predict` do, and compare with Pillow.

    python tests/decode_folder.py FOLDER

Pillow's own test images (Tests/images in its source distribution), or any collection of unusual files. The exit code is 1 if a file
crashes, differs, or is accepted by `convert` and refused later.
"""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lift_ray.data.bad_image import BadImage, NeedsWindow, UnknownFormat
from lift_ray.data.convert.images import Encoding
from lift_ray.data.decode import READABLE, Pixels, decode

NEEDS_WINDOW = "refused: more than 8 bits per channel, without --window"
FAULTS = ("crashed", "different", "accepted by convert only")


def pillow(data: bytes, *, turn: bool) -> Pixels | None:
    """Return Pillow's own pixels, or None if it raises anything."""
    try:
        with Image.open(io.BytesIO(data), formats=READABLE) as image:
            return np.array((ImageOps.exif_transpose(image) if turn else image).convert("RGB"))
    except Exception:
        return None


def outcome(data: bytes) -> tuple[str, str]:
    """Return the kind of the outcome and details."""
    ours: Pixels | None = None
    kind, reason = "", ""
    try:
        ours = decode(data)
    except UnknownFormat as error:
        kind, reason = "refused: no known format", str(error)
    except NeedsWindow:
        kind = NEEDS_WINDOW
    except BadImage as error:
        kind, reason = "refused by both", str(error)
    except Exception as error:
        return "crashed", repr(error)
    for encoding in (Encoding(), Encoding(short_side_px=16)):
        try:
            stored = encoding(data)
        except BadImage as error:
            if ours is not None:
                kind, reason = "refused by convert only", str(error)
        except Exception as error:
            return "crashed", f"convert: {error!r}"
        else:
            if ours is None:
                return "accepted by convert only", reason
            small = decode(stored).shape[:2]
            if (
                encoding.short_side_px
                and (small[0] < small[1]) != (ours.shape[0] < ours.shape[1])
                and min(small) < max(small)
            ):
                return "different", f"convert --short-side: {small}, decode: {ours.shape}"
    expected = pillow(data, turn=True)
    if kind == NEEDS_WINDOW:
        return kind, ""
    if ours is None:
        return ("different", f"refused ({reason}), but Pillow reads it") if expected is not None else (kind, reason)
    if expected is None:
        lying = pillow(data, turn=False)
        same = lying is not None and np.array_equal(lying, ours)
        return ("equal, with broken metadata", "") if same else ("different", "Pillow refuses it")
    if ours.shape != expected.shape or not np.array_equal(ours, expected):
        return "different", f"{ours.shape}, Pillow {expected.shape}"
    return kind or "equal", reason


def main(folder: str) -> int:
    """Print the counts and what is worth a look; return the exit code."""
    warnings.simplefilter("ignore")
    found: dict[str, list[str]] = defaultdict(list)
    slowest = (0.0, "")
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        began = time.perf_counter()
        kind, details = outcome(path.read_bytes())
        slowest = max(slowest, (time.perf_counter() - began, path.name))
        found[kind].append(f"{path.relative_to(folder)}: {details}")
    for kind, lines in sorted(found.items()):
        print(f"{len(lines):5,} {kind}")
        if kind in (*FAULTS, "refused by convert only"):
            print(*(f"        {line}" for line in lines), sep="\n")
    print(f"slowest: {slowest[1]}, {slowest[0]:.1f} s")
    return int(any(kind in found for kind in FAULTS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
