"""Weak and strong views, and the stream of pairs of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from embedded import embedded
from PIL import Image, ImageEnhance, ImageOps

from lift_ray.data.augment import Augmentation, Preprocessing, evaluation_image
from lift_ray.data.batches import Batch, Decoders, unlabelled_batches
from lift_ray.data.dataset import Split
from lift_ray.data.decode import Pixels
from lift_ray.data.order import Sampling, epoch_order
from lift_ray.data.reader import RowReader
from lift_ray.data.views import GRAY, NUM_DRAWS, OPERATIONS, STRONG_DRAWS, TwoViews, strong_view, weak_view

AFFINE = Image.Transform.AFFINE
# the operations of FixMatch's published code, on Pillow; strength from 0.1 to 0.9
PUBLISHED: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda here, strength: here,
    "shear_x": lambda here, strength: here.transform(here.size, AFFINE, (1, 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": lambda here, strength: here.transform(here.size, AFFINE, (1, 0, 0, 0.3 * strength, 1, 0)),
    "translate_x": lambda here, strength: here.transform(
        here.size, AFFINE, (1, 0, int(0.3 * strength * here.width), 0, 1, 0)
    ),
    "translate_y": lambda here, strength: here.transform(
        here.size, AFFINE, (1, 0, 0, 0, 1, int(0.3 * strength * here.height))
    ),
    "rotate": lambda here, strength: here.rotate(30 * strength),
    "brightness": lambda here, strength: ImageEnhance.Brightness(here).enhance(0.05 + 0.9 * strength),
    "color": lambda here, strength: ImageEnhance.Color(here).enhance(0.05 + 0.9 * strength),
    "contrast": lambda here, strength: ImageEnhance.Contrast(here).enhance(0.05 + 0.9 * strength),
    "sharpness": lambda here, strength: ImageEnhance.Sharpness(here).enhance(0.05 + 0.9 * strength),
    "posterize": lambda here, strength: ImageOps.posterize(here, 4 + int(4 * strength)),
    "solarize": lambda here, strength: ImageOps.solarize(here, 256 - int(256 * strength)),
    "auto_contrast": lambda here, strength: ImageOps.autocontrast(here),
    "equalize": lambda here, strength: ImageOps.equalize(here),
}


def pool() -> Split:
    return embedded("unlabelled", "caltech101-half")


def image(number: int = 0) -> Pixels:
    with RowReader(pool()) as reader:
        return evaluation_image(reader.read(np.array([number]))[0], Preprocessing(48))


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_fixmatchs_published_code(name: str, strength: float) -> None:
    view = torch.from_numpy(image().copy()).permute(2, 0, 1)
    expected = np.asarray(PUBLISHED[name](Image.fromarray(image()), strength), int)
    got = [OPERATIONS[name](view, level).permute(1, 2, 0).int().numpy() for level in (strength, -strength)]
    same = [float((abs(one - expected) <= 2).mean()) for one in got]
    assert max(same) > 0.97  # rotated and sheared, the nearest pixel may be either of two
    moves = name.partition("_")[0] in ("shear", "translate", "rotate")
    assert np.array_equal(*got) == (not moves)
    assert name == "identity" or strength < 0.9 or not np.array_equal(got[0], image())


def test_half_of_the_operations_are_used_and_all_strengths_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[float] = []

    def note(view: torch.Tensor, level: float) -> torch.Tensor:
        levels.append(round(level, 1))
        return view

    monkeypatch.setattr("lift_ray.data.views.OPERATIONS", {"note": note})
    for draw in np.random.default_rng(0).random((2000, STRONG_DRAWS)):
        strong_view(np.zeros((8, 8, 3), np.uint8), draw, 0.0)
    assert len(levels) == pytest.approx(2000, abs=150)  # two a view with probability 1/2; a standard deviation is 32
    assert set(levels) == {sign * strength / 10 for strength in range(1, 10) for sign in (1, -1)}


def test_a_weak_view_is_the_image_moved_by_at_most_an_eighth_and_flipped_half_of_the_time() -> None:
    here = image()
    middle = np.array([0.9, 6.5 / 13, 6.5 / 13])
    assert np.array_equal(weak_view(here, middle), here)
    assert np.array_equal(weak_view(here, middle * [0, 1, 1]), here[:, ::-1])
    left_top = weak_view(here, np.array([0.9, 0.0, 0.0]))
    assert np.array_equal(left_top[6:, 6:], here[:-6, :-6])
    assert np.array_equal(left_top[6:, :6], here[:-6, 1:7][:, ::-1])
    right_bottom = weak_view(here, np.array([0.9, 0.999, 0.999]))
    assert np.array_equal(right_bottom[:-6, :-6], here[6:, 6:])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_gray_square_grows_with_the_image_and_is_cut_at_its_border(share: float) -> None:
    here = np.zeros((48, 48, 3), np.uint8)
    draw = np.full(STRONG_DRAWS, 0.5)
    draw[3:-2] = 0.5  # no operation
    assert (strong_view(here, draw, share) == GRAY).all(-1).sum() == round(48 * share) ** 2
    draw[-2:] = 0
    assert (strong_view(here, draw, share) == GRAY).all(-1).sum() == round(48 * share / 2) ** 2


def test_views_depend_on_their_draws_alone() -> None:
    with RowReader(pool()) as reader:
        (data,) = reader.read(np.array([3]))
    views, draws = TwoViews(Preprocessing(48), 0.5), np.random.default_rng(0).random((50, NUM_DRAWS))
    first = [views.image(data, draw) for draw in draws]
    torch.manual_seed(1)
    again = [views.image(data, draw) for draw in reversed(draws)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({view[1].tobytes() for view in first}) == 50
    assert first[0].shape == (2, 48, 48, 3)


def batches(
    *, start_step: int = 0, num_steps: int = 4, num_threads: int = 1, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    with RowReader(pool()) as reader:
        return list(
            unlabelled_batches(
                reader,
                pool(),
                Sampling(5, 480, rank=rank, world_size=world_size),
                Augmentation(Preprocessing(16), None, num_patches=4, patch_dropout=0.5),
                cutout_frac=0.5,
                start_step=start_step,
                num_steps=num_steps,
                decoders=Decoders(num_threads),
            )
        )


def test_every_pass_over_the_pool_sees_each_image_once_and_steps_continue_across_passes() -> None:
    labels = np.concatenate([batch.labels.numpy() for batch in batches()])
    order = np.concatenate([epoch_order(pool(), 5, number) for number in (0, 1)])
    # a rank takes a batch in the order of the batch, so the whole is that of the passes
    assert np.array_equal(labels, pool().labels[order[: len(labels)]])
    assert len(labels) == 1920 > pool().num_samples


def test_the_pairs_are_the_same_for_any_start_and_any_number_of_threads_and_ranks() -> None:
    whole = batches()
    assert (whole[0].images.shape, whole[0].patches.shape) == ((480, 2, 3, 16, 16), (480, 2, 2))  # type: ignore[union-attr]
    for later, again in zip(whole[2:], batches(start_step=2, num_steps=2, num_threads=3), strict=True):
        assert torch.equal(later.images, again.images)
        assert torch.equal(later.patches, again.patches)  # type: ignore[arg-type]
    parts = [batches(rank=rank, world_size=2, num_steps=1)[0] for rank in range(2)]

    def content(*of: Batch) -> list[bytes]:
        return sorted(image.numpy().tobytes() for batch in of for image in batch.images)

    assert content(whole[0]) == content(*parts)
    assert [len(part.labels) for part in parts] == [240, 240]
