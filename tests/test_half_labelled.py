"""The settings, data and figures of methods for half-labelled data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lift_ray.data.open import open_dataset
from lift_ray.evaluation.metrics import pseudo_label_figures
from lift_ray.methods.half_labelled import consistency
from lift_ray.methods.lift import Lift
from lift_ray.methods.ulfine import FusedHead
from lift_ray.methods.world import Ranks
from lift_ray.model.heads import CosineHead
from lift_ray.model.losses import logit_adjusted
from lift_ray.registry import METHODS
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig

DATA = "embedded:caltech101-half"
KINDS = ("fixmatch", "loft", "ulfine")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_consistency_weighs_confident_and_unsure_images_as_fixmatch_and_loft_do() -> None:  # pragma: allowlist secret
    teacher, strong = (3 * drawn(40, 5)).softmax(1), drawn(40, 5)
    expected = 0.0
    for p, z in zip(teacher, strong, strict=True):
        log_q = z.log_softmax(0)
        expected += float(-3 * log_q[p.argmax()] if p.max() >= 0.6 else 0.5 * -(p * log_q).sum()) / 40
    assert 5 < int((teacher.amax(1) >= 0.6).sum()) < 35
    assert float(consistency(teacher, strong, 0.6, 3.0, 0.5)) == pytest.approx(expected, rel=1e-5)


def nll(z: torch.Tensor, shift: torch.Tensor | float, label: int) -> float:
    """CE(z + shift, y) of one image."""
    shifted = z + shift
    return float(shifted.exp().sum().log() - shifted[label])


WEIGHTS: dict[str, dict[str, Any]] = {
    "lift": {},
    "fixmatch": {"lambda_u": 1.7},
    "loft": {"lambda_1": 2.5, "lambda_2": 0.4},
    "ulfine": {"lambda_u": 1.7, "lambda_s": 0.6, "similarity_tau": 0.5, "lambda_o": 40.0, "eta": 0.3, "mu": 0.4},
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_a_step_minimises_is_the_formula_with_the_weights_of_the_settings_and_the_loss_of_the_run(
    kind: str,
) -> None:
    own = {} if kind == "lift" else {"threshold": 0.9, "unlabelled_ratio": 2, **WEIGHTS[kind]}
    method: Any = RunConfig.model_validate({"method": {"kind": kind, **own}}).method
    counts, labels = torch.tensor([60.0, 30.0, 10.0]), [1, 2, 0, 2]
    features, text, linear = drawn(20, 8), drawn(3, 8) + 0.5, CosineHead(drawn(3, 7, 8)[:, 0], scale=8.0)
    model = Lift.__new__(Lift)
    torch.nn.Module.__init__(model)
    model.head = linear
    if kind == "ulfine":
        model.head = FusedHead(linear, text, mu=0.4, ema=0.9, pseudo_ema=0.9, eta=0.3)
    objective = METHODS.build(kind, method, counts, model, logit_adjusted(counts, tau=0.8), Ranks.alone())
    z, s = (8 * torch.cosine_similarity(features[:, None], w[None], dim=2) for w in (linear.weight.detach(), text))
    log_prior = (counts / counts.sum()).log()
    if kind == "lift":
        found, _ = objective(z[:4], torch.tensor(labels))
    else:
        found, _ = objective(features, torch.tensor([*labels, *[0] * 16]))

    expected = sum(nll(z[i], 0.8 * log_prior, y) for i, y in enumerate(labels)) / 4
    sure, unsure = {"fixmatch": (1.7, 0.0), "loft": (2.5, 0.4), "ulfine": (1.7, 0.0), "lift": (0.0, 0.0)}[kind]
    answers = [z] if kind != "ulfine" else [z, s]
    given = torch.zeros(3)
    for weak in range(4, 12):
        p = ((0.3 * s + 0.7 * z) if kind == "ulfine" else z)[weak].softmax(0)
        is_sure = float(p.max()) >= 0.9
        given[p.argmax()] += is_sure
        for answer in answers:
            each = [nll(answer[weak + 8], 0.0, k) for k in range(3)]
            soft = sum(float(p[k]) * each[k] for k in range(3))
            expected += (sure * each[int(p.argmax())] if is_sure else unsure * soft) / 8 / len(answers)
    assert 0 < given.sum() < 8
    if kind == "ulfine":
        expected += 0.6 * sum(nll(s[i], 0.5 * log_prior, y) for i, y in enumerate(labels)) / 4
        unit = torch.nn.functional.normalize(features[:4], dim=1)
        means = torch.stack([unit[2], unit[0], (unit[1] + unit[3]) / 2])
        alpha = (0.4 * given / given.max()).unsqueeze(1)
        fitted = torch.nn.functional.normalize((1 - alpha) * text + alpha * means, dim=1)
        expected += 40 * float((fitted @ fitted.T - torch.eye(3)).square().sum()) / 9
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_pseudo_label_figures_are_by_group_of_classes_and_leave_out_what_is_not_there() -> None:
    counts = np.array([[10, 10, 20, 0], [8, 4, 0, 0], [6, 2, 0, 0]])
    figures = pseudo_label_figures(counts, np.array(["many", "many", "few", "few"]))
    assert figures == {
        "recall": 8 / 40,
        "pseudo_labels": 12,
        "precision": 8 / 12,
        "recall_many": 8 / 20,
        "pseudo_labels_many": 12,
        "precision_many": 8 / 12,
        "recall_few": 0,
        "pseudo_labels_few": 0,
    }


@pytest.mark.parametrize(("suffix", "pool"), [("", 1084), ("-uniform", 2363), ("-reversed", 1078)])
def test_the_embedded_half_labelled_sets_follow_the_rules_of_semi_supervised_counts(suffix: str, pool: int) -> None:
    dataset = open_dataset(DATA + suffix)
    train, unlabelled = dataset.split("train"), dataset.split("unlabelled")
    assert (dataset.num_classes, train.num_samples, unlabelled.num_samples) == (40, 497, pool)
    assert set(train.rows) <= set(unlabelled.rows)
    for split in dataset.splits.values():
        whole = open_dataset("embedded:caltech101-lt")
        full = whole.split("train" if split.name == "unlabelled" else split.name)
        there = dict(zip(full.rows.tolist(), full.labels.tolist(), strict=True))
        names = [whole.class_names[there[row]] for row in split.rows.tolist()]
        assert names == [dataset.class_names[label] for label in split.labels]
    counts, further = train.class_counts(40), unlabelled.class_counts(40) - train.class_counts(40)
    assert (counts.max(), counts.min()) == (40, 2)
    largest, smallest = further[counts.argmax()], further[counts == 2]
    expected = {"": (47, 2), "-uniform": (47, 47), "-reversed": (2, 43)}[
        suffix
    ]  # of some classes no more images are embedded
    assert (largest, smallest.max() if suffix else smallest.min()) == expected


@pytest.mark.parametrize("kind", ["lift", "fixmatch", "loft", "ulfine"])
def test_a_method_may_be_given_by_its_name(kind: str) -> None:
    named = RunConfig.model_validate({"method": kind})
    assert named == RunConfig.model_validate({"method": {"kind": kind}})
    assert apply_overrides({"method": kind}, {"method.kind": kind}, RunConfig) == {"method": {"kind": kind}}


def test_the_methods_for_half_labelled_data_refuse_settings_that_do_not_fit_them() -> None:
    trees: dict[str, dict[str, Any]] = {
        "needs images that change, but got augment.kind none; use mda or crop_flip": {"augment": {"kind": "none"}},
        "needs images that change, but got augment.views 2; leave views out": {"augment": {"views": 2}},
        "needs images decoded on the CPU, but got augment.decode gpu; leave decode out": {"augment": {"decode": "gpu"}},
        "needs a model that is trained, but got tuner.kind zero_shot; use linear_probe": {
            "tuner": {"kind": "zero_shot"}
        },
        "needs all images of a step at once, but got optim.accumulate 2; use backbone.checkpointing instead": {
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
    assert set(METHODS) == {"lift", "backdoor", *KINDS}
