"""Searches with a killed slot, a killed driver, Ctrl-C and SIGTERM, on real Ray processes with real training."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from test_tune import epochs, stored

from lift_ray import tune
from lift_ray.settings.run_file import read_run
from lift_ray.storage.layout import JOURNAL


@pytest.fixture
def drivers() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_ctrl_c_and_sigterm_write_the_best_so_far_and_say_how_to_continue(
    space_file: Path, tmp_path: Path, drivers: list[subprocess.Popen[str]]
) -> None:
    out, environment = tmp_path / "out", {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [
        sys.executable,
        "-m",
        "lift_ray.tune",
        str(space_file),
        "search.trials=200",
        "search.scheduler.kind=none",
        "--no-dashboard",
        "--out",
        str(out),
    ]
    for number, code, words, least in (
        (signal.SIGINT, 130, [], 2),
        (signal.SIGTERM, 143, ["--resume"], 5),
    ):
        log = tmp_path / f"log-{code}"
        with log.open("w") as file:
            drivers.append(
                subprocess.Popen(
                    [*command, *words],
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    preexec_fn=lambda: signal.signal(
                        signal.SIGINT, signal.default_int_handler
                    ),  # ignored in a background job
                )
            )
        ends = time.monotonic() + 120
        while log.read_text().count(" finished ") < least and drivers[-1].poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        drivers[-1].send_signal(number)
        assert drivers[-1].wait(60) == code, log.read_text()
        said = log.read_text().splitlines()
        done = sum(row["state"] == "finished" for row in pq.read_table(out / "trials.parquet").to_pylist())
        best = json.loads((out / "best" / "metrics.json").read_text())["validation/mean_class_accuracy"]
        assert re.fullmatch(
            rf"stopped with {done} of 200 trials done; the best so far is trial \d+ \(.*\), in {out}/best and "
            rf"{out}/best.yaml; add --resume to the command to continue, or --resume search.trials={done} to compare the best of these",
            said[-1],
        ), said[-1]
        assert not [line for line in said if "Traceback" in line or "*** SIG" in line or "Check failed" in line]
        table = pq.read_table(out / "trials.parquet").to_pylist()
        assert best == max(row["validation/mean_class_accuracy"] or 0 for row in table if row["state"] == "finished")
        assert read_run(out / "best.yaml").config
        assert (out / "report" / "index.html").exists()
        assert not (out / "study.json").exists()
    done = sum(row["state"] == "finished" for row in pq.read_table(out / "trials.parquet").to_pylist())
    command[command.index("search.trials=200")] = f"search.trials={done}"
    last = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=120)
    assert last.returncode == 0, last.stdout + last.stderr
    table = pq.read_table(out / "trials.parquet").to_pylist()
    assert [row["state"] for row in table].count("finished") == done, "another trial was started"
    assert json.loads((out / "study.json").read_text())["compared"]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "victim"), [(1, "ray::Slot"), (2, "ray::RankWorker")])
def test_a_slot_that_loses_a_process_is_replaced_and_its_trial_continues(
    workers: int, victim: str, space_file: Path, tmp_path: Path, ray_session: None
) -> None:
    out = tmp_path / "out"
    killed: list[int] = []

    def kill_one_slot() -> None:
        ends = time.monotonic() + 120
        # Each checkpoint replaces the one before, so a busy machine may never see that of epoch 5 itself.
        while not any(path.name >= "epoch-0005" for path in out.glob("checkpoints/*/epoch-[0-9][0-9][0-9][0-9]")):
            if time.monotonic() > ends:
                return
            time.sleep(0.05)
        below = psutil.Process().children(recursive=True)
        workers = [process for process in below if process.name().startswith(victim)]
        killed.append(workers[0].pid)
        workers[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one_slot)
    killer.start()
    words = [
        "search.trials=2",
        "base.optim.epochs=40",
        "search.scheduler.kind=none",
        f"scale.workers_per_trial={workers}",
    ]
    assert not tune.main([str(space_file), *words, "--out", str(out)])
    killer.join()
    assert killed, "no trial reached epoch 5 in time"
    table = pq.read_table(out / "trials.parquet").to_pylist()
    assert [(row["state"], row["epochs"]) for row in table] == [("finished", 40)] * 2
    for trial in stored(out):
        assert [figures["epoch"] for figures in epochs(trial)] == list(range(1, 41)), (
            "an epoch was done twice, or left out"
        )


KILLED = [
    "search.trials=24",
    "base.optim.epochs=2",
    "search.sampler=random",
    "search.scheduler.kind=none",
    "search.tte_best=0",
]


@pytest.mark.slow
def test_sigkill_at_three_moments_loses_no_trial_and_repeats_none(
    space_file: Path, tmp_path: Path, ray_session: None, drivers: list[subprocess.Popen[str]]
) -> None:
    out, words = tmp_path / "out", [str(space_file), *KILLED]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    chance = random.Random(7)
    for attempt in range(3):
        resume = ["--resume"] if attempt else []
        command = [sys.executable, "-m", "lift_ray.tune", *words, "--out", str(out), *resume]
        drivers.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, text=True))
        size = (out / JOURNAL).stat().st_size if attempt else 0
        ends = time.monotonic() + 120
        while ((out / JOURNAL).stat().st_size if (out / JOURNAL).exists() else 0) < size + 4000:
            assert time.monotonic() < ends, "the search stored nothing"
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.6))
        assert drivers[-1].poll() is None, "the search ended before it was killed"
        drivers[-1].send_signal(signal.SIGKILL)
        drivers[-1].wait()
    before = stored_epochs(out)
    assert not tune.main([*words, "--out", str(out), "--resume"])
    undisturbed = tmp_path / "undisturbed"
    assert not tune.main([*words, "scale.max_concurrent=1", "--out", str(undisturbed)])
    table, other = (pq.read_table(folder / "trials.parquet").to_pylist() for folder in (out, undisturbed))
    assert [row["state"] for row in table] == ["finished"] * 24
    for name in ("number", "optim.lr", "loss.tau", "validation/mean_class_accuracy", "train/loss"):
        assert [row[name] for row in table] == [row[name] for row in other], name
    first, second = (json.loads((folder / "study.json").read_text())["best"] for folder in (out, undisturbed))
    assert (first["trial"], first["values"]) == (second["trial"], second["values"])
    after = stored_epochs(out)
    assert all(after[key] == value for key, value in before.items()), (
        "what was stored before a kill was changed after it"
    )
    assert len(before) > 0


def stored_epochs(out: Path) -> dict[tuple[int, str], Any]:
    """Return every stored epoch with its times, which would show a repeated one."""
    trials = stored(out)
    return {(t.number, key): value for t in trials for key, value in t.user_attrs.items() if key.startswith("epoch ")}


@pytest.mark.slow
def test_sigkill_during_confirmation_and_refit_loses_nothing_and_repeats_nothing(
    space_file: Path, tmp_path: Path, ray_session: None, drivers: list[subprocess.Popen[str]]
) -> None:
    out, environment = tmp_path / "out", os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    words = [str(space_file), "search.trials=3", "base.optim.epochs=25", "search.sampler=random", "search.tte_best=0"]
    words += ["search.scheduler.kind=none", "search.folds=3", "search.confirm.best=2", "search.refit=true"]
    for number, moment in enumerate(("*-fold-2", "*-fold-3", "*-refit")):
        resume = ["--resume"] if number else []
        command = [sys.executable, "-m", "lift_ray.tune", *words, "--out", str(out), *resume]
        drivers.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, text=True))
        ends = time.monotonic() + 180
        while not list(out.glob(f"checkpoints/{moment}/epoch-*")):
            assert time.monotonic() < ends, f"no checkpoint of {moment}"
            assert drivers[-1].poll() is None, f"the search ended before {moment}"
            time.sleep(0.02)
        drivers[-1].send_signal(signal.SIGKILL)
        drivers[-1].wait()
    before = results_in(out)
    assert any("fold 2" in key for key in before)
    assert not tune.main([*words, "--out", str(out), "--resume"])
    after = results_in(out)
    assert {key: after[key] for key in before} == before, "a stored result was changed: its job was done twice"
    undisturbed = tmp_path / "undisturbed"
    assert not tune.main([*words, "--out", str(undisturbed)])
    found, expected = (json.loads((folder / "study.json").read_text()) for folder in (out, undisturbed))
    for name in ("choice", "out_of_fold", "posthoc", "refit", "compared"):
        assert found[name] == expected[name], name
    first, second = (pq.read_table(folder / "best" / "out_of_fold.parquet") for folder in (out, undisturbed))
    assert first.drop_columns("logits") == second.drop_columns("logits")


def results_in(out: Path) -> dict[str, Any]:
    """Return the stored results of the jobs after the trials, by key, with their times."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / JOURNAL)))
    [study] = storage.get_all_studies()
    return {key: value for key, value in study.user_attrs.items() if key.startswith("result ")}
