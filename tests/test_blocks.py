"""`tuner.blocks`: block numbers or {last: K}, in settings, on the command line, and searched."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from optuna.storages import InMemoryStorage
from played import METRIC
from safetensors import safe_open

from lift_ray import train, tune
from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.errors import BadInput
from lift_ray.registry import TUNERS
from lift_ray.reporting.figures.charts import plain
from lift_ray.reporting.importance import importances
from lift_ray.reporting.study_files import read_study
from lift_ray.reporting.trial_rows import write_rows
from lift_ray.searching.study import Study, described
from lift_ray.searching.tables import trial_table
from lift_ray.settings.checks import read_space
from lift_ray.settings.overrides import parse_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import read_run
from lift_ray.settings.schema import space_schema
from lift_ray.settings.space import SpaceFile, grid_points, seeded_draws
from lift_ray.terminal.tables import describe

HAVE_BLOCKS = [name for name, kind in TUNERS.items() if "blocks" in kind.config.model_fields]
HEAD = "name: n\ndataset: d\n"
KINDS = "  tuner.kind: {choices: [lora, linear_probe]}\n"
CHOICES = [{"last": 1}, {"last": 2}, [0, 1], None]
TEXTS: list[Any] = ['{"last": 1}', '{"last": 2}', "[0, 1]", None]


def run_with(folder: Path, text: str, *words: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(f"dataset: d\n{text}\n")
    return read_run(path, parse_overrides(list(words))).config


def space_with(folder: Path, text: str, *words: str) -> SpaceFile:
    path = folder / "space.yaml"
    path.write_text(HEAD + text)
    return read_space(path, parse_overrides(list(words)))


# ---- settings


@pytest.mark.parametrize("kind", HAVE_BLOCKS)
def test_the_last_blocks_become_their_numbers_for_every_kind_with_blocks(kind: str) -> None:
    config, listed = (
        RunConfig.parse({"tuner": {"kind": kind, "blocks": blocks}}) for blocks in ({"last": 3}, [9, 10, 11])
    )
    assert RunConfig.parse(json.loads(json.dumps(config.to_dict()))) == config
    resolved = config.resolve(1000, 12, 768)
    assert resolved == listed.resolve(1000, 12, 768), "derived sizes use the number of tuned blocks"
    assert resolved.to_dict()["tuner"]["blocks"] == [9, 10, 11]
    assert config.resolve(1000, 3, 768).to_dict()["tuner"]["blocks"] == [0, 1, 2]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        config.resolve(1000, 2, 768)
    assert str(caught.value) == "tuner.blocks.last: must lie in 1 ... 2, but got 3; lower it"


def test_problem_and_derived_of_a_kind_see_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.parse({"extra_tuner": {"kind": "lora", "blocks": {"last": 2}}})
    seen: list[Any] = []

    def problem(self: Any, num_blocks: int) -> str:
        seen.append(self.blocks)
        return ""

    def derived(self: Any, num_classes: int, num_tuned: int, width: int) -> dict[str, Any]:
        seen.append(self.blocks)
        return {}

    monkeypatch.setattr(type(config.extra_tuner), "problem", problem)
    monkeypatch.setattr(type(config.extra_tuner), "derived", derived)
    config.resolve(10, 4, 8)
    assert seen == [[2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("text", "word", "blocks"),
    [
        ("", "tuner.blocks.last=2", {"last": 2}),
        ("", "tuner.blocks={last: 2}", {"last": 2}),
        ("tuner: {blocks: [0, 1]}", "tuner.blocks.last=2", {"last": 2}),
        ("tuner: {blocks: [0, 1]}", "tuner.blocks={last: 2}", {"last": 2}),
        ("tuner: {blocks: {last: 3}}", "tuner.blocks.last=1", {"last": 1}),
        ("tuner: {blocks: {last: 3}}", "tuner.blocks=[1]", [1]),
        ("tuner: {blocks: {last: 3}}", "tuner.blocks=null", None),
        ("tuner: {kind: ssf, blocks: {last: 3}}", "tuner.kind=lora", None),
    ],
)
def test_the_command_line_sets_either_form(text: str, word: str, blocks: object, tmp_path: Path) -> None:
    assert run_with(tmp_path, text, word).to_dict()["tuner"]["blocks"] == blocks


def test_the_second_tuner_has_last_blocks_too(tmp_path: Path) -> None:
    config = run_with(tmp_path, "extra_tuner: {kind: lora, blocks: [0]}", "extra_tuner.blocks.last=1")
    assert config.resolve(10, 4, 8).to_dict()["extra_tuner"]["blocks"] == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{blocks: {last: 0}}", "tuner.blocks.last: must be greater than or equal to 1, but got 0; change it"),
        ("{blocks: {last: two}}", "tuner.blocks.last: must be a valid integer, but got 'two'; change it"),
        ("{blocks: {lats: 2}}", "tuner.blocks.lats: unknown key 'lats'; did you mean 'last'?"),
        ("{blocks: {}}", "tuner.blocks.last: is required, but missing; add it"),
        ("{blocks: two}", "tuner.blocks: must be a list of block numbers or {last: K}, but got 'two'; change it"),
        ("{blocks: 2}", "tuner.blocks: must be a list of block numbers or {last: K}, but got 2; change it"),
        ("{kind: linear_probe, blocks: {last: 2}}", "tuner.blocks: unknown key 'blocks'; known: kind"),
        ("{kind: partial, blocks: {last: 2}}", "tuner.blocks: unknown key 'blocks'; known: kind, last"),
    ],
)
def test_wrong_blocks_give_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        run_with(tmp_path, f"tuner: {text}")
    assert str(caught.value) == f"{tmp_path}/run.yaml:2 {message}"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tuner.blocks.last=0", "tuner.blocks.last: must be greater than or equal to 1, but got 0; change it"),
        ("tuner.blocks.lats=2", "tuner.blocks.lats: unknown key 'lats'; did you mean 'last'?"),
        (
            "extra_tuner.blocks.last=1",
            "extra_tuner: must have a kind, but got {'blocks': {'last': 1}}; add `kind: ...`",
        ),
    ],
)
def test_wrong_blocks_on_the_command_line_give_one_line(word: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        run_with(tmp_path, "", word)
    assert str(caught.value) == f"command line {message}"


# ---- search spaces


@pytest.mark.parametrize("numbers", ["int: [1, 3]", "choices: [1, 2, 3]"])
def test_the_number_of_last_blocks_is_searched(numbers: str, tmp_path: Path) -> None:
    space = space_with(
        tmp_path,
        f"space:\n{KINDS}  tuner.blocks.last: {{{numbers}, when: {{tuner.kind: [lora]}}}}\n"
        "baselines: [{tuner.kind: lora, tuner.blocks.last: 3}]\n",
    )
    tuners = [space.config(values).to_dict()["tuner"] for values in seeded_draws(space.space, 64)]
    assert {tuner["blocks"]["last"] for tuner in tuners if tuner["kind"] == "lora"} == {1, 2, 3}
    assert {"kind": "linear_probe"} in tuners
    assert len(grid_points(space.space)) == 1 + 3
    assert space.config(space.baseline_values()[0]).to_dict()["tuner"]["blocks"] == {"last": 3}


SEARCHED = """\
space:
  tuner.blocks: {choices: [{last: 1}, {last: 2}, [0, 1], null]}
  loss.tau: {float: [0, 1], when: {tuner.blocks: [{last: 1}, [0, 1]]}}
  optim.lr: {float: [0.1, 0.9], when: {tuner.blocks: {last: 2}}}
"""
BASELINES = "baselines: [{tuner.blocks: [0, 1], loss.tau: 0.5}, {tuner.blocks: {last: 2}, optim.lr: 0.2}]\n"


def test_lists_and_last_blocks_are_choices_that_draws_and_tables_hold_as_text(tmp_path: Path) -> None:
    space = space_with(tmp_path, SEARCHED + BASELINES)
    assert space.space["tuner.blocks"].choices == TEXTS
    assert SpaceFile.model_validate(space.model_dump(by_alias=True)) == space, "text is read back as it was written"
    draws = seeded_draws(space.space, 64)
    assert {values["tuner.blocks"] for values in draws} == set(TEXTS)
    for values in [*draws, *space.baseline_values()]:
        blocks = CHOICES[TEXTS.index(values["tuner.blocks"])]
        assert space.config(values).to_dict()["tuner"]["blocks"] == blocks
        assert ("loss.tau" in values, "optim.lr" in values) == (blocks in ({"last": 1}, [0, 1]), blocks == {"last": 2})


def test_a_grid_has_a_point_for_each_choice(tmp_path: Path) -> None:
    space = space_with(tmp_path, "space:\n  tuner.blocks: {choices: [{last: 1}, [0], null]}\nsearch: {sampler: grid}\n")
    configs = [space.config(point).to_dict()["tuner"]["blocks"] for point in grid_points(space.space)]
    assert configs == [{"last": 1}, [0], None]
    assert space.num_trials == 3


def test_a_choice_replaces_any_blocks_of_the_base() -> None:
    for before in ([0], {"last": 2}, None):
        searched = {"name": "n", "dataset": "d", "base": {"tuner": {"blocks": before}}}
        whole = SpaceFile.model_validate({**searched, "space": {"tuner.blocks": {"choices": CHOICES}}})
        assert [whole.config({"tuner.blocks": text}).to_dict()["tuner"]["blocks"] for text in TEXTS] == CHOICES
        last = SpaceFile.model_validate({**searched, "space": {"tuner.blocks.last": {"int": [1, 3]}}})
        assert last.config({"tuner.blocks.last": 3}).to_dict()["tuner"]["blocks"] == {"last": 3}


@pytest.mark.parametrize(
    ("word", "blocks"),
    [
        ("space.tuner.blocks.last.int=[2, 2]", {"last": 2}),
        ("space.tuner.blocks.choices=[[1, 0]]", [1, 0]),
        ("space.tuner.blocks={choices: [{last: 2}]}", {"last": 2}),
        ("base.tuner.blocks.last=2", {"last": 2}),
    ],
)
def test_the_command_line_of_a_search_reaches_blocks(word: str, blocks: object, tmp_path: Path) -> None:
    space = space_with(tmp_path, "space:\n  seed: {int: [1, 9]}\n", word)
    (values,) = seeded_draws(space.space, 1)
    assert space.config(values).to_dict()["tuner"]["blocks"] == blocks


RULE = "must be text, a number, true, false, null, a list of integers or {last: K}"
BROKEN = {
    "no last block": (
        "space:\n  tuner.blocks.last: {int: [0, 2]}",
        "4 space.tuner.blocks.last: must be greater than or equal to 1, but got 0; change it",
    ),
    "a choice of no last block": (
        "space:\n  tuner.blocks: {choices: [{last: 0}]}",
        "4 space.tuner.blocks: must be greater than or equal to 1, but got 0; change it",
    ),
    "a number that is text": (
        "space:\n  tuner.blocks: {choices: [{last: two}]}",
        f"4 space.tuner.blocks.choices.0: {RULE}, but got {{'last': 'two'}}; change it",
    ),
    "an unknown key": (
        "space:\n  tuner.blocks: {choices: [{lats: 2}]}",
        f"4 space.tuner.blocks.choices.0: {RULE}, but got {{'lats': 2}}; change it",
    ),
    "an empty list": (
        "space:\n  tuner.blocks: {choices: [[]]}",
        f"4 space.tuner.blocks.choices.0: {RULE}, but got []; change it",
    ),
    "a list of lists": (
        "space:\n  tuner.blocks: {choices: [[[0]]]}",
        f"4 space.tuner.blocks.choices.0: {RULE}, but got [[0]]; change it",
    ),
    "a choice that is text": (
        "space:\n  tuner.blocks: {choices: [two]}",
        "4 space.tuner.blocks: must be a list of block numbers or {last: K}, but got 'two'; change it",
    ),
    "text that only looks like a list": (
        'space:\n  tuner.blocks: {choices: ["[01]"]}',
        "4 space.tuner.blocks: must be a list of block numbers or {last: K}, but got '[01]'; change it",
    ),
    "a block below 0": (
        "space:\n  tuner.blocks: {choices: [[-1]]}",
        "4 space.tuner.blocks: must be greater than or equal to 0, but got -1; change it",
    ),
    "both forms": (
        "space:\n  tuner.blocks.last: {int: [1, 2]}\n  tuner.blocks: {choices: [[0]]}",
        "4 space.tuner.blocks.last: must not be beside tuner.blocks; remove one of them",
    ),
    "a kind without blocks": (
        f"space:\n{KINDS}  tuner.blocks.last: {{int: [1, 2]}}",
        "5 space.tuner.blocks.last: has no effect with tuner.kind linear_probe; "
        "add when: {tuner.kind: [the kinds that have it]}",
    ),
    "a kind without blocks, choices": (
        f"space:\n{KINDS}  tuner.blocks: {{choices: [{{last: 1}}]}}",
        "5 space.tuner.blocks: has no effect with tuner.kind linear_probe; "
        "add when: {tuner.kind: [the kinds that have it]}",
    ),
    "a list in the base that no trial uses": (
        "space:\n  tuner.blocks.last: {int: [1, 2]}\nbase: {tuner: {blocks: [0]}}",
        "5 base.tuner.blocks: has no effect, because the space searches it; remove one of them",
    ),
    "last blocks in the base that no trial uses": (
        "space:\n  tuner.blocks: {choices: [[0]]}\nbase: {tuner: {blocks: {last: 2}}}",
        "5 base.tuner.blocks.last: has no effect, because the space searches it; remove one of them",
    ),
    "a baseline outside": (
        "space:\n  tuner.blocks: {choices: [[0]]}\nbaselines: [{tuner.blocks: {last: 2}}]",
        "5 baselines.0.tuner.blocks: must be inside the space ([0]), but got '{\"last\": 2}'; "
        "widen the space or change the baseline",
    ),
    "when of a value that is no choice": (
        "space:\n  tuner.blocks: {choices: [[0]]}\n  loss.tau: {float: [0, 1], when: {tuner.blocks: [[1]]}}",
        "5 space.loss.tau.when.tuner.blocks: tuner.blocks never takes the value '[1]'; did you mean '[0]'?",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_blocks_in_a_space_give_one_exact_line(name: str, tmp_path: Path) -> None:
    text, message = BROKEN[name]
    with pytest.raises(BadInput) as caught:
        space_with(tmp_path, text)
    assert str(caught.value) == f"{tmp_path}/space.yaml:{message}"


def test_the_remedy_for_a_bare_range_is_written_out(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        space_with(tmp_path, "space:\n  seed: {int: [1, 9]}\n", "space.tuner.blocks.last=[1, 4]")
    assert str(caught.value) == (
        "command line space.tuner.blocks.last: must be a mapping, but got [1, 4]; write {int: [1, 4]}"
    )


def test_the_editor_accepts_both_forms() -> None:
    schema = space_schema()
    head: dict[str, Any] = {"name": "n", "dataset": "d"}
    good: list[dict[str, Any]] = [
        {"space": {"tuner.blocks": {"choices": CHOICES}}, "baselines": [{"tuner.blocks": {"last": 2}}]},
        {"space": {"tuner.blocks.last": {"int": [1, 2], "when": {"tuner.kind": ["lora"]}}}},
        {"space": {"seed": {"int": [1, 2]}}, "base": {"tuner": {"kind": "lora", "blocks": {"last": 2}}}},
    ]
    for part in good:
        jsonschema.validate(head | part, schema)
    for choice in ({"lats": 1}, {"last": "two"}, [[0]], {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(head | {"space": {"tuner.blocks": {"choices": [choice]}}}, schema)


# ---- studies


def drawn(space: SpaceFile, storage: InMemoryStorage, trials: int, *, resume: bool = False) -> Study:
    """Run a study of this many trials, of which those with the list [0, 1] are the best."""
    more = space.model_copy(update={"search": space.search.model_copy(update={"trials": trials})})
    study = Study(more, "d", storage, resume=resume)
    while (row := study.next()) is not None:
        value = 0.9 if row.values["tuner.blocks"] == "[0, 1]" else 0.1 * row.values["seed"] / 9
        study.report(row, EpochMetrics(5, validation={"mean_class_accuracy": value}, num_epochs=5))
        study.end(row, "finished")
    return study


def test_tpe_learns_list_choices_and_a_resumed_study_draws_the_same_ones(tmp_path: Path) -> None:
    text = "  tuner.blocks: {choices: [{last: 1}, {last: 2}, [0, 1], [1]]}\n  seed: {int: [0, 9]}\n"
    space = space_with(tmp_path, f"space:\n{text}baselines: [{{tuner.blocks: {{last: 2}}, seed: 1}}]\n")
    storage = InMemoryStorage()
    first = drawn(space, storage, 15)
    assert first.rows[0].values == {"tuner.blocks": '{"last": 2}', "seed": 1}
    resumed = drawn(read_space(tmp_path / "space.yaml"), storage, 40, resume=True)
    assert [row.values for row in resumed.rows.values()][:15] == [row.values for row in first.rows.values()]
    whole = drawn(space, InMemoryStorage(), 40)
    assert [row.values for row in whole.rows.values()] == [row.values for row in resumed.rows.values()]
    counts = Counter(row.values["tuner.blocks"] for row in list(whole.rows.values())[20:])
    assert counts["[0, 1]"] > 10
    with pytest.raises(BadInput, match=re.escape('choices: ["{\\"last\\": 1}", ')):
        drawn(space_with(tmp_path, "space:\n" + text.replace("[1]", "[0]")), storage, 41, resume=True)


def test_choices_come_back_from_the_files_of_a_study(tmp_path: Path) -> None:
    space = space_with(tmp_path, "space:\n  tuner.blocks: {choices: [{last: 1}, [0, 1]]}\n  seed: {int: [0, 9]}\n")
    study = drawn(space, InMemoryStorage(), 20)
    rows = list(study.rows.values())
    write_rows(rows, tmp_path)
    texts = [row.values["tuner.blocks"] for row in rows]
    assert pq.read_table(tmp_path / "trials.parquet")["tuner.blocks"].to_pylist() == texts
    assert pyarrow.csv.read_csv(tmp_path / "trials.csv")["tuner.blocks"].to_pylist() == texts
    (tmp_path / "space.json").write_text(json.dumps({"name": "n", "dataset": "d", "space": described(space, "d")}))
    files = read_study(tmp_path, "n")
    found = importances(files)
    assert found["tuner.blocks"] > found["seed"]


def test_tables_and_figures_name_the_last_blocks() -> None:
    assert describe({"tuner.kind": "lora", "tuner.blocks.last": 2}) == "lora, blocks.last 2"
    assert describe({"tuner.blocks": "[0, 1]", "seed": 3}) == "blocks [0, 1], seed 3"
    assert trial_table([], ["tuner.blocks.last", "seed"], METRIC, "").columns[1].header.plain == "blocks.last"  # type: ignore[union-attr]
    assert plain("tuner.blocks.last") == "last blocks tuned"


# ---- a whole search

SEARCH = """\
name: blocks
dataset: {data}
base:
  backbone: {{model: '{clip}'}}
  optim: {{epochs: 1, global_batch_size: 16}}
  tuner: {{kind: lora, bottleneck: 2}}
space:
  {space}
search: {{trials: {trials}, sampler: {sampler}, scheduler: {{kind: none}}, tte_best: 0}}
"""


def tuned_blocks(checkpoint: Path) -> list[int]:
    """Return the numbers of the blocks whose LoRA a checkpoint has."""
    with safe_open(checkpoint / "weights.safetensors", "pt") as weights:
        found = {re.search(r"\blora\.(\d+)\.", name) for name in weights.keys()}  # noqa: SIM118
    return sorted({int(match[1]) for match in found if match})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "sampler", "name", "expected"),
    [
        ("tuner.blocks.last: {int: [1, 2]}", "grid", "tuner.blocks.last", {1: [1], 2: [0, 1]}),
        (
            "tuner.blocks: {choices: [{last: 1}, [0], null]}",
            "tpe",
            "tuner.blocks",
            {'{"last": 1}': [1], "[0]": [0], None: [0, 1]},
        ),
    ],
    ids=["last", "choices"],
)
def test_the_winner_of_a_search_has_tuners_in_exactly_its_blocks(
    space: str,
    sampler: str,
    name: str,
    expected: dict[object, list[int]],
    small_data: str,
    small_clip: str,
    tmp_path: Path,
    ray_session: None,
    same_threads: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out, again = tmp_path / "space.yaml", tmp_path / "out", tmp_path / "again"
    file.write_text(SEARCH.format(data=small_data, clip=small_clip, space=space, sampler=sampler, trials=2))
    assert not tune.main([str(file), "--dry-run"])
    assert not tune.main([str(file), "--out", str(out)])
    if sampler == "tpe":
        assert not tune.main([str(file), "search.trials=4", "--out", str(out), "--resume"])
    table = pq.read_table(out / "trials.parquet").to_pylist()
    assert len(table) == (4 if sampler == "tpe" else 2)
    for row in table:
        (checkpoint,) = (out / "checkpoints" / f"{row['number']:04d}").glob("*/weights.safetensors")
        assert tuned_blocks(checkpoint.parent) == expected[row[name]]
    study = json.loads((out / "study.json").read_text())
    blocks = expected[study["best"]["values"][name]]
    assert tuned_blocks(out / "best") == blocks
    best = read_run(out / "best.yaml")
    assert best.to_dict()["tuner"]["blocks"] == blocks
    assert not train.main([str(out / "best.yaml"), "--no-ray", "--out", str(again)])
    assert tuned_blocks(again / "checkpoint") == blocks
    assert f"{name.partition('.')[2]} {study['best']['values'][name]}" in capsys.readouterr().out
    assert (out / "report" / "index.html").exists()


@pytest.mark.slow
def test_more_last_blocks_than_the_backbone_has_end_a_search_with_one_line(
    small_data: str, small_clip: str, tmp_path: Path, ray_session: None
) -> None:
    file = tmp_path / "space.yaml"
    text = "tuner.blocks.last: {int: [99, 99]}"
    file.write_text(SEARCH.format(data=small_data, clip=small_clip, space=text, sampler="random", trials=1))
    with pytest.raises(BadInput) as caught:
        tune.main([str(file), "--out", str(tmp_path / "out")])
    assert str(caught.value) == "tuner.blocks.last: must lie in 1 ... 2, but got 99; lower it"
