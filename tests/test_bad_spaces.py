"""What a search cannot be asked for: one exact line each for samplers, schedulers, constraints, shares and words; and a fuzz."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lift_ray import tune
from lift_ray.errors import BadInput, run_and_exit
from lift_ray.settings.checks import read_space
from lift_ray.settings.overrides import parse_overrides
from lift_ray.settings.run_file import read_run

HEAD = "name: n\ndataset: embedded:caltech101-lt\n"
LR = HEAD + "space:\n  optim.lr: {float: [0.1, 1]}\n"
TWO = LR + "  loss.tau: {float: [0, 2]}\n"
KIND = (
    HEAD
    + "space:\n  tuner.kind: {choices: [lora, adapter]}\n  tuner.bottleneck: {int: [1, 3], when: {tuner.kind: lora}}\n"
)
GRID = HEAD + "space:\n  loss.tau: {choices: [0.0, 1.0]}\n  seed: {int: [1, 3]}\n"
COUNT = "trained_parameters"
QUICKSTART = (Path(__file__).parent.parent / "search_spaces" / "quickstart.yaml").read_text()

BROKEN = {
    "a grid without steps": (
        LR + "search: {sampler: grid}",
        "5 search.sampler: grid requires choices, int, or float with a step, but got optim.lr without a step; add one, or use random",
    ),
    "a grid with too few trials": (
        GRID + "search: {sampler: grid, trials: 5}",
        "6 search.sampler: grid requires a trial for each of its 6 points, but got trials: 5; raise it, or use random",
    ),
    "a grid with baselines": (
        GRID + "baselines: [{loss.tau: 0.0, seed: 1}]\nsearch: {sampler: grid}",
        "7 search.sampler: grid already visits every point of the space, but got baselines too; remove them",
    ),
    "a grid without end": (
        HEAD + "space:\n  seed: {int: [0, 4000000000]}\nsearch: {sampler: grid}",
        "5 search.sampler: grid allows at most 10000 points, but got more; use larger steps, or use random",
    ),
    "cmaes with choices": (
        KIND + "search: {sampler: cmaes}",
        "6 search.sampler: cmaes requires int and float settings without `when`, but got tuner.kind; use tpe, or move it to base",
    ),
    "cmaes with one setting": (
        LR + "search: {sampler: cmaes}",
        "5 search.sampler: cmaes requires at least 2 settings, but got 1; use tpe",
    ),
    "cmaes with two objectives": (
        TWO + f"objectives: {{validation/few: max, {COUNT}: min}}\nsearch: {{sampler: cmaes}}",
        "7 search.sampler: cmaes requires one objective, but got 2; use nsga2 or tpe",
    ),
    "gp with when": (
        KIND + "search: {sampler: gp}",
        "6 search.sampler: gp requires settings without `when`, but got tuner.bottleneck; use tpe",
    ),
    "nsga2 with one objective": (
        TWO + "search: {sampler: nsga2}",
        "6 search.sampler: nsga2 requires several objectives, but got 1; use tpe, or add one",
    ),
    "no objective": (LR + "objectives: {}", "5 objectives: must have at least 1 item, but got {}; change it"),
    "a size as the first objective": (
        LR + f"objectives: {{{COUNT}: min}}",
        f"5 objectives.{COUNT}: the first objective must be a validation metric, but got {COUNT}; "
        "put validation/mean_class_accuracy before it",
    ),
    "a constraint on an unknown figure": (
        LR + "constraints: {traned_parameters: {max: 3}}",
        f"5 constraints.traned_parameters: unknown metric 'traned_parameters'; did you mean '{COUNT}'?",
    ),
    "a constraint without a bound": (
        LR + f"constraints: {{{COUNT}: {{}}}}",
        f"5 constraints.{COUNT}: must have min or max, but got neither; add one",
    ),
    "a constraint that nothing keeps to": (
        LR + f"constraints: {{{COUNT}: {{min: 3, max: 2}}}}",
        f"5 constraints.{COUNT}: min must be at most max, but got 3 and 2; swap them",
    ),
    "a constraint that is a number": (
        LR + f"constraints: {{{COUNT}: 3}}",
        f"5 constraints.{COUNT}: must be a mapping, but got 3; write {{key: value}}",
    ),
    "a constraint that is text": (
        LR + f"constraints: {{{COUNT}: {{max: 1e6x}}}}",
        f"5 constraints.{COUNT}.max: must be a valid number, but got '1e6x'; change it",
    ),
    "a misspelt bound": (
        LR + f"constraints: {{{COUNT}: {{maxx: 1}}}}",
        f"5 constraints.{COUNT}.maxx: unknown key 'maxx'; did you mean 'max'?",
    ),
    "constraints as a list": (
        LR + "constraints: [1]",
        "5 constraints: must be a mapping, but got [1]; write {key: value}",
    ),
    "shares without kinds": (
        LR + "search: {per_kind: 3}",
        "5 search.per_kind: must have tuner.kind with choices in the space, but got none; add it, or set trials",
    ),
    "shares and trials": (
        KIND + "search: {per_kind: 3, trials: 6}",
        "6 search: must have trials or per_kind, but got both; remove one",
    ),
    "shares of nothing": (
        KIND + "search: {per_kind: 0}",
        "6 search.per_kind: must be greater than or equal to 1, but got 0; change it",
    ),
    "shares on a grid": (
        HEAD + "space:\n  tuner.kind: {choices: [lora, adapter]}\nsearch: {per_kind: 3, sampler: grid}",
        "5 search.per_kind: does not work with the sampler grid; set trials instead",
    ),
    "shares and a baseline of no kind": (
        KIND + "baselines: [{tuner.bottleneck: 2}]\nsearch: {per_kind: 3}",
        "6 baselines.0.tuner.bottleneck: has no effect here, because its `when` {'tuner.kind': 'lora'} does not hold; remove it",
    ),
    "an unknown scheduler": (
        LR + "search: {scheduler: {kind: ahsa}}",
        "5 search.scheduler.kind: unknown value 'ahsa'; did you mean 'asha'?",
    ),
    "a word of another scheduler": (
        LR + "search: {scheduler: {kind: median, reduction_factor: 3}}",
        "5 search.scheduler.reduction_factor: unknown key 'reduction_factor'; known: grace_epochs, kind, min_trials",
    ),
    "a reduction by 1": (
        LR + "search: {scheduler: {kind: hyperband, reduction_factor: 1}}",
        "5 search.scheduler.reduction_factor: must be greater than or equal to 2, but got 1; change it",
    ),
    "grace beyond the end of hyperband": (
        LR + "search: {scheduler: {kind: hyperband, grace_epochs: 6}}",
        "5 search.scheduler.grace_epochs: must be at most the 5 epochs of a trial, but got 6; lower it, or set "
        "search.scheduler.kind=none",
    ),
    "grace beyond the end of median": (
        LR + "search: {scheduler: {kind: median, grace_epochs: 6}}",
        "5 search.scheduler.grace_epochs: must be at most the 5 epochs of a trial, but got 6; lower it, or set "
        "search.scheduler.kind=none",
    ),
    "pbt, which is no longer there": (
        LR + "search: {scheduler: {kind: pbt}}",
        "5 search.scheduler.kind: unknown value 'pbt'; known: asha, hyperband, median, none",
    ),
    "a plan of no images": (
        LR + "plan: {training_images: 0}",
        "5 plan.training_images: must be greater than or equal to 1, but got 0; change it",
    ),
    "a plan without speed": (
        LR + "plan: {images_per_s: 0}",
        "5 plan.images_per_s: must be greater than 0, but got 0; change it",
    ),
    "a seed below 0": (
        LR + "search: {seed: -1}",
        "5 search.seed: must be greater than or equal to 0, but got -1; change it",
    ),
    "ensembling of half a trial": (
        LR + "search: {tte_best: 0.5}",
        "5 search.tte_best: must be a valid integer, but got 0.5; change it",
    ),
    "a data set without its variable": (
        LR.replace("embedded:caltech101-lt", "${NOT_SET_ANYWHERE}/x"),
        "2 dataset: the environment variable NOT_SET_ANYWHERE must be set, but is not; export NOT_SET_ANYWHERE=... or write "
        "${NOT_SET_ANYWHERE:-default}",
    ),
    "a result folder without its variable": (
        LR + "out: ${NOT_SET_ANYWHERE}",
        "5 out: the environment variable NOT_SET_ANYWHERE must be set, but is not; export NOT_SET_ANYWHERE=... or write "
        "${NOT_SET_ANYWHERE:-default}",
    ),
    "nested when that cannot hold": (
        KIND + "  tuner.mlp: {choices: [true, false], when: {tuner.kind: adapter, tuner.bottleneck: 9}}",
        "6 space.tuner.mlp.when.tuner.bottleneck: tuner.bottleneck never takes the value 9; known: 1 ... 3",
    ),
    "an unknown second objective": (
        LR + "objectives:\n  validation/few: max\n  validation/fwe: min",
        "7 objectives.validation/fwe: unknown metric 'validation/fwe'; did you mean 'validation/few'?",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_impossible_search_gives_one_exact_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    text, message = BROKEN[name]
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        read_space(path)
    assert str(caught.value) == f"{path}:{message}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--resume"],
            "--resume: requires the folder of the search to continue, but --out is missing; add --out FOLDER",
        ),
        (
            ["--resume", "--out", "{tmp}/none"],
            "{tmp}/none: must contain a search to resume, but there is no optuna.journal; check --out, or leave out --resume",
        ),
        (
            ["--schema", "{tmp}/no/schema.json"],
            "--schema: must be a writable file, but got {tmp}/no/schema.json (No such file or directory); choose another path",
        ),
        (
            ["search.sampler=cmaes"],
            "command line search.sampler: cmaes requires at least 2 settings, but got 1; use tpe",
        ),
        (["search.sampler=pte"], "command line search.sampler: unknown value 'pte'; did you mean 'tpe'?"),
        (
            ["objectives.validation/few=up"],
            "command line objectives.validation/few: unknown value 'up'; known: max, min",
        ),
        (
            ["constraints.validation/los.max=1"],
            "command line constraints.validation/los: unknown metric 'validation/los'; did you mean 'validation/loss'?",
        ),
        (["space.optim.lr.log=3"], "command line space.optim.lr.log: must be a valid boolean, but got 3; change it"),
        (
            ["space./=3"],
            "command line: settings must be written key=value, but got 'space./=3'; for example, loss.tau=0.5",
        ),
        (
            ["--storage", "nonsense", "--out", "{tmp}/out"],
            "--storage: must be the URL of a reachable database, but got nonsense (Could not parse SQLAlchemy URL from given URL "
            "string); for example postgresql://user@host/name or sqlite:///file.db",
        ),
    ],
)
def test_an_impossible_argument_gives_one_exact_line_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(LR)
    with pytest.raises(BadInput) as caught:
        tune.main([str(path), *(word.format(tmp=tmp_path) for word in words)])
    assert str(caught.value) == message.format(tmp=tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "space.tuner.botleneck.int=[4, 64]",
            "command line space.tuner.botleneck: unknown setting 'tuner.botleneck'; did you mean 'tuner.bottleneck'?",
        ),
        (
            "space.loss.tau.float=[2, 1]",
            "command line space.loss.tau: low must be at most high, but got [2.0, 1.0]; swap them",
        ),
        (
            "space.loss.tau.itn=[1, 2]",
            "command line space.loss.tau.itn: must be a mapping, but got [1, 2]; did you mean 'int'?",
        ),
        ("space=3", "command line space: must be a mapping, but got 3; write {key: value}"),
    ],
)
def test_a_wrong_value_for_a_searched_setting_gives_a_one_line_error(word: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(QUICKSTART)
    with pytest.raises(BadInput) as caught:
        read_space(path, parse_overrides([word, "start=[]"]))
    assert str(caught.value).splitlines()[0] == message


ALL_KEYS = "base, baselines, constraints, dataset, name, objectives, out, plan, scale, search, space, test"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.momentum=0.1", "command line optim.momentum: unknown key 'optim'; did you mean 'base.optim.momentum'?"),
        (
            "optim.lr.float=[1, 2]",
            "command line optim.lr.float: unknown key 'optim'; did you mean 'space.optim.lr.float'?",
        ),
        ("tuner={kind: lora}", "command line tuner: unknown key 'tuner'; did you mean 'base.tuner'?"),
        ("epochs=5", "command line epochs: unknown key 'epochs'; did you mean 'base.optim.epochs'?"),
        ("trials=5", "command line trials: unknown key 'trials'; did you mean 'search.trials'?"),
        ("kind=lora", f"command line kind: unknown key 'kind'; known: {ALL_KEYS}"),
        ("nothing=5", f"command line nothing: unknown key 'nothing'; known: {ALL_KEYS}"),
        (
            "space.loss.tau=[0, 2]",
            "command line space.loss.tau: must be a mapping, but got [0, 2]; write {float: [0, 2]}",
        ),
        (
            "space.tuner.bottleneck=[2, 32]",
            "command line space.tuner.bottleneck: must be a mapping, but got [2, 32]; write {int: [2, 32]}",
        ),
        (
            "space.tuner.kind=[lora, ssf]",
            "command line space.tuner.kind: must be a mapping, but got ['lora', 'ssf']; write {choices: [lora, ssf]}",
        ),
        (
            "space.optim.lr=[0.1, 0.2, 0.3]",
            "command line space.optim.lr: must be a mapping, but got [0.1, 0.2, 0.3]; write {choices: [0.1, 0.2, 0.3]}",
        ),
        (
            "space.loss.tau=1",
            "command line space.loss.tau: must be a mapping, but got 1; set base.loss.tau to keep it fixed, or write "
            "{choices: [...]} or {float: [low, high]} to search it",
        ),
        (
            "base.optim.lr=0.1",
            "command line base.optim.lr: has no effect, because the space searches it; remove one of them",
        ),
        (
            "base.tuner.kind=ssf",
            "command line base.tuner.kind: has no effect, because the space searches it; remove one of them",
        ),
    ],
)
def test_the_remedy_is_what_was_probably_meant(word: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(QUICKSTART)
    with pytest.raises(BadInput) as caught:
        read_space(path, parse_overrides([word]))
    assert str(caught.value) == message


def test_a_value_of_base_that_only_some_trials_replace_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(KIND + "base: {tuner: {bottleneck: 2}}\n")
    assert read_space(path).base == {"tuner": {"bottleneck": 2}}
    always = HEAD + "space:\n  tuner.kind: {choices: [lora, linear_probe]}\n"
    path.write_text(always + "base: {tuner: {kind: lora, bottleneck: 2}}\n")
    space = read_space(path)
    used = [space.config({"tuner.kind": kind}).tuner for kind in ("lora", "linear_probe")]
    assert [getattr(tuner, "bottleneck", None) for tuner in used] == [2, None], "the kind says whose bottleneck it is"
    path.write_text(always + "base: {tuner: {kind: lora}}\n")
    with pytest.raises(BadInput, match=r"base.tuner.kind: has no effect, because the space searches it"):
        read_space(path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("base.optim.lr=0.1", "command line base.optim.lr: unknown key 'base'; did you mean 'optim.lr'?"),
        ("lr=0.1", "command line lr: unknown key 'lr'; did you mean 'optim.lr'?"),
        (
            "bottleneck=4",
            "command line bottleneck: unknown key 'bottleneck'; did you mean 'tuner.bottleneck' or 'extra_tuner.bottleneck'?",
        ),
    ],
)
def test_the_remedy_for_a_run_has_no_base(word: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HEAD)
    with pytest.raises(BadInput) as caught:
        read_run(path, parse_overrides([word]))
    assert str(caught.value) == message


def test_the_file_of_a_search_and_of_a_run_are_told_apart(tmp_path: Path) -> None:
    space, run = tmp_path / "space.yaml", tmp_path / "run.yaml"
    space.write_text(LR)
    run.write_text(HEAD + "optim: {lr: 0.1}\n")
    with pytest.raises(BadInput) as caught:
        read_run(space)
    assert str(caught.value) == (
        f"{space}:3 space: must not be in a run file, but this is a space file; use python -m lift_ray.tune, or the "
        "best.yaml that it writes"
    )
    with pytest.raises(BadInput) as caught:
        read_space(run)
    assert (
        str(caught.value) == f"{run}: must have a `space` to search, but it is a run file; use python -m lift_ray.train"
    )


def test_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "s3://here")
    path = tmp_path / "space.yaml"
    path.write_text(LR.replace("embedded:caltech101-lt", "${WHERE}/data") + "out: ${NOWHERE:-runs}/x")
    space = read_space(path)
    assert (space.dataset, space.out) == ("s3://here/data", "runs/x")


WHOLE = (
    LR
    + "  tuner.kind: {choices: [lora, linear_probe]}\n  tuner.bottleneck: {int: [1, 8], log: true, when: {tuner.kind: lora}}\n"
    f"objectives: {{validation/few: max, {COUNT}: min}}\nconstraints: {{{COUNT}: {{max: 9}}}}\n"
    "baselines: [{name: a, tuner.kind: linear_probe, optim.lr: 0.2}]\n"
    "search: {per_kind: 4, sampler: tpe, scheduler: {kind: hyperband, grace_epochs: 2}, seed: 1}\nplan: {images_per_s: 3}\n"
)
PIECES = [
    "per_kind",
    "trials: 3",
    "grid",
    "cmaes",
    "gp",
    "nsga2",
    "kind",
    "max",
    "min",
    "-1",
    "0",
    ".nan",
    "1e999",
    "[]",
    "{}",
    "\n",
    "  ",
    ": ",
    "!!python/object:os.system",
    "&a",
    "*a",
    "\x00",
    "\ud7ff",
    "#",
    "'",
    '"',
    "|",
    ">",
    "%",
    "---\n",
    "when",
    "tuner.mlp",
    "2000000000000000000000",
    "null",
    "true",
    "validation/loss",
    "${X}",
]


@settings(max_examples=150)
@given(changes=st.lists(st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 12), st.sampled_from(PIECES)), max_size=4))
@example(changes=[])
def test_any_file_gives_a_plan_or_errors_and_exit_code_2(tmp_path: Path, changes: list[tuple[int, int, str]]) -> None:
    text = WHOLE
    for start, length, piece in changes:
        text = text[:start] + piece + text[start + length :]
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with (
        contextlib.redirect_stderr(io.StringIO()) as said,
        contextlib.redirect_stdout(io.StringIO()),
        pytest.raises(SystemExit) as end,
    ):
        run_and_exit(lambda _: tune.main([str(path), "--dry-run"]))
    assert end.value.code in (0, 2)
    assert bool(said.getvalue()) == (end.value.code == 2)
    assert end.value.code == 0 or changes
    assert "Traceback" not in said.getvalue()


@settings(max_examples=60)
@given(
    path=st.lists(
        st.sampled_from(
            [
                "space",
                "optim",
                "lr",
                "float",
                "when",
                "search",
                "objectives",
                "validation/few",
                "baselines",
                "log",
                "base",
                "constraints",
                "0",
            ]
        ),
        min_size=1,
        max_size=5,
    ),
    value=st.sampled_from(["1", "[1, 2]", "{}", "null", "x", "{a: 1}", "[]", "true", "[[1]]"]),
)
def test_any_argument_gives_a_space_or_bad_input(tmp_path: Path, path: list[str], value: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(LR)
    try:
        read_space(file, parse_overrides([f"{'.'.join(path)}={value}"]))
    except BadInput as error:
        lines = str(error).splitlines()
    else:
        lines = []
    assert all(line.startswith(("command line", str(file))) for line in lines)
