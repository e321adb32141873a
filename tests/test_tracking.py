"""--log-to: what MLflow, Weights & Biases and TensorBoard are told of a search or a run, and what happens without them."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for
from test_live import SPACE

from lift_ray import train, tune
from lift_ray.epoch_metrics import FIELDS, EpochMetrics
from lift_ray.errors import BadInput, RunFailed
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.tracking.services import SERVICES, Tracked, followed, trackers
from lift_ray.training import events
from lift_ray.training.events import EpochEnded, RunStarted, WorkersLost
from lift_ray.training.progress import read_metrics


def trial(state: str = "running") -> TrialRow:
    return TrialRow(
        3,
        {"tuner.kind": "lora", "optim.lr": 0.1},
        1,
        state,
        [EpochMetrics(1, train={"loss": float("nan")}, validation={"accuracy": 0.5})],
    )


class Recorder:
    """A service that writes down what it is told, until it breaks."""

    def __init__(self, breaks: bool = False) -> None:
        self.told: list[Any] = []
        self.breaks = breaks

    def begin(self, title: str, settings: Mapping[str, Any]) -> None:
        self.told.append((title, settings))

    def log(self, title: str, figures: dict[str, float], epoch: int) -> None:
        if self.breaks:
            raise ConnectionError("no\nroute")
        self.told.append((epoch, figures))

    def end(self, title: str, state: str) -> None:
        self.told.append(state)


TRIAL = ("trial 3: lora, lr 0.1", {"tuner.kind": "lora", "optim.lr": 0.1})
FIGURES = {"validation/accuracy": 0.5}


def test_a_tracking_service_receives_each_trial_and_a_broken_one_does_not_end_the_search(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for breaks in (False, True):
        service = Recorder(breaks)
        tracked = Tracked("mlflow", service)
        tell_of_a_trial(tracked)
        assert service.told == [TRIAL, *([] if breaks else [(1, FIGURES), "pruned"])]
    assert capsys.readouterr().out == "mlflow accepts no more metrics (no route); continuing without it\n"


def tell_of_a_trial(tracked: Tracked) -> None:
    row = trial()
    history, row.history = row.history, []
    tracked.started(row)
    row.history = history
    tracked.reported(row)
    tracked.ended(trial("pruned"))


def test_a_tracking_service_receives_the_earlier_epochs_when_a_trial_continues() -> None:
    service = Recorder()
    Tracked("mlflow", service).started(trial())
    assert service.told == [TRIAL, (1, FIGURES)]


def test_a_search_that_is_cut_short_ends_its_trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service = Recorder()
    monkeypatch.setitem(SERVICES, "mlflow", lambda name, folder: service)
    with trackers(["mlflow", "mlflow"], "watched", tmp_path) as [tracked]:
        tracked.started(trial())
    assert service.told[-1] == "stopped"


def test_a_run_reports_each_epoch_once_although_it_is_resumed() -> None:
    service = Recorder()
    first, second = (EpochMetrics(epoch, validation={"accuracy": 0.1 * epoch}) for epoch in (1, 2))
    config = {"tuner": {"kind": "lora", "bottleneck": None}, "seed": 0}
    with followed([Tracked("mlflow", service)], "mine", config) as tell:
        for message in (
            RunStarted(2, 2, 5, 0, 0, [first]),
            WorkersLost("lost"),
            RunStarted(2, 2, 5, 1, 0, [first]),
            EpochEnded(second, ""),
        ):
            tell(message)
        tell(events.TestEnded(EpochMetrics(2, test={"accuracy": 0.3})))
    told = [(1, {"validation/accuracy": 0.1}), (2, {"validation/accuracy": 0.2}), (2, {"test/accuracy": 0.3})]
    assert service.told == [("mine", {"tuner.kind": "lora", "seed": 0}), *told, "finished"]
    for error, state in ((KeyboardInterrupt(), "stopped"), (RunFailed("diverged"), "failed")):
        with pytest.raises(type(error)), followed([Tracked("mlflow", service)], "mine", config):
            raise error
        assert service.told[-1] == state


def test_tensorboard_has_a_folder_for_each_trial(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]

    with trackers(["tensorboard"], "watched", tmp_path) as [tracked]:
        tell_of_a_trial(tracked)
    [folder] = (tmp_path / "tensorboard").iterdir()
    assert folder.name == "trial-3-lora-lr-0.1"
    events = [Event.FromString(data) for path in folder.iterdir() for data in records(path.read_bytes())]
    values = [(event.step, value) for event in events for value in event.summary.value]
    assert [(step, value.simple_value) for step, value in values if value.tag == "validation/accuracy"] == [(1, 0.5)]
    [start] = [v.metadata.plugin_data.content for _, v in values if v.tag.endswith("session_start_info")]
    for text in (b"tuner.kind", b"lora", b"optim.lr", b"state", b"pruned"):
        assert text in start, text


def records(data: bytes) -> Iterator[bytes]:
    """Of a file of events: length, checksum, data, checksum, and so on."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += length + 16


@pytest.fixture
def run_file(small_data: str, small_clip: str, tmp_path: Path) -> str:
    text = f"name: mine\ndataset: {small_data}\nbackbone: {{model: '{small_clip}'}}\noptim: {{epochs: 2, global_batch_size: 16}}\n"
    (tmp_path / "run.yaml").write_text(text)
    return str(tmp_path / "run.yaml")


def test_mlflow_has_settings_and_figures_of_trials_and_runs(
    run_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with trackers(["mlflow"], "watched", tmp_path) as [tracked]:
        tell_of_a_trial(tracked)
    assert not train.main([run_file, "--no-ray", "--log-to", "mlflow", "--out", str(tmp_path / "out")])
    client = mlflow.MlflowClient()

    def run_of(name: str) -> Any:
        [run] = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        return run

    kept = run_of("watched")
    assert (kept.info.run_name, kept.info.status) == (TRIAL[0], "KILLED")
    assert (kept.data.params, kept.data.metrics) == ({"tuner.kind": "lora", "optim.lr": "0.1"}, FIGURES)
    run, lines = run_of("mine"), read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["optim.global_batch_size"] == "16"
    for name in ("validation/mean_class_accuracy", "train/loss"):
        kept = [(found.step, found.value) for found in client.get_metric_history(run.info.run_id, name)]
        assert kept == [(line.epoch, line[name]) for line in lines if name in line and not line.test]
    assert run.data.metrics["test/accuracy"] == lines[-1].test["accuracy"]


def test_weights_and_biases_has_settings_and_figures_of_trials_and_runs(
    run_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with trackers(["wandb"], "watched", tmp_path) as [tracked]:
        tell_of_a_trial(tracked)
    assert not train.main([run_file, "--no-ray", "--log-to", "wandb", "--out", str(tmp_path / "out")])
    logs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2
    wait_for("the last record of each run", lambda: all("code" in offline_run(log) for log in logs), seconds=60)
    runs = {run["project"]: run for run in map(offline_run, logs)}
    kept = runs["watched"]
    assert (kept["name"], kept["code"], kept["state"]) == (TRIAL[0], 0, "pruned")
    assert kept["settings"].items() >= TRIAL[1].items()
    assert kept["epochs"][1].items() >= FIGURES.items()
    run, lines = runs["mine"], read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert (run["name"], run["code"], run["state"]) == ("mine", 0, "finished")
    assert run["settings"]["optim.global_batch_size"] == 16
    for epoch in (1, 2):
        same = [line for line in lines if line.epoch == epoch]  # the test's come with the last epoch's
        told = {name: value for line in same for name, value in line.flat(*FIELDS).items()}
        assert run["epochs"][epoch].items() >= told.items()
    assert "accuracy" in lines[-1].test


def offline_run(path: Path) -> dict[str, Any]:
    """What wandb would upload: its log holds records as LevelDB's logs do, in blocks of 32 KiB.

    A process of wandb writes it, and may still do so when `finish` has returned.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-untyped]

    data, at, parts, found = path.read_bytes(), 7, b"", {"settings": {}, "epochs": {}}  # type: dict[str, Any]
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            break
        if kind:
            parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            if record.HasField("run"):
                found |= {"project": record.run.project, "name": record.run.display_name}
                found["settings"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                epoch = found["epochs"].setdefault(record.history.step.num, {})
                epoch |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            elif record.HasField("summary"):
                found |= {
                    item.key: json.loads(item.value_json) for item in record.summary.update if item.key == "state"
                }
            elif record.HasField("exit"):
                found["code"] = record.exit.exit_code
    return found


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ("mlfow", "--log-to: unknown service 'mlfow'; did you mean 'mlflow'?"),
        ("mlflow", "--log-to mlflow: requires the package mlflow, but it is not installed; pip install mlflow"),
        ("wandb", "--log-to wandb: requires the package wandb, but it is not installed; pip install wandb"),
    ],
)
def test_a_missing_tracking_service_is_reported_before_anything_starts(
    service: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "space.yaml").write_text(SPACE)
    with pytest.raises(BadInput) as caught:
        tune.main([str(tmp_path / "space.yaml"), "--log-to", service, "--out", str(tmp_path / "out")])
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_arguments_that_train_ignores_or_cannot_use_are_refused(run_file: str, tmp_path: Path) -> None:
    for words, message in (
        (
            ["--log-to", "tensorboard"],
            "--log-to: must be mlflow or wandb, but got tensorboard; leave it out, every run writes it",
        ),
        (["--log-to", "mlfow"], "--log-to: unknown service 'mlfow'; did you mean 'mlflow'?"),
        (
            ["--no-ray", "--dashboard"],
            "--dashboard: cannot be used with --no-ray, because Ray serves it; leave one of them out",
        ),
    ):
        with pytest.raises(BadInput) as caught:
            train.main([run_file, *words, "--out", str(tmp_path / "out")])
        assert str(caught.value) == message
    assert not (tmp_path / "out").exists()
