"""Learning from half-labelled data: FixMatch, LoFT and ULFine (our reading)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from made_run import run_config, untimed
from safetensors.torch import load_file, save_file

from lift_ray import evaluate
from lift_ray.epoch_metrics import EpochMetrics, named
from lift_ray.errors import BadInput
from lift_ray.inference.evaluate import evaluate_checkpoint
from lift_ray.methods.half_labelled import UlfineObjective
from lift_ray.methods.lift import Lift
from lift_ray.methods.ulfine import FusedHead, orthogonality
from lift_ray.methods.world import Ranks, join_group
from lift_ray.model.heads import CosineHead
from lift_ray.registry import TUNERS
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import TAUS
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

DATA = "embedded:caltech101-half"
KINDS = ("fixmatch", "loft", "ulfine")
BUFFERS = ("head.prototypes", "head.visual", "head.frequency")


def settings(clip: str, kind: str = "ulfine", **overrides: Any) -> RunConfig:
    tree = {
        "backbone": {"model": clip},
        "optim": {"epochs": 2, "global_batch_size": 96, "lr": 0.05},
        "method": {"kind": kind, "unlabelled_ratio": 1, "threshold": 0.1},
    }
    return run_config(tree, overrides)


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    return Workspace(DATA, Ranks.alone())


@pytest.fixture(scope="module")
def trained(workspace: Workspace, small_clip: str) -> tuple[list[EpochMetrics], Run]:
    """The undisturbed run of ULFine."""
    run = Run(settings(small_clip), workspace)
    return list(run.epochs()), run


def stored(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.stored().items()}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def head(mu: float = 0.1, ema: float = 0.9, pseudo_ema: float = 0.8, eta: float = 0.5) -> FusedHead:
    text = F.normalize(drawn(3, 8) + 1, dim=1)
    return FusedHead(CosineHead(drawn(3, 8)), text, mu=mu, ema=ema, pseudo_ema=pseudo_ema, eta=eta)


def test_prototypes_move_towards_the_moving_average_of_class_means_as_the_equations_say() -> None:
    one, sums = head(), drawn(2, 3, 8)
    text = one.prototypes.clone()
    first = one.fit(sums[0], torch.tensor([2.0, 4.0, 0.0]), torch.tensor([5, 10, 3]))
    visual = [sums[0, 0] / 2, sums[0, 1] / 4]
    assert torch.allclose(first[0], 0.95 * text[0] + 0.05 * visual[0], atol=1e-6)
    assert torch.allclose(first[1], 0.9 * text[1] + 0.1 * visual[1], atol=1e-6)
    assert torch.equal(first[2], text[2])  # no labelled image yet
    second = one.fit(sums[1], torch.tensor([1.0, 0.0, 1.0]), torch.tensor([10, 0, 0]))
    visual[0] = 0.9 * visual[0] + 0.1 * sums[1, 0]
    p = [0.8 * 0.2 * 5 + 0.2 * 10, 0.8 * 0.2 * 10]
    assert torch.allclose(second[0], 0.9 * first[0] + 0.1 * visual[0], atol=1e-6)
    alpha = 0.1 * p[1] / p[0]
    assert torch.allclose(second[1], (1 - alpha) * first[1] + alpha * visual[1], atol=1e-6)
    assert torch.equal(one.prototypes, second)


def test_alpha_is_0_for_classes_without_pseudo_labels() -> None:
    one = head()
    text = one.prototypes.clone()
    for _ in range(3):
        fitted = one.fit(drawn(3, 8), torch.ones(3), torch.tensor([0, 7, 0]))
    assert torch.equal(fitted[[0, 2]], text[[0, 2]])
    assert not torch.equal(fitted[1], text[1])
    still = head()
    assert torch.equal(still.fit(drawn(3, 8), torch.ones(3), torch.zeros(3)), text)


def test_orthogonality_is_0_for_orthogonal_prototypes_and_its_gradient_reaches_the_features_through_the_class_means() -> (
    None
):
    assert orthogonality(torch.eye(4) * 3) == 0
    assert orthogonality(torch.ones(2, 5)) == pytest.approx(0.5)
    features, one = drawn(6, 8).requires_grad_(), head(mu=1.0)
    objective = objective_of(one)
    sums, counts = objective.class_sums(features, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    orthogonality(one.fit(sums, counts, torch.tensor([4, 2, 0]))).backward()
    assert features.grad is not None
    assert (features.grad[:4].norm(dim=1) > 1e-4).all()
    assert (features.grad[4:] == 0).all()  # of the class that no pseudo-label moves
    assert not any(buffer.requires_grad for buffer in one.buffers())


def objective_of(one: FusedHead) -> UlfineObjective:
    model = Lift.__new__(Lift)
    torch.nn.Module.__init__(model)
    model.head = one
    weights = {"sure": 2.0, "similarity_loss": F.cross_entropy, "lambda_s": 1.0, "lambda_o": 0.3}
    return UlfineObjective(model, F.cross_entropy, Ranks.alone(), threshold=0.5, ratio=2, **weights)


def test_the_loss_of_ulfine_is_the_sum_that_its_docstring_names() -> None:
    one, features, labels = head(mu=0.5), drawn(5, 8), torch.tensor([1, 2, 0, 2, 0])
    text, weight = one.prototypes.clone(), one.linear.weight.detach()

    def logits(x: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return 25 * F.normalize(x, dim=1) @ F.normalize(of, dim=1).T

    loss, right = objective_of(one)(features, labels)
    z, s = logits(features, weight), logits(features, text)
    expected = F.cross_entropy(z[:1], labels[:1]) + F.cross_entropy(s[:1], labels[:1])
    fused = ((z + s) / 2).softmax(1)
    pseudo_labels = torch.zeros(3)
    for weak, strong in ((1, 3), (2, 4)):
        confidence, guess = fused[weak].max(0)
        if confidence >= 0.5:
            pseudo_labels[guess] += 1
            expected += 2.0 * (F.cross_entropy(z[strong], guess) + F.cross_entropy(s[strong], guess)) / 2 / 2
    assert pseudo_labels.sum() > 0
    alpha = 0.5 * pseudo_labels[1] / pseudo_labels.max()
    text[1] = (1 - alpha) * text[1] + alpha * F.normalize(features[0], dim=0)
    unit = F.normalize(text, dim=1)
    expected += 0.3 * (unit @ unit.T - torch.eye(3)).square().sum() / 9
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(right) == float(fused[0].argmax() == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_tells_how_good_its_pseudo_labels_are(
    kind: str, workspace: Workspace, small_clip: str, trained: tuple[list[EpochMetrics], Run]
) -> None:
    figures = trained[0] if kind == "ulfine" else list(Run(settings(small_clip, kind), workspace).epochs())
    first, last = figures
    assert last["train/accuracy"] > first["train/accuracy"]
    assert 0 < last["unlabelled/pseudo_labels"] <= 96 * 5
    parts = [last[f"unlabelled/pseudo_labels_{group}"] for group in ("many", "medium", "few")]
    assert sum(parts) == last["unlabelled/pseudo_labels"]
    assert all(
        0 <= last[f"unlabelled/{name}{group}"] <= 1 for name in ("recall", "precision") for group in ("", "_many")
    )
    assert (
        ("validation/few_similarity" in last) == ("validation/mean_class_accuracy_linear" in last) == (kind == "ulfine")
    )


def test_labels_of_unlabelled_images_are_not_used(small_clip: str, trained: tuple[list[EpochMetrics], Run]) -> None:
    blind = Workspace(DATA, Ranks.alone())
    pool = blind.dataset.splits["unlabelled"]
    blind.dataset.splits["unlabelled"] = replace(pool, labels=(pool.labels + 1) % 40)
    run = Run(settings(small_clip), blind)
    figures = list(run.epochs())
    for name, value in stored(trained[1]).items():
        assert torch.equal(value, run.model.stored()[name]), name
    assert figures[-1]["unlabelled/pseudo_labels"] == trained[0][-1]["unlabelled/pseudo_labels"]
    # the figures do use them; this model guesses, so its precision may rise or fall
    assert figures[-1]["unlabelled/precision"] != trained[0][-1]["unlabelled/precision"]


def test_a_run_killed_halfway_continues_with_exactly_the_same_prototypes(
    workspace: Workspace, small_clip: str, trained: tuple[list[EpochMetrics], Run], tmp_path: Path
) -> None:
    figures, whole = trained
    run = Run(settings(small_clip), workspace)
    for batch in run.batches():
        run.train_step(batch)
        if run.step == 3:
            break
    run.save(tmp_path / "here")
    again = Run(settings(small_clip), workspace)
    again.load(tmp_path / "here")
    rest = list(again.epochs())
    for name, value in stored(whole).items():
        assert torch.equal(value, again.model.stored()[name]), name
    assert set(BUFFERS) <= set(stored(whole))
    assert untimed(rest) == untimed(figures)


def train_as_rank(rank: int, port: int, config: dict[str, Any], out: str) -> None:
    torch.set_num_threads(1)
    join_group(rank, 2, "127.0.0.1", port, torch.device("cpu"))
    run = Run(RunConfig.model_validate(config), Workspace(DATA, Ranks(rank, 2, torch.device("cpu"))))
    figures = list(run.epochs())
    Path(out, f"{rank}.json").write_text(json.dumps([metrics.flat() for metrics in figures]))
    save_file(stored(run), Path(out, f"{rank}.safetensors"))
    torch.distributed.destroy_process_group()


def test_two_workers_have_the_prototypes_and_pseudo_labels_of_one(
    small_clip: str,
    trained: tuple[list[EpochMetrics], Run],
    tmp_path: Path,
    as_two_ranks: Callable[..., None],
) -> None:
    as_two_ranks(train_as_rank, settings(small_clip).to_dict(), str(tmp_path))
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, value in stored(trained[1]).items():
        assert torch.equal(first[name], second[name]), name
        tolerance = 1e-5 if name in BUFFERS else 1e-3
        assert torch.allclose(first[name], value, atol=tolerance), (name, (first[name] - value).abs().max())
    together = json.loads((tmp_path / "0.json").read_text())
    for name in ("unlabelled/pseudo_labels", "unlabelled/recall", "validation/accuracy"):
        assert [f[name] for f in together] == pytest.approx([f[name] for f in trained[0]], abs=1e-12)


@pytest.mark.parametrize("tuner", sorted({*TUNERS} - {"batchnorm", "zero_shot"}))
def test_every_kind_of_tuner_takes_a_step(tuner: str, workspace: Workspace, small_clip: str) -> None:
    overrides = {
        "tuner.kind": tuner,
        "augment.patch_dropout": 0.5,
        "optim.global_batch_size": 32,
        "method.threshold": 0.03,
    }
    run = Run(
        RunConfig.model_validate(apply_overrides(settings(small_clip).to_dict(), overrides, RunConfig)), workspace
    )
    before = stored(run)
    run.train_step(next(run.batches()))
    run.check_finite()
    changed = {name for name, value in before.items() if not torch.equal(value, run.model.stored()[name])}
    assert {"head.linear.weight", *BUFFERS} <= changed
    assert (len(changed) > 4) == (tuner != "linear_probe")


def test_predictions_use_the_fused_logits_and_the_others_are_reported_next_to_them(
    workspace: Workspace, small_clip: str, trained: tuple[list[EpochMetrics], Run], tmp_path: Path
) -> None:
    _, run = trained
    found = {}
    for eta, name in ((0.0, "linear"), (1.0, "similarity")):
        one = Run(settings(small_clip, method__eta=eta), workspace)
        one.model.load_stored(stored(run))
        found[name] = named("test", one.evaluate("test").metrics)
        for metric in ("accuracy", "mean_class_accuracy", "medium", "few"):
            assert found[name][f"test/{metric}"] == found[name][f"test/{metric}_{name}"]
    fused = named("test", run.evaluate("test").metrics)
    for metric in ("accuracy", "few"):
        assert fused[f"test/{metric}_linear"] == found["linear"][f"test/{metric}"]
        assert fused[f"test/{metric}_similarity"] == found["similarity"][f"test/{metric}"]
    run.save(tmp_path / "here")
    (again,), _ = evaluate_checkpoint(tmp_path / "here", DATA, "test")
    assert {k: again[k] for k in again if k.startswith("test/")} == pytest.approx(
        {k: v for k, v in fused.items() if k.startswith("test/")}, abs=1e-6
    )
    (crops,), _ = evaluate_checkpoint(tmp_path / "here", DATA, "test", tte="five_crops")
    assert crops["test/loss"] != fused["test/loss"]
    assert {k for k in crops if k.startswith("test/")} == {k for k in fused if k.startswith("test/")}


def test_a_trial_has_its_posthoc_figures_and_those_of_all_logits(workspace: Workspace, small_clip: str) -> None:
    (figures,) = Run(settings(small_clip, optim__epochs=1), workspace, TAUS).epochs()
    assert {"validation/posthoc_tau", "validation/few_linear", "unlabelled/recall_few"} <= set(figures.flat())


def test_text_prototypes_stay_where_they_are_with_mu_0(workspace: Workspace, small_clip: str) -> None:
    run = Run(settings(small_clip, method__mu=0.0), workspace)
    before = run.model.head.prototypes.clone()
    run.train_step(next(run.batches()))
    assert torch.equal(run.model.head.prototypes, before)
    assert torch.allclose(
        before, run.workspace.backbone(run.config).semantic_weights(workspace.dataset.class_names, "a photo of a {}.")
    )


def test_a_dataset_without_unlabelled_images_gives_a_one_line_error(small_data: str, small_clip: str) -> None:
    for kind in KINDS:
        with pytest.raises(BadInput) as caught:
            Run(settings(small_clip, kind, optim__global_batch_size=16), Workspace(small_data, Ranks.alone()))
        assert str(caught.value) == (
            f"method {kind}: requires the split 'unlabelled', but {small_data} has only train, validation, test; "
            "convert with --labelled and --unlabelled, or use method lift"
        )


def test_a_tower_without_text_gives_a_one_line_error(small_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, config = Workspace(DATA, Ranks.alone()), settings(small_clip)
    monkeypatch.setattr(here.backbone(config), "text", None)
    with pytest.raises(BadInput) as caught:
        Run(config, here)
    assert str(caught.value) == (
        f"method ulfine: requires a text tower for its prototypes, but {small_clip} has none; use fixmatch or loft"
    )


def test_evaluate_shows_the_accuracy_of_all_logits_and_how_good_the_pseudo_labels_were(
    trained: tuple[list[EpochMetrics], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained[1].save(tmp_path / "here")
    evaluate.main([str(tmp_path / "here")])
    shown = capsys.readouterr().out
    for words in (
        "its linear logits",
        "its similarity logits",
        "pseudo-labels of the last epoch (%): all precision ",
    ):
        assert words in shown, words
