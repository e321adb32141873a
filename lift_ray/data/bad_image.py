"""Images that cannot be decoded, and the limit on their pixels."""

from __future__ import annotations

MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs


class BadImage(ValueError):
    """An image that cannot be decoded; the message is the reason, on one line.

    Args:
        seen: the reason, such as the kind and range of samples, or a size.
        why: more about it, in the message only.
    """

    def __init__(self, seen: str, why: str = "") -> None:
        super().__init__(seen + why)
        self.seen = seen


class TooManyPixels(BadImage):
    """An image above the limit on pixels."""


class UnknownFormat(BadImage):
    """Bytes of no format that is read."""


class RequiresExtra(UnknownFormat):
    """An image of a format whose decoder is not installed."""


class NeedsWindow(BadImage):
    """An image has samples that no given window maps to 8 bits."""


def check_pixels(width: int, height: int, most: int = MAX_PIXELS) -> None:
    """Raise TooManyPixels for an image that would take gigabytes to decode."""
    if width * height > most:
        raise TooManyPixels(f"{width} x {height} pixels", f", more than {most:,}")
