"""Trials that train in one pass: which, how many, and that a search finds what it finds with one at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from optuna.storages import InMemoryStorage
from played import DATA, log_of, play, run_on_ray, space
from ray import tune as ray_tune

import lift_ray
from lift_ray.searching.jobs import Pack, TrainJob
from lift_ray.searching.packs import MOST, shared_by, size_of
from lift_ray.searching.state import Search
from lift_ray.searching.study import Study
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.storage.output import Output

LAST = {"last": 1}


def job(number: int = 0, **own: Any) -> TrainJob:
    overrides = {name.replace("__", "."): value for name, value in own.items()}
    base = {} if "tuner" in own else {"tuner.blocks": LAST}
    return TrainJob(number, RunConfig.model_validate(apply_overrides({}, base | overrides, RunConfig)).to_dict())


@pytest.mark.parametrize(
    "own",
    [
        {"tuner__bottleneck": 4},
        {"tuner__blocks": [3, 7]},
        {"tuner": {"kind": "linear_probe"}},
        {"tuner": {"kind": "lora", "blocks": {"last": 2}}, "extra_tuner": {"kind": "adaptformer", "blocks": [11]}},
        {"tuner": {"kind": "partial", "last": 2}},
        {"optim__lr": 0.5, "optim__optimizer": "adamw", "loss__tau": 0.5, "head__init": "random"},
        {"evaluation__tte": "five_crops"},
    ],
)
def test_trials_that_see_the_same_images_and_leave_the_first_block_frozen_go_together(own: dict[str, Any]) -> None:
    assert shared_by(job(**own)) == shared_by(job()) is not None


@pytest.mark.parametrize(
    "own",
    [
        {"seed": 1},
        {"backbone__precision": "bf16"},
        {"augment__schedule": "max"},
        {"augment": {"kind": "crop_flip"}},
        {"optim__global_batch_size": 64},
        {"optim__epochs": 4},
        {"optim__sampling": "balanced"},
        {"optim__data_frac": 0.5},
    ],
)
def test_trials_that_see_other_images_do_not(own: dict[str, Any]) -> None:
    found = shared_by(job(**own))
    assert found is not None
    assert found != shared_by(job())
    assert found == shared_by(job(loss__tau=0.5, **own))


@pytest.mark.parametrize(
    "own",
    [
        {"augment": {"kind": "none"}},
        {"augment__views": 2},
        {"tuner__blocks": None},
        {"tuner__blocks": [0, 11]},
        {"tuner": {"kind": "full"}},
        {"extra_tuner": {"kind": "bitfit"}},
        {"tuner": {"kind": "zero_shot"}},
        {"optim__accumulate": 2},
        {"backbone__compile": True},
    ],
)
def test_trials_with_nothing_to_share_train_alone(own: dict[str, Any]) -> None:
    assert shared_by(job(**own)) is None


@pytest.mark.parametrize(
    ("numbers", "title"), [((0, 1, 2), "trials 0 to 2"), ((4, 5), "trials 4 and 5"), ((1, 3, 4), "trials 1, 3 and 4")]
)
def test_the_progress_names_the_trials_of_a_pack(numbers: tuple[int, ...], title: str) -> None:
    assert Pack(tuple(TrainJob(number, {}) for number in numbers)).title == title


def test_jobs_that_are_no_trials_train_alone() -> None:
    assert shared_by(TrainJob(3, job().config, fold=2, then="hold out")) is None


@pytest.mark.parametrize(
    ("trials", "left", "slots", "learns", "size"),
    [
        (64, 64, 2, False, MOST),
        (64, 7, 2, False, 4),
        (64, 1, 2, False, 1),
        (64, 64, 2, True, 8),
        (32, 32, 2, True, 4),
        (14, 14, 2, True, 1),
        (100, 30, 16, True, 1),
    ],
)
def test_all_slots_get_trials_and_a_sampler_that_learns_gets_results(
    trials: int, left: int, slots: int, learns: bool, size: int
) -> None:
    wanted = space(blocks=LAST, trials=trials, sampler="tpe" if learns else "random")
    assert size_of(wanted, left, slots) == size
    off = wanted.model_copy(update={"scale": wanted.scale.model_copy(update={"fused": "off"})})
    assert size_of(off, left, slots) == 1


@pytest.fixture(params=["none", "asha"])
def search(request: pytest.FixtureRequest, tmp_path: Path) -> Search:
    wanted = space(9, LAST, trials=24, scheduler={"kind": request.param})
    return Search(Study(wanted, "d", InMemoryStorage()), Output(str(tmp_path)), DATA)


def test_packs_report_each_epoch_of_each_trial_once_and_shrink_when_trials_end(search: Search) -> None:
    worker = play(search)
    assert [row.number for row in search.rows()] == list(range(24))
    for row in search.rows():
        assert [metrics.epoch for metrics in row.history] == list(range(1, len(row.history) + 1))
        assert row.state == ("finished" if len(row.history) == 9 else "pruned")
    sizes = [1 + key.count("+") for key in worker.began if key.startswith("train")]
    if search.space.search.scheduler.kind == "none":
        assert sizes == [8, 8, 8]
    else:
        assert len(set(sizes)) > 1
        assert sum(row.state == "pruned" for row in search.rows()) > 4


def test_a_lost_slot_parts_its_pack(search: Search) -> None:
    waiting = search.num_waiting
    pack = search.next_job((), 2)
    assert isinstance(pack, Pack)
    assert len(pack.jobs) == 8
    first = search.interrupted(pack)
    assert first == pack.jobs[0]
    alone = [search.next_job((), 2) for _ in range(7)]  # they come first
    assert alone == [*pack.jobs[1:]]
    after = search.next_job((), 2)
    assert isinstance(after, Pack)
    assert [each.number for each in after.jobs] == list(range(8, 16))
    for one in (first, after, *alone):
        search.put_back(one)
    assert search.num_waiting == waiting


@pytest.mark.parametrize("fault", ["die once", "raise"])
def test_a_trial_that_ends_its_slot_does_not_end_those_beside_it(fault: str, tmp_path: Path, ray_session: None) -> None:
    did = run_on_ray(tmp_path, {"trials": 12, "blocks": LAST, "faults": {"2": fault}})
    assert did["states"] == ({"finished": 12} if fault == "die once" else {"finished": 11, "failed": 1})
    lines = Counter(line.split(" ", 1)[1] for line in log_of(tmp_path) if " epoch " in line)
    finished = set(range(12)) - ({2} if fault == "raise" else set())
    assert {f"epoch {number} {epoch}" for number in finished for epoch in (1, 2, 3)} == set(lines)
    assert set(lines.values()) == {1}, "an epoch was trained twice"


class Jobs(ray_tune.Callback):
    """The numbers of the trials of each job."""

    def __init__(self) -> None:
        self.packs: list[list[int]] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if isinstance(trial.config["job"], Pack):
            self.packs.append([each.number for each in trial.config["job"].jobs])


SPACE = """
name: fused
dataset: {data}
base:
  backbone: {{model: "{clip}"}}
  optim: {{global_batch_size: 16, epochs: 3}}
space:
  tuner.kind: {{choices: [adaptformer, lora, linear_probe]}}
  tuner.blocks.last: {{int: [1, 1], when: {{tuner.kind: [adaptformer, lora]}}}}
  optim.lr: {{float: [0.01, 0.3], log: true}}
search: {{trials: 8, sampler: random, tte_best: 0, refit: false, scheduler: {{kind: {scheduler}}}}}
scale: {{max_concurrent: 2, fused: {fused}}}
"""
FIGURES = ["validation/mean_class_accuracy", "validation/loss", "train/loss", "state", "epochs", "optim.lr"]


@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_a_search_with_packs_finds_to_the_last_bit_what_it_finds_one_at_a_time(
    scheduler: str, small_data: str, small_clip: str, tmp_path: Path, ray_session: None
) -> None:
    found, jobs = {}, Jobs()
    for fused in ("off", "auto"):
        file = tmp_path / f"{fused}.yaml"
        file.write_text(SPACE.format(data=small_data, clip=small_clip, fused=fused, scheduler=scheduler))
        out = tmp_path / fused
        callbacks = [jobs] if fused == "auto" else []
        lift_ray.search(lift_ray.SearchSpace.from_yaml(file), out=out, callbacks=callbacks)
        found[fused] = pq.read_table(out / "trials.parquet").select(FIGURES).to_pylist()
    assert jobs.packs[0] == [0, 1, 2, 3]  # the second is smaller where its slot starts late
    if scheduler == "none":
        assert jobs.packs[1][:2] == [4, 5]
        assert found["auto"] == found["off"]
    else:
        both = [
            pair for pair in zip(found["auto"], found["off"], strict=True) if pair[0]["epochs"] == pair[1]["epochs"]
        ]
        assert len(both) > 2
        assert all(one == other for one, other in both)
