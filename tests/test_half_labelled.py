"""The settings, data and figures of methods for half-labelled data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lift_ray.data.catalog import open_dataset
from lift_ray.methods.half_labelled import OBJECTIVES, consistency
from lift_ray.results.metrics import pseudo_label_figures
from lift_ray.settings.run import RunConfig, apply_overrides

DATA = "embedded:caltech101-half"
KINDS = ("fixmatch", "loft", "ulfine")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_consistency_weighs_sure_and_unsure_pictures_as_fixmatch_and_loft_do() -> None:  # pragma: allowlist secret
    teacher, strong = (3 * drawn(40, 5)).softmax(1), drawn(40, 5)
    expected = 0.0
    for p, z in zip(teacher, strong, strict=True):
        log_q = z.log_softmax(0)
        expected += float(-3 * log_q[p.argmax()] if p.max() >= 0.6 else 0.5 * -(p * log_q).sum()) / 40
    assert 5 < int((teacher.amax(1) >= 0.6).sum()) < 35
    assert float(consistency(teacher, strong, 0.6, 3.0, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_pseudo_label_figures_are_by_group_of_classes_and_leave_out_what_is_not_there() -> None:
    counts = np.array([[10, 10, 20, 0], [8, 4, 0, 0], [6, 2, 0, 0]])
    figures = pseudo_label_figures(counts, np.array([150, 120, 5, 6]))
    assert figures == {
        "unlabelled/recall": 8 / 40, "unlabelled/pseudo_labels": 12, "unlabelled/precision": 8 / 12,
        "unlabelled/recall_many": 8 / 20, "unlabelled/pseudo_labels_many": 12, "unlabelled/precision_many": 8 / 12,
        "unlabelled/recall_few": 0, "unlabelled/pseudo_labels_few": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("suffix", "pool"), [("", 1084), ("-uniform", 2377), ("-reversed", 1084)])
def test_the_embedded_half_labelled_sets_follow_the_rules_of_semi_supervised_counts(suffix: str, pool: int) -> None:
    dataset = open_dataset(DATA + suffix)
    train, unlabelled = dataset.split("train"), dataset.split("unlabelled")
    assert (dataset.num_classes, train.num_samples, unlabelled.num_samples) == (40, 497, pool)
    assert set(train.rows) <= set(unlabelled.rows)
    for split in dataset.splits.values():
        whole = open_dataset("embedded:caltech101")
        full = whole.split("train" if split.name == "unlabelled" else split.name)
        there = dict(zip(full.rows.tolist(), full.labels.tolist(), strict=True))
        names = [whole.class_names[there[row]] for row in split.rows.tolist()]
        assert names == [dataset.class_names[label] for label in split.labels]
    counts, further = train.class_counts(40), unlabelled.class_counts(40) - train.class_counts(40)
    assert (counts.max(), counts.min()) == (40, 2)
    largest, smallest = further[counts.argmax()], further[counts == 2]
    expected = {"": (47, 2), "-uniform": (47, 47), "-reversed": (2, 47)}[suffix]
    assert (largest, smallest.max() if suffix else smallest.min()) == expected


@pytest.mark.parametrize("kind", ["lift", "fixmatch", "loft", "ulfine"])
def test_a_method_may_be_given_by_its_name(kind: str) -> None:
    named = RunConfig.model_validate({"method": kind})
    assert named == RunConfig.model_validate({"method": {"kind": kind}})
    assert apply_overrides({"method": kind}, {"method.kind": kind}) == {"method": {"kind": kind}}


def test_the_methods_for_half_labelled_data_say_what_they_do_not_go_with() -> None:
    trees: dict[str, dict[str, Any]] = {
        "needs pictures that change, but got augment.kind none; use mda or crop_flip": {"augment": {"kind": "none"}},
        "needs pictures decoded on the CPU, but got augment.decode gpu; leave decode out": {
            "augment": {"decode": "gpu"}
        },
        "needs a model that is trained, but got tuner.kind zero_shot; use linear_probe": {
            "tuner": {"kind": "zero_shot"}
        },
        "needs a step's pictures at once, but got optim.accumulate 2; use backbone.checkpointing instead": {
            "optim": {"accumulate": 2}
        },
        "needs a head as its prototypes are, but got head.kind linear; use cosine": {"head": {"kind": "linear"}},
    }
    for message, tree in trees.items():
        RunConfig.model_validate(tree)
        with pytest.raises(ValidationError) as caught:
            RunConfig.model_validate({**tree, "method": "ulfine"})
        (problem,) = caught.value.errors()
        assert (problem["loc"], problem["msg"]) == (("method",), f"Value error, ulfine {message}")
    for kind in ("fixmatch", "loft"):
        RunConfig.model_validate({"head": {"kind": "linear"}, "method": kind})


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.5])
def test_a_threshold_lies_between_0_and_1(threshold: float) -> None:
    for kind in ("fixmatch", "loft", "ulfine"):
        with pytest.raises(ValidationError, match=r"method\.\w+\.threshold\n.*(greater|less) than"):
            RunConfig.model_validate({"method": {"kind": kind, "threshold": threshold}})


def test_every_method_of_the_settings_has_an_objective() -> None:
    assert set(OBJECTIVES) == {"lift", *KINDS}
