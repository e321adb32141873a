"""Images with more than 8 bits per channel or transparency, and how they become 8-bit RGB.

Pillow cuts such samples off without a word: a 12-bit image turns white, a float image of 0 to 1 turns black. Here the
samples are read whole, and they are mapped to 8 bits by a window that the user chooses, or the image is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from lift_ray.data.bad_image import NeedsWindow
from lift_ray.data.deep_samples import deep_samples, is_deep
from lift_ray.data.jpeg_header import ORIENTATION
from lift_ray.data.tiff import PHOTOMETRIC, Samples
from lift_ray.errors import BadInput

Pixels = NDArray[np.uint8]

WINDOWS = "auto|minmax|percentile|LO,HI"
PERCENTILES = (1, 99)
NOMINAL_BITS = (8, 10, 12, 14, 16, 20, 24, 32)
COLORS = {"white": (255, 255, 255), "black": (0, 0, 0)}
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class ValueRange:
    """Smallest and largest finite sample of an image, or of several.

    Attributes:
        kind: type of the samples, for messages, such as `16-bit` or `float`.
    """

    low: float
    high: float
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} image with values {self.low:.10g} to {self.high:.10g}"


@dataclass(frozen=True)
class Window:
    """Map of samples to 8 bits: values from `low` to `high` become 0 to 255, linearly and rounded; those outside are clipped.

    Attributes:
        kind: `fixed` for low and high as given; `minmax` for the smallest and largest value of each image; `percentile` for
            its 1st and 99th percentile; `auto` for one nominal range of a whole dataset (`nominal_range`), which is `None` until
            it has been found. `auto` refuses images with values outside and clips none.
        low, high: the range; None if it is found for each image.
    """

    kind: Literal["auto", "minmax", "percentile", "fixed"]
    low: float | None = None
    high: float | None = None

    @classmethod
    def parse(cls, text: str) -> Window:
        """Return the window from its text, one of WINDOWS, or `auto(LO,HI)` once the range is found. Raises BadInput."""
        if text in ("auto", "minmax", "percentile"):
            return cls(text)  # type: ignore[arg-type]
        found = re.fullmatch(r"(auto\()?([^,()]+),([^,()]+)(?(1)\))", text.strip())
        try:
            low, high = (float(number) for number in found.groups()[1:]) if found else (0.0, 0.0)
        except ValueError:
            low = high = 0.0
        if not (found and low < high and np.isfinite([low, high]).all()):
            raise BadInput(
                "--window", f"must be {WINDOWS} with LO < HI", f"{text!r}", "give two numbers, for example 0,4095"
            )
        return cls("auto" if found[1] else "fixed", low, high)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return self.kind
        both = f"{_number(self.low)},{_number(self.high)}"
        return f"auto({both})" if self.kind == "auto" else both

    @property
    def is_open(self) -> bool:
        """True for `auto` before the range of the dataset is known."""
        return self.kind == "auto" and self.low is None

    def eight_bit(self, samples: Samples) -> Pixels:
        """Return the samples in 8 bits, in the same shape.

        If all values of an image are the same, minmax and percentile make it black. Samples that are not finite do not count
        for the range of an image; NaN becomes 0, and the infinities become 0 and 255.

        Raises NeedsWindow if the range of `auto` is not known, or has values outside of it.
        """
        low, high = self._range(samples)
        if samples.dtype == np.uint16:  # a table takes a tenth of the memory, and much less time
            return _mapped(np.arange(65536), low, high)[samples]
        out = np.empty(samples.shape, np.uint8)
        for start in range(0, len(samples), ROWS_AT_ONCE):
            out[start : start + ROWS_AT_ONCE] = _mapped(samples[start : start + ROWS_AT_ONCE], low, high)
        return out

    def _range(self, samples: Samples) -> tuple[float, float]:
        if self.kind == "percentile":
            low, high = np.percentile(_finite(samples), PERCENTILES)
            return float(low), float(high)
        if self.kind == "fixed" and self.low is not None and self.high is not None:
            return self.low, self.high
        found = value_range(samples)
        if self.kind == "minmax":
            return found.low, found.high
        if self.low is None or self.high is None:
            raise NeedsWindow(f"{found}, which none of the images has that --window auto looked at")
        if found.low < self.low or found.high > self.high:
            raise NeedsWindow(f"{found}, outside of {self.low:.10g} to {self.high:.10g}, which --window auto found")
        return self.low, self.high


def _mapped(samples: Samples, low: float, high: float) -> Pixels:
    if low == high:  # no scale: the one value is black, and what lies above it white
        return np.where(samples > low, 255, 0).astype(np.uint8)
    scaled = np.subtract(samples, low, dtype=np.float64)
    scaled *= 255 / (high - low)
    np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.clip(scaled.round(out=scaled), 0, 255, out=scaled).astype(np.uint8)


def _finite(samples: Samples) -> Samples:
    finite = samples if samples.dtype.kind != "f" else samples[np.isfinite(samples)]
    if not finite.size:
        raise ValueError("float image without a finite value")
    return finite


def value_range(samples: Samples) -> ValueRange:
    """Return the range of the finite samples. Raises ValueError if there are none."""
    finite, bits = _finite(samples), 8 * samples.dtype.itemsize
    kind = {"f": "float", "i": f"signed {bits}-bit", "u": f"{bits}-bit"}[samples.dtype.kind]
    return ValueRange(float(finite.min()), float(finite.max()), kind)


def nominal_range(ranges: Iterable[ValueRange]) -> tuple[float, float] | None:
    """Return the smallest nominal range that holds all values: what `--window auto` means; None without ranges.

    Floats in [0, 1] have the range 0 to 1, and floats in [-1, 1] have -1 to 1. Other values have 0 to 2^n - 1, or, if some are
    negative, -2^(n-1) to 2^(n-1) - 1, with n = 8, 10, 12, 14, 16, 20, 24 or 32.

    Raises BadInput if no such range holds them, or if there are floats and integers.
    """
    found = list(ranges)
    if not found:
        return None
    low, high = min(each.low for each in found), max(each.high for each in found)
    floats = {each.kind == "float" for each in found}
    if floats == {True} and low >= -1 and high <= 1:
        return (0.0, 1.0) if low >= 0 else (-1.0, 1.0)
    for bits in NOMINAL_BITS:
        bottom = -(2.0 ** (bits - 1)) if low < 0 else 0.0
        if len(floats) == 1 and bottom <= low and high <= bottom + 2**bits - 1:
            return bottom, bottom + 2**bits - 1
    mixed = "both floats and integers" if len(floats) > 1 else f"values {low:.10g} to {high:.10g}"
    raise BadInput("--window auto", "must find one nominal range for all images", mixed, "pass --window LO,HI")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


@dataclass(frozen=True)
class Rendering:
    """How an opened image becomes the 8-bit image that is trained on: the same in training, prediction and serving.

    Attributes:
        window: for images with more than 8 bits per channel; None refuses them. Others are not changed by it.
        page: page of a TIFF, or frame of an animation, from 1; a still image of another format is used as it is. `decode.opened`
            turns to it.
        background: color behind transparent pixels; None drops the transparency, so the colors show that are stored there.
    """

    window: Window | None = None
    page: int = 1
    background: tuple[int, int, int] | None = None

    @classmethod
    def parse(cls, window: str | None = None, page: int = 1, background: str | None = None) -> Rendering:
        """Return the rendering from its options as text. Raises BadInput."""
        return cls(
            None if window is None else Window.parse(window),
            page,
            None if background is None else parse_color(background),
        )

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Rendering:
        """Return the rendering from `to_dict`. Raises ValueError with the reason in one line."""
        for name, kind, rule in (("window", str, "text"), ("page", int, "an integer"), ("background", str, "text")):
            if name in content and type(content[name]) is not kind:
                raise ValueError(f"rendering.{name}: must be {rule}, but got {content[name]!r}")
        if content.get("page", 1) < 1:
            raise ValueError(f"rendering.page: must be at least 1, but got {content['page']}")
        try:
            return cls.parse(content.get("window"), content.get("page", 1), content.get("background"))
        except BadInput as error:
            raise ValueError(f"rendering.{error.place.lstrip('-')}: {error.rule}, but got {error.got}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the default, for manifests and checkpoints."""
        given: dict[str, Any] = {} if self.window is None else {"window": str(self.window)}
        if self.page != 1:
            given["page"] = self.page
        if self.background is not None:
            given["background"] = "#{:02x}{:02x}{:02x}".format(*self.background)
        return given

    def sentences(self) -> list[str]:
        """Return a sentence for each part that is not the default, for people who prepare images."""
        told = []
        if self.window is not None:
            told.append(f"Images with more than 8 bits per channel are mapped to 8 bits: {_explained(self.window)}.")
        if self.page != 1:
            told.append(f"Page {self.page} of each TIFF or animation is used.")
        if self.background is not None:
            color = "#{:02x}{:02x}{:02x}".format(*self.background)
            told.append(f"Transparent pixels are composed over {color}.")
        return told

    def applied(self, opened: Image.Image) -> Image.Image:
        """Return an image of 8 bits per channel from an opened one, which is at its page and not loaded yet.

        The result is `opened` itself if nothing is to be done. It is not rotated: the orientation stays where it is.

        Raises:
            NeedsWindow: the image has more than 8 bits per channel, and there is no window for it.
            OSError, ValueError, SyntaxError: the image is broken.
        """
        image = self._in_eight_bits(opened) if is_deep(opened) else opened
        return image if self.background is None else _over(image, self.background)

    def changes(self, opened: Image.Image) -> bool:
        """Return True if an opened image is not at its first page, or `applied` does not return it as it is."""
        composed = self.background is not None and opened.has_transparency_data
        return opened.tell() > 0 or composed or is_deep(opened)

    def _in_eight_bits(self, opened: Image.Image) -> Image.Image:
        samples, alpha = deep_samples(opened)
        if self.window is None:
            raise NeedsWindow(str(value_range(samples)), ", and the data was not converted with --window")
        pixels = self.window.eight_bit(samples)
        if isinstance(opened, TiffImageFile) and opened.tag_v2.get(PHOTOMETRIC) == 0:
            pixels = 255 - pixels  # white is zero
        mode = "L" if pixels.ndim == 2 else {3: "RGB", 4: "CMYK"}[pixels.shape[2]]
        image = Image.fromarray(pixels, mode)
        if alpha is not None:
            opaque = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
            image.putalpha(Image.fromarray(_mapped(alpha, 0, opaque)))
        image.info = {name: value for name, value in opened.info.items() if name != "transparency"}
        if isinstance(opened, TiffImageFile) and ORIENTATION in opened.tag_v2:
            exif = Image.Exif()
            exif[ORIENTATION] = opened.tag_v2[ORIENTATION]
            image.info["exif"] = exif.tobytes()
        return image


AS_STORED = Rendering()


def parse_color(text: str) -> tuple[int, int, int]:
    """Return (red, green, blue) from white, black or #rrggbb. Raises BadInput."""
    if text in COLORS:
        return COLORS[text]
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise BadInput("--background", "must be white, black or #rrggbb", f"{text!r}", "give a color such as #808080")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def _over(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return an image over a color; the image itself if it has no transparency."""
    if not image.has_transparency_data:
        return image
    clear = image.convert("RGBA")
    made = Image.alpha_composite(Image.new("RGBA", clear.size, (*color, 255)), clear).convert("RGB")
    made.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return made


def _explained(window: Window) -> str:
    if window.kind in ("minmax", "percentile"):
        ends = "its smallest and largest value" if window.kind == "minmax" else "its 1st and 99th percentile"
        return f"v becomes round(255 (v - low) / (high - low)), clipped, with low and high of each image: {ends}"
    if window.low is None or window.high is None:
        return "none of the training images had more"
    low, span = _number(window.low), _number(window.high - window.low)
    return f"v becomes round(255 (v - {low}) / {span})" + ("" if window.kind == "auto" else ", clipped to 0 to 255")
