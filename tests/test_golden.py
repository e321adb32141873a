"""Agreement with the reference implementation: figures computed once, stored in tests/golden."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from golden_figures import FOLDER, GOLDEN, drawn

from lift_ray.methods.lift import Lift
from lift_ray.model.backbone import Backbone
from lift_ray.model.heads import CosineHead
from lift_ray.model.loading import rebuild
from lift_ray.model.tuners.config import derived_width
from lift_ray.registry import LOSSES
from lift_ray.settings.run import OptimConfig
from lift_ray.training.step import make_optimizer

INFO: dict[str, Any] = json.loads((FOLDER / "lift_golden_dev.json").read_text())
ALL = {"blocks": [0, 1, 2]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_probe": ("linear_probe", {}),
    "adaptformer": ("adaptformer", {**ALL, "bottleneck": 4}),
    "adaptformer_last1": ("adaptformer", {"blocks": [2], "bottleneck": 4}),
    "adapter": ("adapter", {**ALL, "bottleneck": 4}),
    "lora": ("lora", {**ALL, "bottleneck": 4}),
    "ssf": ("ssf", ALL),
    "vpt_deep": ("vpt_deep", {**ALL, "length": 3}),
    "vpt_shallow": ("vpt_shallow", {"length": 3}),
    "bitfit": ("bitfit", ALL),
    "full": ("full", ALL),
    "partial_1": ("partial", {"blocks": [2]}),
}
CANONICAL = {
    ".attn_in.": ".attn.ssf.in_proj.",
    ".attn_out.": ".attn.ssf.out_proj.",
    ".mlp_1.": ".mlp.ssf.in_proj.",
    ".mlp_2.": ".mlp.ssf.out_proj.",
}


def canonical(name: str) -> str:
    """The reference's name of a parameter of a Lift."""
    name = name.removeprefix("tuner.").removeprefix("tower.").replace("head.", "classifier.")
    for ours, theirs in CANONICAL.items():
        name = name.replace(ours, theirs)
    return name


def is_norm_weight(key: str) -> bool:
    return "ln_" in key and key.endswith("weight")


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    vision = {
        "image_size": INFO["image"],
        "layers": INFO["layers"],
        "width": INFO["width"],
        "patch_size": INFO["patch"],
    }
    text = {
        "context_length": INFO["text"]["context"],
        "vocab_size": INFO["text"]["vocab"],
        "width": INFO["text"]["width"],
        "heads": INFO["text"]["heads"],
        "layers": INFO["text"]["layers"],
    }
    model = open_clip.CLIP(INFO["embed_dim"], {**vision, "head_width": 64}, text, quick_gelu=True)
    state = {
        key: value
        if key == "attn_mask"
        else torch.tensor(math.log(100))
        if key == "logit_scale"
        else drawn("dev/" + key, tuple(value.shape), 0.05, 1.0 if is_norm_weight(key) else 0.0)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def lift_model(clip: open_clip.CLIP, case: str) -> Lift:
    kind, options = CASES[case]
    head = CosineHead(
        drawn("dev/classifier.weight", (INFO["classes"], INFO["width"]), 0.5), INFO["classifier"]["scale"]
    )
    model = Lift(rebuild(clip.visual), {kind: options}, head)
    with torch.no_grad():
        for name, parameter in model.tuner.named_parameters():
            mean = 1.0 if name.endswith(("norm.weight", "scale")) else 0.0
            parameter.copy_(drawn("dev/" + canonical(name), tuple(parameter.shape), 0.1, mean))
    return model


IMAGES = drawn("dev/image", (8, 3, 32, 32))
LABELS = torch.from_numpy(GOLDEN["image_label"]).long()
COUNTS = torch.from_numpy(GOLDEN["class_counts"]).float()
LOG_PRIOR = (COUNTS / COUNTS.sum()).log()


def assert_close(actual: torch.Tensor, key: str, tolerance: float) -> None:
    difference = np.abs(actual.detach().numpy() - GOLDEN[key]).max()
    assert difference <= tolerance, f"{key}: differs by {difference:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_golden_features_logits_loss_and_gradients(clip: open_clip.CLIP, case: str) -> None:
    model = lift_model(clip, case)
    feature = model.feature(IMAGES)
    logits = model.head(feature)
    loss = LOSSES.build("logit_adjusted", COUNTS, tau=1.0)(logits, LABELS)
    assert_close(feature, f"{case}/feature", 2e-5)
    assert_close(logits, f"{case}/logit", 2e-5)
    assert_close(loss, f"{case}/loss", 2e-5)
    loss.backward()
    named = {canonical(name): parameter for name, parameter in model.trained().items()}
    assert sum(p.numel() for p in named.values()) == int(GOLDEN[f"{case}/trainable"])
    assert set(named) == set(INFO["grad_norms"][case])
    for name, norm in INFO["grad_norms"][case].items():
        gradient = named[name].grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize("case", CASES)
def test_golden_five_sgd_steps(clip: open_clip.CLIP, case: str) -> None:
    model = lift_model(clip, case)
    sgd = INFO["sgd"]
    settings = OptimConfig(lr=sgd["lr"], momentum=sgd["momentum"], weight_decay=sgd["weight_decay"])
    optimizer = make_optimizer(model.trained(), settings)
    trace = []
    for _ in range(sgd["steps"]):
        loss = LOSSES.build("logit_adjusted", COUNTS, tau=1.0)(model(IMAGES), LABELS)
        trace.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(torch.stack(trace), f"{case}/loss_trace", 2e-4)


def test_golden_semantic_initialization_and_zero_shot(clip: open_clip.CLIP) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    names = INFO["classnames"]
    tokens = tokenizer(["a photo of a {}.".format(name.replace("_", " ")) for name in names])
    assert np.array_equal(tokens.numpy(), GOLDEN["semantic/tokens"])

    def text(lines: list[str]) -> torch.Tensor:
        return clip.encode_text(tokenizer(lines), normalize=True)

    projection = clip.visual.proj.detach()
    backbone = Backbone("dev", rebuild(clip.visual), (0, 0, 0), (1, 1, 1), text, projection, 100.0)
    weights = backbone.semantic_weights(names, "a photo of a {}.")
    assert_close(weights, "semantic/classifier_weight", 2e-5)
    with torch.no_grad():
        head = backbone.zero_shot_head(names, "a photo of a {}.")
        assert_close(head(backbone.tower(IMAGES)), "zero_shot/logit", 2e-4)


@pytest.mark.parametrize("case", list(INFO["default_dims"]))
def test_golden_derived_widths(case: str) -> None:
    classes, layers = (int(part.split("=")[1]) for part in case.split(","))
    expected = INFO["default_dims"][case]
    assert derived_width(classes, 2 * layers) == expected["adaptformer"]
    assert derived_width(classes, 4 * layers) == expected["lora"]
    assert derived_width(classes, layers) == expected["vpt"]
