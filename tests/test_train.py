"""python -m lift_ray.train: in this process and on one Ray worker, on object storage, stopped, on a full disk, bad input.

What workers, drivers and nodes that are lost do is in test_trainer.py.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from evaluation_json import flat_evaluation
from made_run import assert_same_tensors, untimed
from moto.server import ThreadedMotoServer
from ports import free_ports
from pyarrow import fs

from lift_ray import evaluate, train
from lift_ray.errors import BadInput, RunFailed
from lift_ray.settings.run_file import read_run
from lift_ray.storage.output import Output
from lift_ray.training import checkpoint, loop
from lift_ray.training.run import Position

pytestmark = pytest.mark.usefixtures("same_threads")
EPOCHS = 3
OUTAGE_S = float(os.environ.get("LIFT_TEST_OUTAGE_S", "2"))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, small_data: str, small_clip: str) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(
        f"name: e2e\ndataset: {small_data}\nbackbone: {{model: '{small_clip}'}}\n"
        f"tuner: {{kind: adaptformer, bottleneck: 4}}\noptim: {{epochs: {EPOCHS}, lr: 0.01, global_batch_size: 8}}\n"
    )
    return path


@pytest.fixture(scope="module")
def alone(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of an undisturbed run in this process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train.main([str(run_file), "--no-ray", "--out", str(out)])
    return out


def figures(path: Path) -> list[dict[str, float]]:
    return untimed([json.loads(line) for line in path.read_text().splitlines()])


def assert_same_model(out: Path, expected: Path) -> None:
    assert figures(out / "metrics.jsonl") == figures(expected / "metrics.jsonl")
    assert_same_tensors(out, expected)


def test_a_run_keeps_its_last_two_checkpoints_the_best_its_figures_and_tensorboard(alone: Path) -> None:
    lines = figures(alone / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 3]
    assert "test/accuracy" in lines[-1]
    best = 1 + max(range(EPOCHS), key=lambda i: lines[i]["validation/mean_class_accuracy"])
    assert {path.name for path in (alone / "checkpoints").iterdir()} == {
        "epoch-0002",
        "epoch-0003",
        f"epoch-{best:04d}",
    }
    (events,) = (alone / "tensorboard").iterdir()
    assert b"validation/mean_class_accuracy" in events.read_bytes()


@pytest.mark.slow
def test_one_ray_worker_trains_what_this_process_does(
    run_file: Path, tmp_path: Path, alone: Path, ray_session: None
) -> None:
    train.main([str(run_file), "--out", str(tmp_path / "out")])
    assert_same_model(tmp_path / "out", alone)


def test_sigterm_writes_a_checkpoint_inside_the_epoch_and_resume_gives_exactly_the_same_model(
    run_file: Path, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, steps, before = tmp_path / "out", [], signal.getsignal(signal.SIGTERM)

    class Notice(loop.StepCallback):
        """SIGTERM comes after the 17th step: five into the second epoch of twelve."""

        def __call__(self, at: Position, evaluated: float = 0.0) -> None:
            steps.append(at.step)
            if len([step for step in steps if step]) == 21:
                os.kill(os.getpid(), signal.SIGTERM)
            super().__call__(at, evaluated)

    monkeypatch.setattr(loop, "StepCallback", Notice)
    with pytest.raises(RunFailed) as caught:
        train.main([str(run_file), "--no-ray", "--out", str(out)])
    last = max(path.name for path in (out / "checkpoints").iterdir())
    assert str(caught.value) == f"{out}: stopped by SIGTERM; the last checkpoint is {last}; continue with --resume"
    assert last.startswith("epoch-0001-step-")
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    capsys.readouterr()
    train.main([str(run_file), "--no-ray", "--out", str(out), "--resume"])
    assert f"continuing from epoch 2, step {int(last[-6:])} of 12, on 1 worker" in capsys.readouterr().out
    assert_same_model(out, alone)
    train.main([str(run_file), "--no-ray", "--out", str(out), "--resume"])
    assert_same_model(out, alone)


def test_a_full_disk_gives_a_one_line_error_and_leaves_the_last_good_checkpoint(
    run_file: Path, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, sizes = tmp_path / "out", Path.write_bytes, []

    def full(path: Path, data: bytes) -> int:
        sizes.append(len(data))
        if sum(sizes) > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunFailed) as caught:
        train.main([str(run_file), "--no-ray", "--out", str(out), "--checkpoint-steps", "2"])
    assert (
        str(caught.value)
        == f"{out}: cannot write a checkpoint: the disk is full; free some space, then continue with --resume"
    )
    names = [path.name for path in (out / "checkpoints").iterdir()]
    assert names
    assert not [name for name in names if name.endswith(".tmp")]
    monkeypatch.undo()
    train.main([str(run_file), "--no-ray", "--out", str(out), "--resume"])
    assert_same_model(out, alone)


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, list[ThreadedMotoServer]]]:
    """The URL of an empty bucket of moto's server, and the servers to stop."""
    (port,) = free_ports(1)
    servers = [ThreadedMotoServer(ip_address="127.0.0.1", port=port)]
    servers[0].start()
    # pragma: allowlist nextline secret
    url = f"s3://key:secret@runs/{{}}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1&allow_bucket_creation=true"
    fs.FileSystem.from_uri(url.format(""))[0].create_dir("runs")
    yield url, servers
    servers[-1].stop()


def test_a_run_on_object_storage_survives_an_outage_is_resumed_and_evaluated_there(
    bucket: tuple[str, list[ThreadedMotoServer]],
    run_file: Path,
    tmp_path: Path,
    alone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, servers = bucket[0].format("run"), bucket[1]
    port = servers[0].get_host_and_port()[1]
    down: list[float] = []

    def up_again() -> None:
        time.sleep(OUTAGE_S)
        servers.append(ThreadedMotoServer(ip_address="127.0.0.1", port=port))
        servers[-1].start()
        down.append(time.monotonic())

    save = checkpoint.save

    def with_an_outage(*args: Any, **options: Any) -> None:
        if not down:
            down.append(time.monotonic())
            servers[-1].stop()
            threading.Thread(target=up_again).start()
        save(*args, **options)

    monkeypatch.setattr(checkpoint, "save", with_an_outage)
    train.main([str(run_file), "optim.epochs=2", "--no-ray", "--out", url])
    assert len(down) == 2, "the storage was to be away for a while"
    assert down[1] - down[0] >= OUTAGE_S
    with pytest.raises(BadInput, match="must be a new folder, but it already contains a run"):
        train.main([str(run_file), "optim.epochs=2", "--no-ray", "--out", url])
    output = Output(url)
    assert output.names("checkpoints") == ["epoch-0001", "epoch-0002"]
    for name in ("metrics.jsonl", "run.yaml", "checkpoint/run.json"):
        assert output.holds(name), name
    output.remove("checkpoints/epoch-0002")
    capsys.readouterr()
    train.main([str(run_file), "optim.epochs=2", "--no-ray", "--out", url, "--resume"])
    assert "continuing from epoch 2, step 0 of 12" in capsys.readouterr().out
    with output.fetched("metrics.jsonl") as path:
        lines = figures(path)
    assert lines[0]["epoch"] == 1
    assert not evaluate.main([url, "--json"])
    found = flat_evaluation(capsys.readouterr().out)
    assert found["test/accuracy"] == pytest.approx(lines[-1]["test/accuracy"])


def test_storage_that_stays_away_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch, silent_storage: str) -> None:
    monkeypatch.setattr("lift_ray.storage.output.PATIENCE_S", 0.5)
    output = Output(silent_storage)
    (output.folder / "run.yaml").write_text("name: x")
    with pytest.raises(RunFailed) as caught:
        output.publish()
    assert str(caught.value).startswith(f"{output.url}: the storage failed: ")
    assert "\n" not in str(caught.value)


def test_dry_run_prints_a_run_file_and_the_plan_and_starts_nothing(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ray(**_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", no_ray)
    train.main([str(run_file), "--dry-run", "--workers", "2", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    record = checkpoint.read_record(alone / "checkpoint")
    assert read_run(tmp_path / "printed.yaml").config.to_dict() == record.config
    plan = dict(line.removeprefix("# ").split(": ", 1) for line in text.splitlines() if line.startswith("# "))
    trained = json.loads((alone / "metrics.jsonl").read_text().splitlines()[0])["trained_parameters"]
    assert plan["digest"] == record.digest
    assert plan["trained parameters"] == f"{trained:,}"
    assert plan["workers"] == "2, 4 of 8 images a step each"
    assert plan["steps"] == "12 an epoch, 36 in all; a checkpoint after each epoch and every 300 s"
    assert plan["memory of a worker"].startswith("about ")
    assert not (tmp_path / "out").exists()


def test_bad_input_gives_a_one_line_error_and_leaves_nothing(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    held = tmp_path / "held"
    held.mkdir()
    (held / "run.yaml").write_text(run_file.read_text())
    cases: list[tuple[list[str], str]] = [
        (
            [str(run_file), "--workers", "3", "--out", str(out)],
            "optim.global_batch_size: must be divisible by 3 workers, but got 8; use 9, or 2 workers",
        ),
        (
            [str(run_file), "--workers", "4", "--min-workers", "2", "--out", str(out)],
            "optim.global_batch_size: must be divisible by 3 workers, but got 8; use 9, or 2 workers",
        ),
        (
            [str(run_file), "--workers", "2", "--no-ray", "--out", str(out)],
            "--workers: must be 1 with --no-ray, but got 2; leave one of them out",
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
            "--resume: requires the run to continue, but --out is missing; add --out FOLDER",
        ),
        (
            [str(run_file), "--resume", "--out", str(out)],
            f"{out}: must contain a run to continue, but there is no run.yaml; check --out, or leave out --resume",
        ),
        (
            [str(run_file), "--out", str(held)],
            f"{held}: must be a new folder, but it already contains a run; add --resume, or use another --out",
        ),
        (
            [str(run_file), "seed=1", "--resume", "--out", str(held)],
            f"{held / 'run.yaml'}: the settings must be those the run started with, but got seed: 0 -> 1; "
            "restore them, or give another --out",
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


def test_more_workers_than_the_machine_has_are_refused_before_training(
    run_file: Path, tmp_path: Path, ray_session: None
) -> None:
    with pytest.raises(BadInput, match=r"scale: a trial must fit the cluster, but got 64 x \(1 CPU\) for 1 node"):
        train.main([str(run_file), "optim.global_batch_size=64", "--workers", "64", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_error_that_only_a_worker_finds_is_bad_input_too(run_file: Path, tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(BadInput) as caught:
        train.main([str(run_file), "backbone.model=ViT-B-61", "--out", str(tmp_path / "out")])
    assert str(caught.value) == "backbone.model: unknown model 'ViT-B-61'; did you mean 'ViT-B-16'?"


@pytest.mark.parametrize("where", ["--no-ray", pytest.param("--workers=1", marks=pytest.mark.slow)])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    run_file: Path, tmp_path: Path, where: str, ray_session: None
) -> None:
    with pytest.raises(RunFailed) as caught:
        train.main([str(run_file), "optim.lr=1e9", where, "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith("epoch 1, step 2: the training loss must be finite, but got ")
    assert not (tmp_path / "out" / "checkpoint").exists()
