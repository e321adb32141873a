"""The run files of the published rows say what the papers say, and there is none for anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lift_ray.data.longtail import semi_supervised_counts
from lift_ray.settings.methods import LoftConfig, UlfineConfig
from lift_ray.settings.run import EvaluationConfig, RunConfig
from lift_ray.settings.run_file import read_run

FOLDER = Path(__file__).parents[1] / "search_spaces" / "recipes"
CLASSES = {"cifar100_lt": 100, "imagenet_lt": 1000, "places_lt": 365, "inat2018": 8142}
CLIP_B, CLIP_L, CLIP_L336, IN21K = (
    "ViT-B-16",
    "ViT-L-14",
    "ViT-L-14-336",
    "timm:vit_base_patch16_224.augreg_in21k_ft_in1k",
)

# recipe -> tower, epochs and rate, as stated in METHODS.md, sections 1 and 5
LIFT = {
    "imagenet_lt/lift": (CLIP_B, 10, 0.01),
    "imagenet_lt/lift_l14": (CLIP_L, 10, 0.01),
    "places_lt/lift": (CLIP_B, 10, 0.01),
    "places_lt/lift_l14": (CLIP_L, 10, 0.01),
    "inat2018/lift": (CLIP_B, 20, 0.01),
    "inat2018/lift_l14": (CLIP_L, 20, 0.01),
    "inat2018/lift_l14_336": (CLIP_L336, 20, 0.01),
    **{f"cifar100_lt/lift{tail}": (CLIP_B, 10, 0.01) for tail in ("", "_50", "_10")},
    **{f"cifar100_lt/lift_in21k{tail}": (IN21K, 10, 0.01) for tail in ("", "_50", "_10")},
}
LIFT_PLUS = {f"{data}/lift_plus": (CLIP_B, 15 if data == "inat2018" else 5, 0.02) for data in CLASSES}
# recipe -> changes of LIFT or LIFT+
OTHERS: dict[str, dict[str, Any]] = {
    "imagenet_lt/full": {"tuner.kind": "full", "optim.lr": 5e-4},
    "places_lt/full": {"tuner.kind": "full", "optim.lr": 1e-3},
    "inat2018/full": {"tuner.kind": "full", "optim.lr": 5e-3, "optim.epochs": 20},
    "imagenet_lt/linear_probe": {"tuner.kind": "linear_probe", "optim.lr": 0.02},
    "places_lt/linear_probe": {"tuner.kind": "linear_probe", "optim.lr": 0.02},
    "inat2018/linear_probe": {"tuner.kind": "linear_probe", "optim.lr": 0.01},
    "imagenet_lt/sparse": {"tuner.kind": "sparse", "tuner.ratio": 0.01},
    "places_lt/sparse": {"tuner.kind": "sparse", "tuner.ratio": 0.005},
    "imagenet_lt/zero_shot": {"tuner.kind": "zero_shot"},
    "places_lt/zero_shot": {"tuner.kind": "zero_shot"},
    "imagenet_lt/full_plus": {"tuner.kind": "full", "optim.lr": 0.001},
    "places_lt/full_plus": {"tuner.kind": "full", "optim.lr": 0.002},
    "imagenet_lt/linear_probe_plus": {"tuner.kind": "linear_probe", "optim.lr": 0.03},
    "places_lt/linear_probe_plus": {"tuner.kind": "linear_probe", "optim.lr": 0.03},
    "imagenet_lt/sparse_plus": {"tuner.kind": "sparse", "tuner.ratio": 0.005},
    "places_lt/sparse_plus": {"tuner.kind": "sparse", "tuner.ratio": 0.005},
}
SHARED = ("cosine_by_epoch", 128, 0.9, 5e-4, "sgd", "natural", 1.0)


def shared(config: RunConfig) -> tuple[Any, ...]:
    optim = config.optim
    return (
        *(optim.schedule, optim.global_batch_size, optim.momentum, optim.weight_decay),
        *(optim.optimizer, optim.sampling, optim.data_frac),
    )


def test_there_is_a_recipe_for_each_published_row_and_no_other() -> None:
    found = {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")}
    assert found == {*LIFT, *LIFT_PLUS, *OTHERS, "base/lift", "base/lift_plus", "cifar100_half/ulfine"}
    assert len(LIFT) == 13


@pytest.mark.parametrize("name", [*LIFT, *LIFT_PLUS])
def test_lift_and_lift_plus_are_as_published(name: str) -> None:
    run = read_run(FOLDER / f"{name}.yaml")
    data, tower, epochs, rate = name.split("/")[0], *(LIFT | LIFT_PLUS)[name]
    assert (run.backbone.model, run.optim.epochs, run.optim.lr) == (tower, epochs, rate)
    assert run.backbone.pretrained == (None if tower == IN21K else "openai")
    assert shared(run.config) == SHARED
    plus = name in LIFT_PLUS
    assert (run.augment.kind, run.backbone.interpolation) == (("mda", "bicubic") if plus else ("crop_flip", "bilinear"))
    init = "class_mean" if tower == IN21K else "semantic"
    assert run.head == RunConfig().head.model_copy(update={"init": init})
    assert (run.tuner, run.loss, run.method) == (RunConfig().tuner, RunConfig().loss, RunConfig().method)
    blocks, width = (24, 1024) if "L-14" in tower else (12, 768)
    bottleneck = 2 ** int(np.log2(CLASSES[data] / (2 * blocks)))
    assert run.config.resolve(CLASSES[data], blocks, width).to_dict()["tuner"]["bottleneck"] == bottleneck


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_methods_have_the_published_rates_on_the_same_protocol(name: str) -> None:
    base = "lift_plus" if name.endswith("_plus") else "lift"
    base = f"{name.split('/')[0]}/{base}" if name != "inat2018/linear_probe" else "imagenet_lt/lift"  # 10 epochs
    ours, theirs = (read_run(FOLDER / f"{one}.yaml", changes) for one, changes in ((name, {}), (base, OTHERS[name])))
    assert ours.config == theirs.config


@pytest.mark.parametrize("name", [*LIFT, *LIFT_PLUS, *OTHERS])
def test_each_recipe_tests_with_five_crops_the_published_groups_and_all_training_images(name: str) -> None:
    run = read_run(FOLDER / f"{name}.yaml")
    assert (run.name, run.train_on) == (name.replace("/", "-"), "train")
    expand_px = 21 if "l14" in name else 24
    assert run.evaluation == EvaluationConfig(tte="five_crops", expand_px=expand_px, group_bounds=[20, 100])
    tail = next((tail for tail in ("-50", "-10") if name.endswith(tail.replace("-", "_"))), "")
    assert run.dataset == f"s3://my-bucket/{name.split('/')[0].replace('_', '-')}{tail}"


def test_each_recipe_is_small_and_says_what_it_repeats() -> None:
    for name in (*LIFT, *LIFT_PLUS, *OTHERS):
        head, *rest = (FOLDER / f"{name}.yaml").read_text().splitlines()
        assert len(rest) <= 8, name
        assert rest[0].startswith("# arXiv 23") or rest[0].startswith("# arXiv 25"), name
        assert "row " in rest[0] or "rate" in rest[0], name
        assert head.startswith("# "), name


def test_ulfine_is_our_reading_with_about_1024_steps_and_can_be_changed_to_its_neighbours() -> None:
    path = FOLDER / "cifar100_half" / "ulfine.yaml"
    config = read_run(path).config
    labelled, _ = semi_supervised_counts(np.full(100, 500), 50, 400, 10, 10)
    assert 1000 <= config.optim.epochs * (labelled.sum() // config.optim.global_batch_size) <= 1024
    assert (config.optim.lr, config.method) == (0.01, UlfineConfig())
    assert read_run(path, {"method.kind": "loft"}).config.method == LoftConfig()
