"""What only a GPU shows. Skipped where there is none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded import LIFT_TINY, jpegs
from made_run import run_config
from PIL import Image

from lift_ray.data.augment import Preprocessing, square_crop, training_image, training_images_on
from lift_ray.data.decode import decode, decode_on
from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training.plan import memory
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")


def settings(clip: str, **overrides: Any) -> RunConfig:
    tree = {"backbone": {"model": clip}, "optim": {"epochs": 2, "global_batch_size": 16, "lr": 0.05}}
    return run_config(tree, overrides)


@pytest.fixture(scope="module")
def here(small_data: str) -> Workspace:
    return Workspace(small_data, Ranks.alone(num_cpus=2))


@pytest.fixture(scope="module")
def there(small_data: str) -> Workspace:
    return Workspace(small_data, Ranks.alone(use_gpu=True, num_cpus=2))


def trained(run: Run) -> list[EpochMetrics]:
    return list(run.epochs())


@pytest.fixture(scope="module")
def on_cpu(here: Workspace) -> list[EpochMetrics]:
    return trained(Run(settings(LIFT_TINY), here))


def losses(figures: list[EpochMetrics]) -> list[float]:
    return [f["train/loss"] for f in figures]


def test_fp32_on_a_gpu_is_the_run_of_a_cpu(there: Workspace, on_cpu: list[EpochMetrics]) -> None:
    assert losses(trained(Run(settings(LIFT_TINY), there))) == pytest.approx(losses(on_cpu), rel=1e-3)


@pytest.mark.parametrize("kind", ["adaptformer", "lora", "vpt_deep", "ssf", "full", "linear_probe"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_fp32_learns(here: Workspace, there: Workspace, precision: str, kind: str) -> None:
    lr = 1e-3 if kind == "full" else 0.05
    half = Run(settings(LIFT_TINY, backbone__precision=precision, tuner__kind=kind, optim__lr=lr), there)
    single = Run(settings(LIFT_TINY, tuner__kind=kind, optim__lr=lr), here)
    assert losses(trained(half)) == pytest.approx(losses(trained(single)), rel=0.03)
    assert all(p.dtype == torch.float32 for p in half.model.trained().values())


def test_fp16_scales_the_loss_and_survives_an_overflow(there: Workspace) -> None:
    run = Run(settings(LIFT_TINY, backbone__precision="fp16"), there)
    before = {name: p.detach().clone() for name, p in run.model.trained().items()}
    run.stepper.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**80)  # every gradient overflows
    run.train_step(next(iter(run.batches())))
    assert all(torch.equal(p, before[name]) for name, p in run.model.trained().items())
    assert run.stepper.scaler.get_scale() < 2.0**80


def test_a_run_on_a_gpu_resumes_with_the_same_state(there: Workspace, tmp_path: Path) -> None:
    whole, parts = Run(settings(LIFT_TINY), there), Run(settings(LIFT_TINY), there)
    expected = trained(whole)[-1]
    next(parts.epochs())
    parts.save(tmp_path / "checkpoint")
    again = Run(settings(LIFT_TINY), there)
    again.load(tmp_path / "checkpoint")
    assert trained(again)[-1]["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adaptformer", "lora", "full"])
def test_the_planned_memory_is_what_a_step_takes(small_data: str, kind: str, precision: str) -> None:
    config = settings(
        LIFT_TINY, backbone__precision=precision, tuner__kind=kind, optim__global_batch_size=96, optim__epochs=1
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = Run(config, Workspace(small_data, Ranks.alone(use_gpu=True, num_cpus=2)))
    for batch in run.batches():
        run.train_step(batch)
    taken = torch.cuda.max_memory_allocated() - before
    parts = memory(run.model.cpu(), config, 96)
    planned = parts["tower"] + parts["trained, gradients and optimizer"] + parts["activations"]
    assert 0.75 < taken / planned < 1.4, f"{taken / 2**20:.1f} MiB taken, {planned / 2**20:.1f} planned: {parts}"


def test_jpegs_decoded_on_the_gpu_differ_by_how_color_is_made_larger() -> None:
    images = jpegs(29, "test", step=7)
    png = io.BytesIO()
    Image.open(io.BytesIO(images[0])).save(png, "PNG")
    for one, found in zip([*images, png.getvalue()], decode_on(GPU, [*images, png.getvalue()]), strict=True):
        expected = torch.from_numpy(decode(one)).permute(2, 0, 1).int()
        assert found.device.type == "cuda"
        assert found.shape == expected.shape
        assert (found.cpu().int() - expected).abs().float().mean() < 4


def test_crops_made_on_the_gpu_are_those_of_the_cpu() -> None:
    images, random = jpegs(29, "test", step=7), np.random.default_rng(0)
    draws = random.random((len(images), 3))
    finds = [lambda w, h, draw=draw: square_crop(w, h, 0.3, draw) for draw in draws]
    found = training_images_on(GPU, images, Preprocessing(48), finds).cpu().numpy()
    for one, find, image in zip(images, finds, found, strict=True):
        expected = np.moveaxis(training_image(one, Preprocessing(48), find), -1, 0)
        assert np.abs(image.astype(int) - expected).mean() < 4


def test_a_run_may_decode_on_the_gpu(there: Workspace, on_cpu: list[EpochMetrics]) -> None:
    found = trained(Run(settings(LIFT_TINY, augment__decode="gpu"), there))
    assert losses(found) == pytest.approx(losses(on_cpu), rel=0.1)


def test_the_compiled_step_is_the_plain_one(there: Workspace, on_cpu: list[EpochMetrics]) -> None:
    found = trained(Run(settings(LIFT_TINY, backbone__compile=True), there))
    assert losses(found) == pytest.approx(losses(on_cpu), rel=1e-3)
