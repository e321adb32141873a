"""Published values: which are claimed, what a measurement says about them, and the command that compares both."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from processes import wait_for

from lift_ray import convert, reproduce
from lift_ray.api.reproduce import Reproduction, planned
from lift_ray.errors import BadInput, RunFailed
from lift_ray.reporting.reproduction import NOT_VERIFIED, STAND_IN, Claim, Measured, claims, published_data
from lift_ray.searching.fixed_runs import FixedRun, FixedRuns
from lift_ray.searching.jobs import EvaluationJob, TrainJob
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import read_run
from lift_ray.storage.output import Output
from lift_ray.training.events import JobDone, RunDiverged, StepsDone

THIRTEEN = [78.3, 82.9, 52.2, 53.7, 80.4, 85.2, 87.4, 81.7, 83.1, 84.9, 89.1, 90.2, 91.3]


def test_the_first_hand_claims_of_lift_are_the_thirteen_published_rows_each_with_its_recipe() -> None:
    ours = [claim for claim in claims() if claim.source == "2309.10019"]
    assert [claim.value for claim in ours] == THIRTEEN
    assert all(claim.tte and claim.recipe and not claim.second_hand for claim in ours)
    assert len({claim.recipe for claim in ours}) == 13


@pytest.mark.parametrize("claim", [claim for claim in claims() if claim.recipe], ids=lambda claim: str(claim.recipe))
def test_the_recipe_of_a_claim_is_of_its_dataset_and_tower(claim: Claim) -> None:
    run = read_run(str(claim.recipe))
    assert run.dataset.endswith(f"/{claim.dataset}")
    tower = {"CLIP ViT-B/16": "ViT-B-16", "CLIP ViT-L/14": "ViT-L-14", "CLIP ViT-L/14@336": "ViT-L-14-336"}
    assert run.backbone.model == tower.get(claim.model, "timm:vit_base_patch16_224.augreg_in21k_ft_in1k")
    assert run.evaluation.tte == "five_crops"


def test_a_claim_without_a_recipe_says_why() -> None:
    without = [claim.note for claim in claims() if claim.recipe is None]
    assert without
    assert all(note.startswith("no recipe: ") for note in without)


@pytest.mark.parametrize("name", sorted(published_data()))
def test_the_command_for_a_dataset_is_one_that_convert_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *words = shlex.split(published_data()[name].command.format(folder=f"data/{name}"))
    assert verb == "convert"
    with pytest.raises(
        BadInput, match=r"/?(cifar-100|ImageNet_LT|Places_LT|classnames|inat2018)\S*: must be"
    ):  # not usage
        convert.main(words)


# ---- what a measurement says


def measured(*values: float, seeds: int = 3) -> Measured:
    return Measured(claims()[0], values, seeds)  # 78.3


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ((78.0, 78.2, 78.4), "reproduced"),
        ((76.0, 76.1, 76.2), "differs by -2.2"),
        ((80.0, 80.1, 80.2), "differs by +1.8"),
        ((78.2, 78.2, 78.2), "differs by -0.1"),
        ((78.3, 78.3, 78.3), "reproduced"),
        ((78.0, 78.2), "not finished (2 of 3 seeds)"),
        ((), "not run"),
    ],
)
def test_a_claim_inside_the_interval_is_reproduced(values: tuple[float, ...], status: str) -> None:
    assert measured(*values).status == status


def test_the_interval_is_that_of_one_more_run() -> None:
    found = measured(77.0, 78.0, 79.0)
    assert found.half_width == pytest.approx(4.303 * (1 + 1 / 3) ** 0.5, rel=1e-3)  # t of 2 degrees, deviation 1
    assert found.interval == (78.0 - found.half_width, 78.0 + found.half_width)
    assert measured(78.3, seeds=1).status == "not decided (one seed has no interval)"


def test_an_interval_of_accuracies_ends_at_0_and_100() -> None:
    assert measured(2.0, 4.0).interval == (0.0, pytest.approx(3 + 12.706 * 2**0.5 * 1.5**0.5, rel=1e-3))
    assert measured(98.0, 99.0).cells()[5] == "98.5 (87.5 to 100.0)"


def test_a_stand_in_never_verifies_anything() -> None:
    one = replace(measured(78.3, 78.3, 78.3), stand_in=True)
    assert (one.status, one.difference) == (NOT_VERIFIED, None)
    assert "stand-in" in one.cells()[5]


# ---- jobs


def run(seed: int, *ensembling: bool) -> FixedRun:
    config = RunConfig.parse({"seed": seed, "evaluation": {"tte": True}})
    return FixedRun(f"one-seed-{seed}", "data", config, ensembling or (True,))


def test_a_run_is_trained_once_and_tested_as_often_as_asked(tmp_path: Path) -> None:
    source = FixedRuns([run(0, True, False), run(1)], Output(str(tmp_path)))
    assert source.num_jobs == 5
    first = source.next_job()
    assert isinstance(first, TrainJob)
    assert source.num_waiting == 1  # the other training
    assert source.take(first, StepsDone(0, 1))
    assert not source.take(first, JobDone({"trained_parameters": 7}))
    found = [source.next_job() for _ in range(4)]
    tests = [job for job in found if isinstance(job, EvaluationJob)]
    assert [job.config["evaluation"]["tte"] for job in tests] == ["five_crops", "off"]
    assert {job.checkpoint for job in tests} == {f"checkpoints/{first.number}-refit/epoch-0005"}
    assert isinstance(found[2], TrainJob)
    assert found[3] is None
    assert not source.is_over


def test_another_process_continues_with_what_is_not_done(tmp_path: Path) -> None:
    out, runs = Output(str(tmp_path)), [run(0)]
    source = FixedRuns(runs, out, {"commit": "c"})
    job = source.next_job()
    assert job is not None
    source.take(job, JobDone({"trained_parameters": 7}))
    source.next_job()  # and is killed while it tests
    again = FixedRuns(runs, out)
    (test,) = [again.next_job()]
    assert isinstance(test, EvaluationJob)
    again.take(test, JobDone({"figures": [{"test/accuracy": 0.5}]}))
    assert again.is_over
    assert [again.results[key]["seconds"] >= 0 for key in (job.key, test.key)] == [True, True]
    assert again.results[test.key]["test/accuracy"] == 0.5
    assert FixedRuns(runs, out).is_over
    assert not FixedRuns([run(1)], out).is_over  # other settings, another run


def test_the_same_settings_on_another_dataset_are_another_run(tmp_path: Path) -> None:
    assert replace(run(0), dataset="other").training.key != run(0).training.key
    plan = [replace(one, data_problem="", weights_problem="") for one in planned(None, str(tmp_path), stand_in=False)]
    found = Reproduction(plan, 1, Output(f"{tmp_path}/out"), stand_in=False, command="c")
    names = {one.name for one in found._merged.values()}
    assert names == {
        f"{claim.recipe.removeprefix('recipes/').replace('/', '-')}-seed-0" for claim in claims() if claim.recipe
    }


def test_a_run_that_diverges_is_not_tested_and_one_that_fails_ends_with_its_name(tmp_path: Path) -> None:
    source = FixedRuns([run(0), run(1)], Output(str(tmp_path)))
    first, second = source.next_job(), source.next_job()
    assert first is not None
    assert second is not None
    source.take(first, RunDiverged("the loss is nan"))
    assert source.next_job() is None
    with pytest.raises(RunFailed, match=r"^training one-seed-1 failed: boom; run the same command again"):
        source.failed(second, "boom")


# ---- the command


def test_list_prints_every_claim_and_the_commands_that_bring_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    reproduce.main(["--list", "--data", f"{tmp_path}/data"])
    said = capsys.readouterr().out
    assert all(f" {claim.value:g} " in said for claim in claims())
    assert (
        f"python -m lift_ray.convert cifar cifar-100-python.tar.gz {tmp_path}/data/cifar100-lt --imbalance 100" in said
    )
    assert "lr.load_backbone('ViT-L-14-336', 'openai')" in said
    assert said.count("second-hand") == sum(claim.second_hand for claim in claims())
    with pytest.raises(BadInput, match=r"^TABLE: unknown table 'places'; did you mean 'places-lt'\?$"):
        reproduce.main(["places"])


def test_a_dataset_that_is_not_the_published_one_is_refused(
    small_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lift_ray.model.backbone.weights_are_here", lambda *_: True)
    (tmp_path / "places-lt").symlink_to(small_data)
    plan = planned("places-lt", str(tmp_path), stand_in=False)
    problem = f"{tmp_path}/places-lt has 96 training images, but the published dataset has 62,500"
    assert {one.problem for one in plan if one.config} == {problem}
    found = Reproduction(plan, 3, Output(f"{tmp_path}/out"), stand_in=False, command="c")
    assert {row.status for row in found.measured() if row.claim.recipe} == {problem}


@pytest.fixture
def drivers() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1500)  # a minute on an idle machine
def test_a_stand_in_that_is_killed_continues_and_says_in_every_file_that_it_verifies_nothing(
    tmp_path: Path, drivers: list[subprocess.Popen[str]]
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    words = ["cifar100-lt", "--stand-in", "--seeds", "1", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def start() -> subprocess.Popen[str]:
        with log.open("a") as file:
            command = [sys.executable, "-m", "lift_ray.reproduce", *words]
            drivers.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file, text=True))
        return drivers[-1]

    def results() -> dict[str, dict[str, object]]:
        there = (out / "results.json").exists()
        return json.loads((out / "results.json").read_text()) if there else {}

    first = start()
    before = wait_for("a result", lambda: results() if first.poll() is None else pytest.fail(log.read_text()), 600)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    for child in children:
        if child.is_running():
            child.kill()
    first.wait()
    assert start().wait(900) == 0, log.read_text()
    after = results()
    assert len(after) == 4 > len(before)  # two heads, each trained and tested once
    assert before.items() <= after.items()
    assert f"4 jobs of training and testing, {len(before)} done before" in log.read_text()
    for name in ("reproduction.html", "reproduction.md"):
        text = (out / name).read_text()
        assert STAND_IN in text
        assert text.count(NOT_VERIFIED) == 6
    found = json.loads((out / "reproduction.json").read_text())
    assert found["stand_in"]
    assert STAND_IN in found["banner"]
    rows = [row for row in found["claims"] if row["claim"]["recipe"]]
    assert {row["status"] for row in rows} == {NOT_VERIFIED}
    assert all(len(row["values"]) == 1 and row["difference"] is None for row in rows)
