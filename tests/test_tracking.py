"""--log-to: what MLflow and Weights & Biases are told of a search, and what happens without them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_live import SPACE

from lift_ray import tune
from lift_ray.distributed.tracking import Tracked, trackers
from lift_ray.errors import BadInput
from lift_ray.results.rows import TrialRow
from lift_ray.settings.space import read_space


def trial(state: str = "running") -> TrialRow:
    return TrialRow(
        3,
        {"tuner.kind": "lora", "optim.lr": 0.1},
        1,
        state,
        [{"epoch": 1, "validation/accuracy": 0.5, "x": float("nan")}],
    )


class Recorder:
    """A service that writes down what it is told, until it breaks."""

    def __init__(self, breaks: bool = False) -> None:
        self.told: list[Any] = []
        self.breaks = breaks

    def begin(self, row: TrialRow) -> None:
        self.told.append(("begin", row.number))

    def log(self, row: TrialRow, figures: dict[str, float]) -> None:
        if self.breaks:
            raise ConnectionError("no\nroute")
        self.told.append(figures)

    def end(self, row: TrialRow) -> None:
        self.told.append(("end", row.state))


def test_a_service_is_told_of_each_trial_and_a_broken_one_does_not_end_the_search(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for breaks in (False, True):
        service = Recorder(breaks)
        tracked = Tracked("mlflow", service)
        tracked.started(trial())
        tracked.reported(trial())
        tracked.ended(trial("pruned"))
        figures = [] if breaks else [{"epoch": 1, "validation/accuracy": 0.5}, ("end", "pruned")]
        assert service.told == [("begin", 3), *figures]
    assert capsys.readouterr().out == "mlflow takes no more figures (no route); the search goes on without it\n"


def test_mlflow_gets_a_run_for_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            calls.append(("find", name))

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append(("run", experiment, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="id"))

        def log_param(self, *args: Any) -> None:
            calls.append(args)

        def log_metric(self, *args: Any, step: int) -> None:
            calls.append((*args, step))

        def set_terminated(self, *args: Any) -> None:
            calls.append(args)

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))
    (tmp_path / "space.yaml").write_text(SPACE)
    with trackers(["mlflow", "mlflow"], read_space(tmp_path / "space.yaml")) as [tracked]:
        tracked.started(trial())
        tracked.reported(trial())
        tracked.ended(trial("pruned"))
    assert calls == [
        ("find", "watched"), ("run", "7", "trial 3"), ("id", "tuner.kind", "lora"), ("id", "optim.lr", 0.1), ("id", "epoch", 1, 1),
        ("id", "validation/accuracy", 0.5, 1), ("id", "KILLED"),
    ]  # fmt: skip


@pytest.mark.parametrize(("service", "message"), [
    ("mlfow", "--log-to: unknown service 'mlfow'; did you mean 'mlflow'?"),
    ("mlflow", "--log-to mlflow: needs the package mlflow, but it is not installed; pip install mlflow"),
    ("wandb", "--log-to wandb: needs the package wandb, but it is not installed; pip install wandb"),
])  # fmt: skip
def test_a_service_that_is_not_there_is_said_before_anything_starts(
    service: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "space.yaml").write_text(SPACE)
    with pytest.raises(BadInput) as caught:
        tune.main([str(tmp_path / "space.yaml"), "--log-to", service, "--out", str(tmp_path / "out")])
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()
