"""The embedded CLIP: weights stored as integers, and what they expand into."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lift_ray
from lift_ray.model.backbone import Backbone, load_backbone
from lift_ray.model.merging import write_open_clip
from lift_ray.model.packed import FILE, SMALLEST, pack, unpack

FOLDER = Path(lift_ray.__file__).parent / "assets" / "lift-small"


@pytest.fixture(scope="module")
def small() -> Backbone:
    return load_backbone("embedded:lift-small", None)


@settings(max_examples=8)
@given(spread=st.floats(-6, 4), seed=st.integers(0, 99))
def test_a_large_weight_is_stored_as_integers_to_half_a_step_of_its_row(spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(SMALLEST // 64, 64) * 10.0 ** (spread * torch.rand(SMALLEST // 64, 1))
    stored = pack({"w": weight, "b": weight[0]})
    assert {name: value.dtype for name, value in stored.items()} == {
        "w": torch.int8,
        "w.scale": torch.float16,
        "b": torch.float16,
    }
    found = unpack(stored)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found["w"] - weight).abs() <= 0.57 * step + 2**-18).all(), (
        "half a step, and 127 times the rounding of its scale"
    )
    assert found["b"].dtype == torch.float32


def test_rows_of_zeros_kernels_and_exact_tensors_are_kept() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(SMALLEST // 48, 3, 4, 4)
    kernel[0] = 0
    stored = pack({"kernel": kernel, "table": torch.ones(SMALLEST, 1)}, exact=frozenset({"table"}))
    assert stored["table"].dtype == torch.float16
    found = unpack(stored)
    assert found["kernel"].shape == kernel.shape
    assert (found["kernel"][0] == 0).all()
    assert torch.allclose(found["kernel"], kernel, atol=0.05)


def test_the_embedded_clip_fits_the_package_and_has_a_model_card() -> None:
    assert (FOLDER / FILE).stat().st_size <= 35_000_000
    card = (FOLDER / "README.md").read_text()
    for said in ("MIT", "Tiny ImageNet", "DINOv2", "benchmarks/results/lift_small.jsonl"):
        assert said in card
    assert "@" not in card, "all figures are filled in"


def test_it_expands_to_what_open_clip_computes(small: Backbone, tmp_path: Path) -> None:
    write_open_clip("embedded:lift-small", None, small.tower, tmp_path)
    clip = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    torch.manual_seed(0)
    images, names = torch.randn(3, 3, 84, 84), ["an ewer", "a photo of a wild cat."]
    assert small.projection is not None
    assert small.text is not None
    with torch.inference_mode():
        theirs, ours = clip.encode_image(images), small.tower(images) @ small.projection
        assert (theirs - ours).abs().max() < 1e-5 * theirs.abs().max()
        assert torch.allclose(clip.encode_text(tokenizer(names), normalize=True), small.text(names), atol=1e-6)


def test_its_positions_are_those_of_518_px_so_larger_images_do_not_stretch_the_grid_of_84_px(small: Backbone) -> None:
    assert (small.tower.resolution_px, len(small.tower.positions)) == (84, 37 * 37 + 1)
    large = load_backbone("embedded:lift-small", None, resolution_px=112).tower
    assert large(torch.randn(1, 3, 112, 112)).shape == (1, 384)


def test_it_knows_more_of_the_class_names_than_chance(small: Backbone) -> None:
    related = small.text_embeddings(["sunflower", "water lily", "airplane", "helicopter"], "a photo of a {}.")
    alike = related @ related.T
    assert alike[0, 1] > alike[0, 2]
    assert alike[2, 3] > alike[1, 2]
