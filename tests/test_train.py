"""python -m lift_ray.train on real Ray Train workers: a killed worker, a killed driver, resume, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray.train

from lift_ray import train
from lift_ray.distributed import trainer
from lift_ray.distributed.capacity import Need
from lift_ray.distributed.checkpoint import FOLDER
from lift_ray.distributed.ranks import Ranks
from lift_ray.distributed.run import Run
from lift_ray.distributed.warm import Warm
from lift_ray.errors import BadInput, RunFailed
from lift_ray.settings.files import read_run

EPOCHS = 6


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, small_clip: str) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(
        f"name: e2e\ndataset: embedded:caltech101-lt\nbackbone: {{model: '{small_clip}'}}\n"
        f"tuner: {{kind: adaptformer, bottleneck: 4}}\noptim: {{epochs: {EPOCHS}, lr: 0.05}}\n"
    )
    return path


@pytest.fixture(scope="module")
def undisturbed(run_file: Path) -> list[dict[str, float]]:
    """The same run alone in this process, without Ray."""
    warm = Warm("embedded:caltech101-lt", Ranks.alone(num_cpus=2))
    run = Run(read_run(run_file).config, warm)
    figures = list(run.epochs())
    return [*figures, run.evaluate("test")]


@contextmanager
def training(run_file: Path, out: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "lift_ray.train", str(run_file), "--out", str(out), *words]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def lines(out: Path) -> list[dict[str, float]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "nothing happened in time"
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.1)


def training_workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def assert_same_run(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line["epoch"] for line in actual] == [*range(1, EPOCHS + 1), EPOCHS]
    for one, other in zip(actual[:-1], expected[:-1], strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)
        assert one["validation/loss"] == pytest.approx(other["validation/loss"], abs=1e-3)
    assert actual[-1]["test/accuracy"] == pytest.approx(expected[-1]["test/accuracy"], abs=0.004)


def test_two_workers_finish_although_one_is_killed(
    run_file: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    out = tmp_path / "out"
    with training(run_file, out, "--workers", "2") as process:
        wait_for(lambda: len(lines(out)) >= 1, process)
        workers = training_workers(process)
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGKILL)
        killed_at = len(lines(out))
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert killed_at < EPOCHS
    assert_same_run(lines(out), undisturbed)
    assert "mean class" in output
    assert (out / "checkpoint" / "weights.safetensors").exists()


def test_a_run_whose_driver_was_killed_resumes(
    run_file: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    out = tmp_path / "out"
    with training(run_file, out) as process:
        wait_for(lambda: len(lines(out)) >= 1, process)
        process.kill()
    done = len(lines(out))
    assert done < EPOCHS
    assert not (out / "checkpoint").exists()
    before = lines(out)[:done]
    with training(run_file, out, "--resume") as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert lines(out)[: done - 1] == before[: done - 1], "finished epochs were trained again"
    assert_same_run(lines(out), undisturbed)


def test_bad_input_is_one_line_and_leaves_nothing(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    held = tmp_path / "held"
    held.mkdir()
    (held / "run.yaml").write_text(run_file.read_text())
    cases: list[tuple[list[str], str]] = [
        (
            [str(run_file), "--workers", "6", "--out", str(out)],
            "optim.global_batch_size: must be divisible by 6 workers, but got 128; use 126, or 4 workers",
        ),
        (
            [str(run_file), "tuner.kind=lorra", "--out", str(out)],
            "command line tuner.kind: unknown value 'lorra'; did you mean 'lora'?",
        ),
        (
            ["nowhere.yaml"],
            "nowhere.yaml: must be a YAML file, but there is none; check the path",
        ),
        (
            [str(run_file), "--resume"],
            "--resume: must name the run to go on with, but --out is missing; add --out FOLDER",
        ),
        (
            [str(run_file), "--resume", "--out", str(out)],
            f"{out}: must hold a run to go on with, but there is no run.yaml; check --out, or leave out --resume",
        ),
        (
            [str(run_file), "--out", str(held)],
            f"{held}: must be a new folder, but it holds a run already; add --resume, or give another --out",
        ),
        (
            [str(run_file), "seed=1", "--resume", "--out", str(held)],
            f"{held / 'run.yaml'} seed: must stay as the run began, 0, but got 1; "
            "give another --out, or the settings it began with",
        ),
        (
            [str(run_file), "dataset=/nowhere/at/all"],
            "/nowhere/at/all: must be a folder of Parquet shards, but nothing is there; check the path",
        ),
    ]
    for words, message in cases:
        with pytest.raises(BadInput) as caught:
            train.main(words)
        assert str(caught.value) == message
    assert not out.exists()


def test_more_workers_than_the_machine_has_is_said_before_training(
    run_file: Path, tmp_path: Path, ray_session: None
) -> None:
    with pytest.raises(BadInput, match=r"scale: a trial must fit the cluster, but got 64 x \(1 CPU\) for 1 node"):
        train.main([str(run_file), "--workers", "64", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_only_a_worker_finds_is_bad_input_too(run_file: Path, tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(BadInput) as caught:
        train.main([str(run_file), "backbone.model=ViT-B-61", "--out", str(tmp_path / "out")])
    assert str(caught.value) == "backbone.model: unknown model 'ViT-B-61'; did you mean 'ViT-B-16'?"


def test_a_run_that_diverges_late_keeps_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "stored"
    (stored / FOLDER).mkdir(parents=True)
    (stored / FOLDER / "run.json").write_text("{}")

    class Diverges:
        """In the place of Ray's trainer: two good epochs, then a problem."""

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def fit(self) -> SimpleNamespace:
            good = [{"epoch": 1, "train/loss": 1.0}, {"epoch": 2, "train/loss": 0.9}]
            problem = {"problem": "epoch 3: the training loss must be finite", "bad_input": False}
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*good, problem]))
            return SimpleNamespace(checkpoint=ray.train.Checkpoint.from_directory(str(stored)))

    monkeypatch.setattr(trainer, "TorchTrainer", Diverges)
    with pytest.raises(RunFailed) as caught:
        trainer.run_training({}, "data", Need(1, 1, 0), tmp_path, lambda _: None)
    kept = tmp_path / "checkpoint"
    assert str(caught.value) == f"epoch 3: the training loss must be finite; {kept} is the last good checkpoint"
    assert (kept / "run.json").read_text() == "{}"
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]
