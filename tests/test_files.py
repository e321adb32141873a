"""Run files: reading, overriding, and one exact line for everything that can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_ray.errors import BadInput, did_you_mean
from lift_ray.settings.checks import read_space
from lift_ray.settings.overrides import parse_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.run_file import RunFile, read_run
from lift_ray.settings.space import SpaceFile
from lift_ray.settings.yaml_file import SettingsFile, dump_yaml

D = "dataset: d\n"
SECTIONS = (
    "augment, backbone, dataset, evaluation, extra_tuner, head, loss, method, name, optim, out, seed, train_on, tuner"
)


def check(text: str) -> RunFile:
    return SettingsFile.parse(text, "run.yaml").validate(RunFile)


def problem(text: str) -> str:
    with pytest.raises(BadInput) as caught:
        check(text)
    return str(caught.value)


BROKEN = {
    "a missing data set": ("seed: 1\n", "run.yaml:1 dataset: is required, but missing; add it"),
    "an unknown section": (D + "optm: {lr: 1}", "run.yaml:2 optm: unknown key 'optm'; did you mean 'optim'?"),
    "an unknown key": (
        D + "optim:\n  lr: 0.1\n  epoch: 3",
        "run.yaml:4 optim.epoch: unknown key 'epoch'; did you mean 'epochs'?",
    ),
    "nothing near": (D + "zebra: 1", f"run.yaml:2 zebra: unknown key 'zebra'; known: {SECTIONS}"),
    "a key that is a number": (D + "1: 2", f"run.yaml:2 1: unknown key '1'; known: {SECTIONS}"),
    "an unknown tuner": (
        D + "tuner:\n  kind: lorra",
        "run.yaml:3 tuner.kind: unknown value 'lorra'; did you mean 'lora'?",
    ),
    "a field of another kind": (
        D + "tuner: {kind: linear_probe, bottleneck: 4}",
        "run.yaml:2 tuner.bottleneck: unknown key 'bottleneck'; known: kind",
    ),
    "a name in place of a section": (
        D + "tuner: lora",
        "run.yaml:2 tuner: must be a mapping, but got 'lora'; write {kind: lora}",
    ),
    "a number in place of a section": (
        D + "optim: 3",
        "run.yaml:2 optim: must be a mapping, but got 3; write {key: value}",
    ),
    "an empty section": (D + "loss:\n", "run.yaml:2 loss: must be a mapping, but got None; write {key: value}"),
    "a width of 0": (
        D + "tuner: {bottleneck: 0}",
        "run.yaml:2 tuner.bottleneck: must be greater than or equal to 1, but got 0; change it",
    ),
    "no widths": (
        D + "tuner: {bottleneck: []}",
        "run.yaml:2 tuner.bottleneck: must have at least 1 item, but got []; change it",
    ),
    "a width of 0 in a list": (
        D + "tuner: {kind: dora, bottleneck: [4, 0]}",
        "run.yaml:2 tuner.bottleneck.1: must be greater than or equal to 1, but got 0; change it",
    ),
    "a list of widths where there is one": (
        D + "tuner: {kind: clip_adapter, bottleneck: [4]}",
        "run.yaml:2 tuner.bottleneck: must be a valid integer, but got [4]; change it",
    ),
    "a block below 0": (
        D + "tuner:\n  kind: lora\n  blocks:\n    - 0\n    - -1",
        "run.yaml:6 tuner.blocks.1: must be greater than or equal to 0, but got -1; change it",
    ),
    "a block that is text": (
        D + "tuner: {blocks: [one]}",
        "run.yaml:2 tuner.blocks.0: must be a valid integer, but got 'one'; change it",
    ),
    "an unknown precision": (
        D + "backbone: {precision: fp17}",
        "run.yaml:2 backbone.precision: unknown value 'fp17'; did you mean 'fp16'?",
    ),
    "an unknown schedule": (
        D + "augment: {schedule: linaer}",
        "run.yaml:2 augment.schedule: unknown value 'linaer'; did you mean 'linear'?",
    ),
    "a negative tau": (
        D + "loss: {tau: -1}",
        "run.yaml:2 loss.tau: must be greater than or equal to 0, but got -1; change it",
    ),
    "tau without its loss": (
        D + "loss: {kind: cross_entropy, tau: 1.0}",
        "run.yaml:2 loss.tau: unknown key 'tau'; known: kind, label_smoothing",
    ),
    "a setting of random crops without them": (
        D + "augment: {kind: none, decode: exact}",
        "run.yaml:2 augment.decode: unknown key 'decode'; known: kind",
    ),
    "a number as text": (
        D + "optim: {lr: '0.1'}",
        "run.yaml:2 optim.lr: must be a valid number, but got '0.1'; change it",
    ),
    "half an epoch": (
        D + "optim: {epochs: 1.5}",
        "run.yaml:2 optim.epochs: must be a valid integer, but got 1.5; change it",
    ),
    "a truth as a number": (D + "seed: true", "run.yaml:2 seed: must be a valid integer, but got True; change it"),
    "full momentum": (
        D + "optim: {momentum: 1}",
        "run.yaml:2 optim.momentum: must be less than 1, but got 1; change it",
    ),
    "an endless rate": (
        D + "optim: {lr: .inf}",
        "run.yaml:2 optim.lr: must be a finite number, but got inf; change it",
    ),
    "no number": (D + "head: {scale: .nan}", "run.yaml:2 head.scale: must be a finite number, but got nan; change it"),
    "a seed too large": (
        D + "seed: 4294967296",
        "run.yaml:2 seed: must be less than 4294967296, but got 4294967296; change it",
    ),
    "a huge number": (
        D + "optim: {epochs: 0x1" + 5000 * "0" + "}",
        f"run.yaml:2 optim.epochs: must be a valid integer, but got '0x1{53 * '0'}...; change it",
    ),
    "an unknown initialisation": (
        D + "head: {init: semantics}",
        "run.yaml:2 head.init: unknown value 'semantics'; did you mean 'semantic'?",
    ),
    "a template without a place": (
        D + "head: {template: a photo}",
        "run.yaml:2 head.template: must contain {} for the class name, but got 'a photo'; add it",
    ),
    "a list with a template without a place": (
        D + "head:\n  template:\n    - a {}\n    - a photo",
        "run.yaml:3 head.template: must contain {} for the class name, but got 'a photo'; add it",
    ),
    "a template that is a number": (
        D + "head: {template: 3}",
        "run.yaml:2 head.template: must be a text with {}, a list of such texts, or ensemble, but got 3; change it",
    ),
    "a second tuner without its kind": (
        D + "extra_tuner: {bottleneck: 2}",
        "run.yaml:2 extra_tuner: must have a kind, but got {'bottleneck': 2}; add `kind: ...`",
    ),
    "a field of another kind in the second tuner": (
        D + "extra_tuner:\n  kind: bitfit\n  bottleneck: 2",
        "run.yaml:4 extra_tuner.bottleneck: unknown key 'bottleneck'; known: blocks, kind",
    ),
    "two tuners that do not go together": (
        D + "tuner: {kind: full}\nextra_tuner:\n  kind: bitfit",
        "run.yaml:3 extra_tuner: must change other places than tuner, but got full and bitfit: both train the tower's own "
        "weights, and share some of them; remove one",
    ),
    "a data set that is a number": ("dataset: 3", "run.yaml:1 dataset: must be a valid string, but got 3; change it"),
    "a key with a line break": (D + '"a\\nb": 1', f"run.yaml:2 a b: unknown key 'a b'; known: {SECTIONS}"),
    "a merged key": (D + "optim:\n  <<: {lrr: 1}", "run.yaml:3 optim.lrr: unknown key 'lrr'; did you mean 'lr'?"),
    "a list": ("- 1", "run.yaml:1: must be a mapping of settings, but got a list; start with `dataset: ...`"),
    "an empty file": ("", "run.yaml:1: must be a mapping of settings, but got nothing; start with `dataset: ...`"),
    "a repeated key": (
        "dataset: d\ndataset: e",
        'run.yaml:2: invalid YAML 1.2: found duplicate key "dataset" with '
        'value "e" (original value: "d"); fix this line',
    ),
    "a broken line": (
        D + "optim: {lr: 1",
        "run.yaml:2: invalid YAML 1.2: expected ',' or '}', but got '<stream end>'; fix this line",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_file_gives_one_exact_line(name: str) -> None:
    text, message = BROKEN[name]
    assert problem(text) == message


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    text = "seed: -1\ndataset: d\nloss:\n  tau: x\noptim:\n  lr: 0\n  epochs: 0\ntuner: {kind: lorra}\n"
    lines = problem(text).splitlines()
    places = [("1", "seed"), ("4", "loss.tau"), ("6", "optim.lr"), ("7", "optim.epochs"), ("8", "tuner.kind")]
    assert [line.split(": ")[0] for line in lines] == [f"run.yaml:{number} {path}" for number, path in places]


def test_yaml_is_1_2() -> None:
    run = check("dataset: off\nname: no\noptim: {lr: 3e-4}\n")
    assert (run.dataset, run.name, run.optim.lr) == ("off", "no", 3e-4)


def test_the_error_of_a_folder_names_the_files_in_it(tmp_path: Path) -> None:
    for name in ("run.yaml", "best.yaml", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(BadInput) as caught:
        SettingsFile.read(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path}: must be a YAML file, but it is a folder; give a file of it: best.yaml, run.yaml"
    )


def test_a_second_document_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    assert check("dataset: a\nname: b\n---\n").dataset == "a"
    with pytest.raises(BadInput) as caught:
        check("dataset: a\n---\nname: b\n")
    assert str(caught.value) == "run.yaml:3: must be one YAML document, but got 2; remove the others, and their ---"


def test_a_file_that_is_missing_or_no_text_gives_a_one_line_error(tmp_path: Path) -> None:
    for path, got in (
        (tmp_path / "none.yaml", "there is none"),
        (tmp_path, "it is a folder; give a file; start with `dataset: ...`"),
    ):
        with pytest.raises(BadInput, match=got) as caught:
            SettingsFile.read(path)
        assert str(caught.value).startswith(f"{path}: must be a ")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="must be a readable YAML file"):
        SettingsFile.read(tmp_path / "bytes.yaml")


def test_environment_variables_fill_dataset_and_out_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFT_TEST_DATA", "/pictures")
    monkeypatch.delenv("LIFT_TEST_NONE", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text("dataset: ${LIFT_TEST_DATA}/birds\nout: ${LIFT_TEST_NONE:-runs/x}\nname: ${LIFT_TEST_DATA}\n")
    run = read_run(path)
    assert (run.dataset, run.out, run.name) == ("/pictures/birds", "runs/x", "${LIFT_TEST_DATA}")
    path.write_text("name: n\ndataset: ${LIFT_TEST_NONE}\n")
    with pytest.raises(BadInput) as caught:
        read_run(path)
    assert str(caught.value) == (
        f"{path}:2 dataset: the environment variable LIFT_TEST_NONE must be set, but is not; "
        "export LIFT_TEST_NONE=... or write ${LIFT_TEST_NONE:-default}"
    )


def test_command_line_settings_are_yaml_values() -> None:
    words = [
        "loss.tau=0.5",
        "tuner.kind=lora",
        "tuner.blocks=[0, 1]",
        "out=",
        "backbone.pretrained=a=b",
        "optim.lr=3e-4",
    ]
    assert parse_overrides(words) == {
        "loss.tau": 0.5,
        "tuner.kind": "lora",
        "tuner.blocks": [0, 1],
        "out": None,
        "backbone.pretrained": "a=b",
        "optim.lr": 3e-4,
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("loss.tau", "command line: settings must be written key=value, but got 'loss.tau'; for example, loss.tau=0.5"),
        ("--tau=1", "command line: settings must be written key=value, but got '--tau=1'; for example, loss.tau=0.5"),
        (
            "loss.tau=[",
            "command line loss.tau: must be a YAML value, but got '[' (expected the node content, but found "
            "'<stream end>'); quote it",
        ),
        (
            "name=\x07",
            "command line name: must be a YAML value, but got '\x07' (unacceptable character #x0007: special characters "
            'are not allowed in "<unicode string>", position 0); quote it',
        ),
    ],
)
def test_a_broken_command_line_setting_gives_a_one_line_error(word: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_overrides([word])
    assert str(caught.value) == message


def test_overrides_reach_the_run_and_their_faults_name_the_path(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("dataset: d\ntuner: {kind: adaptformer, bottleneck: 4}\nloss: {tau: 0.5}\n")
    run = read_run(path, {"tuner.kind": "lora", "optim.lr": 0.1})
    assert run.to_dict()["tuner"] == {"kind": "lora", "bottleneck": None, "mlp": False, "blocks": None}
    assert run.optim.lr == 0.1
    for overrides, message in (
        ({"optm.lr": 1}, "command line optm.lr: unknown key 'optm'; did you mean 'optim'?"),
        ({"loss.tau": -1}, "command line loss.tau: must be greater than or equal to 0, but got -1; change it"),
        (
            {"head.kind": "CE"},
            "command line head.kind: unknown value 'CE'; known: cosine, l2norm, layernorm, linear, text",
        ),
        ({"loss": 3}, "command line loss: must be a mapping, but got 3; write {key: value}"),
        (
            {"tuner.kind": "linear_probe", "tuner.bottleneck": 4},
            "command line tuner.bottleneck: unknown key 'bottleneck'; known: kind",
        ),
        (
            {"loss.kind": "cross_entropy", "optim.lr": 0},
            "command line optim.lr: must be greater than 0, but got 0; change it",
        ),
    ):
        with pytest.raises(BadInput) as caught:
            read_run(path, overrides)
        assert str(caught.value) == message


def test_name_data_and_out_of_a_run_file_are_not_in_its_digest() -> None:
    one = check("dataset: a\nname: x\nout: y\nseed: 3\n")
    assert one.config == check("dataset: b\nseed: 3\n").config
    assert one.config.digest() == RunConfig(seed=3).digest()


def test_a_run_file_reads_back_what_was_dumped(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"tuner": {"kind": "lora"}, "head": {"template": "a: {} # 'x'"}}).resolve(9, 2, 8)
    dump_yaml({"name": "again", "dataset": "d", **config.to_dict()}, tmp_path / "run.yaml", "# a header\n")
    assert read_run(tmp_path / "run.yaml").config == config
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


GOOD = """\
name: mine
dataset: embedded:caltech101-lt
seed: 3
backbone: {model: ViT-B-16, pretrained: openai, precision: bf16}
tuner:
  kind: lora
  blocks: [0, 1]
loss: {kind: logit_adjusted, tau: 1.0}
optim: &o {epochs: 5, lr: 3e-4}
"""
PIECES = [
    "dataset",
    "tuner",
    "kind",
    "lora",
    "loss",
    "tau",
    "optim",
    "lr",
    "blocks",
    "seed",
    "name",
    "a",
    "1",
    "-1",
    "0.5",
    "1e9",
    "0x1f",
    ".inf",
    ".nan",
    "null",
    "true",
    "~",
    "2001-01-01",
    "''",
    '""',
    '"',
    "'",
    ":",
    ": ",
    "\n",
    "\n  ",
    "\n- ",
    "- ",
    ", ",
    "{",
    "}",
    "[",
    "]",
    "<<: ",
    "<<: *x",
    "&x ",
    "*x",
    "!!set ",
    "!!omap ",
    "!!binary ",
    "!!float ",
    "!!int ",
    "!!python/x ",
    "!t ",
    "? ",
    "| ",
    "> ",
    "# ",
    "%YAML 1.1\n---\n",
    "---\n",
    "...\n",
    "\t",
    "\x07",
    "\x85",
    "\u2028",
    "\ufeff",
    "${X}",
    "@",
    "`",
]
CUTS = st.tuples(
    st.integers(0, len(GOOD)), st.integers(0, 12), st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
)


def validates_or_is_bad_input(text: str) -> None:
    try:
        run = check(text)
    except BadInput as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.startswith("run.yaml:") and "; " in line for line in lines), lines
    else:
        assert RunConfig.model_validate(run.config.to_dict()).digest() == run.config.digest()


@settings(max_examples=200)
@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=30).map("".join).map(("dataset: d\n").__add__))
def test_any_text_validates_or_is_bad_input(text: str) -> None:
    validates_or_is_bad_input(text)


@settings(max_examples=200)
@given(st.lists(CUTS, min_size=1, max_size=3))
def test_any_change_of_a_good_file_validates_or_is_bad_input(cuts: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for start, length, piece in cuts:
        text = text[:start] + piece + text[start + length :]
    validates_or_is_bad_input(text)


@settings(max_examples=100)
@given(st.text(max_size=8) | st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
def test_any_argument_gives_a_value_or_bad_input(text: str) -> None:
    try:
        got = str(list(parse_overrides(["name=" + text])))
    except BadInput as error:
        got = str(error)
    assert got == "['name']" or got.startswith("command line name: must be a YAML value, but got")


def test_of_very_many_names_only_the_nearest_are_listed() -> None:
    names = [f"tower_{number:03d}" for number in range(200)]
    line = did_you_mean("tow", names)
    assert line.startswith("known: tower_")
    assert line.endswith(" and 192 more")
    assert did_you_mean("zzz", names[:3]) == "known: tower_000, tower_001, tower_002"
    assert did_you_mean("towr_015", names) == "did you mean 'tower_015'?"


@pytest.mark.parametrize("read", [read_run, read_space], ids=["run file", "space file"])
@pytest.mark.parametrize(
    ("beside", "here", "used", "line"),
    [
        (True, True, "{0}/files/data/d", "{0}/files/data/d (relative to the file), not {0}/data/d"),
        (True, False, "{0}/files/data/d", "{0}/files/data/d (relative to the file)"),
        (False, True, "data/d", "{0}/data/d (relative to the shell)"),
        (False, False, "data/d", ""),
    ],
)
def test_a_dataset_is_relative_to_its_file_then_to_the_shell_and_the_output_says_which(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read: Callable[[str], RunFile | SpaceFile],
    beside: bool,
    here: bool,
    used: str,
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, is_there in (("files/data/d", beside), ("data/d", here)):
        (tmp_path / folder).mkdir(parents=True) if is_there else None
    (tmp_path / "files").mkdir(exist_ok=True)
    text = "dataset: data/d\n" + ("" if read is read_run else "name: a\nspace:\n  optim.lr: {float: [0.1, 1]}\n")
    (tmp_path / "files" / "a.yaml").write_text(text)
    assert read("files/a.yaml").dataset == used.format(tmp_path)
    expected = f"files/a.yaml:1 dataset: using {line.format(tmp_path)}\n" if line else ""
    assert capsys.readouterr().err == expected


def test_other_datasets_are_taken_as_they_are_and_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("files/d", "d", "e"):
        (tmp_path / folder).mkdir(parents=True)
    for dataset in ("embedded:caltech101-lt", "s3://bucket/d", f"{tmp_path}/d"):
        (tmp_path / "files" / "a.yaml").write_text(f"dataset: {dataset}\n")
        assert read_run("files/a.yaml").dataset == dataset
    assert read_run("files/a.yaml", {"dataset": "d"}).dataset == "d"  # from the command line: relative to the shell
    (tmp_path / "a.yaml").write_text("dataset: d\n")
    assert read_run("a.yaml").dataset == "d"
    assert capsys.readouterr().err == ""


# ---- run files that change another one


def written(folder: Path, **texts: str) -> str:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return f"{folder}/{next(iter(texts))}.yaml"


def test_a_run_file_changes_its_base(tmp_path: Path) -> None:
    base = "dataset: d\nname: b\ntuner: {kind: lora, bottleneck: 4}\noptim: {lr: 0.1, epochs: 7}\nhead: {scale: 20.0}\n"
    middle = "base: b.yaml\nname: m\noptim: {lr: 0.2}\nhead: {kind: cosine, init: random}\n"
    run = read_run(written(tmp_path, a="base: m.yaml\ntuner: {kind: full}\n", m=middle, b=base))
    assert (run.name, run.dataset, run.tuner.kind) == ("m", "d", "full")
    assert (run.optim.lr, run.optim.epochs) == (0.2, 7)
    assert run.head == RunConfig.parse({"head": {"scale": 20.0, "init": "random"}}).head
    assert read_run(f"{tmp_path}/m.yaml", {"optim.epochs": 1}).optim.epochs == 1


def test_a_base_can_be_a_shipped_file_and_paths_in_a_base_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "below" / "data").mkdir(parents=True)
    written(tmp_path / "below", b="base: recipes/base/lift\ndataset: data\n")
    run = read_run(written(tmp_path, a="base: below/b.yaml\nseed: 1\n"))
    assert (run.dataset, run.optim.lr) == (f"{tmp_path}/below/data", 0.01)


NOT_A_BASE = {
    "a circle": (
        {"a": "dataset: d\nbase: b.yaml\n", "b": "base: a.yaml\n"},
        "{}/b.yaml:1 base: must not lead back to this file, but got 'a.yaml'; remove one base of the circle",
    ),
    "nothing": (
        {"a": "dataset: d\nbase: b.yaml\n"},
        "{}/a.yaml:2 base: must be a run file, but there is no {}/b.yaml; "
        "give its path relative to this file, or the name of a shipped one",
    ),
    "a mapping": (
        {"a": "base: {optim: {lr: 0.1}}\n"},
        "{}/a.yaml:1 base: must be the path of a run file, but got {'optim': {'lr': 0.1}}; write base: other.yaml",
    ),
    "a space": (
        {"a": "base: b.yaml\n", "b": "dataset: d\nspace: {}\n"},
        "{}/b.yaml:2 space: must not be in a run file, but this is a space file; "
        "use python -m lift_ray.tune, or the best.yaml that it writes",
    ),
    "faults in both": (
        {"a": "base: b.yaml\noptim:\n  lr: -1\n", "b": "dataset: d\n\noptim: {epochs: 0}\n"},
        "{}/a.yaml:3 optim.lr: must be greater than 0, but got -1; change it\n"
        "{}/b.yaml:3 optim.epochs: must be greater than or equal to 1, but got 0; change it",
    ),
}


@pytest.mark.parametrize("case", NOT_A_BASE)
def test_a_fault_of_a_base_has_its_file_and_line(case: str, tmp_path: Path) -> None:
    texts, message = NOT_A_BASE[case]
    with pytest.raises(BadInput) as caught:
        read_run(written(tmp_path, **texts))
    assert sorted(str(caught.value).splitlines()) == sorted(message.replace("{}", str(tmp_path)).splitlines())
