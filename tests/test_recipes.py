"""The run files of the published recipes say what the papers say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lift_ray.data.longtail import semi_supervised_counts
from lift_ray.settings.methods import LoftConfig, UlfineConfig
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import read_run

FOLDER = Path(__file__).parents[1] / "search_spaces" / "recipes"
NAMES = ("full", "lift", "lift_plus", "linear_probe", "zero_shot")
DATA = {"cifar100_lt": (100, 4), "imagenet_lt": (1000, 32), "places_lt": (365, 8), "inat2018": (8142, 256)}


def test_there_is_every_recipe_for_every_data_set() -> None:
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")}
    assert found == {f"{data}/{name}.yaml" for data in DATA for name in NAMES} | {"cifar100_half/ulfine.yaml"}


def test_ulfine_is_our_reading_with_about_1024_steps_and_can_be_changed_to_its_neighbours() -> None:
    path = FOLDER / "cifar100_half" / "ulfine.yaml"
    config = read_run(path).config
    labelled, _ = semi_supervised_counts(np.full(100, 500), 50, 400, 10, 10)
    assert 1000 <= config.optim.epochs * (labelled.sum() // config.optim.global_batch_size) <= 1024
    assert (config.optim.lr, config.method) == (0.01, UlfineConfig())
    assert read_run(path, {"method.kind": "loft"}).config.method == LoftConfig()


@pytest.mark.parametrize("data", DATA)
def test_lift_plus_is_the_default_but_for_tower_length_and_five_crops(data: str) -> None:
    config = read_run(FOLDER / data / "lift_plus.yaml").config
    epochs = 15 if data == "inat2018" else 5
    changed = {
        "backbone": config.backbone,
        "evaluation": config.evaluation,
        "optim": config.optim.model_copy(update={"epochs": 5}),
    }
    assert (config.optim.epochs, config.evaluation.tte) == (epochs, "five_crops")
    assert RunConfig().model_copy(update=changed) == config.model_copy(update={"optim": changed["optim"]})
    assert config.resolve(DATA[data][0], 12, 768).to_dict()["tuner"]["bottleneck"] == DATA[data][1]


@pytest.mark.parametrize("data", DATA)
def test_lift_trains_longer_at_half_the_rate_with_crops_and_flips(data: str) -> None:
    config = read_run(FOLDER / data / "lift.yaml").config
    assert (config.optim.epochs, config.optim.lr) == (20 if data == "inat2018" else 10, 0.01)
    assert config.augment.kind == "crop_flip"
    assert config.resolve(DATA[data][0], 12, 768).to_dict()["tuner"]["bottleneck"] == DATA[data][1]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ["full", "linear_probe", "zero_shot"])
def test_the_other_recipes_are_of_their_kind_on_the_same_tower(data: str, name: str) -> None:
    run = read_run(FOLDER / data / f"{name}.yaml")
    assert run.tuner.kind == name
    assert run.backbone == read_run(FOLDER / data / "lift_plus.yaml").backbone
    assert run.name == f"{data}-{name}"
