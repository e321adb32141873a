"""One run on a cluster of three nodes loses its driver, workers and a node, and gives the model of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
import torch
import torch.multiprocessing
from made_run import assert_same_tensors, untimed
from ports import free_ports
from processes import wait_for
from ray.cluster_utils import Cluster

from lift_ray import train
from lift_ray.epoch_metrics import named
from lift_ray.methods.world import Ranks, join_group
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import read_run
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

pytestmark = pytest.mark.cluster
EPOCHS, STEPS = 14, 24
SMALL_NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
Lines = list[dict[str, float]]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, small_data: str, small_clip: str) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(
        f"name: e2e\ndataset: {small_data}\nbackbone: {{model: '{small_clip}'}}\n"
        f"tuner: {{kind: adaptformer, bottleneck: 4}}\noptim: {{epochs: {EPOCHS}, lr: 0.01, global_batch_size: 4}}\n"
    )
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes of one core each, all on this machine."""
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=SMALL_NODE)
    for _ in range(2):
        cluster.add_node(**SMALL_NODE)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def train_as_rank(rank: int, port: int, data: str, config: dict[str, Any], out: str) -> None:
    torch.set_num_threads(1)
    join_group(rank, 2, "127.0.0.1", port, torch.device("cpu"))
    run = Run(RunConfig.model_validate(config), Workspace(data, Ranks(rank, 2, torch.device("cpu"))))
    figures = [*(metrics.flat() for metrics in run.epochs())]
    test = run.evaluate("test")
    figures.append({"epoch": run.epoch, "time/evaluate_s": test.seconds, **named("test", test.metrics)})
    if rank == 0:
        run.save(Path(out, "checkpoint"))
        Path(out, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in figures))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def undisturbed(run_file: Path, small_data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes, without Ray and without a break."""
    out = tmp_path_factory.mktemp("undisturbed")
    arguments = (*free_ports(1), small_data, read_run(run_file).config.to_dict(), str(out))
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=train_as_rank, args=(rank, *arguments)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    return out


@contextmanager
def training(
    cluster: Cluster,
    run_file: Path,
    out: Path,
    *words: str,
    stdout: IO[str] | int = subprocess.PIPE,
    **environment: str,
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "lift_ray.train", str(run_file), "--out", str(out), "--workers", "2", *words]
    process = subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"RAY_ADDRESS": cluster.address} | environment,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def while_it_runs(what: str, condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    def seen() -> object:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        return condition()

    wait_for(what, seen, every_s=0.02)


def wait_for_the_middle(out: Path, epoch: int, process: subprocess.Popen[str]) -> None:
    """Until the run has just begun the epoch after so many: a third of it may be done, not more."""
    newest = out / "checkpoints" / f"epoch-{epoch:04d}-step-000005"
    while_it_runs(newest.name, newest.exists, process)


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def newest(out: Path) -> str:
    return max(path.name for path in (out / "checkpoints").iterdir() if not path.name.endswith(".tmp"))


def figures(out: Path) -> Lines:
    return untimed([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])


def assert_same_model(out: Path, expected: Path) -> None:
    assert figures(out) == figures(expected)
    for file in ("weights.safetensors", "optimizer.safetensors"):
        assert_same_tensors(out, expected, file)


@pytest.fixture(scope="module")
def killed(cluster: Cluster, run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves whose driver was told to stop, was resumed, and killed with SIGKILL inside an epoch."""
    out = tmp_path_factory.mktemp("killed") / "out"
    with training(cluster, run_file, out, "--checkpoint-steps", "5") as process:
        wait_for_the_middle(out, 1, process)
        process.terminate()
        told = time.monotonic()
        output, _ = process.communicate(timeout=60)
        took_s = time.monotonic() - told
    assert process.returncode == 1
    assert output.splitlines()[-1].split("; ", 1) == [
        f"{out}: stopped by SIGTERM",
        f"the last checkpoint is {newest(out)}; continue with --resume",
    ]
    assert "-step-" in newest(out)
    assert took_s < 30
    with training(cluster, run_file, out, "--resume", "--checkpoint-steps", "5") as process:
        wait_for_the_middle(out, 4, process)
        process.kill()
        process.wait(30)
        wait_for("the end of the workers of a dead driver", lambda: not workers())
    assert "-step-" in newest(out), "the driver was to be killed inside an epoch"
    return out


def test_a_run_whose_driver_and_then_a_worker_were_killed_gives_exactly_the_same_model(
    cluster: Cluster, run_file: Path, killed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    with training(cluster, run_file, out, "--resume", "--checkpoint-steps", "5") as process:
        wait_for_the_middle(out, 8, process)
        workers()[1].send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    places = [line.split("continuing from ")[1] for line in output.splitlines() if "continuing from " in line]
    assert [place.split(",")[0] for place in places] == ["epoch 5", "epoch 9"]
    assert not any("step 0 " in place for place in places), "it was to go on inside an epoch"
    assert "retried 1 time: worker " in output
    assert_same_model(out, undisturbed)


def test_a_run_continues_with_fewer_workers_and_the_same_losses(
    run_file: Path, killed: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    threads = torch.get_num_threads()
    train.main([str(run_file), "--resume", "--no-ray", "--out", str(out)])
    torch.set_num_threads(threads)
    for one, other in zip(figures(out), figures(undisturbed), strict=True):
        losses = {name: value for name, value in other.items() if name.endswith("/loss")}
        assert losses
        assert {name: one[name] for name in losses} == pytest.approx(losses, abs=1e-4)


def test_a_hung_worker_a_spot_notice_and_a_lost_node_leave_exactly_the_same_model(
    cluster: Cluster, run_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with training(cluster, run_file, out, "--checkpoint-steps", "5", "--heartbeat-s", "10") as process:
        wait_for_the_middle(out, 1, process)
        workers()[0].send_signal(signal.SIGSTOP)
        wait_for_the_middle(out, 4, process)
        workers()[0].send_signal(signal.SIGTERM)
        wait_for_the_middle(out, 7, process)
        parents = [worker.ppid() for worker in workers()]
        lost = next(n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid in parents)
        cluster.remove_node(lost, allow_graceful=False)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    again = [line for line in output.splitlines() if line.startswith("retried 1 time")]
    assert len(again) == 3
    assert again[0] == "retried 1 time: the workers were silent for 10 s"
    assert "stopped by SIGTERM after writing epoch-0004-step-" in again[1]
    assert_same_model(out, undisturbed)


def test_a_run_continues_with_fewer_workers_when_the_cluster_shrinks_and_with_more_when_it_grows_again(
    cluster: Cluster, run_file: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    while len(cluster.worker_nodes) > 1:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    def places() -> list[str]:
        return re.findall(r"continuing from epoch \d+, step \d+ of \d+, on (.*)", log.read_text())

    words = ("optim.epochs=2000", "--min-workers", "1", "--checkpoint-steps", "5")
    start = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
    with log.open("w") as text, training(cluster, run_file, out, *words, stdout=text, **start) as process:
        wait_for_the_middle(out, 1, process)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        while_it_runs("one worker", lambda: places() == ["1 worker"], process)
        cluster.add_node(**SMALL_NODE)
        while_it_runs("two workers", lambda: places() == ["1 worker", "2 workers"], process)
        before = len(figures(out))
        while_it_runs("another epoch", lambda: len(figures(out)) > before, process)
        process.terminate()
        process.wait(60)
    epochs = [line["epoch"] for line in figures(out)]
    assert epochs == list(range(1, len(epochs) + 1))
