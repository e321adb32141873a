"""Optuna's own dashboard reads a study's storage."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import optuna_dashboard
import pytest
from test_resume import space

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.searching.study import Study, open_storage


@pytest.mark.parametrize("url", [None, "sqlite:///{}/studies.db"])
def test_the_dashboard_shows_the_trials_of_a_study(url: str | None, tmp_path: Path) -> None:
    storage = open_storage(url and url.format(tmp_path), tmp_path)
    study = Study(space(), "d", storage)
    for value in (0.25, 0.5):
        row = study.next()
        assert row is not None
        study.report(row, EpochMetrics(1, validation={"mean_class_accuracy": value}))
        study.end(row, "finished")
    app = optuna_dashboard.wsgi(storage)
    [shown] = asked(app, "/api/studies")["study_summaries"]
    assert shown["study_name"] == "played"
    trials = asked(app, f"/api/studies/{shown['study_id']}")["trials"]
    assert [(trial["state"], trial["values"]) for trial in trials] == [("Complete", [0.25]), ("Complete", [0.5])]
    assert trials[0]["intermediate_values"] == [{"step": 1, "value": 0.25}]


def asked(app: Any, path: str) -> Any:
    """The JSON that a WSGI application answers."""
    statuses: list[str] = []
    environment = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": path,
        "QUERY_STRING": "after=0",
        "SERVER_NAME": "here",
        "SERVER_PORT": "80",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.url_scheme": "http",
    }
    body = b"".join(app(environment, lambda status, headers, *_: statuses.append(status)))
    assert statuses[0].startswith("200"), body
    return json.loads(body)
