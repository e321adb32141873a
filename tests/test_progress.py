"""What a run in training tells: kept, shown, passed on."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.storage.output import Output
from lift_ray.training import run_channel
from lift_ray.training.events import EpochEnded, RunAborted, RunStarted, StepsDone, WorkersLost
from lift_ray.training.progress import STEP_FIGURES, Progress
from lift_ray.training.ray_train import _reason


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_progress_rebuilds_the_figures_from_the_history_and_counts_what_was_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = EpochMetrics(1, train={"loss": 2.0, "images_per_s": 9.0}, validation={"mean_class_accuracy": 0.5})
    second = replace(first, epoch=2)
    with Progress(Output(str(tmp_path))) as progress:
        progress.take(RunStarted(2, 3, 10, 0, 0, []))
        progress.take(StepsDone(0, 4, dict.fromkeys(STEP_FIGURES, 0.5)))
        progress.take(EpochEnded(first, "epoch-0001"))
        progress.take(EpochEnded(second, "epoch-0002"))
        progress.take(WorkersLost("worker 1: [/lost] its node"))
        progress.take(RunStarted(1, 3, 10, 1, 4, [first]))
        stored = {"epoch": 1, "train/loss": 2.0, "train/images_per_s": 9.0, "validation/mean_class_accuracy": 0.5}
        assert lines(tmp_path) == [stored]
        progress.take(EpochEnded(second, "epoch-0002"))
        progress.take(RunAborted("one", True))
        progress.take(RunAborted("two", False))
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]
    assert progress.retries == ["worker 1: [/lost] its node"]
    assert progress.problem == RunAborted("one", True)
    said = capsys.readouterr().out
    assert "worker 1: [/lost] its node; retrying from the last checkpoint" in said
    assert "continuing from epoch 2, step 4 of 10, on 1 worker" in said
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"step/data_wait_frac" in events.read_bytes()


def test_the_run_channel_relays_stop_requests_and_measures_silence(ray_session: None) -> None:
    here = run_channel.RunChannel("name")
    assert here.take()[1] == 0.0
    assert here.tell(StepsDone(0, 1, {"loss": 1.0})) == ""
    time.sleep(0.05)
    messages, silent_s = here.take()
    assert (len(messages), here.take()[0]) == (1, [])
    assert silent_s >= 0.05
    assert here.ask_stop("SIGTERM")
    assert here.tell(StepsDone(0, 2)) == "SIGTERM"
    here.failed("gone")
    assert here.take()[1] == 0.0
    assert here.join(None), "a run that was told to stop has no problem"
    here.tell(RunAborted("bad", True))
    assert not here.join(None)


def test_the_reason_of_a_failure_is_the_worker_that_failed_first() -> None:
    errors = {0: Exception("[x/gloo/pair.cc:545] Connection closed by peer"), 1: Exception("The worker died\n")}
    assert _reason(errors) == "worker 1: The worker died"
    assert _reason({0: errors[0]}).startswith("worker 0: [x/gloo")
