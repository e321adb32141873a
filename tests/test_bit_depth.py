"""Images with more than 8 bits per channel, several pages or transparency: the same pixels in training and in prediction."""

from __future__ import annotations

import io
import json
import re
import shutil
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deep_images import Samples, png16, saved, tiff
from embedded import jpegs
from PIL import Image

from lift_ray import convert as verb
from lift_ray.data import decode as decoding
from lift_ray.data import deep_samples as deep
from lift_ray.data.augment import Preprocessing, View, evaluation_image
from lift_ray.data.bad_image import BadImage, NeedsWindow, TooManyPixels
from lift_ray.data.batches import evaluation_batches
from lift_ray.data.bit_depth import Rendering, ValueRange, Window, nominal_range, value_range
from lift_ray.data.convert.images import Encoding
from lift_ray.data.convert.index import encode_lossless
from lift_ray.data.dataset import Dataset
from lift_ray.data.decode import decode, has_pages, upright
from lift_ray.data.deep_samples import deep_samples, is_deep
from lift_ray.data.open import _from_arrays, _to_arrays, open_dataset, schema_metadata
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.inference.classifier import Classifier
from lift_ray.inference.image_files import find_images
from lift_ray.inference.model_card import model_card
from lift_ray.inference.predict import Job, predict
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import RECORD
from lift_ray.training.checkpoint import read_record
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

RANDOM = np.random.default_rng(0)
TYPES = ("u2", "i2", "u4", "i4", "f2", "f4", "f8")
LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "gray": ((), {}),
    "gray and alpha": ((2,), {"extra": 2}),
    "RGB": ((3,), {}),
    "RGB in planes": ((3,), {"planar": True}),
    "RGB and alpha": ((4,), {"extra": 2}),
    "RGB and a spare channel": ((4,), {"extra": 0}),
}
STORAGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "big-endian": {"order": ">"},
    "strips": {"rows_per_strip": 5},
    "deflate": {"deflate": True, "rows_per_strip": 5},
    "deflate, big-endian": {"deflate": True, "order": ">"},
}


def samples_of(kind: str, *channels: int) -> Samples:
    """Random samples (17, 13, *channels) over the whole range of a type."""
    if np.dtype(kind).kind == "f":
        return RANDOM.normal(size=(17, 13, *channels)).astype(kind)
    bounds = np.iinfo(kind)
    return RANDOM.integers(bounds.min, bounds.max, (17, 13, *channels), kind, endpoint=True)


def read(encoded: bytes) -> tuple[Samples, Samples | None]:
    with Image.open(io.BytesIO(encoded)) as opened:
        assert is_deep(opened)
        return deep_samples(opened)


def gradient(largest: int, kind: str = "u2") -> Samples:
    """Gray samples (32, 32) from 0 to `largest`."""
    return np.linspace(0, largest, 32 * 32).round().astype(kind).reshape(32, 32)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TYPES)
def test_every_sample_of_a_tiff_is_read_as_stored(kind: str, layout: str, storage: str) -> None:
    channels, options = LAYOUTS[layout]
    stored = samples_of(kind, *channels)
    found, alpha = read(tiff(stored, **options, **STORAGE[storage]))
    expected = {(): stored, (2,): stored[..., 0]}.get(channels, stored[..., :3])
    assert found.dtype == np.dtype(kind)
    np.testing.assert_array_equal(found, expected)
    assert (alpha is not None) == (options.get("extra") == 2)


@pytest.mark.parametrize("channels", [(), (2,), (3,), (4,)])
def test_every_sample_of_a_16_bit_png_is_read_as_stored(channels: tuple[int, ...]) -> None:
    stored = samples_of("u2", *channels)
    found, alpha = read(png16(stored))
    np.testing.assert_array_equal(found, {(): stored, (2,): stored[..., 0]}.get(channels, stored[..., :3]))
    if channels in ((2,), (4,)):
        assert alpha is not None
        np.testing.assert_array_equal(alpha, stored[..., -1])


@pytest.mark.parametrize("compression", ["tiff_lzw", "zstd", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("kind", ["u2", "i4", "f4"])
def test_compressed_tiffs_of_pillow_and_big_files_are_read(kind: str, compression: str) -> None:
    stored = samples_of(kind)
    for big in (False, True):
        data = saved(Image.fromarray(stored), "TIFF", compression=compression, big_tiff=big)
        np.testing.assert_array_equal(read(data)[0], stored)


def test_a_tiff_with_the_bits_of_each_byte_reversed_is_read_as_stored() -> None:
    stored = samples_of("u2")
    reversed_bits = np.packbits(np.unpackbits(stored.view(np.uint8), bitorder="little")).view(np.uint16)
    np.testing.assert_array_equal(read(tiff(reversed_bits.reshape(stored.shape), tags={266: 2}))[0], stored)


@pytest.mark.parametrize("header", ["P2\n# gray\n13 17\n65535\n", "P5 13 17 65535\n"])
def test_a_gray_pgm_of_16_bits_is_read_as_stored(header: str) -> None:
    stored = samples_of("u2")
    body = stored.astype(">u2").tobytes() if "P5" in header else " ".join(map(str, stored.ravel())).encode()
    np.testing.assert_array_equal(read(header.encode() + body)[0], stored)


def test_a_plain_bitmap_has_no_maximum() -> None:
    assert decode(b"P1\n2 2\n10 01").tolist() == [[[0] * 3, [255] * 3], [[255] * 3, [0] * 3]]


@pytest.mark.parametrize("header", ["P5 3 1 1000\n", "P2 3 1 1000\n", "P6 1 1 1000\n", "P3 1 1 1000\n"])
def test_gray_and_color_of_the_same_values_are_the_same_pixels(header: str) -> None:
    stored = np.array([0, 500, 1000], ">u2")
    body = stored.tobytes() if header[1] in "56" else b"0 500# half\n1000 # largest"
    found = decode(header.encode() + body, rendering=Rendering(Window("fixed", 0, 1000)))
    assert found.ravel()[:: 3 if header[1] in "25" else 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"0 5", "fewer than 3 numbers"), (b"0 x 5", "b'x'"), (b"0 -1 5", "b'-'"), (b"0 4096 5", "numbers above 4095")],
)
def test_a_plain_ppm_of_other_values_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(b"P3 1 1 4095\n" + body)


@pytest.mark.parametrize("header", ["P6 13 17 4095\n", "P3 13 17 4095\n"])
def test_a_color_ppm_of_12_bits_is_read_as_stored(header: str) -> None:
    stored = RANDOM.integers(0, 4096, (17, 13, 3)).astype(np.uint16)
    body = stored.astype(">u2").tobytes() if header.startswith("P6") else " ".join(map(str, stored.ravel())).encode()
    np.testing.assert_array_equal(read(header.encode() + body)[0], stored)


def test_premultiplied_colors_are_divided_by_alpha_and_a_spare_channel_is_left_out() -> None:
    stored = np.array([[[100, 200, 50, 32768, 7], [9, 9, 9, 0, 7], [60000, 3, 0, 30000, 7]]], np.uint16)
    found, alpha = read(tiff(stored, extra=1, photometric=2))
    assert found.tolist() == [[[199, 399, 99], [9, 9, 9], [65535, 6, 0]]]
    assert alpha is not None
    assert alpha.tolist() == [[32768, 0, 30000]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "premultiplied", "P6", "P3"])
def test_deep_images_take_a_few_times_the_memory_of_their_samples(kind: str) -> None:
    stored = RANDOM.integers(0, 65536, (400, 500, 3 if kind[0] == "P" and kind != "PNG" else 4), np.uint16)
    data = {
        "PNG": lambda: png16(stored),
        "TIFF": lambda: tiff(stored, extra=2),
        "premultiplied": lambda: tiff(stored, extra=1),
        "P6": lambda: b"P6 500 400 65535\n" + stored.astype(">u2").tobytes(),
        "P3": lambda: b"P3 500 400 65535\n" + " ".join(map(str, stored.ravel())).encode(),
    }[kind]()
    tracemalloc.start()
    read(data)
    per_pixel = tracemalloc.get_traced_memory()[1] / 2e5
    tracemalloc.stop()
    assert per_pixel < 60


def test_the_reads_of_a_deep_png_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = png16(samples_of("u2", 3))
    at = whole.index(b"IDAT") - 4
    data = whole[:at] + whole[at : at + 12 + int.from_bytes(whole[at : at + 4])]
    data = whole[:at] + (bytes(4) + b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4)) * 4000 + whole[at:]
    monkeypatch.setattr(decoding, "MAX_READS", 5000)
    monkeypatch.setattr(deep, "_loaded", lambda *_: pytest.fail("read again before the reads were counted"))
    with pytest.raises(BadImage, match="too many pieces"):
        decode(data, rendering=Rendering(Window("minmax")))


def test_differences_to_the_left_are_summed_again_in_each_tile_and_for_floats() -> None:
    """Predictors 2 and 3, which libtiff undoes only if it knows the samples."""
    whole, floats = samples_of("u2", 3), samples_of("f4")
    differences = whole.copy()
    differences[:, 1:] -= whole[:, :-1]
    assert np.array_equal(read(tiff(differences, tags={317: 2}))[0], whole)
    planes = np.ascontiguousarray(floats.astype(">f4").view(np.uint8).reshape(17, 13, 4).swapaxes(1, 2)).reshape(17, 52)
    planes[:, 1:] -= planes[:, :-1].copy()
    assert np.array_equal(read(tiff(planes.reshape(17, 13, 4).view("<f4")[..., 0], tags={317: 3}))[0], floats)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(samples_of("u2", 5), extra=0, photometric=1), "TIFF of 5 channels"),
        (tiff(samples_of("u2"), tags={259: 7}), "TIFF of more than 8 bits with compression 7"),
        (tiff(samples_of("f8"), tags={256: 12_000, 257: 12_000}), "more than 1 GiB"),
        (tiff(samples_of("f8", 3), tags={273: 3000}), "truncated"),
        (tiff(samples_of("u2"), tags={278: 5}), "fewer strips"),
        (tiff(samples_of("u2"), tags={278: 0}), "broken image: integer division"),
        (png16(samples_of("u2", 3))[:500], "truncated"),
        (b"P6 13 17 4095\n" + bytes(900), "buffer is smaller"),
    ],
    ids=["channels", "compression", "bomb", "cut TIFF", "strips", "no rows", "cut PNG", "cut PPM"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_layout_that_is_not_supported_and_a_broken_file_are_one_bad_image(data: bytes, reason: str) -> None:
    with pytest.raises((OSError, ValueError), match=reason):
        decode(data, rendering=Rendering(Window("minmax")))


# the window


@pytest.mark.parametrize(
    ("text", "samples", "expected"),
    [
        ("0,4095", np.array([[0, 2047, 2048, 4095, 60000]], np.uint16), [0, 127, 128, 255, 255]),
        ("0,65535", np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
        ("-1000,1000", np.array([[-2000, -1000, 0, 1000, 5000]], np.int32), [0, 0, 128, 255, 255]),
        ("0,1", np.array([[-0.5, 0, 0.25, 1, 7]], np.float32), [0, 0, 64, 255, 255]),
        ("0,1", np.array([[np.nan, np.inf, -np.inf, 0.2]], np.float32), [0, 255, 0, 51]),
        ("minmax", np.array([[1000, 1500, 2000]], np.uint16), [0, 128, 255]),
        ("minmax", np.array([[np.nan, 1, 2, np.inf]], np.float32), [0, 0, 255, 255]),
        ("minmax", np.full((1, 3), 700, np.uint16), [0, 0, 0]),
        ("percentile", np.full((1, 3), -2.5, np.float32), [0, 0, 0]),
        ("minmax", np.array([[-(2**31), 2**31 - 1]], np.int32), [0, 255]),
        ("auto(0,4095)", np.array([[0, 4095]], np.uint16), [0, 255]),
    ],
)
def test_a_window_maps_its_ends_to_0_and_255(text: str, samples: Samples, expected: list[int]) -> None:
    assert Window.parse(text).eight_bit(samples).tolist() == [expected]


def test_percentiles_leave_out_one_percent_at_each_end() -> None:
    samples = np.arange(10_001, dtype=np.uint16).reshape(1, -1)
    found = Window("percentile").eight_bit(samples)[0]
    assert (found[:101] == 0).all()
    assert (found[9_900:] == 255).all()
    assert found[5_000] == 128
    assert 0 < (found == 1).sum() < 50


def test_a_table_of_16_bits_and_blocks_of_rows_give_the_same_as_one_formula() -> None:
    samples = samples_of("u2").repeat(40, axis=0)
    expected = np.clip(np.round((samples.astype(float) - 999) * (255 / 50_001)), 0, 255)
    assert np.array_equal(Window("fixed", 999, 51_000).eight_bit(samples), expected)
    assert np.array_equal(Window("fixed", 999, 51_000).eight_bit(samples.astype(np.int32)), expected)


def test_an_image_without_a_finite_value_is_refused() -> None:
    with pytest.raises(ValueError, match="without a finite value"):
        Window("minmax").eight_bit(np.full((2, 2), np.nan, np.float32))


@pytest.mark.parametrize("text", ["", "max", "5", "5,5", "9,1", "0,nan", "0,inf", "1,2,3", "auto(1", "0,x"])
def test_a_window_that_is_none_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--window: must be auto\|minmax\|percentile\|LO,HI with LO < HI, but got "):
        Window.parse(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"window": 5}, "rendering.window: must be text, but got 5"),
        ({"window": "bad"}, "rendering.window: must be auto|minmax|percentile|LO,HI with LO < HI, but got 'bad'"),
        ({"page": "x"}, "rendering.page: must be an integer, but got 'x'"),
        ({"page": None}, "rendering.page: must be an integer, but got None"),
        ({"page": 2.5}, "rendering.page: must be an integer, but got 2.5"),
        ({"page": True}, "rendering.page: must be an integer, but got True"),
        ({"page": 0}, "rendering.page: must be at least 1, but got 0"),
        ({"background": 5}, "rendering.background: must be text, but got 5"),
        ({"background": "red"}, "rendering.background: must be white, black or #rrggbb, but got 'red'"),
    ],
)
def test_a_rendering_of_other_types_is_refused_with_the_file_that_has_it(
    content: dict[str, Any], message: str, trained: tuple[Path, Path, Dataset], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Rendering.of(content)
    for place, name in ((trained[0], RECORD), (trained[0].parent / "data", "manifest.json")):
        shutil.copytree(place, tmp_path / place.name)
        file = tmp_path / place.name / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rendering": content}))
    with pytest.raises(
        BadInput, match=f"^{tmp_path}/checkpoint/{RECORD}: invalid checkpoint record: {re.escape(message)};"
    ):
        read_record(tmp_path / "checkpoint")
    with pytest.raises(
        BadInput, match=rf"^{tmp_path}/data/manifest.json: must be a manifest of format \d, but got .rendering\."
    ):
        open_dataset(f"{tmp_path}/data")


@pytest.mark.parametrize("text", ["auto", "minmax", "percentile", "0,4095", "-0.5,0.25", "auto(0,4095)", "1e-07,1e+20"])
def test_a_rendering_is_the_same_after_a_manifest(text: str) -> None:
    rendering = Rendering.parse(text, 3, "#0A0b0c")
    assert Rendering.of(json.loads(json.dumps(rendering.to_dict()))) == rendering
    assert Rendering.of({}) == Rendering()
    assert Rendering().to_dict() == {}


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 4095, "16-bit")], (0, 4095)),
        ([(3, 900, "16-bit"), (0, 3000, "16-bit")], (0, 4095)),
        ([(0, 4096, "16-bit")], (0, 16383)),
        ([(0, 65535, "16-bit")], (0, 65535)),
        ([(7, 200, "16-bit")], (0, 255)),
        ([(-1024, 3071, "signed 16-bit")], (-8192, 8191)),
        ([(0.1, 0.9, "float")], (0, 1)),
        ([(-0.1, 0.9, "float")], (-1, 1)),
        ([(0, 254.5, "float")], (0, 255)),
        ([], None),
    ],
)
def test_auto_is_the_smallest_nominal_range(
    ranges: list[tuple[float, float, str]], expected: tuple[float, float] | None
) -> None:
    assert nominal_range(ValueRange(*each) for each in ranges) == expected


def test_auto_refuses_what_no_range_holds_and_mixtures() -> None:
    with pytest.raises(BadInput, match="values 0 to 1e\\+20; pass --window LO,HI"):
        nominal_range([ValueRange(0, 1e20, "float")])
    with pytest.raises(BadInput, match="both floats and integers"):
        nominal_range([ValueRange(0, 1, "float"), ValueRange(0, 4095, "16-bit")])


def test_auto_never_clips() -> None:
    with pytest.raises(NeedsWindow, match=r"^16-bit image with values 0 to 5000, outside of 0 to 4095"):
        Window.parse("auto(0,4095)").eight_bit(gradient(5000))
    with pytest.raises(NeedsWindow, match="which none of the images has"):
        Window.parse("auto").eight_bit(gradient(5000))


# whole images


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (png16(gradient(4095)), "16-bit image with values 0 to 4095"),
        (png16(np.stack([gradient(4095)] * 3, -1)), "16-bit image with values 0 to 4095"),
        (tiff(gradient(1000, "i4") - 500), "signed 32-bit image with values -500 to 500"),
        (tiff((gradient(4) / 4).astype(np.float32)), "float image with values 0 to 1"),
        (saved(Image.fromarray(gradient(900)), "TIFF"), "16-bit image with values 0 to 900"),
    ],
    ids=["12 bits", "RGB", "signed", "float", "pillow"],
)
def test_without_a_window_a_deep_image_is_refused_and_never_clipped(data: bytes, seen: str) -> None:
    for refused in (lambda: decode(data), lambda: Encoding()(data), lambda: Encoding(short_side_px=16)(data)):
        with pytest.raises(NeedsWindow) as raised:
            refused()
        assert raised.value.seen == seen


def test_conversion_and_prediction_give_the_same_pixels() -> None:
    deep = np.stack([gradient(4095), gradient(2000), gradient(77)], -1)
    turned = Image.Exif()
    turned[0x0112] = 6
    for text in ("0,4095", "minmax", "percentile", "auto(0,4095)"):
        rendering = Rendering(Window.parse(text))
        for data in (png16(deep), png16(deep, (b"eXIf", turned.tobytes()[6:])), tiff(deep), tiff(deep, tags={274: 8})):
            stored = Encoding(rendering=rendering)(data)
            assert stored.startswith(b"\x89PNG")
            np.testing.assert_array_equal(decode(stored), decode(data, rendering=rendering))


def test_a_deep_image_is_turned_upright() -> None:
    stored = samples_of("u2", 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    rendering = Rendering(Window("fixed", 0, 65535))
    expected = np.rot90((stored / 257).round().astype(np.uint8), -1)
    for data in (png16(stored, (b"eXIf", turned.tobytes()[6:])), tiff(stored, tags={274: 6})):
        np.testing.assert_array_equal(decode(data, rendering=rendering), expected)


def test_white_is_zero_is_inverted_as_it_is_for_8_bits() -> None:
    rendering = Rendering(Window("fixed", 0, 4095))
    found = decode(tiff(gradient(4095), photometric=0), rendering=rendering)
    np.testing.assert_array_equal(found, 255 - decode(tiff(gradient(4095)), rendering=rendering))


EIGHT_BIT = {
    "JPEG": jpegs()[0],
    "PNG": saved(Image.fromarray(gradient(255, "u1")), "PNG"),
    "TIFF": saved(Image.fromarray(gradient(255, "u1")), "TIFF"),
    "RGBA": saved(Image.fromarray(RANDOM.integers(0, 256, (9, 9, 4), "u1")), "PNG"),
    "palette": saved(Image.fromarray(gradient(255, "u1")).convert("P"), "GIF"),
    "bilevel": saved(Image.fromarray(gradient(255, "u1") > 99), "TIFF"),
    "16 bits a pixel": saved(Image.fromarray(gradient(255, "u1")), "BMP"),
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_a_window_does_not_touch_8_bits(name: str) -> None:
    data = EIGHT_BIT[name]
    for text in ("auto", "minmax", "percentile", "0,10"):
        rendering = Rendering(Window.parse(text))
        assert Encoding(rendering=rendering)(data) == data
        np.testing.assert_array_equal(decode(data, rendering=rendering), decode(data))


# pages


def stack(kind: str, **options: Any) -> bytes:
    first, *rest = (Image.fromarray(np.full((8, 9), level, "u1")).convert("RGB") for level in (10, 120, 240))
    return saved(first, kind, save_all=True, append_images=rest, **options)


STACKS = {
    "TIFF": stack("TIFF"),
    "GIF": stack("GIF"),
    "WEBP": stack("WEBP", lossless=True),
    "PNG": stack("PNG"),
}


@pytest.mark.parametrize("kind", STACKS)
def test_the_page_is_chosen_and_the_first_one_keeps_the_bytes(kind: str) -> None:
    data = STACKS[kind]
    assert has_pages(data)
    assert Encoding()(data) == data
    assert (decode(data) == 10).all()
    for page, level in ((2, 120), (3, 240)):
        rendering = Rendering(page=page)
        assert (decode(data, rendering=rendering) == level).all()
        assert (decode(Encoding(rendering=rendering)(data)) == level).all()
    with pytest.raises(ValueError, match=r"^no page 4, which convert --page asked for$"):
        Encoding(rendering=Rendering(page=4))(data)


def test_a_page_of_a_deep_stack_has_its_own_samples() -> None:
    first, second = Image.fromarray(gradient(4095)), Image.fromarray(gradient(4095)[::-1].copy())
    data = saved(first, "TIFF", save_all=True, append_images=[second])
    found = decode(data, rendering=Rendering(Window("minmax"), 2))
    np.testing.assert_array_equal(found[..., 0], Window("minmax").eight_bit(gradient(4095)[::-1]))


def test_a_still_image_is_used_as_it_is_and_a_tiff_of_one_page_has_no_second_one() -> None:
    rendering = Rendering(page=2)
    for data in EIGHT_BIT.values():
        assert not has_pages(data)
        if data[:2] in (b"II", b"MM"):
            with pytest.raises(ValueError, match=r"^no page 2, which convert --page asked for$"):
                decode(data, rendering=rendering)
        else:
            assert Encoding(rendering=rendering)(data) == data
            np.testing.assert_array_equal(decode(data, rendering=rendering), decode(data))
    assert not has_pages(b"GIF89abroken")


def test_the_limits_hold_for_every_page() -> None:
    small, large = Image.new("L", (5, 5)), Image.new("L", (40, 40))
    data = saved(small, "TIFF", save_all=True, append_images=[large])
    assert upright(data, max_pixels=100).size == (5, 5)
    for read in (upright, decode):
        with pytest.raises(TooManyPixels, match=r"^40 x 40 pixels, more than 100$"):
            read(data, max_pixels=100, rendering=Rendering(page=2))
    frame = b"!\xfe" + b"\xff".ljust(256, b"a") * 20_000 + b"\0"
    comments = stack("GIF", duration=100).replace(b"!\xf9\x04", frame + b"!\xf9\x04").replace(frame, b"", 1)
    assert decode(comments).shape == (8, 9, 3)
    assert not has_pages(comments)
    with pytest.raises(ValueError, match="too many pieces"):
        decode(comments, rendering=Rendering(page=2))


# transparency


def glass() -> Samples:
    """Red, half transparent on the left, and transparent on the right."""
    pixels = np.full((8, 8, 4), (200, 0, 0, 128), "u1")
    pixels[:, 4:, 3] = 0
    return pixels


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(glass()), "PNG"),
        saved(Image.fromarray(glass()), "WEBP", lossless=True, exact=True),
        png16(glass().astype(np.uint16) * 257),
        tiff(glass().astype(np.uint16) * 257, extra=2),
    ],
    ids=["PNG", "WEBP", "16 bits", "TIFF"],
)
def test_transparency_shows_the_background_and_without_one_the_stored_color(data: bytes) -> None:
    window = Window("fixed", 0, 65535)
    assert (decode(data, rendering=Rendering(window)) == (200, 0, 0)).all()
    for text, behind in (("white", 255), ("black", 0), ("#808080", 128)):
        rendering = Rendering.parse("0,65535", 1, text)
        found = decode(data, rendering=rendering)
        assert (found[:, 4:] == behind).all()
        assert np.abs(found[:, :4].astype(int) - (np.array([200, 0, 0]) + behind) / 2).max() <= 1
        np.testing.assert_array_equal(decode(Encoding(rendering=rendering)(data)), found)


def test_a_transparent_color_of_a_png_and_of_a_palette_shows_the_background() -> None:
    deep = png16(np.full((4, 4), 700, np.uint16), (b"tRNS", (700).to_bytes(2)))
    assert (decode(deep, rendering=Rendering.parse("0,65535", 1, "white")) == 255).all()
    palette = saved(Image.new("P", (4, 4), 0), "GIF", transparency=0)
    assert (decode(palette, rendering=Rendering.parse(background="#112233")) == (0x11, 0x22, 0x33)).all()


def test_an_opaque_image_is_kept_whatever_the_background() -> None:
    for name in ("JPEG", "PNG", "TIFF"):
        assert Encoding(rendering=Rendering(background=(1, 2, 3)))(EIGHT_BIT[name]) == EIGHT_BIT[name]


@pytest.mark.parametrize("text", ["", "red", "#12345", "#gggggg", "112233"])
def test_a_background_that_is_no_color_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--background: must be white, black or #rrggbb, but got "):
        Rendering.parse(background=text)


# a dataset, a model, and its predictions


def fields(folder: Path, largest: int = 4095, count: int = 8) -> Path:
    """Two classes of 16-bit PNGs with noise, up to `largest`."""
    random = np.random.default_rng(1)
    for name, bottom in (("dark", 0), ("light", largest // 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            samples = random.integers(bottom, bottom + largest // 2 + 2, (40, 36)).astype(np.uint16)
            samples[0, 0] = bottom + (largest + 1) // 2
            (folder / name / f"{number}.png").write_bytes(png16(samples))
    return folder


def pixels_of(uri: str) -> list[Samples]:
    split = open_dataset(uri).split("train")
    with RowReader(split) as reader:
        return [decode(data) for data in reader.read(np.arange(split.num_samples))]


def test_a_set_of_deep_images_is_refused_in_one_line_that_says_the_range(tmp_path: Path) -> None:
    source = fields(tmp_path / "photos")
    with pytest.raises(BadInput) as raised:
        verb.main(["folder", str(source), f"{tmp_path}/out"])
    line = str(raised.value)
    assert line.startswith(f"{source}/")
    assert "must be an 8-bit image, but got 16-bit image with values " in line
    assert line.endswith(" (10 such images have 0 to 4095); convert with --window auto|minmax|percentile|LO,HI")
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("window", "kept"),
    [("auto", "auto(0,4095)"), ("0,4095", "0,4095"), ("minmax", "minmax"), ("percentile", "percentile")],
)
def test_the_window_of_a_conversion_is_kept_in_the_manifest_and_in_the_dataset(
    window: str, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fields(tmp_path / "photos")
    verb.main(["folder", str(source), f"{tmp_path}/out", "--window", window, "--test-frac", "0"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rendering"] == {"window": kept}
    dataset = open_dataset(f"{tmp_path}/out")
    assert dataset.rendering == Rendering(Window.parse(kept))
    assert f"window of images with more than 8 bits per channel: {kept}\n" in capsys.readouterr().out
    stored = {image.tobytes() for image in pixels_of(f"{tmp_path}/out")}
    expected = {decode(path.read_bytes(), rendering=dataset.rendering).tobytes() for path in source.rglob("*.png")}
    assert stored < expected


def test_parquet_with_16_bit_images_is_converted_in_the_same_way_and_opened_directly_it_names_the_row(
    tmp_path: Path,
) -> None:
    deep = [png16(gradient(4095) // (1 + row)) for row in range(6)]
    small = saved(Image.fromarray(gradient(255, "u1")), "PNG")
    images = [{"bytes": data, "path": None} for data in (small, small, *deep)]
    (tmp_path / "raw").mkdir()
    table = pa.table({"image": images, "label": [0, 1] * 4}).replace_schema_metadata(schema_metadata(["a", "b"]))
    pq.write_table(table, tmp_path / "raw" / "train-00000-of-00001.parquet")
    split = open_dataset(f"{tmp_path}/raw").split("train")
    with RowReader(split) as reader, pytest.raises(BadInput) as raised:
        list(evaluation_batches(reader, split, View(Preprocessing(16))))
    assert str(raised.value) == (
        f"{tmp_path}/raw: row 2 of train must be an 8-bit image, but got 16-bit image with values 0 to 4095; "
        "convert it with --window auto|minmax|percentile|LO,HI"
    )
    verb.main(["parquet", f"{tmp_path}/raw/*.parquet", f"{tmp_path}/out", "--window", "auto", "--test-frac", "0"])
    assert str(open_dataset(f"{tmp_path}/out").rendering.window) == "auto(0,4095)"


def test_bad_images_are_skipped_by_auto_and_an_image_beyond_the_range_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fields(tmp_path / "photos")
    (source / "dark" / "0.png").write_bytes((source / "dark" / "0.png").read_bytes()[:200])
    verb.main(["folder", str(source), f"{tmp_path}/out", "--window", "auto", "--skip-bad", "--test-frac", "0"])
    assert str(open_dataset(f"{tmp_path}/out").rendering.window) == "auto(0,4095)"
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 1
    (source / "dark" / "0.png").write_bytes(png16(gradient(9000)))
    monkeypatch.setattr(Encoding, "value_range", lambda *_: ValueRange(0, 4000, "16-bit"))
    with pytest.raises(BadInput, match="values 0 to 9000, outside of 0 to 4095, which --window auto found"):
        verb.main(["folder", str(source), f"{tmp_path}/other", "--window", "auto"])


@pytest.mark.parametrize("kind", ["u2", "i4", "f4"])
def test_the_images_of_torchvision_keep_their_samples(kind: str) -> None:
    stored = samples_of(kind)
    np.testing.assert_array_equal(read(encode_lossless(Image.fromarray(stored)))[0], stored)


def test_the_summary_counts_images_with_several_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "one.jpg").write_bytes(jpegs()[0])
        (tmp_path / "photos" / name / "many.tif").write_bytes(STACKS["TIFF"])
    options = ["--validation-frac", "0", "--test-frac", "0"]
    verb.main(["folder", f"{tmp_path}/photos", f"{tmp_path}/out", *options])
    assert "2 images with several pages: page 1 of each was used (--page)\n" in capsys.readouterr().out
    assert "rendering" not in json.loads((tmp_path / "out" / "manifest.json").read_text())
    verb.main(["folder", f"{tmp_path}/photos", f"{tmp_path}/second", "--page", "2", *options])
    assert {image[0, 0, 0] for image in pixels_of(f"{tmp_path}/second")} == {120, decode(jpegs()[0])[0, 0, 0]}
    with pytest.raises(BadInput, match=r"many.tif: .* no page 4, which convert --page asked for"):
        verb.main(["folder", f"{tmp_path}/photos", f"{tmp_path}/fourth", "--page", "4", *options])


def test_short_side_and_background_go_with_a_window(tmp_path: Path) -> None:
    rendering = Rendering.parse("0,65535", 1, "white")
    stored = Encoding(16, rendering=rendering)(png16(glass().astype(np.uint16).repeat(4, 0).repeat(4, 1) * 257))
    image = Image.open(io.BytesIO(stored))
    assert (image.format, image.size) == ("JPEG", (16, 16))
    assert np.asarray(image)[:, 12:].min() > 245


@pytest.fixture(scope="module")
def trained(small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Dataset]:
    """A checkpoint, the folder of 16-bit images that it was made from, and the dataset."""
    folder = tmp_path_factory.mktemp("depth")
    source = fields(folder / "photos")
    verb.main(["folder", str(source), f"{folder}/data", "--window", "auto", "--background", "white"])
    config = {"backbone": {"model": small_clip}, "optim": {"epochs": 1, "global_batch_size": 4}}
    threads = torch.get_num_threads()
    Run(RunConfig.model_validate(config), Workspace(f"{folder}/data", Ranks.alone())).save(folder / "checkpoint")
    torch.set_num_threads(threads)
    return folder / "checkpoint", source, open_dataset(f"{folder}/data")


def test_a_model_renders_16_bit_files_as_its_training_did_bit_for_bit(trained: tuple[Path, Path, Dataset]) -> None:
    folder, source, dataset = trained
    model = Classifier(folder, Ranks.alone())
    assert model.rendering == dataset.rendering == Rendering.parse("auto(0,4095)", 1, "white")
    assert _from_arrays(dataset.uri, _to_arrays(dataset)).rendering == model.rendering, "the cached index keeps it"
    split = dataset.split("train")
    with RowReader(split) as reader:
        seen = {
            evaluation_image(data, Preprocessing(32)).tobytes() for data in reader.read(np.arange(split.num_samples))
        }
    files = [model.image(path.read_bytes()).tobytes() for path in source.rglob("*.png")]
    assert seen < set(files)
    assert len(set(files)) == 16


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # in Ray Serve
def test_predict_and_serve_take_16_bit_files_and_refuse_what_the_window_does_not_hold(
    trained: tuple[Path, Path, Dataset], tmp_path: Path
) -> None:
    from lift_ray.inference.serve_http import Options
    from lift_ray.inference.serve_model import ModelReplica

    folder, source, _ = trained
    data = next(source.rglob("*.png")).read_bytes()
    (tmp_path / "1.png").write_bytes(data)
    (tmp_path / "2.png").write_bytes(png16(gradient(50_000)))
    job = Job(str(folder), find_images([f"{tmp_path}/*.png"]), top=2, temperature=1.0)
    assert predict(job, tmp_path / "o.parquet", lambda *_: None).num_bad == 1
    errors = pq.read_table(tmp_path / "o.parquet")["error"].to_pylist()
    assert errors == [None, "16-bit image with values 0 to 50000, outside of 0 to 4095, which --window auto found"]
    server = ModelReplica(Options.of({"checkpoint": str(folder), "temperature": 1.0}))
    status, image = server._decoded(data)
    assert status == 200
    assert np.array_equal(image, np.moveaxis(Classifier(folder, Ranks.alone()).image(data), -1, -3))
    assert server._decoded(png16(gradient(50_000)))[0] == 400
    server._max_pixels = 100
    assert server._decoded(data) == (413, "image: must have at most 100 pixels, but got 36 x 40 pixels")
    server._classifier.rendering = Rendering(page=2)
    pages = saved(Image.new("L", (5, 5)), "TIFF", save_all=True, append_images=[Image.new("L", (40, 40))])
    assert server._decoded(pages) == (413, "image: must have at most 100 pixels, but got 40 x 40 pixels")


@pytest.mark.parametrize("shrunk", [[], ["--short-side", "32"]])
def test_predictions_of_the_converted_pages_are_those_of_the_source_files(
    shrunk: list[str], trained: tuple[Path, Path, Dataset], tmp_path: Path
) -> None:
    for name, level in (("a", 50), ("b", 150)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            first, second = (Image.new("RGB", (40, 36), (level, number * 50, page * 60)) for page in (1, 2))
            path = tmp_path / "photos" / name / f"{number}.tif"
            path.write_bytes(saved(first, "TIFF", save_all=True, append_images=[second]))
    options = ["--page", "2", "--validation-frac", "0", "--test-frac", "0", *shrunk]
    verb.main(["folder", f"{tmp_path}/photos", f"{tmp_path}/data", *options])
    shutil.copytree(trained[0], tmp_path / "checkpoint")
    record = tmp_path / "checkpoint" / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"rendering": {"page": 2}}))
    found = []
    for number, source in enumerate((f"{tmp_path}/photos/*/*.tif", f"{tmp_path}/data/*.parquet")):
        out = tmp_path / f"{number}.parquet"
        job = Job(str(tmp_path / "checkpoint"), find_images([source]), top=2, temperature=1.0)
        assert predict(job, out, lambda *_: None).num_bad == 0
        rows = pq.read_table(out).to_pylist()
        found.append(sorted((row["class_1"], row["probability_1"]) for row in rows))
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    tolerance = 1e-3 if shrunk else 1e-6
    np.testing.assert_allclose([p for _, p in found[0]], [p for _, p in found[1]], atol=tolerance)


def test_the_model_card_says_how_images_are_rendered(trained: tuple[Path, Path, Dataset]) -> None:
    card = model_card(Classifier(trained[0], Ranks.alone()), [], {})
    assert (
        "Images with more than 8 bits per channel are mapped to 8 bits: v becomes round(255 (v - 0) / 4095). "
        "Transparent pixels are composed over #ffffff." in card
    )


def test_a_range_is_named_with_the_type_of_its_samples() -> None:
    assert str(value_range(np.array([[0, 4095]], np.uint16))) == "16-bit image with values 0 to 4095"
    assert str(value_range(np.array([[-5, 70000]], np.int32))) == "signed 32-bit image with values -5 to 70000"
    assert str(value_range(np.array([[np.nan, 0.25, 1]], np.float32))) == "float image with values 0.25 to 1"
