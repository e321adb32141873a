"""Weak and strong views, and the stream of pairs of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from embedded import embedded
from torchvision.transforms import v2

from lift_ray.data.augment import Augmentation, evaluation_image
from lift_ray.data.batches import Batch, unlabelled_batches
from lift_ray.data.dataset import Split
from lift_ray.data.decode import Pixels
from lift_ray.data.order import Sampling, epoch_order
from lift_ray.data.reader import RowReader
from lift_ray.data.views import GRAY, LEVEL, NUM_DRAWS, OPERATIONS, STRONG_DRAWS, strong_view, two_views, weak_view

TORCHVISION = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "color": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
}


def pool() -> Split:
    return embedded("unlabelled", "caltech101-half")


def image(number: int = 0) -> Pixels:
    with RowReader(pool()) as reader:
        return evaluation_image(reader.read(np.array([number]))[0], 48)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_torchvisions_randaugment_at_magnitude_10(name: str) -> None:
    reference = v2.RandAugment()
    assert list(reference._AUGMENTATION_SPACE) == list(TORCHVISION.values())
    view = torch.from_numpy(image().copy()).permute(2, 0, 1)
    strengths, signed = reference._AUGMENTATION_SPACE[TORCHVISION[name]]
    magnitudes = strengths(31, 48, 48)
    magnitude = 0.0 if magnitudes is None else float(magnitudes[10])
    for sign in (1, -1) if signed else (1,):
        expected = reference._apply_image_or_video_transform(
            view, TORCHVISION[name], sign * magnitude, v2.InterpolationMode.NEAREST, {torch.Tensor: None}
        )
        got = OPERATIONS[name](view, sign * LEVEL)
        assert (got.int() - expected.int()).abs().max() <= 1
        assert name == "identity" or not torch.equal(got, view)


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
    draw[3:-2] = 0  # identity, twice
    assert (strong_view(here, draw, share) == GRAY).all(-1).sum() == round(48 * share) ** 2
    draw[-2:] = 0
    assert (strong_view(here, draw, share) == GRAY).all(-1).sum() == round(48 * share / 2) ** 2


def test_views_depend_on_their_draws_alone() -> None:
    with RowReader(pool()) as reader:
        (data,) = reader.read(np.array([3]))
    draws = np.random.default_rng(0).random((50, NUM_DRAWS))
    first = [two_views(data, 48, draw, 0.5) for draw in draws]
    torch.manual_seed(1)
    again = [two_views(data, 48, draw, 0.5) for draw in reversed(draws)][::-1]
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
                Augmentation(16, None, num_patches=4, patch_dropout=0.5),
                cutout_frac=0.5,
                start_step=start_step,
                num_steps=num_steps,
                num_threads=num_threads,
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
