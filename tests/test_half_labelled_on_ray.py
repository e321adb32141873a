"""Half-labelled data and several models on real Ray processes: two workers, a driver that is killed, a small search."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from embedded import LIFT_TINY
from processes import wait_for
from safetensors.torch import load_file

from lift_ray import train, tune

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_threads")]
EPOCHS = 3


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, small_clip: str) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(
        f"name: half\ndataset: embedded:caltech101-half\nbackbone: {{model: '{small_clip}'}}\n"
        f"tuner: {{kind: adaptformer, bottleneck: 4}}\noptim: {{epochs: {EPOCHS}, lr: 0.02, global_batch_size: 48}}\n"
        "method: {kind: ulfine, unlabelled_ratio: 1, threshold: 0.1}\n"
    )
    return path


@pytest.fixture(scope="module")
def alone(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process, undisturbed."""
    out = tmp_path_factory.mktemp("alone") / "out"
    threads = torch.get_num_threads()
    train.main([str(run_file), "--no-ray", "--out", str(out)])
    torch.set_num_threads(threads)
    return out


def farthest(out: Path, expected: Path) -> float:
    """The largest difference of a number in the prototypes and what they are fitted from."""
    one, other = (load_file(folder / "checkpoint" / "weights.safetensors") for folder in (out, expected))
    names = ("head.prototypes", "head.visual", "head.frequency")
    return max(float((one[name] - other[name]).abs().max()) for name in names)


def test_two_workers_of_ray_train_have_the_prototypes_of_one_process(
    run_file: Path, alone: Path, tmp_path: Path, ray_session: None
) -> None:
    train.main([str(run_file), "--workers", "2", "--out", str(tmp_path / "out")])
    assert farthest(tmp_path / "out", alone) < 1e-4


def test_a_run_whose_driver_is_killed_by_sigkill_ends_with_the_same_prototypes(
    run_file: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(run_file), "--no-ray", "--out", str(out), "--checkpoint-steps", "3"]
    process = subprocess.Popen([sys.executable, "-m", "lift_ray.train", *words], stdout=subprocess.DEVNULL)
    try:
        checkpoints = (out / "checkpoints").glob
        wait_for("a checkpoint inside an epoch", lambda: [*checkpoints("epoch-0001-step-*[0-9]")], every_s=0.01)
        assert process.poll() is None, "it ended before it was killed"
    finally:
        process.kill()
        process.wait(30)
    assert not (out / "checkpoint").exists()
    train.main([*words, "--resume"])
    assert "continuing from epoch " in capsys.readouterr().out
    assert farthest(out, alone) == 0


def test_a_search_over_sets_of_models_ends_with_what_each_gains_and_costs(
    small_data: str, tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    space, out = tmp_path / "space.yaml", tmp_path / "out"
    space.write_text(
        f"name: sets\ndataset: {small_data}\nbase:\n  backbone: {{model: '{LIFT_TINY}', resolution_px: 32}}\n"
        "  optim: {epochs: 1, global_batch_size: 16, lr: 0.05}\n"
        "  method: {kind: backdoor, members: {a: {}, probe: {tuner.kind: linear_probe}, seed1: {seed: 1}}}\n"
        "space: {method.use: {choices: [a+probe, a+seed1]}}\n"
        "search: {sampler: grid, trials: 2, scheduler: {kind: none}, tte_best: 0}\n"
    )
    assert not tune.main([str(space), "--out", str(out), "--no-dashboard"])
    shown, study = capsys.readouterr().out, json.loads((out / "study.json").read_text())
    for words in (
        "Ensembles, test accuracy (%)",
        "over best",
        "a+probe",
        "a+seed1",
        "P-many",
        "D-few",
        "keep their parameter group",
    ):
        assert words in shown, words
    found = {one["values"]["method.use"]: one for one in study["together"]}
    assert set(found) == {"a+probe", "a+seed1"}
    for use, one in found.items():
        report = one["report"]
        assert list(report["members"]) == use.split("+")
        whole = report["groups"]["all"]["all"]
        assert whole["together"] == pytest.approx(one["test/mean_class_accuracy"], abs=1e-6)
        alone = [figures["test/mean_class_accuracy"] for figures in report["members"].values()]
        assert whole["gain_over_best"] == pytest.approx(whole["together"] - max(alone), abs=1e-6)
        assert report["cost"]["train_s"] > 0
    compared = {one["label"]: one for one in study["compared"]}
    best = compared.get(
        "best found, tau 0", compared["best found"]
    )  # the first is there if another post-hoc tau is used
    assert found[study["best"]["values"]["method.use"]]["test/loss"] == pytest.approx(best["test/loss"], abs=1e-6)
