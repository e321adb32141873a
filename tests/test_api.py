"""lift_ray as a library: a search and a training from Python are those of the verbs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import lift_ray as lr
from lift_ray.settings.base import settings_given

pytestmark = pytest.mark.usefixtures("same_threads")


def space_of(small_clip: str, **sections: Any) -> lr.SearchSpace:
    """A search of two trials, without early stopping."""
    return lr.SearchSpace(
        {"loss.tau": {"float": [0.5, 2.0]}},
        base=lr.RunConfig(
            backbone=lr.BackboneConfig(model=small_clip),
            tuner=lr.LoraConfig(bottleneck=4),
            optim=lr.OptimConfig(epochs=1, global_batch_size=16, lr=0.05),
        ),
        baselines=[{"name": "LIFT+", "loss.tau": 1.0}],
        **{
            "search": {"trials": 2, "scheduler": {"kind": "none"}, "tte_best": 0},
            **sections,
        },
    )


def test_a_search_from_python_ends_with_its_study_and_its_model(
    small_data: str, small_clip: str, tmp_path: Path, ray_session: None
) -> None:
    import ray

    out = tmp_path / "s"
    study = lr.search(space_of(small_clip), lr.open_dataset(small_data), out=out)
    assert ray.is_initialized()  # the Ray that was there before
    assert study.best.config.tuner == lr.LoraConfig(bottleneck=4, blocks=study.best.config.tuner.blocks)  # type: ignore[attr-defined]
    assert study.best.values["loss.tau"] == study.best.config.loss.tau  # type: ignore[attr-defined]
    trials = study.trials_dataframe()
    assert sorted(trials["number"]) == [0, 1]
    table = study.comparison()
    assert list(table.index) == ["zero-shot", "LIFT+", "best found"]
    assert table.loc["best found", "test/few"] == study.best.metrics["few"]
    assert Path(study.report()).is_file()
    clf = study.classifier(temperature=1)
    assert clf.evaluate(small_data).metrics["accuracy"] == pytest.approx(study.best.metrics["accuracy"], abs=1e-9)
    again = lr.search(space_of(small_clip), small_data, out=out, resume=True)
    assert again.best == study.best
    assert lr.FinishedStudy(out).best.trial == study.best.trial


@pytest.mark.slow
def test_resume_begins_a_search_that_is_not_there_yet(
    small_data: str, small_clip: str, tmp_path: Path, ray_session: None
) -> None:
    space = space_of(small_clip, search={"trials": 1, "scheduler": {"kind": "none"}, "tte_best": 0}, test="none")
    study = lr.search(space, small_data, out=tmp_path / "s", resume=True)
    assert len(study.trials_dataframe()) == 1
    assert set(study.best.metrics) >= {"accuracy", "few"}


def test_a_training_from_python_gives_metrics_history_and_the_model(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    config = lr.RunConfig(
        backbone=lr.BackboneConfig(model=small_clip),
        tuner=lr.LoraConfig(bottleneck=4),
        optim=lr.OptimConfig(epochs=2, global_batch_size=16, lr=0.05),
    )
    data = lr.open_dataset(small_data)
    threads = torch.get_num_threads()
    result = lr.fit(config, data, out=tmp_path / "a")
    assert torch.get_num_threads() == threads
    assert [epoch["epoch"] for epoch in result.history] == [1, 2]
    assert 0 <= result.history[-1]["validation/few"] <= 1
    evaluated = result.classifier.evaluate(data)
    assert result.metrics["few"] == pytest.approx(evaluated.metrics["few"], abs=1e-9)
    with pytest.raises(lr.BadInput, match="must be a new folder"):
        lr.fit(config, data, out=tmp_path / "a")
    assert lr.fit(config, data, out=tmp_path / "a", resume=True).metrics == result.metrics


@pytest.mark.slow
def test_a_training_on_ray_workers_is_that_of_this_process(
    small_data: str, small_clip: str, tmp_path: Path, ray_session: None
) -> None:
    config = lr.RunConfig(
        backbone=lr.BackboneConfig(model=small_clip),
        tuner=lr.LoraConfig(bottleneck=4),
        optim=lr.OptimConfig(epochs=1, global_batch_size=16, lr=0.05),
    )
    alone = lr.fit(config, small_data, out=tmp_path / "alone")
    there = lr.fit(config, small_data, out=tmp_path / "there", workers=1)
    assert there.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-4)


def test_a_space_from_a_file_and_from_python_are_the_same(space_file: Path) -> None:
    from_file = lr.SearchSpace.from_yaml(space_file, {"search.trials": 3})
    tree = dict(YAML(typ="safe").load(space_file.read_text()))
    tree["search"]["trials"] = 3
    made = lr.SearchSpace(tree.pop("space"), **{"base": tree.pop("base", {}), **tree})
    assert made.file == from_file.file


def test_only_the_settings_that_were_given_are_the_base() -> None:
    config = lr.RunConfig(tuner=lr.LoraConfig(bottleneck=8), optim=lr.OptimConfig(lr=0.1))
    assert settings_given(config) == {"tuner": {"kind": "lora", "bottleneck": 8}, "optim": {"lr": 0.1}}
    assert lr.RunConfig.model_validate(settings_given(config)) == config


def test_a_tuner_on_a_backbone_is_a_module_for_ones_own_loop(small_clip: str) -> None:
    backbone = lr.load_backbone(small_clip)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    before = backbone.tower.finish(backbone.tower.embed(images))
    features = lr.add_tuner(backbone, lr.LoraConfig(bottleneck=4))
    assert torch.allclose(features(images), before, atol=1e-5)  # LoRA starts as the identity
    model = lr.add_tuner(backbone, lr.AdaptformerConfig(), class_names=["ewer", "crab", "lamp"])
    optimizer = torch.optim.AdamW(model.trained().values(), lr=0.003)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(backbone.tower.finish(backbone.tower.embed(images)), before)
    assert {name.split(".")[0] for name in model.trained()} == {"tuner", "head"}
    assert lr.add_tuner(backbone, lr.SsfConfig(), num_classes=5)(images).shape == (6, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lr.SearchSpace({"loss.tua": {"float": [0, 1]}}),
            "SearchSpace space.loss.tua: unknown setting 'loss.tua'; did you mean 'loss.tau'?",
        ),
        (
            lambda: lr.SearchSpace({"loss.tau": {"float": [0, 1]}}, trials=3),
            "SearchSpace: unknown section 'trials'; known: ",
        ),
        (
            lambda: lr.search(lr.SearchSpace({"loss.tau": {"float": [0, 1]}})),
            "data: is required, because the space names no dataset, but is missing",
        ),
        (
            lambda: lr.FinishedStudy("nowhere"),
            "must hold a finished search, but there is no study.json; check the path, or continue the search",
        ),
        (
            lambda: lr.fit(lr.RunConfig(), "nowhere"),
            "nowhere: must be a dataset, a folder of class directories, a CSV, ",
        ),
        (
            lambda: lr.SearchSpace.from_yaml("no.yaml"),
            "no.yaml: must be a YAML file, but there is none; check the path",
        ),
    ],
)
def test_what_cannot_be_used_gives_one_line(make: Any, message: str) -> None:
    with pytest.raises(lr.BadInput) as caught:
        make()
    assert str(caught.value).replace(f"{Path.cwd()}/nowhere: ", "").startswith(message)
    assert "\n" not in str(caught.value)


def test_a_width_that_follows_from_the_classes_requires_classes(small_clip: str) -> None:
    with pytest.raises(lr.BadInput, match="derived from the number of classes"):
        lr.add_tuner(lr.load_backbone(small_clip), lr.AdaptformerConfig())


@pytest.mark.slow
def test_a_script_without_a_main_guard_searches_and_stops_the_ray_that_it_started(
    small_data: str, small_clip: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio, ray, lift_ray as lr\n"
        "print('begun')\n"
        f"space = lr.SearchSpace({{'loss.tau': {{'float': [0.5, 2.0]}}}}, base={{'backbone': {{'model': {small_clip!r}}},"
        " 'optim': {'epochs': 1, 'global_batch_size': 16}},"
        " search={'trials': 1, 'scheduler': {'kind': 'none'}, 'tte_best': 0}, scale={'max_concurrent': 1})\n"
        "async def main():  # as in a notebook, where an event loop runs\n"
        f"    return lr.search(space, {small_data!r}, out='s')\n"
        "study = asyncio.run(main())\n"
        "print('ray is running' if ray.is_initialized() else 'ray has ended', len(study.trials_dataframe()))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun") == 1
    assert done.stdout.endswith("ray has ended 1\n")
