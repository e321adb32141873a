"""The settings tree: defaults, kinds, overrides, derived values, digests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lift_ray.settings.run import RunConfig, apply_overrides, check_global_batch, derived_width

KINDS = {
    "tuner": ("adaptformer", "lora", "linear_probe", "zero_shot"),
    "head": ("cosine",),
    "loss": ("logit_adjusted", "cross_entropy"),
}


def test_the_defaults_are_lift_plus() -> None:
    config = RunConfig()
    assert config.to_dict() == {
        "seed": 0,
        "backbone": {"model": "embedded:lift-tiny", "pretrained": None, "precision": "fp32"},
        "augment": {"schedule": "convex", "patch_dropout": 0.0},
        "tuner": {"kind": "adaptformer", "bottleneck": None, "blocks": None},
        "head": {"kind": "cosine", "scale": 25.0, "init": "semantic", "template": "a photo of a {}."},
        "loss": {"kind": "logit_adjusted", "tau": 1.0},
        "optim": {"epochs": 5, "global_batch_size": 128, "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4},
    }


@pytest.mark.parametrize(("section", "kind"), [(section, kind) for section in KINDS for kind in KINDS[section]])
def test_every_kind_builds_from_its_name_alone(section: str, kind: str) -> None:
    config = RunConfig.model_validate({section: {"kind": kind}})
    assert config.to_dict()[section]["kind"] == kind


@pytest.mark.parametrize("tree", [
    {"tuner": {"bottleneck": 4}}, {"loss": {"tau": 0.5}}, {"head": {"scale": 16.0}}, {"tuner": {}, "loss": {}, "head": {}},
])  # fmt: skip
def test_a_section_without_kind_is_of_the_default_kind(tree: dict[str, Any]) -> None:
    named = {section: {"kind": KINDS[section][0], **fields} for section, fields in tree.items()}
    assert RunConfig.model_validate(tree) == RunConfig.model_validate(named)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().optim.lr = 1.0  # type: ignore[misc]


def test_the_plain_tree_builds_the_same_settings_again() -> None:
    config = RunConfig.model_validate({"tuner": {"kind": "lora", "blocks": [1, 0]}, "optim": {"lr": 1}}).resolve(100, 4)
    assert RunConfig.model_validate(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("tree", "overrides", "expected"), [
    ({}, {"loss.tau": 0.5}, {"loss": {"tau": 0.5}}),
    ({"loss": {"tau": 1.0}}, {"loss.tau": 0.5}, {"loss": {"tau": 0.5}}),
    ({"tuner": {"kind": "lora", "bottleneck": 4}}, {"tuner.kind": "adaptformer"}, {"tuner": {"kind": "adaptformer"}}),
    ({"tuner": {"kind": "lora", "bottleneck": 4}}, {"tuner.kind": "lora"}, {"tuner": {"kind": "lora", "bottleneck": 4}}),
    ({"tuner": {"bottleneck": 4}}, {"tuner.kind": "adaptformer"}, {"tuner": {"kind": "adaptformer", "bottleneck": 4}}),
    ({"tuner": {"bottleneck": 4}}, {"tuner.kind": "zero_shot"}, {"tuner": {"kind": "zero_shot"}}),
    ({"loss": {"tau": 4}}, {"loss.kind": "cross_entropy"}, {"loss": {"kind": "cross_entropy"}}),
    ({"tuner": {"kind": "lora"}}, {"tuner.bottleneck": 2, "tuner.kind": "adaptformer"},
     {"tuner": {"kind": "adaptformer", "bottleneck": 2}}),
    ({"optim": 3}, {"optim.lr": 2.0}, {"optim": {"lr": 2.0}}),
])  # fmt: skip
def test_a_new_kind_drops_the_fields_of_the_old_one(
    tree: dict[str, Any], overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = json.dumps(tree)
    assert apply_overrides(tree, overrides) == expected
    assert json.dumps(tree) == before


TREES = st.fixed_dictionaries({}, optional={
    "seed": st.integers(0, 9),
    "optim": st.fixed_dictionaries({}, optional={"lr": st.floats(0.1, 1), "epochs": st.integers(1, 5)}),
    "loss": st.sampled_from([{}, {"tau": 0.5}, {"kind": "cross_entropy"}]),
    "tuner": st.sampled_from([{}, {"kind": "lora", "bottleneck": 3}, {"bottleneck": 2, "blocks": [1]}, {"kind": "zero_shot"}]),
})  # fmt: skip
OVERRIDES = st.fixed_dictionaries({}, optional={
    "seed": st.integers(0, 9), "optim.lr": st.floats(0.1, 1), "optim.momentum": st.floats(0, 0.9),
    "tuner.kind": st.sampled_from(KINDS["tuner"]), "loss.kind": st.sampled_from(KINDS["loss"]),
})  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(tree=TREES, overrides=OVERRIDES)
def test_overrides_of_a_valid_tree_are_valid_hold_and_change_nothing_else(
    tree: dict[str, Any], overrides: dict[str, Any]
) -> None:
    before, after = RunConfig.model_validate(tree).to_dict(), apply_overrides(tree, overrides)
    got = RunConfig.model_validate(after).to_dict()
    assert apply_overrides(after, overrides) == after
    for path, value in overrides.items():
        *section, leaf = path.split(".")
        assert (got[section[0]] if section else got)[leaf] == value
    touched = {path.split(".")[0] for path in overrides}
    assert {k: v for k, v in got.items() if k not in touched} == {k: v for k, v in before.items() if k not in touched}


@pytest.mark.parametrize(("tree", "classes", "blocks", "width", "tuned"), [
    ({}, 100, 12, 4, list(range(12))),
    ({}, 8142, 12, 256, list(range(12))),
    ({}, 10, 12, 1, list(range(12))),
    ({"tuner": {"kind": "lora"}}, 1000, 12, 16, list(range(12))),
    ({"tuner": {"blocks": [3, 1, 3]}}, 100, 6, 16, [1, 3]),
    ({"tuner": {"bottleneck": 7}}, 100, 2, 7, [0, 1]),
])  # fmt: skip
def test_resolve_fills_width_and_blocks(
    tree: dict[str, Any], classes: int, blocks: int, width: int, tuned: list[int]
) -> None:
    resolved = RunConfig.model_validate(tree).resolve(classes, blocks)
    assert resolved.to_dict()["tuner"]["bottleneck"] == width
    assert resolved.to_dict()["tuner"]["blocks"] == tuned
    assert resolved.resolve(classes, blocks) == resolved


@pytest.mark.parametrize("kind", ["linear_probe", "zero_shot"])
def test_resolve_leaves_a_run_without_blocks_as_it_is(kind: str) -> None:
    config = RunConfig.model_validate({"tuner": {"kind": kind}})
    assert config.resolve(100, 12) == config


@pytest.mark.parametrize("given_blocks", [[4], [0, 1, 2, 3, 4], []])
def test_resolve_refuses_blocks_that_the_tower_lacks(given_blocks: list[int]) -> None:
    config = RunConfig.model_validate({"tuner": {"blocks": given_blocks}})
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        config.resolve(100, 4)
    assert str(caught.value) == f"tuner.blocks: must lie in 0 ... 3, but got {given_blocks}; name at least one"


@given(classes=st.integers(1, 10**6), divisor=st.integers(1, 200))
def test_a_derived_width_is_the_largest_power_of_two_that_fits(classes: int, divisor: int) -> None:
    width = derived_width(classes, divisor)
    assert width & (width - 1) == 0
    assert width == 1 or width * divisor <= classes
    assert 2 * width * divisor > classes


def test_a_digest_is_stable_and_differs_with_any_setting() -> None:
    assert RunConfig().digest() == "5acb500ee4b5"
    tree = RunConfig().to_dict()
    other = [
        {"seed": 1}, {"backbone.model": "ViT-B-16"}, {"backbone.pretrained": "openai"}, {"backbone.precision": "bf16"},
        {"augment.schedule": "linear"}, {"tuner.kind": "lora"}, {"tuner.bottleneck": 4}, {"tuner.blocks": [0]},
        {"head.scale": 20.0}, {"head.init": "random"}, {"head.template": "{}"}, {"loss.kind": "cross_entropy"},
        {"loss.tau": 0.5}, {"optim.epochs": 6}, {"optim.global_batch_size": 64}, {"optim.lr": 0.1},
        {"optim.momentum": 0.0}, {"optim.weight_decay": 0.0},
    ]  # fmt: skip
    digests = {RunConfig.model_validate(apply_overrides(tree, change)).digest() for change in other}
    assert len(digests | {RunConfig().digest()}) == len(other) + 1


@pytest.mark.parametrize(("size", "workers", "advice"), [
    (128, 6, "use 126, or 4 workers"), (128, 3, "use 129, or 2 workers"), (7, 2, "use 8, or 1 worker"),
    (1, 4, "use 4, or 1 worker"),
])  # fmt: skip
def test_a_batch_that_cannot_be_shared_says_what_would_fit(size: int, workers: int, advice: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_global_batch(size, workers)
    assert (
        str(caught.value)
        == f"optim.global_batch_size: must be divisible by {workers} workers, but got {size}; {advice}"
    )


@given(size=st.integers(1, 4096), workers=st.integers(1, 64))
def test_the_advice_for_a_batch_fits(size: int, workers: int) -> None:
    try:
        check_global_batch(size, workers)
        assert size % workers == 0
    except ValueError as error:
        batch, fewer = str(error).split("; use ")[1].replace(" workers", "").replace(" worker", "").split(", or ")
        assert size % workers != 0
        check_global_batch(int(batch), workers)
        check_global_batch(size, int(fewer))
