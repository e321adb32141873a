"""The settings tree: defaults, kinds, overrides, derived values, digests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lift_ray.model.tuners.config import derived_width
from lift_ray.registry import TUNERS
from lift_ray.settings.messages import models_of
from lift_ray.settings.overrides import apply_overrides, parse_overrides
from lift_ray.settings.run import FREE, RunConfig
from lift_ray.settings.run_file import batch_fault, read_run

KINDS: dict[str, tuple[str, ...]] = {  # the default first
    "augment": ("mda", "crop_flip", "none"),
    "tuner": ("adaptformer", *sorted({*TUNERS} - {"adaptformer"})),
    "head": ("cosine", "linear", "l2norm", "layernorm", "text"),
    "loss": (
        "logit_adjusted",
        "cross_entropy",
        "focal",
        "ldam",
        "class_balanced",
        "reweighted",
        "balanced_softmax",
        "lade",
        "gla",
    ),
    "method": ("lift", "fixmatch", "loft", "ulfine", "backdoor"),
}
REQUIRED: dict[str, dict[str, Any]] = {"backdoor": {"members": {"a": {"seed": 1}, "b": {"seed": 2}}}}


def test_the_defaults_are_lift_plus() -> None:
    config = RunConfig()
    assert config.to_dict() == {
        "seed": 0,
        "method": {"kind": "lift"},
        "backbone": {
            "model": "embedded:lift-small",
            "pretrained": None,
            "quickgelu": None,
            "precision": "fp32",
            "resolution_px": None,
            "interpolation": None,
            "compile": False,
            "checkpointing": False,
            "prepacked": False,
            "cache_gib": 2.0,
        },
        "augment": {
            "kind": "mda",
            "views": None,
            "patch_dropout": 0.0,
            "start_px": None,
            "decode": "exact",
            "schedule": "convex",
        },
        "tuner": {"kind": "adaptformer", "bottleneck": None, "blocks": None},
        "extra_tuner": None,
        "head": {"kind": "cosine", "scale": 25.0, "init": "semantic", "template": "a photo of a {}."},
        "loss": {"kind": "logit_adjusted", "label_smoothing": 0.0, "tau": 1.0},
        "optim": {
            "optimizer": "sgd",
            "schedule": "cosine_by_epoch",
            "epochs": 5,
            "global_batch_size": 128,
            "accumulate": 1,
            "lr": 0.02,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "sampling": "natural",
            "shuffle_mib": 192.0,
            "decode_processes": "auto",
            "data_frac": 1.0,
        },
        "evaluation": {"posthoc_tau": 0.0, "tte": "off", "expand_px": None, "views": 10, "group_bounds": "auto"},
    }


@pytest.mark.parametrize(
    ("written", "mode"),
    [("off", "off"), ("false", "off"), ("true", "five_crops"), ("five_crops", "five_crops"), ("'off'", "off")],
)
def test_the_mode_of_test_time_ensembling_is_also_read_as_earlier_versions_wrote_it(
    written: str, mode: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(f"dataset: embedded:caltech101-lt\nevaluation: {{tte: {written}}}\n")
    assert read_run(tmp_path / "run.yaml").evaluation.tte == mode
    assert read_run(tmp_path / "run.yaml", parse_overrides([f"evaluation.tte={written}"])).evaluation.tte == mode


def test_the_kinds_of_a_section_are_those_listed_here() -> None:
    for section, kinds in KINDS.items():
        models = models_of(RunConfig.model_fields[section].annotation)
        assert tuple(sorted(model.model_fields["kind"].default for model in models)) == tuple(sorted(kinds))


@pytest.mark.parametrize(("section", "kind"), [(section, kind) for section in KINDS for kind in KINDS[section]])
def test_every_kind_builds_from_its_name_and_what_it_requires(section: str, kind: str) -> None:
    config = RunConfig.model_validate({section: {"kind": kind, **REQUIRED.get(kind, {})}})
    assert config.to_dict()[section]["kind"] == kind


@pytest.mark.parametrize(
    "tree",
    [
        {"tuner": {"bottleneck": 4}},
        {"loss": {"tau": 0.5}},
        {"head": {"scale": 16.0}},
        {"augment": {"start_px": 16}},
        {"augment": {}, "tuner": {}, "loss": {}, "head": {}},
    ],
)
def test_a_section_without_kind_is_of_the_default_kind(tree: dict[str, Any]) -> None:
    named = {section: {"kind": KINDS[section][0], **fields} for section, fields in tree.items()}
    assert RunConfig.model_validate(tree) == RunConfig.model_validate(named)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().optim.lr = 1.0  # type: ignore[misc]


def test_the_plain_tree_builds_the_same_settings_again() -> None:
    tree = {
        "tuner": {"kind": "lora", "blocks": [1, 0]},
        "extra_tuner": {"kind": "sparse"},
        "optim": {"lr": 1},
        "head": {"template": ["a {}", "{}"]},
        "augment": {"kind": "none"},
    }
    config = RunConfig.model_validate(tree).resolve(100, 4, 8)
    assert RunConfig.model_validate(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("template", ["a {}", "ensemble", ["a {}"], ["a {}", "the {}, {}"]])
def test_a_template_is_one_text_or_several_or_the_ensemble(template: str | list[str]) -> None:
    assert RunConfig.model_validate({"head": {"template": template}}).head.template == template


UNREADABLE = "a text with {}, a list of such texts, or ensemble"


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("a photo", "Value error, must contain {} for the class name, but got 'a photo'; add it"),
        ("Ensemble", "Value error, must contain {} for the class name, but got 'Ensemble'; add it"),
        (["a {}", "a {0}"], "Value error, must contain {} for the class name, but got 'a {0}'; add it"),
        (["ensemble"], "Value error, must contain {} for the class name, but got 'ensemble'; add it"),
        (["a {}", ""], "Value error, must contain {} for the class name, but got ''; add it"),
        ("", UNREADABLE),
        ([], UNREADABLE),
        (3, UNREADABLE),
        (["a {}", 3], UNREADABLE),
        (None, UNREADABLE),
    ],
)
@pytest.mark.parametrize("kind", KINDS["head"])
def test_a_template_without_a_place_for_the_name_is_refused(kind: str, template: object, rule: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({"head": {"kind": kind, "template": template}})
    (problem,) = caught.value.errors()
    assert problem["loc"] == ("head", kind, "template")
    assert problem["msg"] == rule


BESIDE = ("adaptformer", "adapter", "dora", "ia3", "lora", "ssf")
PROMPTS = ("vpt_shallow", "vpt_deep")
OWN_WEIGHTS = ("bitfit", "layernorm", "batchnorm", "sparse", "full", "partial")
BEHIND = ("clip_adapter",)
NOTHING = ("linear_probe", "zero_shot")
SAME, IDLE = "they are the same", "one of them trains nothing before the classifier"
TOKENS, WEIGHTS = "both own the prompt tokens", "both train the tower's own weights, and share some of them"


def refusal(first: str, second: str) -> str | None:
    """Why two tuners do not go together, or None."""
    if first == second:
        return SAME
    if {first, second} & set(NOTHING):
        return IDLE
    shared = [
        (reason, group) for reason, group in ((TOKENS, PROMPTS), (WEIGHTS, OWN_WEIGHTS)) if {first, second} <= {*group}
    ]
    return shared[0][0] if shared else None


def test_two_tuners_go_together_when_they_change_different_places() -> None:
    assert sorted((*BESIDE, *PROMPTS, *OWN_WEIGHTS, *BEHIND, *NOTHING)) == sorted(KINDS["tuner"])
    refused: dict[str | None, int] = {}
    for first, second in itertools.product(KINDS["tuner"], repeat=2):
        reason, tree = refusal(first, second), {"tuner": {"kind": first}, "extra_tuner": {"kind": second}}
        refused[reason] = refused.get(reason, 0) + 1
        if reason is None:
            assert [tuner.kind for tuner in RunConfig.model_validate(tree).tuners()] == [first, second]
            continue
        with pytest.raises(ValidationError) as caught:
            RunConfig.model_validate(tree)
        (problem,) = caught.value.errors()
        assert problem["loc"] == ("extra_tuner",)
        assert problem["msg"] == (
            f"Value error, must change other places than tuner, but got {first} and {second}: {reason}; remove one"
        )
    assert refused == {None: 178, SAME: 17, IDLE: 62, TOKENS: 2, WEIGHTS: 30}


def test_there_is_one_tuner_unless_a_second_is_named() -> None:
    assert [tuner.kind for tuner in RunConfig().tuners()] == ["adaptformer"]
    with pytest.raises(ValidationError, match=r"extra_tuner\n.*discriminator 'kind'"):
        RunConfig.model_validate({"extra_tuner": {"bottleneck": 2}})


@pytest.mark.parametrize(
    ("tree", "overrides", "expected"),
    [
        ({}, {"loss.tau": 0.5}, {"loss": {"tau": 0.5}}),
        ({"loss": {"tau": 1.0}}, {"loss.tau": 0.5}, {"loss": {"tau": 0.5}}),
        (
            {"tuner": {"kind": "lora", "bottleneck": 4}},
            {"tuner.kind": "adaptformer"},
            {"tuner": {"kind": "adaptformer"}},
        ),
        (
            {"tuner": {"kind": "lora", "bottleneck": 4}},
            {"tuner.kind": "lora"},
            {"tuner": {"kind": "lora", "bottleneck": 4}},
        ),
        (
            {"tuner": {"bottleneck": 4}},
            {"tuner.kind": "adaptformer"},
            {"tuner": {"kind": "adaptformer", "bottleneck": 4}},
        ),
        ({"tuner": {"bottleneck": 4}}, {"tuner.kind": "zero_shot"}, {"tuner": {"kind": "zero_shot"}}),
        ({"loss": {"tau": 4}}, {"loss.kind": "cross_entropy"}, {"loss": {"kind": "cross_entropy"}}),
        (
            {"tuner": {"kind": "lora"}},
            {"tuner.bottleneck": 2, "tuner.kind": "adaptformer"},
            {"tuner": {"kind": "adaptformer", "bottleneck": 2}},
        ),
        ({"optim": 3}, {"optim.lr": 2.0}, {"optim": {"lr": 2.0}}),
        ({"augment": {"schedule": "min"}}, {"augment.kind": "crop_flip"}, {"augment": {"kind": "crop_flip"}}),
        (
            {},
            {"extra_tuner.bottleneck": 2, "extra_tuner.kind": "lora"},
            {"extra_tuner": {"kind": "lora", "bottleneck": 2}},
        ),
        (
            {"extra_tuner": {"kind": "lora", "bottleneck": 2}},
            {"extra_tuner.kind": "ssf"},
            {"extra_tuner": {"kind": "ssf"}},
        ),
        ({"extra_tuner": {"kind": "lora", "bottleneck": 2}}, {"extra_tuner": None}, {"extra_tuner": None}),
    ],
)
def test_a_new_kind_drops_the_fields_of_the_old_one(
    tree: dict[str, Any], overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = json.dumps(tree)
    assert apply_overrides(tree, overrides, RunConfig) == expected
    assert json.dumps(tree) == before


TREES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 9),
        "optim": st.fixed_dictionaries({}, optional={"lr": st.floats(0.1, 1), "epochs": st.integers(1, 5)}),
        "loss": st.sampled_from([{}, {"tau": 0.5}, {"kind": "cross_entropy"}, {"kind": "lade", "weight": 0.2}]),
        "head": st.sampled_from([{}, {"scale": 16.0}, {"kind": "linear", "init": "random"}]),
        "augment": st.sampled_from([{}, {"patch_dropout": 0.5}, {"kind": "none"}]),
        "tuner": st.sampled_from(
            [{}, {"kind": "lora", "bottleneck": 3}, {"bottleneck": 2, "blocks": [1]}, {"kind": "zero_shot"}]
        ),
    },
)
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 9),
        "optim.lr": st.floats(0.1, 1),
        "optim.momentum": st.floats(0, 0.9),
        "tuner.kind": st.sampled_from(KINDS["tuner"]),
        "loss.kind": st.sampled_from(KINDS["loss"]),
        "head.kind": st.sampled_from(KINDS["head"]),
        "augment.kind": st.sampled_from(KINDS["augment"]),
    },
)


@settings(max_examples=100)
@given(tree=TREES, overrides=OVERRIDES)
def test_overrides_of_a_valid_tree_are_valid_hold_and_change_nothing_else(
    tree: dict[str, Any], overrides: dict[str, Any]
) -> None:
    before, after = RunConfig.model_validate(tree).to_dict(), apply_overrides(tree, overrides, RunConfig)
    got = RunConfig.model_validate(after).to_dict()
    assert apply_overrides(after, overrides, RunConfig) == after
    for path, value in overrides.items():
        *section, leaf = path.split(".")
        assert (got[section[0]] if section else got)[leaf] == value
    touched = {path.split(".")[0] for path in overrides}
    assert {k: v for k, v in got.items() if k not in touched} == {k: v for k, v in before.items() if k not in touched}


FOUR = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given_tuner", "classes", "blocks", "filled"),
    [
        ({}, 100, 12, {"bottleneck": 4, "blocks": list(range(12))}),
        ({}, 8142, 12, {"bottleneck": 256, "blocks": list(range(12))}),
        ({}, 10, 12, {"bottleneck": 1, "blocks": list(range(12))}),
        ({"blocks": [3, 1, 3]}, 100, 6, {"bottleneck": 16, "blocks": [1, 3]}),
        ({"bottleneck": 7}, 100, 4, {"bottleneck": 7, "blocks": FOUR}),
        ({"kind": "adapter"}, 1000, 4, {"bottleneck": 64, "blocks": FOUR}),
        ({"kind": "adapter", "blocks": [3]}, 1000, 4, {"bottleneck": 256, "blocks": [3]}),
        ({"kind": "lora"}, 1000, 12, {"bottleneck": 16, "blocks": list(range(12))}),
        ({"kind": "lora", "mlp": True, "blocks": [0, 1]}, 1000, 12, {"bottleneck": 64, "blocks": [0, 1]}),
        ({"kind": "lora", "bottleneck": [4, 8], "blocks": [3, 0]}, 1000, 12, {"blocks": [0, 3]}),
        ({"kind": "dora"}, 1000, 12, {"bottleneck": 16, "blocks": list(range(12))}),
        ({"kind": "dora", "bottleneck": [1, 2, 3, 4]}, 1000, 4, {"blocks": FOUR}),
        ({"kind": "ia3"}, 1000, 4, {"blocks": FOUR}),
        ({"kind": "ssf"}, 1000, 4, {"blocks": FOUR}),
        ({"kind": "vpt_shallow"}, 1000, 12, {"length": 64}),
        ({"kind": "vpt_shallow", "length": 5}, 1000, 12, {"length": 5}),
        ({"kind": "vpt_deep"}, 1000, 12, {"length": 64, "blocks": list(range(12))}),
        ({"kind": "vpt_deep", "blocks": [2, 0, 1]}, 1000, 12, {"length": 256, "blocks": [0, 1, 2]}),
        ({"kind": "bitfit"}, 1000, 4, {"blocks": FOUR}),
        ({"kind": "layernorm", "blocks": [2]}, 1000, 4, {"blocks": [2]}),
        ({"kind": "batchnorm"}, 1000, 4, {"blocks": FOUR}),
        ({"kind": "sparse"}, 1000, 4, {"ratio": 1000 / (4 * (12 * 768 + 9)), "blocks": FOUR}),
        ({"kind": "sparse", "blocks": [3, 2]}, 1000, 4, {"ratio": 1000 / (2 * (12 * 768 + 9)), "blocks": [2, 3]}),
        ({"kind": "sparse"}, 10**6, 4, {"ratio": 1.0, "blocks": FOUR}),
        ({"kind": "sparse", "places": "attention"}, 1000, 4, {"ratio": 1000 / (4 * (4 * 768 + 4)), "blocks": FOUR}),
        ({"kind": "sparse", "places": "mlp"}, 1000, 4, {"ratio": 1000 / (4 * (8 * 768 + 5)), "blocks": FOUR}),
        ({"kind": "sparse", "ratio": 0.25}, 1000, 4, {"ratio": 0.25, "blocks": FOUR}),
        ({"kind": "full"}, 1000, 4, {"blocks": FOUR}),
        ({"kind": "partial", "last": 4}, 1000, 4, {}),
        ({"kind": "clip_adapter"}, 1000, 4, {"bottleneck": 192}),
        ({"kind": "clip_adapter", "bottleneck": 7, "ratio": 0.5}, 1000, 4, {}),
        ({"kind": "linear_probe"}, 1000, 4, {}),
        ({"kind": "zero_shot"}, 1000, 4, {}),
    ],
)
def test_resolve_fills_widths_and_blocks_and_nothing_else(
    given_tuner: dict[str, Any], classes: int, blocks: int, filled: dict[str, Any]
) -> None:
    kind = given_tuner.get("kind", "adaptformer")
    beside = "lora" if kind == "adaptformer" else "adaptformer"
    for section in ("tuner",) if kind in NOTHING else ("tuner", "extra_tuner"):
        tree = {"tuner": {"kind": beside}} | {section: {"kind": kind, **given_tuner}}
        config = RunConfig.model_validate(tree)
        resolved = config.resolve(classes, blocks, 768)
        assert resolved.to_dict()[section] == config.to_dict()[section] | filled
        untouched = set(RunConfig.model_fields) - {"tuner", "extra_tuner"}
        assert all(getattr(resolved, name) == getattr(config, name) for name in untouched)
        assert None not in resolved.to_dict()["tuner"].values()
        assert resolved.resolve(classes, blocks, 768) == resolved


@pytest.mark.parametrize("given_blocks", [[4], [0, 1, 2, 3, 4], []])
@pytest.mark.parametrize("section", ["tuner", "extra_tuner"])
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS["tuner"] if kind not in (*NOTHING, *BEHIND, "vpt_shallow", "partial")]
)
def test_resolve_refuses_blocks_that_the_tower_lacks(kind: str, section: str, given_blocks: list[int]) -> None:
    beside = "lora" if kind == "adaptformer" else "adaptformer"
    config = RunConfig.model_validate({"tuner": {"kind": beside}} | {section: {"kind": kind, "blocks": given_blocks}})
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        config.resolve(100, 4, 8)
    assert str(caught.value) == f"{section}.blocks: must lie in 0 ... 3, but got {given_blocks}; name at least one"


@pytest.mark.parametrize("section", ["tuner", "extra_tuner"])
def test_resolve_refuses_more_last_blocks_than_the_tower_has(section: str) -> None:
    config = RunConfig.model_validate({section: {"kind": "partial", "last": 5}})
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        config.resolve(100, 4, 8)
    assert str(caught.value) == f"{section}.last: must be at most the tower's 4 blocks, but got 5; lower it"
    assert config.resolve(100, 5, 8).to_dict()[section] == {"kind": "partial", "last": 5}


@pytest.mark.parametrize("kind", ["adaptformer", "adapter", "lora", "dora"])
@pytest.mark.parametrize(("blocks", "number"), [(None, 4), ([3, 1], 2), ({"last": 1}, 1)])
def test_resolve_refuses_a_list_of_bottlenecks_that_is_not_one_for_each_tuned_block(
    kind: str, blocks: Any, number: int
) -> None:
    for length in (number - 1, number + 1) if number > 1 else (2,):
        widths = [4] * length
        config = RunConfig.model_validate({"tuner": {"kind": kind, "bottleneck": widths, "blocks": blocks}})
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            config.resolve(100, 4, 8)
        assert str(caught.value) == (
            f"tuner.bottleneck: must be one width, or a list of {number}, one for each tuned block, but got {widths}; change it"
        )


def test_the_places_of_sparse_tuning_are_in_the_settings_only_if_they_are_not_all_places() -> None:
    """So digests are those of versions without the setting."""
    plain, mlp = (RunConfig.model_validate({"tuner": {"kind": "sparse", "places": p}}) for p in ("all", "mlp"))
    assert plain.to_dict()["tuner"] == {"kind": "sparse", "ratio": None, "blocks": None}
    assert mlp.to_dict()["tuner"]["places"] == "mlp"
    assert [RunConfig.parse(config.to_dict()) for config in (plain, mlp)] == [plain, mlp]


@given(classes=st.integers(1, 10**6), divisor=st.integers(1, 200))
def test_a_derived_width_is_the_largest_power_of_two_that_fits(classes: int, divisor: int) -> None:
    width = derived_width(classes, divisor)
    assert width & (width - 1) == 0
    assert width == 1 or width * divisor <= classes
    assert 2 * width * divisor > classes


OTHER: dict[str, Any] = {  # another value for each setting, whichever kinds it belongs to
    "seed": 1,
    "model": "ViT-B-16",
    "pretrained": "openai",
    "quickgelu": True,
    "precision": "bf16",
    "resolution_px": 64,
    "interpolation": "bilinear",
    "compile": True,
    "checkpointing": True,
    "cache_gib": 0.0,
    "schedule": "linear",
    "optim.schedule": "cosine",
    "patch_dropout": 0.5,
    "start_px": 32,
    "decode": "reduced",
    "group_bounds": [10, 50],
    "bottleneck": 4,
    "blocks": [0],
    "mlp": True,
    "norms": True,
    "length": 3,
    "ratio": 0.5,
    "places": "mlp",
    "last": 2,
    "scale": 20.0,
    "init": "random",
    "context": 4,
    "projections": True,
    "head.tuner": {"kind": "lora"},
    "texts": {"cat": ["a small animal"]},
    "template": "{}",
    "tau": 0.5,
    "gamma": 1.0,
    "max_margin": 0.4,
    "beta": 0.9,
    "remine": 0.2,
    "weight": 0.2,
    "label_smoothing": 0.1,
    "optimizer": "adamw",
    "sampling": "balanced",
    "epochs": 6,
    "global_batch_size": 64,
    "accumulate": 2,
    "lr": 0.1,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "shuffle_mib": 1.0,
    "data_frac": 0.5,
    "posthoc_tau": 1.0,
    "tte": "ten_crops",
    "expand_px": 21,
    "views": 5,
    "threshold": 0.9,
    "unlabelled_ratio": 3,
    "cutout_frac": 0.25,
    "lambda_u": 2.0,
    "lambda_1": 1.0,
    "lambda_2": 1.0,
    "lambda_o": 0.2,
    "mu": 0.2,
    "ema": 0.5,
    "pseudo_ema": 0.5,
    "eta": 0.1,
    "lambda_s": 0.5,
    "similarity_tau": 1.0,
    "members": {"a": {"seed": 1}, "b": {"seed": 3}},
    "use": "a+b",
    "combine": "probabilities",
    "weights": {"a": 2.0},
}


def one_setting_apart() -> list[dict[str, Any]]:
    """Every kind, and every kind with one of its settings changed."""
    trees: list[dict[str, Any]] = []
    for section, field in RunConfig.model_fields.items():
        models = models_of(field.annotation)
        if not models:
            trees.append({section: OTHER[section]})
        for model in models:
            kind = {"kind": model.model_fields["kind"].default} if "kind" in model.model_fields else {}
            kind |= REQUIRED.get(kind.get("kind", ""), {})
            if section == "extra_tuner" and kind["kind"] in ("adaptformer", *NOTHING):
                continue  # not beside the default tuner
            if kind and kind["kind"] != KINDS.get(section, ("",))[0]:
                trees.append({section: kind})
            trees += [
                {section: {**kind, name: OTHER.get(f"{section}.{name}", OTHER.get(name))}}
                for name in model.model_fields
                # the first has a single value, the second decides no result
                if name != "kind" and (kind.get("kind"), name) != ("text", "init") and name not in FREE.values()
            ]
    return trees


def test_a_digest_is_stable_and_differs_with_any_setting_of_any_kind() -> None:
    assert RunConfig().digest() == "a999a7f3b53d"  # pragma: allowlist secret
    trees = one_setting_apart()
    assert len(trees) > 100
    digests = {RunConfig.model_validate(tree).digest() for tree in trees}
    assert len(digests | {RunConfig().digest()}) == len(trees) + 1


@pytest.mark.parametrize("template", ["ensemble", ["a photo of a {}."], ["a {}", "{}"], ["{}", "a {}"]])
def test_a_digest_tells_templates_apart(template: str | list[str]) -> None:
    digests = {
        RunConfig.model_validate({"head": {"template": t}}).digest() for t in (template, "a photo of a {}.", "a {}")
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("size", "workers", "advice"),
    [
        (128, 6, "use 126, or 4 workers"),
        (128, 3, "use 129, or 2 workers"),
        (7, 2, "use 8, or 1 worker"),
        (1, 4, "use 4, or 1 worker"),
    ],
)
def test_a_batch_that_cannot_be_shared_says_what_would_fit(size: int, workers: int, advice: str) -> None:
    expected = f"optim.global_batch_size: must be divisible by {workers} workers, but got {size}; {advice}"
    assert str(batch_fault(size, workers, "optim.global_batch_size")) == expected


@given(size=st.integers(1, 4096), workers=st.integers(1, 64))
def test_the_advice_for_a_batch_fits(size: int, workers: int) -> None:
    fault = batch_fault(size, workers, "place")
    assert (fault is None) == (size % workers == 0)
    if fault:
        batch, fewer = str(fault).split("; use ")[1].replace(" workers", "").replace(" worker", "").split(", or ")
        assert batch_fault(int(batch), workers, "place") is None
        assert batch_fault(size, int(fewer), "place") is None
