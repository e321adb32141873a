"""Search-space files: what they may say, what they draw, and one exact line for everything that can be wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lift_ray import tune
from lift_ray.errors import BadInput
from lift_ray.settings.checks import known_paths, read_space
from lift_ray.settings.overrides import parse_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import Draw, Param, SpaceFile, is_active, parents_first, seeded_draws

FOLDER = Path(__file__).parent.parent / "search_spaces"
SHIPPED = sorted(path for path in FOLDER.glob("*.yaml") if "\nspace:" in path.read_text())
QUICKSTART = (FOLDER / "quickstart.yaml").read_text()
HEAD = "name: n\ndataset: embedded:caltech101-lt\n"
SEED = HEAD + "space:\n  seed: {int: [1, 9]}\n"
LAST = "tuner.ratio, tuner.places, tuner.norms, tuner.mlp, tuner.length, tuner.last, tuner.kind, tuner.bottleneck"


def written(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "path",
    [path for path in SHIPPED if "baselines:" in path.read_text() and path.stem != "quickstart"],
    ids=lambda path: path.stem,
)
def test_a_shipped_space_is_valid_and_starts_from_the_published_recipe(path: Path) -> None:
    space = read_space(path)
    assert space.baseline_labels()[0] == {"ulfine": "ULFine (our reading)"}.get(path.stem, "LIFT+ defaults")
    recipe = space.config(space.baseline_values()[0])
    published = RunConfig()
    assert (recipe.tuner.kind, recipe.loss, recipe.head) == ("adaptformer", published.loss, published.head)
    assert (recipe.optim.lr, recipe.optim.momentum) == (published.optim.lr, published.optim.momentum)


def test_the_quickstart_compares_with_baselines_at_the_best_of_three_rates() -> None:
    space = read_space(FOLDER / "quickstart.yaml")
    points = space.baseline_values()
    for label in set(space.baseline_labels()):
        mine = [point for point, name in zip(points, space.baseline_labels(), strict=True) if name == label]
        assert len({point["optim.lr"] for point in mine}) == len(mine) == 3
        assert all({**point, "optim.lr": 0} == {**mine[0], "optim.lr": 0} for point in mine)
    assert space.num_trials - len(points) >= 12
    assert {space.config(point).augment.kind for point in points} == {"none"}, "frozen blocks are computed once"


def param(text: str) -> str:
    """A space of one setting, in line 4."""
    return HEAD + f"space:\n  {text}\n"


KINDS = "  tuner.kind: {choices: [lora, linear_probe]}\n"
BROKEN = {
    "no space": (HEAD, "1 space: is required, but missing; add it"),
    "an empty space": (HEAD + "space: {}", "3 space: must have at least 1 item, but got {}; change it"),
    "a space that is a list": (HEAD + "space: [1]", "3 space: must be a mapping, but got [1]; write {key: value}"),
    "no name": (SEED.replace("name: n\n", ""), "1 name: is required, but missing; add it"),
    "a name with a slash": (
        SEED.replace("name: n", "name: a/b"),
        "1 name: must match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', but got 'a/b'; change it",
    ),
    "an unknown section": (SEED + "serch: {trials: 3}", "5 serch: unknown key 'serch'; did you mean 'search'?"),
    "a setting without a range": (
        param("optim.lr: {}"),
        "4 space.optim.lr: must have exactly one of choices, named, int, float, but got none; add one",
    ),
    "a setting with two ranges": (
        param("optim.lr: {float: [0.1, 1], int: [1, 2]}"),
        "4 space.optim.lr: must have exactly one of choices, named, int, float, but got ['int', 'float']; keep one",
    ),
    "a setting that is a number": (
        param("optim.lr: 3"),
        "4 space.optim.lr: must be a mapping, but got 3; set base.optim.lr to keep it fixed, or write {choices: [...]} or "
        "{float: [low, high]} to search it",
    ),
    "an unknown word of a setting": (
        param("optim.lr: {float: [0.1, 1], lgo: true}"),
        "4 space.optim.lr.lgo: unknown key 'lgo'; did you mean 'log'?",
    ),
    "bounds the wrong way": (
        param("optim.lr: {float: [1, 0.1]}"),
        "4 space.optim.lr: low must be at most high, but got [1.0, 0.1]; swap them",
    ),
    "one bound": (
        param("optim.lr: {float: [0.1]}"),
        "4 space.optim.lr.float: must have at least 2 items, but got [0.1]; change it",
    ),
    "log from 0": (
        param("optim.lr: {float: [0, 1], log: true}"),
        "4 space.optim.lr: log requires low > 0, but got 0.0; raise it",
    ),
    "an endless bound": (
        param("optim.lr: {float: [0.1, .inf]}"),
        "4 space.optim.lr.float.1: must be a finite number, but got inf; change it",
    ),
    "a bound beyond the samplers": (
        param("optim.lr: {float: [0.1, 1.0e+300]}"),
        "4 space.optim.lr: bounds must be within -1e15 ... 1e15, but got [0.1, 1e+300]; narrow them",
    ),
    "log and step": (
        param("optim.epochs: {int: [1, 5], log: true, step: 2}"),
        "4 space.optim.epochs: must not have both log and step, but got both; remove one",
    ),
    "log with choices": (
        param("optim.lr: {choices: [0.1], log: true}"),
        "4 space.optim.lr: log and step require int or float, but got choices; remove them",
    ),
    "half a step": (
        param("optim.epochs: {int: [1, 5], step: 0.5}"),
        "4 space.optim.epochs: step must be an integer for int, but got 0.5; round it",
    ),
    "a step that misses the end": (
        param("optim.lr: {float: [0.1, 1], step: 0.4}"),
        "4 space.optim.lr: high - low must be a whole number of steps, but got [0.1, 1.0] with step 0.4; change one",
    ),
    "no choices": (
        param("optim.lr: {choices: []}"),
        "4 space.optim.lr.choices: must have at least 1 item, but got []; change it",
    ),
    "a choice that is a list": (
        param("tuner.kind: {choices: [[lora]]}"),
        "4 space.tuner.kind.choices.0: must be text, a number, true, false, null, a list of integers or {last: K}, "
        "but got ['lora']; change it",
    ),
    "an unknown setting": (
        param("optim.lrr: {float: [0.1, 1]}"),
        "4 space.optim.lrr: unknown setting 'optim.lrr'; did you mean 'optim.lr'?",
    ),
    "a section as a setting": (
        param("tuner: {choices: [lora]}"),
        "4 space.tuner: unknown setting 'tuner'; did you mean 'tuner.mlp'?",
    ),
    "nothing near": (
        param("3: {int: [1, 2]}"),
        f"4 space.3: unknown setting '3'; known: {LAST} and {len(known_paths()) - 8} more",
    ),
    "an unknown choice": (
        param("tuner.kind: {choices: [lora, lorra]}"),
        "4 space.tuner.kind: unknown value 'lorra'; did you mean 'lora'?",
    ),
    "a range that leaves the settings": (
        param("tuner.bottleneck: {int: [0, 3]}"),
        "4 space.tuner.bottleneck: must be greater than or equal to 1, but got 0; change it",
    ),
    "a setting of other kinds without when": (
        HEAD + "space:\n" + KINDS + "  tuner.bottleneck: {int: [1, 3]}",
        "5 space.tuner.bottleneck: has no effect with tuner.kind linear_probe; "
        "add when: {tuner.kind: [the kinds that have it]}",
    ),
    "a setting that the base excludes": (
        param("tuner.bottleneck: {int: [1, 3]}") + "base: {tuner: {kind: zero_shot}}",
        "4 space.tuner.bottleneck: has no effect with tuner.kind zero_shot; remove it",
    ),
    "a second tuner that does not go with all that are drawn": (
        HEAD + "space:\n" + KINDS + "base: {extra_tuner: {kind: bitfit}}",
        "3 space: must change other places than tuner, but got linear_probe and bitfit: one of them trains nothing before "
        "the classifier; remove one",
    ),
    "a second tuner that searches no kind": (
        param("extra_tuner.bottleneck: {choices: [2]}"),
        "4 space.extra_tuner.bottleneck: must have a kind, but got {'bottleneck': 2}; add `kind: ...`",
    ),
    "when of an unknown setting": (
        HEAD + "space:\n" + KINDS + "  tuner.bottleneck:\n    int: [1, 3]\n    when: {tuner.knid: lora}",
        "7 space.tuner.bottleneck.when.tuner.knid: `when` must name a setting of the space, but got 'tuner.knid'; "
        "did you mean 'tuner.kind'?",
    ),
    "when of an impossible value": (
        HEAD + "space:\n" + KINDS + "  tuner.bottleneck: {int: [1, 3], when: {tuner.kind: [lora, lorra]}}",
        "5 space.tuner.bottleneck.when.tuner.kind: tuner.kind never takes the value 'lorra'; did you mean 'lora'?",
    ),
    "when of a value outside a range": (
        HEAD + "space:\n  optim.epochs: {int: [1, 3]}\n  optim.lr: {float: [0.1, 1], when: {optim.epochs: 4}}",
        "5 space.optim.lr.when.optim.epochs: optim.epochs never takes the value 4; known: 1 ... 3",
    ),
    "when in a circle": (
        HEAD
        + "space:\n  seed: {int: [1, 2], when: {loss.tau: 1}}\n  optim.lr: {float: [0.1, 1], when: {optim.epochs: 1}}\n"
        "  optim.epochs: {int: [1, 2], when: {optim.lr: 0.1}}\n  loss.tau: {float: [0, 1], when: {optim.lr: 0.1}}",
        "3 space: `when` must not be circular, but got optim.lr -> optim.epochs -> optim.lr; break the circle",
    ),
    "when of itself": (
        param("seed: {int: [1, 2], when: {seed: 1}}"),
        "3 space: `when` must not be circular, but got seed -> seed; break the circle",
    ),
    "when that is a mapping of mappings": (
        param("seed: {int: [1, 2], when: {seed: {a: 1}}}"),
        "4 space.seed.when.seed: must be one value or a list of values, but got {'a': 1}; change it",
    ),
    "a baseline outside": (
        SEED + "baselines:\n  - {seed: 2}\n  - {seed: 10}",
        "7 baselines.1.seed: must be inside the space (1 ... 9), but got 10; widen the space or change the baseline",
    ),
    "a baseline of another type": (
        SEED + "baselines: [{seed: 2.0}]",
        "5 baselines.0.seed: must be inside the space (1 ... 9), but got 2.0; widen the space or change the baseline",
    ),
    "a baseline off the steps": (
        param("seed: {int: [1, 9], step: 4}") + "baselines: [{seed: 3}]",
        "5 baselines.0.seed: must be inside the space (1 ... 9), but got 3; widen the space or change the baseline",
    ),
    "a baseline that is not searched": (
        SEED + "baselines: [{sed: 2}]",
        "5 baselines.0.sed: must name a setting of the space, but got 'sed'; did you mean 'seed'?",
    ),
    "a baseline with an inactive setting": (
        HEAD + "space:\n" + KINDS + "  tuner.bottleneck: {int: [1, 3], when: {tuner.kind: lora}}\n"
        "baselines:\n  - {tuner.kind: linear_probe, tuner.bottleneck: 2}",
        "7 baselines.0.tuner.bottleneck: has no effect here, because its `when` {'tuner.kind': 'lora'} does not hold; remove it",
    ),
    "an empty baseline": (
        SEED + "baselines: [{name: nothing}]",
        "5 baselines.0: must set at least one setting of the space, but got none; add one",
    ),
    "an unknown metric": (
        SEED + "objectives: {validation/accurcy: max}",
        "5 objectives.validation/accurcy: unknown metric 'validation/accurcy'; did you mean 'validation/accuracy'?",
    ),
    "tuning on test": (
        SEED + "objectives: {test/accuracy: max}",
        "5 objectives.test/accuracy: unknown metric 'test/accuracy'; did you mean 'validation/accuracy'?",
    ),
    "an unknown direction": (
        SEED + "objectives: {validation/accuracy: up}",
        "5 objectives.validation/accuracy: unknown value 'up'; known: max, min",
    ),
    "an unknown key of the base": (
        SEED + "base:\n  optm: {lr: 1.0}",
        "6 base.optm: unknown key 'optm'; did you mean 'optim'?",
    ),
    "a wrong value in the base": (
        SEED + "base:\n  optim:\n    lr: -1",
        "7 base.optim.lr: must be greater than 0, but got -1; change it",
    ),
    "a base that is a number": (SEED + "base: 3", "5 base: must be a mapping, but got 3; write {key: value}"),
    "no trials": (
        SEED + "search: {trials: 0}",
        "5 search.trials: must be greater than or equal to 1, but got 0; change it",
    ),
    "an unknown sampler": (
        SEED + "search: {sampler: tpee}",
        "5 search.sampler: unknown value 'tpee'; did you mean 'tpe'?",
    ),
    "a scheduler by name": (
        SEED + "search: {scheduler: asha}",
        "5 search.scheduler: must be a mapping, but got 'asha'; write {kind: asha}",
    ),
    "grace beyond the end": (
        SEED + "search:\n  scheduler:\n    grace_epochs: 9",
        "7 search.scheduler.grace_epochs: must be at most the 5 epochs of a trial, but got 9; "
        "lower it, or set search.scheduler.kind=none",
    ),
    "no slots": (
        SEED + "scale: {max_concurrent: 0}",
        "5 scale.max_concurrent: must be auto or an integer of at least 1, but got 0; change it",
    ),
    "half a GPU": (
        SEED + "scale: {use_gpu: 0.5}",
        "5 scale.use_gpu: must be auto, true or false, but got 0.5; change it",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_space_file_gives_one_exact_line(name: str, tmp_path: Path) -> None:
    text, message = BROKEN[name]
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        read_space(path)
    assert str(caught.value) == f"{path}:{message}"


def test_several_problems_come_at_once(tmp_path: Path) -> None:
    text = HEAD + "space:\n  optim.lrr: {float: [0.1, 1]}\n  sed: {int: [1, 2]}\nbase: {loss: {tau: -1}}\n"
    with pytest.raises(BadInput) as caught:
        read_space(written(tmp_path, text))
    places = [line.split(": ")[0].split(":")[-1] for line in str(caught.value).splitlines()]
    assert places == ["6 base.loss.tau", "4 space.optim.lrr", "5 space.sed"]


def test_a_kind_that_is_searched_drops_the_fields_that_the_base_gives_the_default_kind(tmp_path: Path) -> None:
    text = HEAD + "space:\n  loss.kind: {choices: [logit_adjusted, cross_entropy]}\nbase: {loss: {tau: 0.5}}\n"
    space = read_space(written(tmp_path, text))
    assert space.config({"loss.kind": "cross_entropy"}).to_dict()["loss"] == {
        "kind": "cross_entropy",
        "label_smoothing": 0.0,
    }
    assert space.config({"loss.kind": "logit_adjusted"}).to_dict()["loss"] == {
        "kind": "logit_adjusted",
        "label_smoothing": 0.0,
        "tau": 0.5,
    }


def test_bottlenecks_of_each_block_are_searched_as_choices(tmp_path: Path) -> None:
    text = (
        HEAD
        + "space:\n  tuner.bottleneck: {choices: [16, [4, 8], null]}\nbase: {tuner: {kind: lora, blocks: {last: 2}}}\n"
    )
    space = read_space(written(tmp_path, text))
    drawn = [space.config(values).tuner for values in seeded_draws(space.space, 20)]
    assert {str(tuner.bottleneck) for tuner in drawn} == {"16", "[4, 8]", "None"}  # type: ignore[attr-defined]


def test_the_command_line_reaches_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, QUICKSTART)
    space = read_space(path, {"search.trials": 3, "base.optim.epochs": 7, "search.scheduler.kind": "none"})
    assert (space.search.trials, space.most_epochs(), space.search.scheduler.kind) == (3, 7, "none")
    with pytest.raises(BadInput) as caught:
        read_space(path, {"search.trials": 0})
    assert str(caught.value) == "command line search.trials: must be greater than or equal to 1, but got 0; change it"


@pytest.mark.parametrize(
    ("word", "ranges"),
    [
        ("space.tuner.bottleneck.int=[2, 32]", {"ints": [2, 32], "log": True}),
        ("space.tuner.bottleneck.choices=[4, 8]", {"choices": [4, 8], "ints": None, "log": False}),
        (
            "space.tuner.bottleneck={choices: [4], when: {tuner.kind: [adaptformer, lora]}}",
            {"choices": [4], "ints": None},
        ),
        ("space.tuner.bottleneck.log=false", {"ints": [4, 64], "log": False}),
    ],
)
def test_the_command_line_reaches_names_with_dots(word: str, ranges: dict[str, object], tmp_path: Path) -> None:
    path = written(tmp_path, QUICKSTART)
    param = read_space(path, parse_overrides([word, "start=[]"])).space["tuner.bottleneck"]
    assert {name: getattr(param, name) for name in ranges} == ranges
    assert param.when == {"tuner.kind": ["adaptformer", "lora"]}


def test_the_command_line_reaches_metrics_and_new_settings(tmp_path: Path) -> None:
    words = [
        "space.optim.momentum.float=[0.5, 0.9]",
        "objectives={validation/few: max, trained_parameters: min}",
        "constraints.validation/few.min=0.1",
    ]
    space = read_space(written(tmp_path, QUICKSTART), parse_overrides([*words, "start=[]"]))
    assert space.space["optim.momentum"].floats == [0.5, 0.9]
    assert list(space.objectives) == ["validation/few", "trained_parameters"]
    assert space.constraints["validation/few"].min == 0.1


def ranged(**words: object) -> Param:
    return Param.model_validate(words)


NESTED = {
    "optim.lr": ranged(float=[0.1, 1.0], when={"tuner.bottleneck": [1, 2]}),
    "tuner.bottleneck": ranged(int=[1, 4], when={"tuner.kind": "lora"}),
    "tuner.kind": ranged(choices=["lora", "linear_probe"]),
    "seed": ranged(int=[0, 3], when={"optim.lr": 0.1, "tuner.kind": "lora"}),
}


def test_parents_come_first_whatever_the_order_of_the_file() -> None:
    assert parents_first(NESTED) == ["tuner.kind", "tuner.bottleneck", "optim.lr", "seed"]


def test_a_draw_holds_exactly_the_active_settings() -> None:
    draws = seeded_draws(NESTED, 64)
    for values in draws:
        for name, param in NESTED.items():
            assert (name in values) == is_active(param, values)
            assert name not in values or param.holds(values[name])
    drawn = {tuple(values) for values in draws}
    assert drawn == {
        ("tuner.kind",),
        ("tuner.kind", "tuner.bottleneck"),
        ("tuner.kind", "tuner.bottleneck", "optim.lr"),
    }
    assert draws == seeded_draws(NESTED, 64)


@settings(max_examples=50)
@given(low=st.integers(-5, 5), steps=st.integers(0, 6), step=st.sampled_from([1, 2, 0.5, 0.1]), seed=st.integers(0, 9))
def test_what_optuna_draws_lies_in_the_setting(low: int, steps: int, step: float, seed: int) -> None:
    whole = step == int(step)
    high = low + steps * step if whole else round(low + steps * step, 1)
    space = {"x": ranged(int=[low, int(high)], step=step) if whole else ranged(float=[low, high], step=step)}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    assert all(space["x"].holds(Draw(space)(study.ask())["x"]) for _ in range(5))


def test_most_epochs_counts_the_searched_maximum() -> None:
    fixed: dict[str, object] = {"name": "n", "dataset": "d", "base": {"optim": {"epochs": 4}}}
    assert SpaceFile.model_validate({**fixed, "space": {"seed": {"int": [1, 2]}}}).most_epochs() == 4
    assert SpaceFile.model_validate({**fixed, "space": {"optim.epochs": {"int": [1, 9]}}}).most_epochs() == 9
    assert SpaceFile.model_validate({**fixed, "space": {"optim.epochs": {"choices": [2, 6, 3]}}}).most_epochs() == 6


def test_a_dry_run_prints_the_plan_and_trains_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIFT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tune.main([str(FOLDER / "inat.yaml"), "search.trials=24", "--dry-run"]) is None
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines()]
    looked_up = ["looking up ViT-B-16 ...", "looking up hf-hub:imageomics/bioclip ..."]
    assert lines[:3] == [*looked_up, "inat2018-vit-b16: plan"]
    assert lines[-1] == "checked: no errors found"
    for piece in (
        "s3://my-bucket/inat2018 (remote: not opened in a dry run)",
        "clip: ViT-B-16 openai in bf16",
        "bioclip: hf-hub:imageomics/bioclip in bf16",
        "validation/mean_class_accuracy, max",
        "4 ... 512 (log)   when tuner.kind is ['adaptformer', 'lora', 'dora']",
        "24 trials, 1 baseline first, then tpe; stops early: asha",
        "at most 24 x 15 = 360",
        "about 115 with early stopping",
        "about 14 GPU-hours at 1000 images/s per worker (plan)",
        "1 x (8 CPU + 1 GPU)",
        "0 GPU: lacks",
        "1 GPU for a trial; run on a cluster (clusters/)",
    ):
        assert piece in out
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_exits_with_2_and_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, (FOLDER / "inat.yaml").read_text().replace("objectives:", "objectivs:"))
    done = subprocess.run(
        [sys.executable, "-m", "lift_ray.tune", str(path), "--dry-run"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{path}:5 objectivs: unknown key 'objectivs'; did you mean 'objectives'?\n"


WORDS = [
    "tuner.kind",
    "tuner.bottleneck",
    "loss.tau",
    "lora",
    "choices",
    "int",
    "float",
    "log",
    "step",
    "when",
    "baselines",
    "space",
    "base",
    "true",
    "null",
    "0",
    "-1",
    "0.5",
    "1.0e+400",
    "99999999999999999999",
    "[",
    "]",
    "{",
    "}",
    ": ",
    ", ",
    "\n",
    "  ",
    "- ",
    "<<: ",
    "''",
    "kind",
    "name",
]
TOKENS = [
    token
    for line in QUICKSTART.splitlines(keepends=True)
    if not line.startswith("#")
    for token in line.replace(" ", " \0").replace(":", ":\0").replace("[", "[\0").split("\0")
]
CHANGES = st.lists(
    st.tuples(st.integers(0, len(TOKENS)), st.integers(0, 3), st.lists(st.sampled_from(WORDS + TOKENS), max_size=2)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=100)
@given(changes=CHANGES)
def test_any_change_of_the_quickstart_file_is_valid_or_bad_input(
    tmp_path: Path, changes: list[tuple[int, int, list[str]]]
) -> None:
    tokens = list(TOKENS)
    for start, length, words in changes:
        tokens[start : start + length] = words
    path = written(tmp_path, "".join(tokens))
    try:
        lines = [str(read_space(path).most_epochs())]
    except BadInput as error:
        lines = str(error).splitlines()
        assert all(line.startswith(f"{path}:") for line in lines), lines
    assert lines


def test_the_old_name_of_the_baselines_is_read_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = (FOLDER / "quickstart.yaml").read_text()
    old = tmp_path / "old.yaml"
    old.write_text(new.replace("\nbaselines:", "\nstart:"))
    assert read_space(old) == read_space(FOLDER / "quickstart.yaml")
    line = (
        old.read_text().splitlines().index(next(li for li in old.read_text().splitlines() if li.startswith("start:")))
        + 1
    )
    assert capsys.readouterr().err == f"{old}:{line} start: renamed to baselines; the old name still works\n"
    assert read_space(old, {"start": []}).baselines == []
    old.write_text(old.read_text() + "\nbaselines: []\n")
    with pytest.raises(BadInput, match=rf"{old}:{line} start: is the old name of baselines, but got both; remove one$"):
        read_space(old)


def test_each_problem_is_an_error_of_its_own_with_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(HEAD + "space:\n  optim.lrr: {float: [0.1, 1]}\n  tuner: {choices: [1]}\n")
    with pytest.raises(BadInput) as caught:
        read_space(path)
    assert [(fault.place, fault.rule, fault.remedy) for fault in caught.value.faults] == [
        (f"{path}:4 space.optim.lrr", "unknown setting 'optim.lrr'", "did you mean 'optim.lr'?"),
        (f"{path}:5 space.tuner", "unknown setting 'tuner'", "did you mean 'tuner.mlp'?"),
    ]
