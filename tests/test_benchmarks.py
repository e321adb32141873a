"""The figures that the benchmarks compute from their runs. Nothing is trained."""

from __future__ import annotations

from typing import Any

import methods
import pytest
import time_to_accuracy as timing

EPOCHS = 5
Row = dict[str, Any]


def row(name: str, seed: int, validation: float, **more: Any) -> Row:
    """A made-up line of a JSONL file; `few`, `test`, `seconds` and the like through `more`."""
    test, few = more.pop("test", 0.3), more.pop("few", 0.1)
    figures = {"accuracy": test, "mean_class_accuracy": test, "many": 0.7, "medium": 0.3, "few": few}
    metrics = {"validation/mean_class_accuracy": validation} | {f"test/{k}": v for k, v in figures.items()}
    made = {
        "name": name,
        "seed": seed,
        "epochs": EPOCHS,
        "rate": 0.1,
        "seconds": 100.0,
        "cpu_s": 80.0,
        "metrics": metrics,
        "trained_parameters": 1000,
        "digest": "d",
        "key": "k",
        "laps_s": [0.0] + [20.0] * 5,
    }
    return made | more


def failed(name: str, seed: int, **more: Any) -> Row:
    return {
        "name": name,
        "seed": seed,
        "epochs": EPOCHS,
        "failed": "the training loss must be finite",
        "key": "k",
        **more,
    }


def method_rows(few_of_full: float) -> list[Row]:
    sizes = {"linear_probe": (19_200, 0.14), "adaptformer": (41_142, 0.16), "full": (2_688_384, few_of_full)}
    return [
        row(name, seed, 0.25, trained_parameters=size, few=few + wobble)
        for name, (size, few) in sizes.items()
        for seed, wobble in enumerate((-0.01, 0.0, 0.01))
    ]


def test_the_rate_with_the_best_validation_accuracy_on_the_first_seed_is_reported() -> None:
    rows = [
        row("lora", 0, 0.20, rate=0.03),
        row("lora", 0, 0.24, rate=0.1, test=0.30, few=0.11),
        failed("lora", 0, rate=0.3),
        row("lora", 1, 0.22, rate=0.1, test=0.32, few=0.12),
        row("lora", 2, 0.23, rate=0.1, test=0.34, few=0.13),
        row("lora", 1, 0.99, rate=0.03, test=0.99),
    ]
    (summary,) = methods.summarise(rows, seed=0)
    assert (summary["rate"], summary["seeds"], summary["at_end_of_rates"]) == (0.1, [0, 1, 2], False)
    assert summary["test"]["mean_class_accuracy"] == pytest.approx({"mean": 0.32, "std": 0.02})
    assert summary["test"]["few"] == pytest.approx({"mean": 0.12, "std": 0.01})
    assert summary["by_rate"] == {"0.03": 0.20, "0.1": 0.24}


def test_a_best_rate_at_an_end_is_known_and_a_method_that_only_failed_is_left_out() -> None:
    rows = [row("full", 0, 0.3, rate=0.01), row("full", 0, 0.2, rate=0.03), failed("lora", 0, rate=0.1)]
    (summary,) = methods.summarise(rows, seed=0)
    assert (summary["method"], summary["rate"], summary["at_end_of_rates"]) == ("full", 0.01, True)


# more, less by chance with a rising rank, within the noise
@pytest.mark.parametrize(("few_of_full", "hurts"), [(0.06, True), (0.20, False), (0.155, False), (0.15, False)])
def test_heavy_fine_tuning_hurts_if_the_rows_say_so(few_of_full: float, hurts: bool) -> None:
    assert methods.few_hurt(methods.summarise(method_rows(few_of_full), seed=0))[0] == hurts


def test_a_drop_within_the_noise_of_the_seeds_does_not_count() -> None:
    rows = [r for r in method_rows(0.147) if r["name"] != "linear_probe"]
    assert not methods.few_hurt(methods.summarise(rows, seed=0))[0]
    rows = [r for r in method_rows(0.14) if r["name"] != "linear_probe"]
    assert methods.few_hurt(methods.summarise(rows, seed=0))[0]


def test_a_setting_that_reached_is_cut_shorter_and_one_that_did_not_is_trained_longer() -> None:
    target, lengths = row("recipe", 0, 0.30), [2, 3, 5, 8]
    quick = {"seconds": 50.0, "laps_s": [0.0] + [10.0] * 5}
    good, bad = row("drop50", 0, 0.30, **quick), row("drop50", 0, 0.29, **quick)
    next_epochs = timing.next_epochs
    assert next_epochs({}, target, EPOCHS, lengths) is None
    assert next_epochs({5: good}, None, EPOCHS, lengths) is None
    assert next_epochs({5: good}, target, EPOCHS, lengths) == 3
    assert next_epochs({5: good, 3: bad}, target, EPOCHS, lengths) is None
    assert next_epochs({5: good, 3: good}, target, EPOCHS, lengths) == 2
    assert next_epochs({5: bad}, target, EPOCHS, lengths) == 8
    assert next_epochs({5: bad, 8: bad}, target, EPOCHS, lengths) is None
    assert next_epochs({5: failed("drop50", 0)}, target, EPOCHS, lengths) is None
    slow = bad | {"laps_s": [0.0] + [15.0] * 5}
    assert next_epochs({5: slow}, target, EPOCHS, lengths) is None, (
        "8 epochs of 15 s are slower than the recipe's 100 s"
    )


def test_cached_features_are_computed_once_in_a_longer_schedule() -> None:
    assert timing.expected_s(row("last1", 0, 0.3, laps_s=[1.0, 15.0, 2.0, 2.0, 2.0, 2.0]), 8) == 30


def timed_rows() -> list[Row]:
    out = []
    for seed, target in enumerate((0.30, 0.32)):
        out += [
            row("recipe", seed, target, test=0.30),
            row("drop50", seed, target, seconds=50.0, cpu_s=20.0, test=0.31),
            row("drop50", seed, target + 0.01 - 0.02 * seed, epochs=3, seconds=30.0, cpu_s=16.0, test=0.29),
            row("last1", seed, target - 0.05, seconds=20.0),
            row("last1", seed, target - 0.03 * (1 - seed), epochs=8),
        ]
    return out


def test_seconds_are_those_of_the_shortest_schedule_that_ends_at_the_target() -> None:
    drop = timing.summarise(timed_rows(), ["drop50"], [0, 1], EPOCHS)[0]
    assert drop["epochs"] == [3, 5], "with seed 1 the short schedule ends under the target"
    assert drop["ratios"] == pytest.approx([100 / 30, 2.0])
    assert (drop["seconds"], drop["ratio"], drop["cpu_ratio"]) == (40.0, 2.5, pytest.approx(160 / 36))
    assert drop["ratio_at_equal_epochs"] == 2.0
    assert drop["test_gain"] == pytest.approx(0.0)
    assert drop["best_final"] == pytest.approx({"mean": 0.315, "std": 0.0070711}, abs=1e-6)


def test_a_target_that_one_seed_misses_is_not_reached() -> None:
    summaries = timing.summarise(timed_rows(), ["recipe", "drop50", "last1"], [0, 1], EPOCHS)
    last = summaries[2]
    assert (last["num_reached"], last["num_seeds"], last["ratio"], last["epochs"]) == (1, 2, None, [None, 8])


def test_failed_runs_and_seeds_without_the_recipe_do_not_count() -> None:
    rows = [*timed_rows(), failed("grow", 0), row("grow", 1, 0.4), row("grow", 2, 0.4)]
    (grow,) = timing.summarise(rows, ["grow"], [0, 1, 2], EPOCHS)
    assert (grow["num_seeds"], grow["num_reached"], grow["ratio"]) == (2, 1, None)
    assert timing.summarise([failed("recipe", 0), row("grow", 0, 0.4)], ["recipe", "grow"], [0], EPOCHS) == []
