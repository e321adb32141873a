"""Searches that choose between backbones: `named` choices of a space file, and slots that load each backbone once."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from loading_slot import LoadingSlot
from made_study import make_trials, write_study
from optuna.storages import InMemoryStorage
from played import DATA

from lift_ray import tune
from lift_ray.data.open import open_dataset
from lift_ray.errors import BadInput
from lift_ray.ray_runtime.capacity import Need
from lift_ray.reporting.figures.comparison import calibration_figure
from lift_ray.reporting.figures.search import positions
from lift_ray.reporting.importance import importances
from lift_ray.reporting.study_files import read_study
from lift_ray.searching.driver import run_search
from lift_ray.searching.engine import Engine
from lift_ray.searching.final_comparison import zero_shots
from lift_ray.searching.interrupts import Interrupts
from lift_ray.searching.jobs import EvaluationJob, IdleJob, Job, SlotSettings, TrainJob, first_fitting
from lift_ray.searching.preflight import backbones_of
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.state import Search
from lift_ray.searching.study import Study, open_storage
from lift_ray.settings.checks import checked_space
from lift_ray.settings.space import SpaceFile, backbones
from lift_ray.settings.yaml_file import SettingsFile
from lift_ray.storage.output import Output
from lift_ray.training.events import JobDone, Reply

TWO: dict[str, Any] = {
    "name": "two",
    "dataset": "d",
    "base": {"backbone": {"cache_gib": 0.5}, "optim": {"epochs": 1, "global_batch_size": 32}},
    "space": {
        "backbone": {
            "named": {
                "clip": {"model": "ViT-B-16", "pretrained": "openai"},
                "dino": {"model": "timm:vit_small_patch16_224"},
            }
        },
        "head.init": {"choices": ["class_mean"], "when": {"backbone": "dino"}},
        "optim.lr": {"float": [0.01, 0.1]},
    },
    "baselines": [{"name": "clip", "backbone": "clip", "optim.lr": 0.02}],
    "search": {"trials": 6, "sampler": "random", "scheduler": {"kind": "none"}, "tte_best": 0},
}


def two(changes: dict[str, Any] | None = None, **sections: Any) -> SpaceFile:
    """Return the space of two backbones, with other settings by section."""
    tree = copy.deepcopy(TWO) | sections
    tree["space"] |= changes or {}
    return checked_space(SettingsFile("file", tree, {}, first_line=0))


def test_a_name_stands_for_the_settings_of_its_choice_over_those_of_base() -> None:
    found = two().config({"backbone": "dino", "head.init": "class_mean", "optim.lr": 0.05})
    assert (found.backbone.model, found.backbone.pretrained) == ("timm:vit_small_patch16_224", None)
    assert (found.backbone.cache_gib, found.head.init, found.optim.lr) == (0.5, "class_mean", 0.05)
    assert two().config({"backbone": "clip"}).backbone.pretrained == "openai"


def test_any_settings_of_a_section_can_be_named() -> None:
    heads = {"plain": {"kind": "linear", "init": "random"}, "warm": {"kind": "cosine", "scale": 30.0}}
    tree = TWO | {"space": {"head": {"named": heads}, "optim.lr": {"float": [0.01, 0.1]}}, "baselines": []}
    space = SpaceFile.model_validate(tree)
    plain, warm = (space.config({"head": name}).head for name in heads)
    assert (plain.kind, plain.init) == ("linear", "random")
    assert (warm.kind, warm.init, warm.scale) == ("cosine", "semantic", 30.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"backbone": {"named": {"a": {"modell": "x"}}}},
            "file space.backbone.named.a.modell: unknown key 'modell'; did you mean 'model'?",
        ),
        (
            {"backbone": {"named": {"a": {"precision": "fp8"}}}},
            "file space.backbone.named.a.precision: unknown value 'fp8'; known: bf16, fp16, fp32",
        ),
        (
            {"optim": {"named": {"a": {"lr": 1.0}}}},
            "file space.optim.named: `named` must be for one of backbone, augment, head, loss, but got optim; "
            "use choices, or write it for one of these",
        ),
        (
            {"backbone.model": {"choices": ["ViT-B-16"]}},
            "file space.backbone.model: must not be beside backbone, which sets it; remove one of them",
        ),
        (
            {"backbone": {"named": {"a": {}}, "log": True}},
            "file space.backbone: log and step require int or float, but got named; remove them",
        ),
        (
            {"backbone": {"named": {"a, tau 1": {}}}},
            "file space.backbone: names must be letters, digits, '.', '_' and '-', but got 'a, tau 1'; rename it",
        ),
        (
            {"loss.tau": {"choices": [1.0], "when": {"backbone": "dinov2"}}},
            "file space.loss.tau.when.backbone: backbone never takes the value 'dinov2'; did you mean 'dino'?",
        ),
    ],
)
def test_bad_choices_are_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput) as caught:
        two(changes, baselines=[])
    assert line in str(caught.value).splitlines()


def test_base_must_not_set_what_every_choice_sets() -> None:
    base = TWO["base"] | {"backbone": {"model": "ViT-B-32", "pretrained": "openai"}}
    with pytest.raises(BadInput) as caught:
        two(base=base)
    assert str(caught.value) == (
        "file base.backbone.model: has no effect, because the space searches it; remove one of them"
    )


def test_each_backbone_is_checked_and_compared_without_training_if_it_has_a_text_tower() -> None:
    space = two()
    assert {one.model for one in backbones_of(space)} == {"ViT-B-16", "timm:vit_small_patch16_224"}
    models = zero_shots(space)
    assert {label: (one.name, one.has_text) for label, one in models.items()} == {
        "zero-shot clip": ("zero-shot-1", True),
        "zero-shot dino": ("zero-shot-2", False),
    }
    assert models["zero-shot clip"].config["backbone"]["pretrained"] == "openai"


def test_without_a_choice_there_is_one_backbone_that_needs_no_label() -> None:
    space = SpaceFile.model_validate(TWO | {"space": {"optim.lr": {"float": [0.01, 0.1]}}, "baselines": []})
    assert backbones(space) == {"": {}}
    assert [(label, one.name) for label, one in zero_shots(space).items()] == [("zero-shot", "zero-shot")]


def test_backbones_of_single_settings_have_their_values_as_label() -> None:
    space = SpaceFile.model_validate(
        TWO
        | {
            "space": {
                "backbone.model": {"choices": ["ViT-B-16", "hf-hub:a/b"]},
                "backbone.pretrained": {"choices": ["openai", "dfn2b"], "when": {"backbone.model": "ViT-B-16"}},
            },
            "baselines": [],
        }
    )
    assert list(backbones(space)) == ["ViT-B-16, openai", "ViT-B-16, dfn2b", "hf-hub:a/b"]


def train(number: int, model: str) -> TrainJob:
    return TrainJob(number, {"backbone": {"model": model}})


def test_of_jobs_that_wait_the_first_whose_backbone_is_loaded_comes_first() -> None:
    jobs: list[Job] = [train(0, "x"), train(1, "y"), EvaluationJob("m", {"backbone": {"model": "z"}}, None, "test", ())]
    assert [first_fitting(jobs, {(name, None, None)}) for name in "xyzw"] == [jobs[0], jobs[1], jobs[0], jobs[0]]


def test_what_is_drawn_does_not_depend_on_what_is_loaded(tmp_path: Path) -> None:
    clip = ("ViT-B-16", "openai", None)
    drawn = []
    for loaded in ((), {clip}):
        study = Study(two(), "d", InMemoryStorage())
        search = Search(study, Output(str(tmp_path)), DATA)
        jobs = [search.next_job(loaded) for _ in range(6)]
        drawn.append([study.rows[job.number].values for job in jobs if isinstance(job, TrainJob)])
    assert drawn[0] == drawn[1]
    assert {values["backbone"] for values in drawn[0]} == {"clip", "dino"}


def test_interrupted_trials_continue_where_their_backbone_is_loaded(tmp_path: Path) -> None:
    storage = InMemoryStorage()
    study = Study(two(), "d", storage)
    drawn = [study.next() for _ in range(6)]
    dino = [row.number for row in drawn if row and row.values["backbone"] == "dino"]
    assert 0 < len(dino) < 6
    search = Search(Study(two(), "d", storage, resume=True), Output(str(tmp_path)), DATA)
    order = [search.next_job({("timm:vit_small_patch16_224", None, None)}) for _ in range(6)]
    numbers = [job.number for job in order if isinstance(job, TrainJob)]
    assert numbers == [*dino, *(row.number for row in drawn if row and row.number not in dino)]


class Source:
    """Source of jobs that notes what the slot for the next one has loaded."""

    is_over, num_waiting = False, 4

    def __init__(self) -> None:
        self.jobs: list[Job] = [train(0, "x"), train(1, "y"), train(2, "y"), train(3, "x")]
        self.heard: list[set[str]] = []

    def next_job(self, loaded: Any = (), num_slots: int = 1) -> Job | None:
        self.heard.append({model for model, _, _ in loaded})
        return self.jobs.pop(0) if self.jobs else None

    def take(self, job: Job, reply: Reply) -> bool:
        return False

    def interrupted(self, job: Job) -> Job:
        return job

    def put_back(self, job: Job) -> None: ...

    def failed(self, job: Job, error: str) -> None: ...


def test_the_engine_knows_which_backbones_the_next_free_slot_has_loaded() -> None:
    source, need = Source(), Need(1, 1, 0)
    engine = Engine(
        source,
        SlotSettings("d", need, "o", "s"),
        lambda: 2,
        should_stop=lambda: False,
        on_step=lambda: None,
        keeps_slots=True,
    )

    def run(name: str, slot: int) -> Job:
        """Hand a job to a slot, which ends it."""
        config = engine.next_config(name)
        assert isinstance(config, dict)
        engine._take(name, {"reply": JobDone({}), "slot": slot})
        return config["job"]

    opening = [engine.next_config(name) for name in ("a", "b")]
    assert all(isinstance(one, dict) and isinstance(one["job"], IdleJob) for one in opening)
    for slot, name in enumerate(("a", "b")):
        engine._take(name, {"reply": JobDone({}), "slot": slot})
        engine._forget(name)
    run("c", 0)
    run("d", 1)
    engine._forget("d")  # slot 1 is free first, so Tune gives it the next job
    engine._forget("c")
    run("e", 1)
    run("f", 0)
    assert source.heard == [set(), set(), {"y"}, {"x"}]
    engine._forget("f")
    engine.open_slots.discard(1)  # as when a slot is lost
    assert engine._free == [0]


def test_a_dry_run_names_each_backbone(small_data: str, small_clip: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        f"name: two\ndataset: {small_data}\nbase: {{optim: {{global_batch_size: 8}}}}\nspace:\n  backbone: {{named: "
        f"{{small: {{model: '{small_clip}'}}, own: {{model: embedded:lift-small}}}}}}\n  optim.lr: {{float: [0.01, 0.1]}}\n"
    )
    tune.main([str(path), "--dry-run"])
    said = capsys.readouterr().out
    assert "small: local-dir:" in said
    assert "own: embedded:lift-small" in said


def test_a_report_shows_named_choices_and_zero_shot_of_each_backbone(tmp_path: Path) -> None:
    trials = make_trials(20)
    for row in trials:
        row["backbone"] = ("clip", "dino")[row["number"] % 2]
    folder = write_study(tmp_path / "out", trials)
    about = json.loads((folder / "study.json").read_text())
    about["compared"][0]["label"], about["compared"][1]["label"] = "zero-shot clip", "zero-shot dino"
    named = {name: {} for name in ("clip", "dino")}
    about["space"]["space"]["backbone"] = {"choices": None, "named": named, "int": None, "float": None, "when": {}}
    (folder / "study.json").write_text(json.dumps(about))
    study = read_study(folder, "out")
    assert study.space["backbone"]["choices"] == ["clip", "dino"]
    assert "backbone" in importances(study)
    assert positions(study.trials, "backbone", study.space["backbone"])[0][:2] == [0.0, 1.0]
    figure = calibration_figure(study)
    assert figure is not None
    assert [trace["name"] for trace in figure.traces[1:]] == ["best found", "zero-shot clip", "zero-shot dino"]


@pytest.mark.slow
def test_each_slot_loads_each_backbone_at_most_once(
    small_data: str, small_clip: str, tmp_path: Path, ray_session: None
) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    named = {"clip": {"model": small_clip}, "dino": {"model": "timm:test_vit", "pretrained": str(weights)}}
    baselines = [{"name": name, "backbone": name, "optim.lr": 0.02} for name in named]
    baselines[1]["head.init"] = "class_mean"
    space = two(
        {"backbone": {"named": named}}, baselines=baselines, search=TWO["search"] | {"trials": 8, "seeds_best": 2}
    )
    folder = tmp_path / "out"
    folder.mkdir()
    study, out = Study(space, small_data, open_storage(None, folder), resume=False), Output(str(folder))
    data = SearchData.of(space, open_dataset(small_data))
    with Interrupts() as interrupts:
        found = run_search(
            study, small_data, Need(1, 1, 0), lambda: 2, out, interrupts, data=data, slot_class=LoadingSlot
        )
    assert [row.state for row in study.rows.values()] == ["finished"] * 8
    assert {row.values["backbone"] for row in study.rows.values()} == {"clip", "dino"}
    loads = Counter((folder / "loads").read_text().splitlines())
    assert max(loads.values()) == 1, f"a slot loaded a backbone again: {loads}"
    assert len({line.split()[0] for line in loads}) == 2, "one slot did everything"
    assert {line.split()[1] for line in loads} == {one["model"] for one in named.values()}
    assert [label for label, _ in found.compared][:3] == ["zero-shot clip", "clip", "dino"]
