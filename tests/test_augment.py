"""Images from their encoded bytes: minimalist augmentation, and the crop for evaluation."""

from __future__ import annotations

import io
import math
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embedded import jpegs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from lift_ray.data.augment import (
    GROWTH,
    MOST_RESIZED,
    SMALLEST_AREA,
    Augmentation,
    Crop,
    FindCrop,
    Preprocessing,
    View,
    any_crop,
    centre_crop,
    corners_and_centre,
    evaluation_image,
    resized_part,
    smallest_area,
    square_crop,
    training_image,
    training_images_on,
)
from lift_ray.data.decode import decode

SIDES = st.integers(1, 3000)
LEVELS = 1 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 0  # torch has other code for old processors
DRAWS = st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3).map(np.array)


def photos() -> list[bytes]:
    return jpegs(12, "train", "caltech101-lt", step=5)


@pytest.mark.parametrize(
    ("schedule", "at_quarter", "at_end"),
    [
        ("convex", 1 - math.sqrt(1 - 0.25**2), 1.0),
        ("linear", 0.25, 1.0),
        ("concave", math.sqrt(1 - 0.75**2), 1.0),
        ("min", 0.0, 0.0),
        ("max", 1.0, 1.0),
    ],
)
def test_the_smallest_area_grows_by_its_schedule(schedule: str, at_quarter: float, at_end: float) -> None:
    first = 1.0 if schedule == "max" else 0.0
    expected = [0.08 + 0.92 * growth for growth in (first, at_quarter, at_end)]
    assert [smallest_area(schedule, epoch, 9) for epoch in (0, 2, 8)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", GROWTH)
def test_a_run_of_one_epoch_uses_the_start_of_its_schedule(schedule: str) -> None:
    assert smallest_area(schedule, 0, 1) == pytest.approx(1.0 if schedule == "max" else SMALLEST_AREA)


@given(schedule=st.sampled_from(sorted(GROWTH)), epochs=st.integers(1, 50))
def test_the_smallest_area_never_falls(schedule: str, epochs: int) -> None:
    areas = [smallest_area(schedule, epoch, epochs) for epoch in range(epochs)]
    assert areas == sorted(areas)
    assert SMALLEST_AREA - 1e-12 <= areas[0] <= areas[-1] <= 1 + 1e-12


def test_convex_lies_below_linear_and_concave_above() -> None:
    for epoch in range(1, 9):
        convex, linear, concave = (smallest_area(name, epoch, 10) for name in ("convex", "linear", "concave"))
        assert convex < linear < concave


@settings(max_examples=300)
@given(width=SIDES, height=SIDES, smallest=st.floats(SMALLEST_AREA, 1), draw=DRAWS)
def test_a_crop_is_a_square_inside_the_image(width: int, height: int, smallest: float, draw: np.ndarray) -> None:
    crop = square_crop(width, height, smallest, draw)
    left, top, side = crop.left, crop.top, crop.width
    assert crop.height == side
    assert 1 <= side <= min(width, height)
    assert 0 <= left <= width - side
    assert 0 <= top <= height - side
    largest = min(width, height) ** 2
    low, high = min(smallest * width * height, largest), largest
    assert math.sqrt(low) - 0.5001 <= side <= math.sqrt(high) + 0.5001


@given(short=st.integers(1, 500), long=st.integers(1, 500))
def test_an_image_too_long_for_the_smallest_area_gives_its_largest_square(short: int, long: int) -> None:
    long += 2 * short  # the largest square holds at most half the image
    for area in (0.0, 0.5, 0.999):
        assert square_crop(short, long, 0.5, np.array([area, 0.0, 0.0])).width == short


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        ([0.0, 0.0, 0.0], (0, 0, 28)),
        ([0.999999, 0.0, 0.0], (0, 0, 100)),
        ([0.0, 0.999999, 0.999999], (72, 72, 28)),
        ([0.5, 0.5, 0.5], (14, 14, 73)),
    ],
)
def test_the_draw_sets_area_left_and_top(draw: list[float], expected: tuple[int, int, int]) -> None:
    left, top, side = expected
    assert square_crop(100, 100, SMALLEST_AREA, np.array(draw)) == Crop(left, top, side, side)


def test_the_area_is_uniform() -> None:
    random = np.random.default_rng(0)
    areas = np.array([square_crop(1000, 1000, 0.08, random.random(3)).width ** 2 / 1e6 for _ in range(4000)])
    quantiles = np.quantile(areas, [0.25, 0.5, 0.75])
    assert quantiles == pytest.approx([0.08 + 0.92 * q for q in (0.25, 0.5, 0.75)], abs=0.03)


def test_the_same_draw_gives_the_same_training_image_and_another_draw_another() -> None:
    for data in photos():
        one = training_image(data, Preprocessing(48), square(0.3, 0.2, 0.9))
        assert one.shape == (48, 48, 3)
        assert one.dtype == np.uint8
        assert np.array_equal(one, training_image(data, Preprocessing(48), square(0.3, 0.2, 0.9)))
        assert not np.array_equal(one, training_image(data, Preprocessing(48), square(0.3, 0.9, 0.9)))


def test_a_crop_of_the_wanted_size_keeps_the_pixels() -> None:
    image = training_image(png(60, 48), Preprocessing(48), square(0.0, 0.999, 0.0, smallest=1.0))
    assert np.array_equal(image, pixels(60, 48)[:, 12:])


def square(*draw: float, smallest: float = SMALLEST_AREA) -> FindCrop:
    return partial(square_crop, smallest=smallest, draw=np.array(draw))


def pixels(width: int, height: int) -> np.ndarray:
    random = np.random.default_rng(width * height)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    """Lossless, so that pixels can be followed."""
    out = io.BytesIO()
    Image.fromarray(pixels(width, height)).convert(mode).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(("size_px", "resized"), [(48, 55), (224, 256), (32, 37)])
def test_evaluation_takes_the_center_of_eight_sevenths(size_px: int, resized: int) -> None:
    for width, height in ((resized, resized), (resized + 20, resized), (resized, resized + 9)):
        left, top = round((width - size_px) / 2), round((height - size_px) / 2)
        whole = pixels(width, height)
        got = evaluation_image(png(width, height), Preprocessing(size_px))
        assert np.array_equal(got, whole[top : top + size_px, left : left + size_px])


@pytest.mark.parametrize(("width", "height"), [(96, 48), (48, 96), (300, 200), (20, 31)])
def test_evaluation_keeps_the_aspect(width: int, height: int) -> None:
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    out = io.BytesIO()
    Image.fromarray(np.stack([x, y, y], -1).round().astype(np.uint8)).save(out, "PNG")
    red, green, _ = evaluation_image(out.getvalue(), Preprocessing(48)).astype(float).transpose(2, 0, 1)
    scale = 55 / min(width, height)
    slope_x = (red[24, 40] - red[24, 8]) / 32 * width * scale / 255
    slope_y = (green[40, 24] - green[8, 24]) / 32 * height * scale / 255
    assert (slope_x, slope_y) == (pytest.approx(1, abs=0.08), pytest.approx(1, abs=0.08))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_of_image_becomes_rgb(mode: str) -> None:
    out = io.BytesIO()
    image = Image.fromarray(pixels(60, 50)).convert(mode)
    image.save(out, "JPEG" if mode == "CMYK" else "PNG")
    assert evaluation_image(out.getvalue(), Preprocessing(48)).shape == (48, 48, 3)
    assert training_image(out.getvalue(), Preprocessing(48), square(0.5, 0.5, 0.5)).shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("mode", "theirs"), [("bicubic", InterpolationMode.BICUBIC), ("bilinear", InterpolationMode.BILINEAR)]
)
def test_random_crops_and_evaluation_images_are_resized_as_asked(mode: str, theirs: InterpolationMode) -> None:
    for number, data in enumerate(photos()):
        image = tv.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
        draw = np.random.default_rng(number).random(3)
        crop = any_crop(image.shape[2], image.shape[1], draw)
        cut = tv.resized_crop(image, crop.top, crop.left, crop.height, crop.width, [48, 48], theirs)
        expected = (cut.flip(-1) if crop.flip else cut).permute(1, 2, 0).numpy()
        augmentation = Augmentation(Preprocessing(48, mode), any_crop)
        assert np.array_equal(augmentation.image(data, draw), expected)
        small = tv.center_crop(tv.resize(image, [55], theirs), [48, 48]).permute(1, 2, 0).numpy()
        assert np.array_equal(evaluation_image(data, Preprocessing(48, mode)), small)
        squashed = tv.resize(image, [48, 48], theirs).permute(1, 2, 0).numpy()
        assert np.array_equal(evaluation_image(data, Preprocessing(48, mode, squash=True)), squashed)
        crops = corners_and_centre(decode(data), Preprocessing(48, mode, squash=True))
        whole = tv.resize(image, [53, 53], theirs).permute(1, 2, 0).numpy()
        assert np.array_equal(crops[0], whole[:48, :48])
        assert np.array_equal(crops[3], whole[5:, 5:])


def test_ten_crops_are_those_of_torchvision_and_the_margin_is_a_setting() -> None:
    for data in photos():
        image = tv.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
        theirs = tv.ten_crop(tv.resize(image, [48 + 9], InterpolationMode.BILINEAR), [48, 48])
        ten = View(Preprocessing(48, "bilinear"), "ten_crops", expand_px=9).of(decode(data))
        assert np.array_equal(ten, np.stack([crop.permute(1, 2, 0).numpy() for crop in theirs]))
        five = View(Preprocessing(48, "bilinear"), "five_crops", expand_px=9).of(decode(data))
        assert np.array_equal(five, ten[:5])
    large = png(300, 300)
    assert np.array_equal(
        View(Preprocessing(224), "five_crops").of(decode(large)),
        View(Preprocessing(224), "five_crops", expand_px=24).of(decode(large)),
    )


def test_augmented_views_are_crops_as_in_training_and_the_same_each_time() -> None:
    data = photos()[0]
    view = View(Preprocessing(48), "augmented", num_augmented=4)
    crops = view.of(decode(data))
    assert crops.shape == (4, 48, 48, 3)
    assert view.shape == (4, 3, 48, 48)
    assert len({crop.tobytes() for crop in crops}) == 4
    assert np.array_equal(crops, view.of(decode(data)))
    draws = np.random.default_rng(0).random((4, 3))
    expected = [training_image(data, Preprocessing(48), partial(any_crop, draw=draw)) for draw in draws]
    assert np.array_equal(crops, np.stack(expected))


def test_images_are_those_of_torchvision_on_tensors_and_within_two_levels_of_pillow() -> None:
    """Of 3 million values, 0.3% differ from Pillow's by one level, and less than ten in a million by two."""
    levels = np.zeros(256, np.int64)
    for number, data in enumerate(jpegs(120, "train", "caltech101-lt", step=3)):
        find = square(*np.random.default_rng(number).random(3))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        crop = find(*image.size)
        ours = training_image(data, Preprocessing(96), find)
        tensor = tv.pil_to_tensor(image)
        theirs = tv.resized_crop(
            tensor, crop.top, crop.left, crop.height, crop.width, [96, 96], InterpolationMode.BICUBIC
        )
        assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        pillow = np.asarray(image.crop(box).resize((96, 96), Image.Resampling.BICUBIC))
        levels += np.bincount(np.abs(ours.astype(int) - pillow).ravel(), minlength=256)
    assert levels[3:].sum() == 0
    assert levels[1] / levels.sum() < 0.01
    assert levels[2] / levels.sum() < 1e-5


@pytest.mark.parametrize("size", [(600, 400), (301, 803)])
def test_reduced_decoding_shows_the_same_part_of_a_large_jpeg(size: tuple[int, int]) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(photos()[3])).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(
        out, "JPEG", quality=92
    )
    for draw in ((0.9, 0.2, 0.6), (0.5, 0.9, 0.1)):
        exact, reduced = (
            training_image(out.getvalue(), Preprocessing(48), square(*draw), reduced=which) for which in (False, True)
        )
        difference = np.abs(exact.astype(int) - reduced)
        shifted = np.abs(exact[:, 4:].astype(int) - reduced[:, :-4]).mean()
        assert 0 < difference.mean() < shifted / 2


def test_reduced_decoding_changes_nothing_where_the_crop_needs_every_pixel() -> None:
    for data in photos():
        assert np.array_equal(
            *(training_image(data, Preprocessing(96), square(0.5, 0.5, 0.5), reduced=which) for which in (False, True))
        )


@pytest.mark.parametrize(("mode", "levels"), [("bicubic", 12), ("bilinear", 1)])
def test_images_made_on_a_device_are_the_same_but_for_rounding(mode: str, levels: int) -> None:
    """The code for a GPU, run on the CPU: it resizes in floats, and rounds and clamps once."""
    to = Preprocessing(48, mode)
    encoded = [*photos()[:6], png(70, 60)]
    draws = np.random.default_rng(0).random((len(encoded), 3))
    finds: list[FindCrop] = [square(*draw) for draw in draws[:4]] + [partial(any_crop, draw=draw) for draw in draws[4:]]
    on_device = training_images_on(torch.device("cpu"), encoded, to, finds)
    for data, find, image in zip(encoded, finds, on_device, strict=True):
        difference = np.abs(training_image(data, to, find).astype(int) - image.permute(1, 2, 0).numpy())
        assert difference.max() <= levels
        assert difference.mean() < 0.5


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_part_of_a_resized_image_has_its_pixels_for_any_sizes(mode: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        height, width, down, right, size_px = (int(side) for side in random.integers(1, 90, 5))
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        down, right = down + size_px, right + size_px
        planar = torch.from_numpy(image).permute(2, 0, 1)[None]
        whole = F.interpolate(planar, size=(down, right), mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()
        left, top = (int(random.integers(0, side - size_px + 1)) for side in (right, down))
        part = resized_part(image, right, down, left, top, size_px, mode).astype(int)
        assert np.abs(part - whole[top : top + size_px, left : left + size_px]).max() <= LEVELS, (image.shape, down)


def cut_from_the_whole(
    image: np.ndarray, short_px: int, size_px: int, mode: str, *, five: bool
) -> tuple[np.ndarray, int]:
    """The crops of the whole resized image, (n, size, size, 3), and its number of pixels: how all images were made at first."""
    height, width = image.shape[:2]
    shape = (int(short_px * height / width), short_px) if width < height else (short_px, int(short_px * width / height))
    planar = torch.from_numpy(image).permute(2, 0, 1)[None]
    if shape != (height, width):
        planar = F.interpolate(planar, size=shape, mode=mode, antialias=True)
    whole = planar[0].permute(1, 2, 0).numpy()
    down, right = shape[0] - size_px, shape[1] - size_px
    centre = [(round(down / 2), round(right / 2))]
    places = [(0, 0), (0, right), (down, 0), (down, right), *centre] if five else centre
    return np.stack([whole[top : top + size_px, left : left + size_px] for top, left in places]), math.prod(shape)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("five", [False, True], ids=["center crop", "five crops"])
def test_crops_have_the_pixels_of_the_whole_resized_image_also_where_only_they_are_computed(
    five: bool, mode: str
) -> None:
    short_px, size_px = 55, 50 if five else 48
    make = corners_and_centre if five else lambda image, to: centre_crop(image, to)[None]
    random, strips = np.random.default_rng(0), 0
    for long, short in (
        (61, 60),
        (500, 400),
        (56, 55),
        (90, 30),
        (320, 40),
        (700, 40),
        (1000, 7),
        (2600, 90),
        (3000, 200),
        (4000, 30),
        (5000, 100),
    ):
        noise = random.integers(0, 256, (short, long, 3), dtype=np.uint8)
        for image in (noise, noise.transpose(1, 0, 2), np.where(noise > 127, 255, 0).astype(np.uint8)):
            expected, pixels = cut_from_the_whole(image, short_px, size_px, mode, five=five)
            difference = np.abs(make(image, Preprocessing(size_px, mode)).astype(int) - expected)
            is_whole = pixels <= MOST_RESIZED * len(expected) * size_px**2
            assert difference.max() <= (0 if is_whole else LEVELS), image.shape
            strips += not is_whole
    assert strips >= 9


@pytest.mark.parametrize("size", [(1, 1_000_000), (20_000, 5)])
def test_the_memory_for_a_line_follows_the_output(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    Image.new("1", size, 1).save(out, "PNG")
    largest, interpolate = 0, F.interpolate

    def counted(image: torch.Tensor, size: tuple[int, int], **options: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, math.prod(size))
        return interpolate(image, size=size, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "interpolate", counted)
    tracemalloc.start()
    try:
        assert (evaluation_image(out.getvalue(), Preprocessing(224)) == 255).all()
        assert (corners_and_centre(decode(out.getvalue()), Preprocessing(224)) == 255).all()
        for draw in ((0.0, 0.0, 0.0), (0.9, 0.9, 0.9)):
            assert (training_image(out.getvalue(), Preprocessing(224), square(*draw)) == 255).all()
            assert (
                training_image(out.getvalue(), Preprocessing(224), partial(any_crop, draw=np.array(draw))) == 255
            ).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest <= 224 * 224
    assert peak < 30e6, "bytes of numpy; the decoded line has 3 million"
