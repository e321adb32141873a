"""Encoded images to pixels: every kind, upright, whole or refused."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from embedded import jpegs
from PIL import Image, ImageFile, ImageOps

from lift_ray.data import decode as decoding
from lift_ray.data.bad_image import BadImage, RequiresExtra, UnknownFormat
from lift_ray.data.convert.images import Encoding
from lift_ray.data.decode import decode, decode_on, upright
from lift_ray.data.jpeg_header import JpegHeader


def photos() -> list[bytes]:
    return jpegs(12, "test", step=9)


def photo() -> Image.Image:
    return Image.open(io.BytesIO(photos()[0])).convert("RGB")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


KINDS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": partial(encoded, kind="JPEG"),
    "progressive": partial(encoded, kind="JPEG", progressive=True),
    "full color": partial(encoded, kind="JPEG", subsampling=0),
    "gray jpeg": lambda image: encoded(image.convert("L"), "JPEG"),
    "cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    **{f"exif {n}": partial(encoded, kind="JPEG", exif=turned(n)) for n in range(1, 9)},
    "png": partial(encoded, kind="PNG"),
    "palette": lambda image: encoded(image.convert("P"), "PNG"),
    "gray and alpha": lambda image: encoded(image.convert("LA"), "PNG"),
    "turned png": partial(encoded, kind="PNG", exif=turned(6)),
    "webp": partial(encoded, kind="WEBP", lossless=True),
    "gif": partial(encoded, kind="GIF"),
    "bmp": partial(encoded, kind="BMP"),
    "tiff": partial(encoded, kind="TIFF", compression="tiff_lzw"),
    "turned tiff": partial(encoded, kind="TIFF", exif=turned(6)),
    "ppm": partial(encoded, kind="PPM"),
    "avif": partial(encoded, kind="AVIF"),
    "turned avif": partial(encoded, kind="AVIF", exif=turned(6)),
}


@cache
def photo_as(kind: str) -> bytes:
    return KINDS[kind](photo())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_decoded_as_pillow_does_upright_and_rgb(kind: str) -> None:
    with Image.open(io.BytesIO(photo_as(kind))) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode(photo_as(kind)), expected)


def test_real_images_are_decoded_to_the_last_bit() -> None:
    for data in photos():
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "gray jpeg", "cmyk", "exif 6"])
def test_the_size_of_a_jpeg_is_read_from_its_header(kind: str) -> None:
    header = JpegHeader.of(photo_as(kind))
    assert header is not None
    assert (header.width, header.height) == photo().size
    assert JpegHeader.of(photo_as(kind)[:20]) is JpegHeader.of(b"") is None


@pytest.mark.parametrize(("factor", "divisor"), [(1.0, 1), (1.9, 1), (2.0, 2), (5.0, 4), (40.0, 8)])
def test_a_jpeg_is_decoded_smaller_but_never_smaller_than_asked(factor: float, divisor: int) -> None:
    large = encoded(photo().resize((800, 640)), "JPEG")
    assert decode(large, lambda width, height: factor).shape == (640 // divisor, 800 // divisor, 3)
    assert decode(photo_as("png"), lambda width, height: factor).shape == decode(photo_as("png")).shape


@pytest.mark.parametrize(
    "broken",
    [
        lambda: photos()[0][:900],
        bytes,
        lambda: b"GIF89a",
        lambda: b"not an image",
        lambda: photo_as("png")[:700],
        lambda: photo_as("webp")[:300],
    ],
    ids=["cut", "empty", "GIF's first bytes", "text", "cut png", "cut webp"],
)
def test_a_broken_image_is_an_error_here_and_on_a_device(broken: Callable[[], bytes]) -> None:
    data = broken()
    with pytest.raises(BadImage):
        decode(data)
    with pytest.raises(BadImage):
        decode_on(torch.device("cpu"), [photos()[1], data])


def bomb(kind: str) -> bytes:
    """A header that says 60,000 x 60,000 pixels."""
    if kind == "jpeg":
        at = photo_as("jpeg").index(b"\xff\xc0")
        return photo_as("jpeg")[: at + 5] + struct.pack(">HH", 60000, 60000) + photo_as("jpeg")[at + 9 :]
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + photo_as("png")[24:29]
    return photo_as("png")[:12] + header + struct.pack(">I", zlib.crc32(header)) + photo_as("png")[33:]


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_an_image_bomb_is_refused_before_it_is_decoded(kind: str) -> None:
    data = bomb(kind)
    for attempt in (
        lambda: decode(data),
        lambda: decode(data, lambda w, h: 8.0),
        lambda: decode_on(torch.device("cpu"), [data]),
    ):
        with pytest.raises(BadImage, match="pixels"):
            attempt()


ERRORS = (
    struct.error,
    KeyError,
    IndexError,
    OverflowError,
    zlib.error,
    RuntimeError,
    AssertionError,
    SyntaxError,
    EOFError,
)


@pytest.mark.parametrize("error", ERRORS)
def test_any_exception_of_a_decoder_is_one_bad_image_with_its_reason(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: ImageFile.ImageFile) -> None:
        raise error("the first line\nand the second.")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    for attempt in (decode, upright, Encoding(), Encoding(short_side_px=16)):
        with pytest.raises(BadImage, match=r"the first line( |\\n)and the second") as raised:
            attempt(photo_as("png"))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_memory_that_ran_out_and_ctrl_c_are_not_bad_images(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    with pytest.raises(error):
        decode(photo_as("png"))


def test_no_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\necho run >> {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for prefix in (b"", b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(eps)) + bytes(20)):
        for attempt in (decode, upright, Encoding()):
            with pytest.raises(UnknownFormat, match="bytes of no known format"):
                attempt(prefix + eps)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("brands", "name"), [(b"heic", "HEIC"), (b"mif1\0\0\0\0heic", "HEIC"), (b"mif1\0\0\0\0avif", "AVIF")]
)
def test_an_image_whose_decoder_is_not_installed_says_what_to_install(
    brands: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"\0\0\0\x18ftyp" + brands + bytes(200)
    monkeypatch.setattr(decoding, "READABLE", ("JPEG", "PNG"))
    with pytest.raises(RequiresExtra, match=rf"^{name}, which requires pip install 'lift_ray\[heif\]'$"):
        decode(data)
    monkeypatch.undo()
    if name == "AVIF":
        with pytest.raises(BadImage, match=r"^a broken AVIF image$"):
            decode(data)


def tiff(*entries: tuple[int, int, int, bytes], order: str = ">", data: bytes = b"") -> bytes:
    """A TIFF header with entries (tag, type, count, 4 bytes), and data at offset 100."""
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "LH", 8, len(entries))
    body = b"".join(struct.pack(order + "HHL", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return (head + body + bytes(4)).ljust(100, b"\0") + data


def entry(orientation: int, order: str = ">") -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(order + "H", orientation)


def app1(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
JUNK = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"
METADATA: dict[str, Callable[[int], list[bytes]]] = {
    "big-endian": lambda n: [b"Exif\0\0" + tiff(entry(n))],
    "little-endian": lambda n: [b"Exif\0\0" + tiff(entry(n, "<"), order="<")],
    "after the maker": lambda n: [
        b"Exif\0\0" + tiff((0x010F, 2, 9, struct.pack(">L", 100)), entry(n), data=b"Panasonic")
    ],
    "after a maker that lies outside": lambda n: [
        b"Exif\0\0" + tiff((0x010F, 2, 9, struct.pack(">L", 4000)), entry(n))
    ],
    "after a tag of no known type": lambda n: [b"Exif\0\0" + tiff((0x010F, 99, 9, struct.pack(">L", 4000)), entry(n))],
    "twice": lambda n: [b"Exif\0\0" + tiff(entry(n), entry(n % 8 + 1))],
    "as a long number": lambda n: [b"Exif\0\0" + tiff((0x0112, 4, 1, struct.pack(">L", n)))],
    "as a little-endian long number": lambda n: [b"Exif\0\0" + tiff((0x0112, 4, 1, struct.pack("<L", n)), order="<")],
    "as bytes": lambda n: [b"Exif\0\0" + tiff((0x0112, 1, 1, bytes([n])))],
    "as text": lambda n: [b"Exif\0\0" + tiff((0x0112, 2, 2, str(n).encode()))],
    "as two numbers": lambda n: [b"Exif\0\0" + tiff((0x0112, 3, 2, struct.pack(">HH", n, n)))],
    "as a fraction": lambda n: [
        b"Exif\0\0" + tiff((0x0112, 5, 1, struct.pack(">L", 100)), data=struct.pack(">LL", n * 3, 3))
    ],
    "out of range": lambda n: [b"Exif\0\0" + tiff(entry(n + 8))],
    "after XMP": lambda n: [JUNK, b"Exif\0\0" + tiff(entry(n))],
    "in XMP": lambda n: [XMP % n],
    "in XMP, against EXIF": lambda n: [XMP % (9 - n), b"Exif\0\0" + tiff(entry(n))],
    "in XMP, after EXIF without it": lambda n: [b"Exif\0\0" + tiff((0x0100, 3, 1, b"\0\5")), XMP % n],
    "in XMP, after broken EXIF": lambda n: [b"Exif\0\0garbage", XMP % n],
    "in two segments": lambda n: [b"Exif\0\0" + tiff(entry(n))[:30], b"Exif\0\0" + tiff(entry(n))[30:]],
    "in an EXIF of no TIFF": lambda n: [b"Exif\0\0" + tiff(entry(n)).replace(b"MM", b"XX")],
    "in a cut EXIF": lambda n: [b"Exif\0\0" + tiff(entry(n))[:17]],
    "in an empty EXIF": lambda n: [b"Exif\0\0"],
}


@cache
def plain_jpeg(width: int, height: int) -> bytes:
    return encoded(photo().resize((width, height)), "JPEG", quality=95)


def with_segments(data: bytes, contents: list[bytes]) -> bytes:
    return data[:2] + b"".join(map(app1, contents)) + data[2:]


def as_pillow_shows(data: bytes) -> Image.Image:
    """Pillow's own answer, which for broken metadata is the pixels as they lie."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except Exception:
            return image.convert("RGB")


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the broken ones
@pytest.mark.parametrize("place", METADATA)
def test_every_path_turns_a_jpeg_as_pillow_does(place: str) -> None:
    shapes = set()
    for orientation in range(1, 9):
        data = with_segments(plain_jpeg(48, 32), METADATA[place](orientation))
        expected = as_pillow_shows(data)
        assert np.array_equal(decode(data), np.asarray(expected)), orientation
        assert np.array_equal(decode(data, lambda w, h: 1.0), np.asarray(expected)), orientation
        assert np.array_equal(decode_on(torch.device("cpu"), [data])[0].permute(1, 2, 0), np.asarray(expected))
        small = expected.resize((expected.width // 2, expected.height // 2), Image.Resampling.LANCZOS)
        assert Encoding(short_side_px=16, quality=95)(data) == encoded(small, "JPEG", quality=95)
        shapes.add(expected.size)
    broken = ("lies outside", "no TIFF", "cut", "empty", "broken", "out of range", "text", "bytes")
    assert len(shapes) == (1 if any(word in place for word in broken) else 2)


@pytest.mark.filterwarnings("ignore")
def test_a_jpeg_with_mutated_metadata_is_turned_as_pillow_does() -> None:
    random = np.random.default_rng(0)
    for case in range(400):
        place = list(METADATA)[case % len(METADATA)]
        data = bytearray(with_segments(plain_jpeg(24, 16), METADATA[place](1 + case % 8)))
        for _ in range(random.integers(1, 4)):
            data[random.integers(6, 60)] = random.choice([0, 1, 6, 18, 0xFF, int(random.integers(256))])
        try:
            expected = np.asarray(as_pillow_shows(bytes(data)))
        except Exception:
            with pytest.raises(BadImage):
                decode(bytes(data))
        else:
            assert np.array_equal(decode(bytes(data)), expected), (case, place)


def test_a_reduced_jpeg_is_as_large_as_asked_whichever_way_it_is_turned() -> None:
    for orientation in (1, 6):
        data = with_segments(encoded(photo().resize((800, 400)), "JPEG"), METADATA["big-endian"](orientation))
        shape = decode(data, lambda width, height: width / 200).shape
        assert shape == ((100, 200, 3) if orientation == 1 else (400, 200, 3))


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    extra = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return photo_as("png")[:33] + extra + photo_as("png")[33:]


BROKEN_METADATA: dict[str, Callable[[], bytes]] = {
    "EXIF of no TIFF in a PNG": lambda: png_with((b"eXIf", b"garbage")),
    "EXIF of another magic number in a PNG": lambda: png_with((b"eXIf", tiff(entry(6)).replace(b"MM", b"XX"))),
    "EXIF that is cut in a PNG": lambda: png_with((b"eXIf", tiff(entry(6))[:15])),
    "a raw profile that is not hexadecimal": lambda: png_with(
        (b"tEXt", b"Raw profile type exif\0\nexif\n  8\nnothex\n")
    ),
    "EXIF of no TIFF in a WebP": lambda: encoded(photo(), "WEBP", lossless=True, exif=b"garbage"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BROKEN_METADATA)
def test_an_image_with_broken_metadata_is_taken_as_its_pixels_lie_by_convert_and_by_training(kind: str) -> None:
    data = BROKEN_METADATA[kind]()
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert Encoding()(data) == data
    assert np.array_equal(decode(data), expected)
    assert min(Image.open(io.BytesIO(Encoding(short_side_px=16)(data))).size) == 16


def many_scans(times: int) -> bytes:
    """A progressive JPEG of 2,000 x 2,000 pixels that repeats its last scan."""
    data = encoded(Image.new("L", (2000, 2000), 128), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * times + data[-2:]


def huge_tile() -> bytes:
    """A TIFF of 64 x 64 pixels in a tile of 60,000 x 60,000, which compresses to little."""
    entries = {
        **{256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1)},
        **{322: (4, 1, 60_000), 323: (4, 1, 60_000), 324: (4, 1, 200), 325: (4, 1, 5000)},
    }
    packed = [(tag, kind, count, struct.pack("<L", value)) for tag, (kind, count, value) in entries.items()]
    return tiff(*packed, order="<").ljust(200, b"\0") + zlib.compress(bytes(5_000_000))


def overlapping_strips(number: int) -> bytes:
    """A TIFF whose strips of one pixel row, compressed with LZW, are all the same 4,000 bytes."""
    row = encoded(Image.new("L", (64, 1)), "TIFF", compression="tiff_lzw")
    tags = Image.open(io.BytesIO(row)).tag_v2  # type: ignore[attr-defined]
    strip = row[tags[273][0] :][: tags[279][0]].ljust(4000, b"\0")
    entries = {
        **{
            256: (4, 1, 64),
            257: (4, 1, number),
            258: (3, 1, 8),
            259: (3, 1, 5),
            262: (3, 1, 1),
            273: (4, number, 4200),
        },
        **{277: (3, 1, 1), 278: (4, 1, 1), 279: (4, number, 4200 + 4 * number)},
    }
    packed = [(tag, kind, count, struct.pack("<L", value)) for tag, (kind, count, value) in entries.items()]
    numbers = struct.pack(f"<{2 * number}L", *[200] * number, *[4000] * number)
    return tiff(*packed, order="<").ljust(200, b"\0") + strip + numbers


SLOW: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans of a progressive JPEG": (lambda: many_scans(800), "80[0-9] scans of 4,000,000 pixels, more than 16 of"),
    "chunks of a PNG": (lambda: png_with(*[(b"tEXt", b"a\0b")] * 9000), "too many pieces"),
    "text that unpacks to gigabytes": (
        lambda: png_with((b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000)))),
        "too large",
    ),
    "comments of a GIF": (
        lambda: photo_as("gif")[:781] + b"!\xfe" + b"\xff".ljust(256, b"a") * 20_000 + b"\0" + photo_as("gif")[781:],
        "too many pieces",
    ),
    "strips of a TIFF that overlap": (lambda: overlapping_strips(200), "the strips of the TIFF hold more bytes"),
    "a tile of a TIFF": (huge_tile, "60000 x 60000 pixels, more than"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_file_made_to_keep_a_decoder_busy_is_refused_by_convert_and_by_training(kind: str) -> None:
    make, reason = SLOW[kind]
    data = make()
    for attempt in (decode, Encoding(), Encoding(short_side_px=16), lambda data: decode(data, lambda w, h: 8.0)):
        with pytest.raises(BadImage, match=reason):
            attempt(data)


def test_strips_that_do_not_add_up_to_much_more_than_the_file_are_no_fault() -> None:
    assert decode(overlapping_strips(8)).shape == (8, 64, 3)


def test_many_scans_of_a_small_jpeg_are_no_fault() -> None:
    assert decode(many_scans(30)).shape == (2000, 2000, 3)


def test_a_jpeg_that_hides_its_size_from_the_check_is_refused_before_it_is_decoded() -> None:
    """Bytes between the segments, which decoders skip and the check does not."""
    data = bomb("jpeg")
    at = data.index(b"\xff\xdb")
    for hidden in (data[:at] + b"\0\0" + data[at:], data[:at] + b"\xff\xd0" + data[at:]):
        with pytest.raises(BadImage, match="pixels"):
            decode(hidden)
        with pytest.raises(BadImage, match="pixels"):
            decode_on(torch.device("cpu"), [hidden])
