"""What is computed once for all runs of a process changes no figure; the settings that only steer the work neither."""

from __future__ import annotations

import functools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded import LIFT_TINY
from made_run import run_config

from lift_ray.data.augment import (
    Preprocessing,
    View,
    any_crop,
    corners_and_centre,
    evaluation_image,
    growing_px,
    training_image,
)
from lift_ray.data.decode import decode
from lift_ray.data.folds import Folds
from lift_ray.data.order import Sampling
from lift_ray.data.reader import RowReader
from lift_ray.errors import BadInput
from lift_ray.evaluation.evaluator import evaluate
from lift_ray.inference.evaluate import evaluate_checkpoint
from lift_ray.methods.world import Ranks
from lift_ray.model.blocks import Block
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training import checkpoint
from lift_ray.training.batches import image_batches, micro_batches
from lift_ray.training.feature_cache import FeatureCache
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace, first_of_each_class


def settings(clip: str, **overrides: Any) -> RunConfig:
    tree = {
        "backbone": {"model": clip},
        "augment": {"kind": "none"},
        "optim": {"epochs": 2, "global_batch_size": 16, "lr": 0.01},
    }
    return run_config(tree, overrides)


@pytest.fixture
def workspace(small_data: str) -> Workspace:
    return Workspace(small_data, Ranks.alone())


def trained(workspace: Workspace, config: RunConfig) -> list[dict[str, float]]:
    keep = ("train/loss", "validation/loss", "validation/accuracy", "validation/mean_class_accuracy")
    return [{name: figures[name] for name in keep} for figures in Run(config, workspace).epochs()]


def assert_near(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {"tuner__kind": "linear_probe"},
        {"tuner__blocks": [1]},
        {"tuner__kind": "partial"},
        {"tuner__kind": "vpt_deep", "tuner__blocks": [1]},
        {"tuner__kind": "linear_probe", "head__kind": "linear"},
    ],
    ids=str,
)
def test_kept_activations_of_frozen_blocks_give_the_same_figures(
    workspace: Workspace, small_clip: str, changes: dict[str, Any]
) -> None:
    kept = trained(workspace, settings(small_clip, **changes))
    assert len(workspace.cache)
    fresh = Workspace(workspace.dataset.uri, Ranks.alone())
    assert_near(trained(fresh, settings(small_clip, backbone__cache_gib=0.0, **changes)), kept)
    assert not len(fresh.cache)


def test_a_second_run_reads_no_image_when_nothing_in_the_tower_is_tuned(
    workspace: Workspace, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(workspace, settings(small_clip, tuner__kind="linear_probe"))
    monkeypatch.setattr(RowReader, "read", lambda *_: pytest.fail("an image was read"))
    assert_near(trained(workspace, settings(small_clip, tuner__kind="linear_probe")), first, 0)
    with pytest.raises(pytest.fail.Exception):
        trained(workspace, settings(small_clip, tuner__kind="lora"))


def test_nothing_is_kept_for_tuned_blocks_and_for_images_that_change(workspace: Workspace, small_clip: str) -> None:
    trained(workspace, settings(small_clip))
    assert not len(workspace.cache)
    trained(workspace, settings(small_clip, tuner__kind="linear_probe", augment__kind="mda"))
    assert [key[-2] for key in workspace.cache] == [workspace.dataset.split("validation").key]


def test_a_linear_probe_from_kept_features_runs_no_block_of_the_tower(
    small_clip: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/kept_features.py measures how much faster that is."""
    ran: list[Block] = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: (ran.append(self), forward(self, *args))[1])
    for cache_gib in (0.0, 2.0):
        own = Workspace(workspace.dataset.uri, Ranks.alone())
        run = Run(settings(small_clip, tuner__kind="linear_probe", backbone__cache_gib=cache_gib), own)
        run.train_epoch()  # keeps the features
        assert ran
        ran.clear()
        run.train_epoch()
        assert bool(ran) == (cache_gib == 0)


@pytest.mark.parametrize("init", ["class_mean", "linear_probe"])
def test_a_classifier_can_start_from_the_features(workspace: Workspace, init: str) -> None:
    run = Run(settings(LIFT_TINY, head__init=init), workspace)
    chance = Run(settings(LIFT_TINY, head__init="random"), workspace).evaluate("validation")
    assert run.evaluate("validation").metrics["mean_class_accuracy"] > 0.3 + chance.metrics["mean_class_accuracy"]
    assert torch.allclose(run.model.head.weight.norm(dim=1), torch.ones(8))


def test_the_first_images_of_each_class_are_taken() -> None:
    labels = np.array([1, 0, 1, 1, 2, 0, 1])
    assert first_of_each_class(labels, 2).tolist() == [0, 1, 2, 4, 5]
    assert first_of_each_class(labels, 9).tolist() == list(range(7))


@pytest.mark.parametrize("kind", ["adaptformer", "linear_probe"])
def test_parts_of_a_batch_add_up_to_the_batch(workspace: Workspace, small_clip: str, kind: str) -> None:
    whole = trained(workspace, settings(small_clip, tuner__kind=kind))
    assert_near(trained(workspace, settings(small_clip, tuner__kind=kind, optim__accumulate=3)), whole)


def test_parts_cover_a_batch_once() -> None:
    for size in range(1, 20):
        for number in range(1, 25):
            parts = micro_batches(size, number)
            assert [i for part in parts for i in range(size)[part]] == list(range(size))
            assert len(parts) == min(size, number)


def test_computing_activations_again_changes_nothing(workspace: Workspace, small_clip: str) -> None:
    once = trained(workspace, settings(small_clip))
    assert_near(trained(workspace, settings(small_clip, backbone__checkpointing=True)), once)


def test_a_compiled_run_gives_the_same_figures(
    workspace: Workspace, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.nn.Module] = []
    traced = functools.partial(
        torch.compile, backend="aot_eager"
    )  # the graph of the real one, without its C++ compiler

    def compiler(model: torch.nn.Module) -> Any:
        asked.append(model)
        return traced(model)

    monkeypatch.setattr(torch, "compile", compiler)
    plain = settings(small_clip, optim__epochs=1, optim__global_batch_size=48)
    compiled = apply_overrides(plain.to_dict(), {"backbone.compile": True}, RunConfig)
    assert_near(trained(workspace, RunConfig.model_validate(compiled)), trained(workspace, plain), 1e-4)
    assert len(asked) == 1


def test_images_grow_over_the_run_in_whole_patches(workspace: Workspace, small_clip: str) -> None:
    assert [growing_px(24, 48, 8, epoch, 4) for epoch in range(4)] == [24, 32, 40, 48]
    assert growing_px(24, 48, 8, 0, 1) == 48
    run = Run(settings(small_clip, augment__kind="mda", augment__start_px=16, optim__epochs=3), workspace)
    tokens: list[int] = []
    run.model.tower.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    for _ in range(3):
        run.train_epoch()
    assert tokens == [5] * 6 + [10] * 6 + [17] * 6


def test_five_crops_are_the_corners_and_the_center_and_their_logits_are_averaged(
    workspace: Workspace, small_clip: str, tmp_path: Path
) -> None:
    split = workspace.dataset.split("test")
    encoded = workspace.reader(split).read(np.arange(1))[0]
    crops = corners_and_centre(decode(encoded), Preprocessing(32))
    assert crops.shape == (5, 32, 32, 3)
    assert len({crop.tobytes() for crop in crops}) == 5
    run = Run(settings(small_clip, evaluation__tte=True), workspace)
    with torch.inference_mode():
        logits = torch.cat([batch.logits for batch in run.predictor.logits(split)])
        pixels = torch.from_numpy(
            np.stack(
                [
                    corners_and_centre(decode(data), Preprocessing(32))
                    for data in workspace.reader(split).read(np.arange(24))
                ]
            )
        ).movedim(-1, -3)
        std, mean = (
            torch.tensor(v).view(3, 1, 1)
            for v in (workspace.backbone(run.config).std, workspace.backbone(run.config).mean)
        )
        by_hand = torch.stack([run.model((pixels[:, i] / 255 - mean) / std) for i in range(5)]).mean(0)
    assert torch.allclose(logits, by_hand, atol=1e-4)
    run.save(tmp_path / "run")
    plain = Run(settings(small_clip), workspace)
    plain.save(tmp_path / "plain")
    asked, own = (
        evaluate_checkpoint(
            tmp_path / name, workspace.dataset.uri, "test", tte="five_crops" if name == "plain" else None
        )[0][0]["test/loss"]
        for name in ("plain", "run")
    )
    assert asked == pytest.approx(own, abs=1e-5) != plain.evaluate("test").metrics["loss"]


@pytest.mark.parametrize(("tte", "number"), [("ten_crops", 10), ("augmented", 3)])
def test_logits_are_averaged_over_the_crops_of_every_mode(
    tte: str, number: int, workspace: Workspace, small_clip: str
) -> None:
    split = workspace.dataset.split("test")
    run = Run(settings(small_clip, evaluation__tte=tte, evaluation__expand_px=9, evaluation__views=3), workspace)
    view = View(Preprocessing(32), tte, 9, 3)
    assert workspace.view(run.config) == view
    crops = np.stack([view.of(decode(data)) for data in workspace.reader(split).read(np.arange(6))])
    assert crops.shape == (6, number, 32, 32, 3)
    pixels = workspace.normalizer(run.config)(torch.from_numpy(crops).movedim(-1, -3))
    with torch.inference_mode():
        logits = torch.cat([batch.logits for batch in run.predictor.logits(split)])[:6]
        by_hand = torch.stack([run.model(pixels[:, i]) for i in range(number)]).mean(0)
    assert torch.allclose(logits, by_hand, atol=1e-4)


def resizing(clip: str, folder: Path, **changes: str) -> str:
    """The same CLIP, with other preprocessing of its weights."""
    shutil.copytree(clip.removeprefix("local-dir:"), folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= changes
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_images_are_resized_as_the_weights_were_trained_or_as_the_settings_say(
    workspace: Workspace, small_clip: str, tmp_path: Path
) -> None:
    split = workspace.dataset.split("train")
    encoded = workspace.reader(split).read(np.arange(16))
    plain = settings(small_clip)
    bilinear = settings(resizing(small_clip, tmp_path / "squash", interpolation="bilinear", resize_mode="squash"))
    cases = [
        (plain, Preprocessing(32, "bicubic")),
        (settings(small_clip, backbone__interpolation="bilinear"), Preprocessing(32, "bilinear")),
        (bilinear, Preprocessing(32, "bilinear", squash=True)),
        (
            run_config(bilinear.to_dict(), {"backbone__interpolation": "bicubic"}),
            Preprocessing(32, "bicubic", squash=True),
        ),
    ]
    for config, expected in cases:
        assert workspace.preprocessing(config) == expected
        run = Run(config, workspace)
        pixels = torch.from_numpy(np.stack([evaluation_image(data, expected) for data in encoded])).movedim(-1, -3)
        with torch.inference_mode():
            by_hand = run.model(workspace.normalizer(config)(pixels))
            cached = next(run.predictor.logits(split)).logits[:16]
        assert torch.allclose(cached, by_hand, atol=1e-4), "cached features are those of the same preprocessing"
        crop = run_config(config.to_dict(), {"augment": {"kind": "crop_flip"}})
        ((images, _), labels) = next(image_batches(crop, workspace, 0, 0))
        draws = np.random.default_rng([0, 0, 0]).random((16, 3))
        rank_samples = Sampling(0, 16, crop.optim.shuffle_bytes).of_epoch(split, 0)
        position, sample = rank_samples(0)
        assert images is not None
        assert labels.tolist() == split.labels[sample].tolist()
        data = workspace.reader(split).read(sample[:1])[0]
        mine = training_image(data, expected, partial(any_crop, draw=draws[position[0]]))
        assert torch.allclose(
            images[0], workspace.normalizer(crop)(torch.from_numpy(mine.copy()).movedim(-1, 0)), atol=1e-5
        )
    with pytest.raises(
        BadInput, match=r"^backbone\.model: must be trained on images that are cropped or squashed .* says longest"
    ):
        Run(settings(resizing(small_clip, tmp_path / "longest", resize_mode="longest")), workspace)


@pytest.mark.parametrize("fold", [None, 2])
def test_fewer_training_images_move_no_class_to_another_group(
    fold: int | None, workspace: Workspace, small_clip: str, tmp_path: Path
) -> None:
    """The classes have 24, 18, 14, 12, 10, 8, 6 and 4 labeled training images."""
    if fold is not None:
        workspace = workspace.on(Folds(3, 0).view(workspace.dataset, fold))
    config = settings(small_clip, evaluation__group_bounds=[10, 20], optim__epochs=1)
    expected = ["many"] + 4 * ["medium"] + 3 * ["few"]
    whole, part = (Run(run_config(config.to_dict(), {"optim__data_frac": frac}), workspace) for frac in (1.0, 0.3))
    assert part.class_counts.sum() < whole.class_counts.sum() / 2
    for run in (whole, part):
        assert run.predictor.groups.names.tolist() == expected
        run.save(tmp_path / run.config.digest())
        record = checkpoint.read_record(tmp_path / run.config.digest())
        assert record.groups.names.tolist() == expected
        assert record.class_counts == run.class_counts.tolist()
    figures = [run.evaluate("test").metrics for run in (whole, part)]
    assert figures[0].keys() == figures[1].keys() >= {"many", "medium", "few"}


def test_the_adjustment_after_training_favours_rare_classes_and_reuses_the_logits(
    workspace: Workspace, small_clip: str
) -> None:
    run = Run(settings(small_clip, optim__lr=0.02), workspace)
    run.train_epoch()
    found = evaluate(run.predictor, workspace.dataset.split("test"), [0.0, 1.0, 100.0])
    none, one, many = (at_tau.metrics for at_tau in found.at_tau)
    assert many["accuracy"] == pytest.approx(1 / 8)  # all in the rarest class
    assert none["loss"] != one["loss"]
    own = Run(settings(small_clip, optim__lr=0.02, evaluation__posthoc_tau=1.0), workspace)
    own.train_epoch()
    assert own.evaluate("test").metrics == pytest.approx(one, abs=1e-6)


def test_a_random_crop_with_flip_is_decided_by_its_draw(workspace: Workspace) -> None:
    encoded = workspace.reader(workspace.dataset.split("train")).read(np.arange(1))[0]
    draws = np.random.default_rng(0).random((40, 3))
    once, again = (
        [training_image(encoded, Preprocessing(16), partial(any_crop, draw=draw)) for draw in draws] for _ in range(2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert len({image.tobytes() for image in once}) == 40
    assert once[0].shape == (16, 16, 3)


def test_a_checkpoint_of_other_classes_or_another_tower_is_refused(
    workspace: Workspace, small_clip: str, tmp_path: Path
) -> None:
    run = Run(settings(small_clip), workspace)
    run.save(tmp_path / "one")
    record = checkpoint.read_record(tmp_path / "one")
    record.class_names[0] = "unicorn"
    with pytest.raises(
        BadInput, match=r"must have the same classes, but it has 8 classes and the dataset 8, which differ in "
    ):
        checkpoint.check_same(tmp_path / "one", record, run.config.to_dict(), workspace.dataset.class_names)
    with pytest.raises(BadInput, match="must have the same settings, but backbone was"):
        Run(settings(LIFT_TINY), workspace).load(tmp_path / "one")


def test_the_cache_computes_an_entry_once_and_counts_all_of_them() -> None:
    cache = FeatureCache()
    calls: list[str] = []

    def compute(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.zeros(10)

    assert cache.fits("a", 40, 40)
    assert not cache.fits("a", 41, 40)
    for _ in range(2):
        assert cache.get("a", lambda: compute("a")).shape == (10,)
    assert calls == ["a"]
    assert cache.fits("a", 10**9, 0), "it is there already"
    assert cache.fits("b", 8, 48)
    assert not cache.fits("b", 9, 48), "what is cached counts too"
    with pytest.raises(BadInput):
        cache.get("c", lambda: _refuse())
    assert list(cache) == ["a"]


def _refuse() -> torch.Tensor:
    raise BadInput("head.init")


def test_folds_share_the_pass_that_starts_their_classifiers(
    workspace: Workspace, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    frozen = Workspace.frozen

    def counted(self: Workspace, config: RunConfig, model: Any, images: Any, samples: Any) -> torch.Tensor:
        passes.append(images.split.name)
        return frozen(self, config, model, images, samples)

    config = settings(small_clip, head__init="class_mean")
    views = [workspace.on(Folds(3).view(workspace.dataset, fold)) for fold in (2, 3)]
    alone = [Workspace(view.dataset, Ranks.alone()) for view in views]
    for one in alone:
        one.cache.fits = lambda *_: False  # type: ignore[method-assign]
    expected = [one.build(one.resolve(config)).head.state_dict() for one in alone]
    monkeypatch.setattr(Workspace, "frozen", counted)
    heads = [view.build(view.resolve(config)).head.state_dict() for view in views]
    assert passes == ["train"]
    for head, other in zip(heads, expected, strict=True):
        torch.testing.assert_close(head, other, atol=1e-5, rtol=0)
    assert not torch.equal(heads[0]["weight"], heads[1]["weight"])
