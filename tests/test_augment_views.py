"""Several augmented views of each training image, whose features are cached like those of images that never change."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lift_ray.data.augment import Preprocessing, smallest_area, square_crop, training_image
from lift_ray.data.dataset import joined
from lift_ray.data.order import Sampling, view_draws
from lift_ray.methods.world import Ranks
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training import workspace as workspace_module
from lift_ray.training.augmentation import view_of_epoch
from lift_ray.training.batches import image_batches
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

torch.set_num_threads(1)


def config(clip: str = "embedded:lift-small", kind: str = "mda", views: int | None = 2, **own: Any) -> RunConfig:
    overrides = {
        "backbone.model": clip,
        "tuner.kind": "adaptformer",
        "tuner.blocks.last": 1,
        "optim.global_batch_size": 16,
        "optim.epochs": 4,
        "augment.kind": kind,
        "augment.views": views,
        **{name.replace("__", "."): value for name, value in own.items()},
    }
    return RunConfig.model_validate(apply_overrides({}, overrides, RunConfig))


@pytest.mark.parametrize(
    ("views", "mda", "crop_flip"),
    [
        (1, [0, 0, 0, 0], [0, 0, 0, 0]),
        (2, [0, 0, 1, 1], [0, 1, 0, 1]),
        (4, [0, 1, 2, 3], [0, 1, 2, 3]),
        (9, [0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_mda_goes_through_its_views_once_and_those_of_crop_flip_alternate(
    views: int, mda: list[int], crop_flip: list[int]
) -> None:
    for kind, expected in (("mda", mda), ("crop_flip", crop_flip)):
        assert [view_of_epoch(config(kind=kind, views=views), epoch) for epoch in range(4)] == expected
    assert view_of_epoch(config(views=None), 1) is None


@pytest.mark.parametrize(
    "own", [{"augment__patch_dropout": 0.5}, {"augment__start_px": 42}, {"augment__decode": "gpu"}]
)
def test_views_are_refused_beside_what_changes_images_in_every_epoch(own: dict[str, Any]) -> None:
    (name,) = own
    with pytest.raises(ValueError, match=rf"views must be alone, but got {name.split('__')[1]} too"):
        config(**own)


@pytest.mark.parametrize("kind", ["mda", "crop_flip"])
@pytest.mark.parametrize("shared", [False, True])
def test_training_on_cached_views_is_training_on_these_images(
    kind: str, shared: bool, small_data: str, small_clip: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFT_CACHE", str(tmp_path))
    files = workspace_module.SharedFeatures() if shared else None
    workspace = Workspace(small_data, Ranks.alone(), files)
    cached = Run(config(small_clip, kind), workspace)
    plain = Run(config(small_clip, kind, backbone__cache_gib=0.0), workspace)
    for _ in range(4):
        ours, theirs = cached.train_epoch(), plain.train_epoch()
        assert ours.train["loss"] == pytest.approx(theirs.train["loss"], abs=1e-5)
    ours, theirs = (list(run.model.trained().values()) for run in (cached, plain))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    # two views of the training images, nothing else
    assert len(workspace.cache) == 2
    if files is not None:
        assert len(list(files.folder.glob("*.features"))) == 2
        files.close()


def test_the_views_of_a_space_are_computed_once_for_all_runs(
    small_data: str, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, passes = Workspace(small_data, Ranks.alone()), []
    plain = workspace_module.evaluation_batches
    monkeypatch.setattr(
        workspace_module, "evaluation_batches", lambda *args, **options: passes.append(args) or plain(*args, **options)
    )
    for lr in (0.01, 0.02):
        run = Run(config(small_clip, optim__lr=lr), workspace)
        for _ in range(4):
            run.train_epoch()
    assert len(passes) == 2
    Run(config(small_clip, augment__schedule="max"), workspace).train_epoch()  # other crops
    assert len(passes) == 3


def test_a_view_is_the_crop_that_its_draws_decide(small_data: str, small_clip: str) -> None:
    workspace, wanted = Workspace(small_data, Ranks.alone()), config(small_clip, backbone__cache_gib=0.0)
    split = workspace.dataset.split("train")
    seen = []
    for epoch in (2, 3):  # both have the second view
        ((images, _), _labels) = next(image_batches(wanted, workspace, epoch, 0))
        _, samples = Sampling(0, 16, wanted.optim.shuffle_bytes).of_epoch(split, epoch)(0)
        crop = partial(square_crop, smallest=smallest_area("convex", 1, 2), draw=view_draws(split, 0, 1, 3)[samples[0]])
        mine = training_image(workspace.reader(split).read(samples[:1])[0], Preprocessing(32), crop)
        expected = workspace.normalizer(wanted)(torch.from_numpy(mine.copy()).movedim(-1, 0))
        assert images is not None
        assert torch.allclose(images[0], expected, atol=1e-5)
        seen.append(int(samples[0]))
    assert seen[0] != seen[1]


def test_draws_stay_with_an_image_in_every_part_of_its_split(small_data: str) -> None:
    splits = Workspace(small_data, Ranks.alone()).dataset.splits
    train, validation = splits["train"], splits["validation"]
    some, others = np.arange(0, train.num_samples, 3), np.arange(5, 20)
    both = joined("train", [(train, some), (validation, others)])
    expected = np.concatenate([view_draws(train, 1, 2, 3)[some], view_draws(validation, 1, 2, 3)[others]])
    assert np.array_equal(view_draws(both, 1, 2, 3), expected)
    assert np.array_equal(view_draws(train.take(some), 1, 2, 3), view_draws(train, 1, 2, 3)[some])
    assert not np.array_equal(view_draws(train, 1, 1, 3), view_draws(train, 1, 2, 3))
