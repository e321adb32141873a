"""Samplers on every kind of space that they support, and early stopping by the rule of each scheduler."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from lift_ray import tune
from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.errors import BadInput
from lift_ray.registry import SAMPLERS
from lift_ray.reporting.trial_rows import TrialRow, pareto_front
from lift_ray.searching.samplers import check_sampler
from lift_ray.searching.stopping import Decision, Stopping, quantile
from lift_ray.searching.study import Study
from lift_ray.settings.search import (
    AnyScheduler,
    AshaConfig,
    Constraint,
    HyperbandConfig,
    SearchConfig,
    expected_epochs,
    num_brackets,
    rungs,
)
from lift_ray.settings.space import SpaceFile, grid_points, seeded_draws

METRIC, COUNT = "validation/mean_class_accuracy", "trained_parameters"
PLAIN = {"optim.lr": {"float": [0.01, 1.0], "log": True}, "loss.tau": {"float": [0.0, 2.0], "step": 0.5}}
NESTED = {
    "tuner.kind": {"choices": ["adaptformer", "lora", "linear_probe"]},
    "tuner.bottleneck": {"int": [1, 8], "when": {"tuner.kind": ["adaptformer", "lora"]}},
    "tuner.mlp": {"choices": [False, True], "when": {"tuner.kind": "lora", "tuner.bottleneck": [1, 2, 3, 4]}},
    "optim.lr": PLAIN["optim.lr"],
}


def space(searched: dict[str, Any], epochs: int = 9, **sections: Any) -> SpaceFile:
    return SpaceFile.model_validate(
        {"name": "s", "dataset": "d", "base": {"optim": {"epochs": epochs}}, "space": searched, **sections}
    )


def told(study: Study, number: int) -> optuna.trial.FrozenTrial:
    trials = [t for s in study._studies.values() for t in s.trials]
    return next(t for t in trials if t.user_attrs["trial"]["number"] == number)


def metrics(epoch: int, value: float, count: int | None = None) -> EpochMetrics:
    return EpochMetrics(epoch, validation={"mean_class_accuracy": value}, trained_parameters=count, num_epochs=9)


def play(wanted: SpaceFile) -> Study:
    """Run a study whose trials have one epoch with the value 1 - |lr - 0.3| (- 0.1 for linear_probe)."""
    study = Study(wanted, "d", InMemoryStorage())
    while (row := study.next()) is not None:
        value = 1 - abs(row.values.get("optim.lr", 0.3) - 0.3) - 0.1 * (row.values.get("tuner.kind") == "linear_probe")
        study.report(row, metrics(9, value, 10 * row.values.get("tuner.bottleneck", 1)))
        study.end(row, "finished")
    return study


def test_there_is_a_sampler_for_every_choice_of_the_settings() -> None:
    assert set(SAMPLERS) == set(get_args(SearchConfig.model_fields["sampler"].annotation))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_draws_what_the_space_holds_and_the_same_again(sampler: str) -> None:
    if SAMPLERS[sampler].package:
        pytest.importorskip(SAMPLERS[sampler].package)
    nested = sampler in ("tpe", "random", "nsga2")
    searched = {"loss.tau": PLAIN["loss.tau"]} if sampler == "grid" else NESTED if nested else PLAIN
    objectives = {METRIC: "max", COUNT: "min"} if sampler == "nsga2" else {METRIC: "max"}
    wanted = space(searched, search={"trials": 14, "sampler": sampler}, objectives=objectives)
    first, second = play(wanted), play(wanted)
    assert len(first.rows) == (5 if sampler == "grid" else 14)
    assert [row.values for row in first.rows.values()] == [row.values for row in second.rows.values()]
    for row in first.rows.values():
        assert all(wanted.space[name].holds(value) for name, value in row.values.items())
        assert told(first, row.number).state == TrialState.COMPLETE
    other = play(wanted.model_copy(update={"search": wanted.search.model_copy(update={"seed": 1})}))
    assert sampler == "grid" or [r.values for r in other.rows.values()] != [r.values for r in first.rows.values()]


def test_tpe_finds_what_random_does_not() -> None:
    def mean_of_last(sampler: str) -> float:
        rows = list(play(space(NESTED, search={"trials": 60, "sampler": sampler})).rows.values())[30:]
        return sum(row.last[METRIC] for row in rows) / len(rows)

    assert mean_of_last("tpe") > mean_of_last("random") + 0.05


@pytest.mark.parametrize("sampler", sorted(name for name, kind in SAMPLERS.items() if kind.package))
def test_a_sampler_without_its_package_gives_a_one_line_error(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput) as caught:
        check_sampler(sampler)
    package = SAMPLERS[sampler].package
    assert str(caught.value) == (
        f"search.sampler: {sampler} requires the package {package}, but it is not installed; pip install {package}, or use tpe"
    )


def test_a_grid_is_every_combination_that_when_allows() -> None:
    searched = {name: param for name, param in NESTED.items() if name != "optim.lr"}
    points = [row.values for row in play(space(searched, search={"trials": 99, "sampler": "grid"})).rows.values()]
    assert len(points) == 1 + 8 + 8 + 4
    assert len({tuple(sorted(point.items(), key=str)) for point in points}) == len(points)
    assert points == grid_points(space(searched).space)
    assert {tuple(sorted(draw)) for draw in seeded_draws(space(searched).space, 99)} == {
        tuple(sorted(p)) for p in points
    }


def test_each_kind_has_its_own_share_and_its_own_sampler() -> None:
    baselines = [{"tuner.kind": "lora", "tuner.bottleneck": 2, "tuner.mlp": False, "optim.lr": 0.02}]
    study = play(space(NESTED, search={"per_kind": 6}, baselines=baselines))
    kinds = Counter(row.values["tuner.kind"] for row in study.rows.values())
    assert kinds == {"adaptformer": 6, "lora": 6, "linear_probe": 6}
    assert all(row.group == row.values["tuner.kind"] for row in study.rows.values())
    assert study.rows[0].values == baselines[0]
    assert sorted(optuna.get_all_study_names(study.storage)) == ["s/adaptformer", "s/linear_probe", "s/lora"]


def test_a_trial_that_breaks_a_constraint_is_told_and_is_not_the_best() -> None:
    wanted = space(NESTED, search={"trials": 40}, constraints={COUNT: {"max": 30}, METRIC: {"min": 0.2}})
    study = Study(wanted, "d", InMemoryStorage())
    while (row := study.next()) is not None:
        count = 10 * row.values.get("tuner.bottleneck", 1)
        if count > 30:
            study.end(row, "infeasible", "too large", known=EpochMetrics(0, trained_parameters=count))
            continue
        study.report(row, metrics(9, 1 - row.values["optim.lr"], count))
        study.end(row, "finished")
    states = {row.number: row.state for row in study.rows.values()}
    for row in study.rows.values():
        trial, count = told(study, row.number), 10 * row.values.get("tuner.bottleneck", 1)
        assert trial.constraints[COUNT] == count - 30
        broken = count > 30 or 1 - row.values["optim.lr"] < 0.2
        assert (states[row.number] == "infeasible") == broken
        assert trial.state == (TrialState.PRUNED if count > 30 else TrialState.COMPLETE)
    later = [states[number] for number in range(20, 40)]
    earlier = [states[number] for number in range(10)]
    assert later.count("infeasible") / 20 < earlier.count("infeasible") / 10, "the sampler did not learn to keep away"


def test_the_front_holds_the_trials_that_nothing_beats() -> None:
    values = [(0.5, 10), (0.6, 20), (0.4, 5), (0.5, 20), (0.6, 20), (0.3, 7)]
    rows = [TrialRow(i, {}, 1, "finished", [metrics(1, a, c)]) for i, (a, c) in enumerate(values)]
    rows.append(TrialRow(6, {}, 1, "pruned", [metrics(1, 0.9, 1)]))
    assert [row.number for row in pareto_front(rows, {METRIC: "max", COUNT: "min"})] == [1, 4, 0, 2]
    rows[3].history[0] = metrics(1, 0.5 + 1e-16, 20)  # the same but for rounding
    assert 3 not in [row.number for row in pareto_front(rows, {METRIC: "max", COUNT: "min"})]
    assert [row.number for row in pareto_front(rows, {METRIC: "max"})] == [1, 4]


def rows_of(*histories: list[float], epochs: int = 9, **fields: Any) -> list[TrialRow]:
    return [
        TrialRow(
            i,
            {"optim.lr": 0.1 * (i + 1)},
            epochs,
            history=[metrics(e, v) for e, v in enumerate(h, 1)],
            **fields,
        )
        for i, h in enumerate(histories)
    ]


def decide(wanted: SpaceFile, row: TrialRow, rows: list[TrialRow]) -> Decision:
    """Decide about a trial among others; one of its number is left out."""
    return Stopping(wanted, [*(other for other in rows if other.number != row.number), row]).decide(row)


def test_asha_stops_trials_below_the_best_third_at_its_rungs() -> None:
    wanted = space(PLAIN, search={"scheduler": {"kind": "asha"}})
    assert rungs(wanted.search.scheduler, 9) == [1, 3]
    rows = rows_of([0.5, 0.6, 0.7], [0.6], [0.2])
    assert decide(wanted, rows[2], rows) == "stop"
    assert decide(wanted, rows[1], rows) == "continue"
    assert decide(wanted, rows_of([0.5, 0.1])[0], rows) == "continue", "epoch 2 is no rung"
    assert decide(wanted, rows_of([0.0])[0], rows[:1]) == "continue", "nobody else was there"
    rows[2].baseline = 0
    assert decide(wanted, rows[2], rows) == "continue", "a baseline runs to its end"
    rows[2].baseline, rows[2].group = None, "lora"
    assert decide(wanted, rows[2], rows) == "continue", "it is compared with its own kind"
    least = space(PLAIN, objectives={"validation/loss": "min"})
    found = [EpochMetrics(1, validation={"loss": loss}) for loss in (1.0, 0.5, 2.0)]
    losses = [TrialRow(i, {}, 9, history=[one]) for i, one in enumerate(found)]
    assert [decide(least, row, losses) for row in losses] == ["stop", "continue", "stop"]


def test_hyperband_gives_each_bracket_a_longer_grace() -> None:
    scheduler = HyperbandConfig(grace_epochs=1, reduction_factor=3)
    assert [rungs(scheduler, 9, b) for b in range(num_brackets(scheduler, 9))] == [[1, 3], [3], []]
    wanted = space(PLAIN, search={"scheduler": {"kind": "hyperband"}})
    rows = rows_of([0.5], [0.5], [0.5], [0.1], [0.1], [0.1])
    assert [decide(wanted, row, rows) for row in rows[3:]] == ["stop", "continue", "continue"]


def test_median_stops_trials_that_were_never_as_good_as_half_of_the_others() -> None:
    wanted = space(PLAIN, search={"scheduler": {"kind": "median", "grace_epochs": 2}})
    rows = rows_of([0.4, 0.6], [0.2, 0.4], [0.5, 0.7], [0.1, 0.35], [0.1, 0.55])
    assert decide(wanted, rows[3], rows) == "stop"
    assert decide(wanted, rows[4], rows) == "continue"
    assert decide(wanted, rows[3], rows[:3]) == "stop"
    assert decide(wanted, rows[3], rows[:2]) == "continue", "too few others"
    assert decide(wanted, rows_of([0.0])[0], rows_of([1.0], [1.0], [1.0], [1.0])) == "continue", "within the grace"


@limits(max_examples=60)
@given(
    values=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=9),
    kind=st.sampled_from([scheduler().kind for scheduler in get_args(AnyScheduler)]),
)
def test_no_rule_stops_the_best_and_order_does_not_matter(values: list[list[float]], kind: str) -> None:
    wanted, rows = space(PLAIN, search={"scheduler": {"kind": kind}}), rows_of(*values)
    for row in rows:
        decision = decide(wanted, row, rows)
        assert decision == decide(wanted, row, rows[::-1])
        best = all(max(v[: len(row.history)]) <= row.history[-1][METRIC] for v in values)
        assert decision == "continue" or (kind != "none" and not best)


@limits(max_examples=60)
@given(
    values=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=9),
    kind=st.sampled_from([scheduler().kind for scheduler in get_args(AnyScheduler)]),
)
def test_epochs_that_are_reported_one_by_one_are_compared_as_if_they_were_read_from_the_journal(
    values: list[list[float]], kind: str
) -> None:
    wanted, rows = space(PLAIN, search={"scheduler": {"kind": kind}}), rows_of(*values)
    stopping, histories = Stopping(wanted), [row.history for row in rows]
    for row in rows:
        row.history = []
    for epoch in range(8):
        for row, history in zip(rows, histories, strict=True):
            if epoch < len(history):
                row.history = history[: epoch + 1]
                stopping.reported(row)
                assert stopping.decide(row) == Stopping(wanted, rows).decide(row)


@limits(max_examples=60)
@given(values=st.lists(st.floats(-1, 1), min_size=1), share=st.floats(0, 1))
def test_a_quantile_is_that_of_numpy(values: list[float], share: float) -> None:
    assert quantile(sorted(values), share) == float(np.quantile(values, share))


@pytest.mark.parametrize(
    ("scheduler", "epochs", "expected"),
    [
        (AshaConfig(grace_epochs=2), 15, 2 + 4 / 3 + 9 / 9),
        (AshaConfig(grace_epochs=1), 1, 1.0),
        (HyperbandConfig(), 9, ((1 + 2 / 3 + 6 / 9) + (3 + 6 / 3) + 9) / 3),
    ],
)
def test_the_plan_takes_into_account_what_early_stopping_saves(scheduler: Any, epochs: int, expected: float) -> None:
    assert expected_epochs(scheduler, epochs) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("limit", "value", "excess"),
    [(Constraint(max=3), 5, 2), (Constraint(min=3), 5, -2), (Constraint(min=1, max=3), 0, 1)],
)
def test_an_excess_above_0_breaks_a_limit(limit: Constraint, value: float, excess: float) -> None:
    assert limit.excess(value) == excess


SPACE = """\
name: {name}
dataset: {data}
base: {{backbone: {{model: '{clip}'}}, optim: {{epochs: 3, global_batch_size: 16}}, tuner: {{kind: lora}}}}
objectives: {objectives}
{more}
space:
  tuner.bottleneck: {{int: [1, 16], log: true}}
  optim.lr: {{float: [1.0e-4, 1.0e-1], log: true}}
search: {{trials: {trials}, sampler: {sampler}, scheduler: {{kind: {scheduler}}}, tte_best: 0}}
"""


def test_a_pareto_search_under_a_constraint_writes_its_front(
    small_data: str, small_clip: str, tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "space.yaml", tmp_path / "out"
    file.write_text(
        SPACE.format(
            name="pareto",
            data=small_data,
            clip=small_clip,
            objectives=f"{{{METRIC}: max, {COUNT}: min}}",
            trials=8,
            more=f"constraints: {{{COUNT}: {{max: 3000}}}}",
            sampler="nsga2",
            scheduler="asha",
        )
    )
    assert not tune.main([str(file), "--out", str(out)])
    table = pq.read_table(out / "trials.parquet").to_pylist()
    large = [row for row in table if row["state"] == "infeasible"]
    assert large
    assert all(row["epochs"] == 0 and row["error"].startswith("trained_parameters is ") for row in large)
    assert all(row[COUNT] <= 3000 for row in table if row["state"] == "finished")
    assert "Pareto front" in capsys.readouterr().out
