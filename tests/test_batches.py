"""The order of samples and the batches: the same for any number of ranks, threads and resumed steps."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded import embedded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from same_batches import assert_same

from lift_ray.data import augment, order
from lift_ray.data import batches as data_batches
from lift_ray.data.augment import (
    SMALLEST_AREA,
    Augmentation,
    Preprocessing,
    View,
    evaluation_image,
    smallest_area,
    square_crop,
)
from lift_ray.data.batches import ONE_THREAD, Batch, Decoders, evaluation_batches, training_batches
from lift_ray.data.convert.shards import publish, write_split
from lift_ray.data.dataset import Shard, Split
from lift_ray.data.decode import READABLE
from lift_ray.data.open import open_dataset
from lift_ray.data.order import Sampling, epoch_order, rank_positions, rank_slice, steps_per_epoch, times_drawn
from lift_ray.data.reader import RowReader
from lift_ray.data.resolutions import view_batches
from lift_ray.errors import BadInput


@pytest.fixture(scope="module")
def small(small_data: str) -> Split:
    return open_dataset(small_data).split("train")


def train(
    split: Split,
    *,
    size_px: int = 16,
    batch: int = 16,
    seed: int = 0,
    epoch: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    decoders: Decoders = ONE_THREAD,
    patch_dropout: float = 0.0,
) -> list[Batch]:
    sampling = Sampling(seed, batch, rank=rank, world_size=world_size)
    crop = partial(square_crop, smallest=smallest_area("convex", epoch, 4))
    augmentation = Augmentation(Preprocessing(size_px), crop, num_patches=9, patch_dropout=patch_dropout)
    with RowReader(split) as reader:
        batches = training_batches(
            reader, split, sampling, augmentation, epoch=epoch, start_step=start_step, decoders=decoders
        )
        return list(batches)


def made_up(row_groups: list[list[int]], keep: list[bool]) -> Split:
    """A split without files: only its numbers matter here."""
    shards = tuple(Shard(f"train-{i}", tuple(rows)) for i, rows in enumerate(row_groups))
    rows = np.flatnonzero(np.resize(keep, sum(map(sum, row_groups))))
    return Split("train", shards, rows % 3, rows)


@settings(max_examples=100)
@given(
    row_groups=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=4),
    keep=st.lists(st.booleans(), min_size=1, max_size=7),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 99),
)
def test_an_epoch_is_a_permutation(row_groups: list[list[int]], keep: list[bool], seed: int, epoch: int) -> None:
    split = made_up(row_groups, keep)
    assert sorted(epoch_order(split, seed, epoch)) == list(range(split.num_samples))


@settings(max_examples=100)
@given(
    counts=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    power=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
)
def test_classes_are_drawn_in_proportion_to_a_power_of_their_images(counts: list[int], power: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(counts)), counts))
    times = times_drawn(labels, power, random)
    assert times.sum() == len(labels)
    share = np.array(counts) ** power / (np.array(counts) ** power).sum()
    drawn = np.bincount(labels, weights=times, minlength=len(counts))
    assert np.abs(drawn - share * len(labels)).max() < 1 + 1e-6
    for number in range(len(counts)):
        assert np.ptp(times[labels == number]) <= 1


def test_an_epoch_of_balanced_classes_shows_other_images_in_the_next() -> None:
    cut = embedded("train", "caltech101-lt")
    one, other = (epoch_order(cut, 0, epoch, power=0) for epoch in (0, 1))
    assert len(one) == cut.num_samples
    for samples in (one, other):
        drawn = np.bincount(cut.labels[samples], minlength=100)
        assert drawn.max() - drawn.min() <= 2
    frequent = np.flatnonzero(cut.labels == np.bincount(cut.labels).argmax())
    seen = [set(samples) & set(frequent) for samples in (one, other)]
    assert len(seen[0] - seen[1]) > len(frequent) / 8
    assert epoch_order(cut, 0, 0, power=0).tolist() == one.tolist()


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    cut = embedded("train", "caltech101-lt")
    orders = {(seed, epoch): epoch_order(cut, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert all(epoch_order(cut, *key).tolist() == order for key, order in orders.items())
    again = open_dataset("embedded:caltech101-lt").split("train")
    assert epoch_order(again, 1, 1).tolist() == orders[1, 1]


def test_an_epoch_reads_one_row_group_after_another_within_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SHUFFLE_SAMPLES", 100)
    split = made_up([[20] * 60, [20] * 40], [True])
    groups = epoch_order(split, 3, 0) // 20
    read_in_order = np.unique(groups, return_index=True)
    opened = read_in_order[0][np.argsort(read_in_order[1])]
    assert opened.tolist() != sorted(opened.tolist())
    for group in range(100):
        at = np.flatnonzero(groups == group)
        assert at.max() - at.min() < 100 + 2 * 20 + 60  # the buffer, the group, and how uneven chance is
    alive = [len({g for g in groups[:i] if g in set(groups[i:])}) for i in range(0, 2000, 50)]
    assert max(alive) <= (100 + 20 + 60) / 20


def test_the_shuffle_looks_at_fewer_samples_when_they_are_large() -> None:
    shards = (Shard("train-0", (100, 100), (100 * 400_000, 100 * 600_000)),)
    split = Split("train", shards, np.zeros(200, np.int64), np.arange(200))
    assert order.shuffle_buffer(split) == 192 * 2**20 // 500_000
    assert order.shuffle_buffer(made_up([[20]], [True])) == order.SHUFFLE_SAMPLES


def test_an_epoch_mixes_classes_and_differs_from_storage() -> None:
    cut = embedded("train", "caltech101-lt")
    labels = cut.labels[epoch_order(cut, 0, 0)]
    first, second = np.bincount(labels[: len(labels) // 2], minlength=100), np.bincount(labels, minlength=100)
    assert np.corrcoef(first, second)[0, 1] > 0.9
    assert not np.array_equal(epoch_order(cut, 0, 0), np.arange(cut.num_samples))


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_are_the_same_for_any_number_of_ranks(small: Split, world_size: int) -> None:
    alone = train(small)
    ranks = [train(small, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(alone)} == {6}
    for step, whole in enumerate(alone):
        batch = epoch_order(small, 0, 0)[16 * step : 16 * (step + 1)]
        places = [rank_positions(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(places)) == list(range(16))
        for rank, mine in enumerate(places):
            assert torch.equal(ranks[rank][step].images, whole.images[mine])
            assert torch.equal(ranks[rank][step].labels, whole.labels[mine])


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_reads_its_share_of_the_row_groups_and_not_all(world_size: int) -> None:
    """A batch is shared out in storage order: over a whole buffer of row groups a rank touches few of them."""
    split = made_up([[64] * 16], [True])
    order = epoch_order(split, 0, 0)
    for rank in range(world_size):
        batches = [order[at : at + 256] for at in range(0, 1024, 256)]
        touched = {group for batch in batches for group in batch[rank_positions(batch, rank, world_size)] // 64}
        assert 16 / world_size <= len(touched) <= 16 / world_size + 4


def test_an_epoch_holds_the_samples_of_its_order_and_leaves_the_incomplete_batch_out(small: Split) -> None:
    labels = torch.cat([batch.labels for batch in train(small, batch=20)])
    assert steps_per_epoch(small, 20) == 4
    assert labels.tolist() == small.labels[epoch_order(small, 0, 0)[:80]].tolist()


@pytest.mark.parametrize("start_step", [1, 4, 6])
def test_starting_at_a_step_equals_skipping_the_steps_before(small: Split, start_step: int) -> None:
    rest = train(small, world_size=2)[start_step:]
    assert_same(train(small, start_step=start_step, world_size=2), rest, at_least=0)


def test_images_change_with_seed_and_epoch(small: Split) -> None:
    first = [train(small, seed=seed, epoch=epoch)[0].images for seed, epoch in ((0, 0), (1, 0), (0, 1))]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_nothing(small: Split, num_threads: int) -> None:
    assert_same(train(small, decoders=Decoders(num_threads)), train(small))


def test_the_images_of_one_batch_are_shared_by_threads(small: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[str] = []
    plain = augment.training_image

    together = threading.Barrier(3)  # breaks when three are never at work at once

    def noted(*args: Any, **options: Any) -> Any:
        name = threading.current_thread().name
        if name.startswith("lift-decode") and name not in makers:
            together.wait(100)
        makers.append(name)
        return plain(*args, **options)

    monkeypatch.setattr(augment, "training_image", noted)
    with RowReader(small) as reader:
        augmentation = Augmentation(Preprocessing(24), partial(square_crop, smallest=SMALLEST_AREA))
        batches = training_batches(reader, small, Sampling(0, 96), augmentation, epoch=0, decoders=Decoders(3))
        assert len(next(batches).labels) == 96
    assert len({name for name in makers if name.startswith("lift-decode")}) == 3


def patches(batch: Batch) -> torch.Tensor:
    assert batch.patches is not None
    return batch.patches


def test_every_image_keeps_its_own_patches_whatever_the_number_of_ranks(small: Split) -> None:
    assert all(batch.patches is None for batch in train(small))
    alone = train(small, patch_dropout=0.5)
    assert_same([replace(batch, patches=None) for batch in alone], train(small))  # images do not depend on it
    seen = torch.cat([patches(batch) for batch in alone])
    assert seen.shape == (96, 4)
    assert sorted(seen.unique().tolist()) == list(range(9))
    assert bool((seen.diff(dim=1) > 0).all())
    assert len(seen.unique(dim=0)) > 48
    for rank in range(2):
        parts = train(small, patch_dropout=0.5, rank=rank, world_size=2)
        for step, (whole, part) in enumerate(zip(alone, parts, strict=True)):
            mine = rank_positions(epoch_order(small, 0, 0)[16 * step : 16 * (step + 1)], rank, 2)
            assert torch.equal(patches(part), patches(whole)[mine])
    assert patches(train(small, patch_dropout=0.99)[0]).shape == (16, 1)


class NoFiles:
    """A reader whose images are never looked at."""

    def read(self, samples: np.ndarray) -> list[bytes]:
        return [b""] * len(samples)

    def prefetch(self, samples: np.ndarray) -> None:
        """There is nothing to read."""


@settings(max_examples=40)
@given(samples=st.integers(1, 200), share=st.integers(1, 16), world_size=st.sampled_from([1, 2, 4, 8]))
def test_every_rank_takes_the_same_number_of_steps_of_the_same_size(samples: int, share: int, world_size: int) -> None:
    split, batch = made_up([[samples]], [True]), share * world_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "training_image", lambda *_, **__: np.zeros((1, 1, 3), np.uint8))
        sizes = {
            tuple(
                len(part.labels)
                for part in training_batches(
                    NoFiles(),  # type: ignore[arg-type]
                    split,
                    Sampling(0, batch, rank=rank, world_size=world_size),
                    Augmentation(Preprocessing(1), partial(square_crop, smallest=SMALLEST_AREA)),
                    epoch=0,
                )
            )
            for rank in range(world_size)
        }
    assert sizes == {(share,) * (samples // batch)}
    assert steps_per_epoch(split, batch) == samples // batch


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_each_sample_once_in_order(small: Split, world_size: int) -> None:
    test = embedded("test") if world_size == 1 else small
    images = torch.zeros(test.num_samples, 3, 16, 16, dtype=torch.uint8)
    labels = torch.full((test.num_samples,), -1)
    with RowReader(test) as reader:
        for rank in range(world_size):
            parts = list(
                evaluation_batches(
                    reader,
                    test,
                    View(Preprocessing(16)),
                    batch_size=25,
                    rank=rank,
                    world_size=world_size,
                    decoders=Decoders(2),
                )
            )
            mine = rank_slice(test.num_samples, rank, world_size)
            images[mine] = torch.cat([part.images for part in parts])
            labels[mine] = torch.cat([part.labels for part in parts])
        encoded = reader.read(np.arange(test.num_samples))
    assert labels.tolist() == test.labels.tolist()
    for index in range(0, test.num_samples, 7):
        assert np.array_equal(
            images[index].permute(1, 2, 0).numpy(), evaluation_image(encoded[index], Preprocessing(16))
        )


def test_more_ranks_than_samples_leave_some_without_work(small: Split) -> None:
    few = Split("test", small.shards, small.labels[:2], small.rows[:2])
    with RowReader(few) as reader:
        sizes = [
            sum(
                len(b.labels) for b in evaluation_batches(reader, few, View(Preprocessing(16)), rank=rank, world_size=3)
            )
            for rank in range(3)
        ]
    assert sorted(sizes) == [0, 1, 1]


def test_batches_are_made_only_a_few_ahead() -> None:
    asked: list[int] = []

    def make(step: int) -> Batch:
        asked.append(step)
        return Batch(torch.zeros(1), torch.tensor([step]))

    batches = data_batches.made_ahead(make, range(100), 2)
    assert [int(next(batches).labels) for _ in range(3)] == [0, 1, 2]
    batches.close()  # type: ignore[attr-defined]
    assert len(asked) <= 3 + data_batches.AHEAD + 2
    assert [int(batch.labels) for batch in data_batches.made_ahead(make, range(20), 4)] == list(range(20))


def test_a_broken_image_gives_a_one_line_error_that_names_row_and_split(tmp_path: Path, small: Split) -> None:
    with RowReader(small) as reader:
        good = reader.read(np.arange(8))
    samples = [(data, f"{i}.jpg", i % 2) for i, data in enumerate(good)]
    samples[5] = (good[5][: len(good[5]) // 3], "5.jpg", 1)
    folder = str(tmp_path / "broken")
    publish(folder, ["a", "b"], {"train": write_split(folder, "train", samples, ["a", "b"], rows_per_shard=4)})
    split = open_dataset(folder).split("train")
    message = rf"^{folder}: row 5 of train must be a readable image, but got .*; convert again with --skip-bad$"
    with pytest.raises(BadInput, match=message):
        train(split, batch=8)
    with RowReader(split) as reader, pytest.raises(BadInput, match=message):
        list(evaluation_batches(reader, split, View(Preprocessing(16))))
    huge = Image.new("1", (20_000, 20_000))
    bomb, avif = io.BytesIO(), io.BytesIO()
    huge.save(bomb, "PNG")
    Image.effect_noise((64, 64), 90).save(avif, "AVIF")
    cut_avif = avif.getvalue()[:-900]
    heic = b"\0\0\0\x18ftypheic" + bytes(200)
    for broken in (b"not an image", bomb.getvalue(), cut_avif, heic):
        samples[5] = (broken, "5.jpg", 1)
        publish(folder, ["a", "b"], {"train": write_split(folder, "train", samples, ["a", "b"], rows_per_shard=4)})
        split = open_dataset(folder).split("train")
        missing = broken is heic and "HEIF" not in READABLE  # a missing decoder is no reason to skip the image
        expected = message.replace("convert again with --skip-bad", "install it") if missing else message
        with pytest.raises(BadInput, match=expected):
            train(split, batch=8)
        with RowReader(split) as reader, pytest.raises(BadInput, match=expected):
            list(evaluation_batches(reader, split, View(Preprocessing(16), "five_crops")))
        with RowReader(split) as reader, pytest.raises(BadInput, match=expected):
            list(view_batches(reader, split, [View(Preprocessing(16))], batch_size=4))
