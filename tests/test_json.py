"""--json: one document on stdout for each verb, with the keys that docs/reference/json.md names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from embedded import jpegs

from lift_ray import __version__
from lift_ray.cli import PYTHON, VERBS
from lift_ray.terminal.results_json import say_json

ROOT = Path(__file__).parent.parent
WITHOUT = {"serve"}  # verbs that print no result
WRONG = {  # words of which no verb can make a result
    "tune": ["missing.yaml"],
    "train": ["missing.yaml"],
    "evaluate": ["missing"],
    "predict": ["missing", "photos", "--out", "names.txt"],
    "export": ["missing", "--out", "exported"],
    "report": ["missing"],
    "reproduce": ["missing"],
    "init": ["missing"],
    "convert": ["folder", "missing", "data"],
    "cluster": ["check", "missing.yaml"],
}
Document = Callable[..., dict[str, Any]]


def documented() -> dict[str, set[str]]:
    """The keys of each section of the page."""
    sections = (ROOT / "docs" / "reference" / "json.md").read_text(encoding="utf-8").split("\n## ")[1:]
    keys = {}
    for section in sections:
        title, _, text = section.partition("\n")
        cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        keys[title.replace("`", "")] = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
    return keys


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str], same_threads: None) -> Document:
    """A function that runs a verb with --json, and returns its document if its keys are those of a section of the page."""

    def ask(section: str, *words: object) -> dict[str, Any]:
        verb = section.partition(" ")[0]
        capsys.readouterr()
        assert import_module(f"lift_ray.{verb}").main([*map(str, words), "--json"]) is None
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert (found.pop("verb"), found.pop("version")) == (verb, __version__)
        assert found.keys() == documented()[section]
        return found

    return ask


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, small_data: str, small_clip: str) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(
        f"name: one\ndataset: {small_data}\nbackbone: {{model: '{small_clip}'}}\noptim: {{epochs: 1, global_batch_size: 16}}\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(run_file: Path) -> dict[str, Any]:
    """The document of a run, from a process of its own: nothing else is on its stdout."""
    words = [str(run_file), "--no-ray", "--out", str(run_file.parent / "out"), "--json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "lift_ray.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert "test accuracy (%)" in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, image in enumerate(jpegs(12)):
        folder = tmp_path / "photos" / ("crab", "newt")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(image)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_a_run_and_its_model(
    trained: dict[str, Any], small_data: str, run_file: Path, photos: Path, tmp_path: Path, asked: Document
) -> None:
    assert trained.keys() == {"verb", "version", *documented()["train"]}
    lines = Path(trained["metrics"]).read_text().splitlines()
    assert trained["figures"] == json.loads(lines[-1])
    assert Path(trained["checkpoint"]).is_dir()
    assert Path(trained["settings"]).name == "run.yaml"

    (plan,) = asked("train --dry-run", run_file, "--dry-run")["runs"]
    assert plan["settings"]["optim"]["epochs"] == 1
    assert "steps" in plan["plan"]

    table, taus = tmp_path / "confusion.csv", ["--posthoc-tau", 0, "--posthoc-tau", 1]
    found = asked("evaluate", trained["out"], *taus, "--confusion", table)
    assert [one["tau"] for one in found["figures"]] == [0, 1]
    assert found["figures"][0]["test/accuracy"] == pytest.approx(trained["figures"]["test/accuracy"])
    assert (found["images"], found["split"], found["ensemble"], found["new_images"]) == (24, "test", None, None)
    assert found["most_confused"][0].keys() == {"true", "predicted", "count", "fraction"}
    assert found["confusion"] == str(table)
    several = asked("evaluate", trained["out"], trained["checkpoint"], "--data", small_data)
    assert {"members", "groups", "cost"} <= several["ensemble"].keys()

    predicted = asked("predict", trained["out"], photos, "--out", tmp_path / "names.csv")
    assert (predicted["images"], predicted["unreadable"], predicted["left_out"]) == (12, 0, 1)
    assert Path(predicted["left_out_list"]).exists()
    assert predicted["calibration"]["num_images"] == 24

    exported = asked("export", trained["out"], "--out", tmp_path / "exported", "--format", "torch")
    (file,) = exported["files"]
    assert Path(file["file"]).exists()
    assert 0 <= file["difference"] < 1e-4


def test_an_ensemble_has_its_file_of_metrics(run_file: Path, tmp_path: Path, asked: Document) -> None:
    members = "method={kind: backdoor, members: {plain: {}, x: {seed: 3}}}"
    found = asked("train", run_file, members, "--no-ray", "--out", tmp_path / "out")
    assert found["figures"] == json.loads(Path(found["metrics"]).read_text())
    assert list(found["figures"]["members"]) == ["plain", "x"]


def test_a_search_and_its_report(space_file: Path, tmp_path: Path, ray_session: None, asked: Document) -> None:
    words = [space_file, "search.trials=2", "base.optim.epochs=1"]
    assert dict(asked("tune --dry-run", *words, "--dry-run")["plan"])["objective"].startswith("validation/")
    found = asked("tune", *words, "--out", tmp_path / "out")
    study = json.loads(Path(found["study"]).read_text())
    assert found["compared"] == study["compared"]
    assert found["best"] == study["best"]
    assert found["states"] == {"finished": 2}
    for name in ("best_settings", "checkpoint", "trials", "report"):
        assert Path(found[name]).exists(), name
    page = asked("report", tmp_path / "out", "--out", tmp_path / "page")["page"]
    assert Path(page).parent == tmp_path / "page"
    assert Path(page).exists()


def test_a_folder_of_images(photos: Path, tmp_path: Path, asked: Document) -> None:
    found = asked("init", photos, "--out", tmp_path / "space.yaml")
    assert (found["classes"], found["images"], found["converted"]) == (2, 12, False)
    assert found["classes_below"] == {"20": 2, "5": 0}
    assert Path(found["out"]).exists()
    made = asked("convert", "folder", photos, tmp_path / "data", "--test-frac", "0.5")
    assert {split: record["images"] for split, record in made["splits"].items()} == found["splits"] | {
        "train": 4,
        "validation": 2,
        "test": 6,
    }
    assert made["left_out"] == 1
    assert Path(made["left_out_list"]).exists()
    assert sum(made["groups"].values()) == 2


def test_published_values(tmp_path: Path, asked: Document) -> None:
    (first, *_) = asked("reproduce --list", "places-lt", "--list", "--data", tmp_path)["claims"]
    assert first["claim"]["table"] == "places-lt"
    assert first["missing"]["data"] == f"no dataset in {tmp_path / 'places-lt'}"


def test_a_cluster(asked: Document) -> None:
    prices = ["--price", "head=0.5", "--price", "gpu-spot=2"]
    found = asked("cluster", "check", "aws", "--for", "quickstart", *prices)
    assert found["node_types"][0]["price_per_h"] == 0.5
    assert found["search"]["fleets"][0]["kind"] in {kind["name"] for kind in found["node_types"]}
    assert found["placeholders"]
    (file,) = (ROOT / "clusters").rglob("prometheus*.y*ml")
    assert "Prometheus" in asked("cluster for Prometheus or Grafana", "check", file)["monitoring"]


def test_the_page_has_every_verb_that_prints_results() -> None:
    assert {section.partition(" ")[0] for section in documented()} == {*VERBS} - WITHOUT == {*WRONG}


@pytest.mark.parametrize("verb", WRONG)
def test_a_verb_that_fails_prints_no_document(verb: str, tmp_path: Path) -> None:
    words = [*PYTHON.split()[1:], verb, *WRONG[verb], "--json"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].count(": ") >= 1
    assert "Traceback" not in done.stderr


def test_numbers_that_are_not_finite_become_null_and_paths_text(capsys: pytest.CaptureFixture[str]) -> None:
    say_json("tune", {"a": [float("inf"), {"b": float("nan"), "c": (1.5, None)}], "out": Path("x")})
    expected = {"verb": "tune", "version": __version__, "a": [None, {"b": None, "c": [1.5, None]}], "out": "x"}
    assert json.loads(capsys.readouterr().out) == expected


def test_other_programs_do_not_print_beside_the_document() -> None:
    code = (
        "import subprocess\nfrom lift_ray.terminal.results_json import say_json, stdout_to_stderr\n"
        "with stdout_to_stderr():\n    print('ours'); subprocess.run(['echo', 'theirs'])\nsay_json('tune', {})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"verb": "tune", "version": __version__}
    assert {"ours", "theirs"} <= set(done.stderr.split())
