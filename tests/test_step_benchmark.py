"""benchmarks/step.py: that it counts and compares what it says."""

from __future__ import annotations

import open_clip
import pytest
import step
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lift_ray.model.loading import rebuild

BATCH, CLASSES, BOTTLENECK = 3, 7, 4
COUNTS = torch.arange(1.0, CLASSES + 1)
IMAGES = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def visual() -> nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(16, vision, text).visual


def step_of(model: nn.Module) -> step.Step:
    return step.Step(model, IMAGES, torch.arange(BATCH), COUNTS)


def test_the_counted_flops_are_those_that_torch_counts(visual: nn.Module) -> None:
    """Exactly, when the scores that its attention computes again are added; without them within 3%."""
    tower = rebuild(visual)
    ours = step_of(step.new_lift(tower, BOTTLENECK, CLASSES))

    def linear(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
        return 2 * x.numel() * weight[0]

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
        return int(sdpa_flop_count(q, k, v))

    def attention_backward(
        grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object
    ) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    aten = torch.ops.aten
    further = {
        torch.ops.mkldnn._linear_pointwise: linear,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,  # torch counts those of GPUs alone
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=further) as counter:
        ours()
    counted = step.step_flops(tower, BOTTLENECK, CLASSES, BATCH)
    assert counter.get_total_flops() == counted + step.recomputed_flops(tower, BATCH)
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.03)


def test_the_plain_model_computes_the_same(visual: nn.Module) -> None:
    ours = step.new_lift(rebuild(visual), BOTTLENECK, CLASSES)
    plain = step.Plain(visual, ours).train()
    assert step.difference(step_of(ours), step_of(plain)) < step.TOLERANCE
    with torch.no_grad():
        plain.visual.transformer.resblocks[1].tuner.scale.add_(0.1)
    assert step.difference(step_of(ours), step_of(plain)) > 10 * step.TOLERANCE


def test_a_rounds_ratio_is_formed_within_the_round() -> None:
    rounds = [{"ours": 1.0, "plain": 2.0, "mm 9": 0.5, "x": 0.4}, {"ours": 2.0, "plain": 4.0, "mm 9": 1.0, "x": 0.8}]
    figures = step.evaluate(
        rounds, ["ours", "plain"], flops=300, batch=8, peaks={"mm 9": (None, 200), "x": (None, 200)}
    )
    assert figures["variants"]["ours"]["times_plain_range"] == [2.0, 2.0]
    assert (figures["peak"], figures["mm_peak"]) == ("x", "mm 9")
    assert figures["variants"]["ours"]["share_of_peak"] == pytest.approx(0.6)
    assert figures["variants"]["ours"]["share_of_mm_peak"] == pytest.approx(0.75)
    assert figures["variants"]["plain"]["images_per_s"] == pytest.approx(8 / 3)
