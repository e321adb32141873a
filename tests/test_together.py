"""Several runs in one pass: each is what it would be alone, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Diverged, Run
from lift_ray.training.together import train_together
from lift_ray.training.workspace import Workspace

torch.set_num_threads(1)

EPOCHS = 2
TRIALS: list[dict[str, Any]] = [
    {"tuner.kind": "adaptformer", "tuner.blocks.last": 1},
    {"tuner.kind": "linear_probe", "optim.lr": 0.1},
    {"tuner.kind": "lora", "tuner.blocks.last": 2, "optim.lr": 0.05},
    {"tuner.kind": "adaptformer", "tuner.blocks.last": 1, "tuner.bottleneck": 3, "loss.tau": 0.5},
    {"tuner.kind": "vpt_deep", "tuner.blocks.last": 1, "optim.optimizer": "adamw", "optim.lr": 0.001},
    {"tuner.kind": "partial", "tuner.last": 1, "optim.lr": 0.001},
    {"tuner.kind": "bitfit", "tuner.blocks.last": 2},
    {"tuner.kind": "adaptformer", "tuner.blocks.last": 2, "extra_tuner": {"kind": "bitfit", "blocks": {"last": 1}}},
]


def config(clip: str, own: dict[str, Any]) -> RunConfig:
    common = {"backbone.model": clip, "augment.kind": "mda", "optim.global_batch_size": 16, "optim.epochs": EPOCHS}
    return RunConfig.model_validate(apply_overrides({}, common | own, RunConfig))


def epoch_of(runs: Sequence[Run]) -> list[EpochMetrics]:
    """Train an epoch of several runs in one pass."""
    train_together(runs)
    assert [run.step for run in runs] == [run.steps_per_epoch for run in runs]
    return [run.train_epoch() for run in runs]


def assert_same(one: Run, other: Run) -> None:
    ours, theirs = one.model.stored(), other.model.stored()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.evaluate("validation").metrics == other.evaluate("validation").metrics


@pytest.fixture(scope="module")
def alone(workspace: Workspace, small_clip: str) -> list[tuple[Run, list[float]]]:
    """Each trial, trained for all epochs, and the loss of each."""
    runs = [Run(config(small_clip, own), workspace) for own in TRIALS]
    return [(run, [run.train_epoch().train["loss"] for _ in range(EPOCHS)]) for run in runs]


@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_a_run_in_a_pack_of_any_size_equals_the_run_alone(
    number: int, workspace: Workspace, alone: list[tuple[Run, list[float]]], small_clip: str
) -> None:
    for start in range(0, len(TRIALS), number):
        runs = [Run(config(small_clip, own), workspace) for own in TRIALS[start : start + number]]
        expected = alone[start : start + number]
        for epoch in range(EPOCHS):
            assert [metrics.train["loss"] for metrics in epoch_of(runs)] == [losses[epoch] for _, losses in expected]
        for run, (other, _) in zip(runs, expected, strict=True):
            assert_same(run, other)


@pytest.mark.parametrize(
    "common", [{"augment.patch_dropout": 0.5}, {"augment.start_px": 16}, {"augment.kind": "crop_flip"}]
)
def test_runs_also_share_parts_of_images_and_growing_images(
    common: dict[str, Any], workspace: Workspace, small_clip: str
) -> None:
    settings = [config(small_clip, own | common) for own in TRIALS[:3]]
    together, apart = ([Run(one, workspace) for one in settings] for _ in range(2))
    for _ in range(EPOCHS):
        losses = [metrics.train["loss"] for metrics in epoch_of(together)]
        assert losses == [run.train_epoch().train["loss"] for run in apart]
    for one, other in zip(together, apart, strict=True):
        assert_same(one, other)


def test_runs_continue_in_the_middle_of_an_epoch_and_wait_less_than_they_train(
    workspace: Workspace, small_clip: str
) -> None:
    (one, _), (other, _) = pairs = [[Run(config(small_clip, own), workspace) for own in TRIALS[:2]] for _ in range(2)]
    for run in pairs[0]:
        batches = run.batches()
        run.train_step(next(batches))
    found = epoch_of(pairs[0])
    expected = epoch_of(pairs[1])
    assert [metrics.train["loss"] for metrics in found] == [metrics.train["loss"] for metrics in expected]
    assert_same(one, other)
    assert all(metrics.seconds["data_wait_s"] < metrics.seconds["train_s"] for metrics in found)


def test_a_run_that_diverges_does_not_disturb_the_others(workspace: Workspace, small_clip: str) -> None:
    wild = Run(config(small_clip, TRIALS[0] | {"optim.lr": 1e30}), workspace)
    run, other = (Run(config(small_clip, TRIALS[1]), workspace) for _ in range(2))
    train_together([wild, run])
    with pytest.raises(Diverged, match=r"^epoch 1, step \d+: the training loss must be finite"):
        wild.train_epoch()
    run.train_epoch()
    other.train_epoch()
    assert_same(run, other)
