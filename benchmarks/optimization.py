"""What schedule, optimizer, sampling and label smoothing bring, each changed alone, on the embedded long-tailed Caltech-101.

The base is what the quickstart trains: AdaptFormer in the last two blocks on cached features, SGD with momentum, cosine schedule by
step, natural sampling, logit adjustment, a classifier that starts from the class means. Each variant has three learning rates on the
first seed; the best on validation is then trained with the other seeds. Differences are paired by seed.

    python benchmarks/optimization.py --out /tmp/optimization --record
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from jobs import Job, Row, file_of, mean_std, parser, work_through
from methods import Summary, choose, summarise, table
from record import record, typed

from lift_ray.epoch_metrics import MAIN
from lift_ray.terminal.tables import console

Settings = dict[str, Any]
Variants = dict[str, tuple[Settings, list[float]]]  # name -> settings beside the base, and learning rates to compare

BASE: Settings = {
    "augment.kind": "none",
    "head.init": "class_mean",
    "tuner.kind": "adaptformer",
    "tuner.blocks.last": 2,
    "tuner.bottleneck": 16,
    "optim.schedule": "cosine",
}
SGD, ADAMW = [0.01, 0.03, 0.1], [0.001, 0.003, 0.01]
VARIANTS: Variants = {
    "base": ({}, SGD),
    "cosine_by_epoch": ({"optim.schedule": "cosine_by_epoch"}, SGD),
    "sgd_nesterov": ({"optim.optimizer": "sgd_nesterov"}, SGD),
    "adamw": ({"optim.optimizer": "adamw"}, ADAMW),
    "square_root": ({"optim.sampling": "square_root"}, SGD),
    "balanced": ({"optim.sampling": "balanced"}, SGD),
    "smoothing_0.1": ({"loss.label_smoothing": 0.1}, SGD),
}
COMPARED = (MAIN, "few")


def possible_jobs(base: Settings, variants: Variants, seeds: Sequence[int], epochs: int) -> list[Job]:
    """Every run that may be needed, by variant, then seed, then rate."""
    return [
        Job(name, seed, epochs, rate, base | changed)
        for name, (changed, rates) in variants.items()
        for seed in seeds
        for rate in rates
    ]


def differences(rows: Sequence[Row], summaries: Sequence[Summary]) -> dict[str, dict[str, dict[str, float]]]:
    """Test accuracy of each variant less that of the base with the same seed: mean and standard error, by variant and metric."""
    at = {(row["name"], row["rate"], row["seed"]): row for row in rows if "failed" not in row}
    base, *others = summaries
    out = {}
    for one in others:
        seeds = [seed for seed in one["seeds"] if seed in base["seeds"]]
        pairs = [(at[one["method"], one["rate"], seed], at[base["method"], base["rate"], seed]) for seed in seeds]
        by_metric = {
            name: mean_std(a["metrics"][f"test/{name}"] - b["metrics"][f"test/{name}"] for a, b in pairs)
            for name in COMPARED
        }
        out[one["method"]] = {
            name: {"mean": value["mean"], "standard_error": value["std"] / len(seeds) ** 0.5}
            for name, value in by_metric.items()
        }
    return out


def compare(title: str, about: str | None, base: Settings, variants: Variants) -> None:
    """Compare variants with the first of them, print the table, and record it on request.

    Args:
        title: name of the benchmark.
        about: what it is, for --help.
        base: settings of all variants.
    """
    first, *others = variants
    options = parser(about, epochs=3, minutes=60)
    options.add_argument("--variants", nargs="+", choices=others, default=others, metavar="NAME")
    args = options.parse_args()
    names = [first, *args.variants]
    jobs = possible_jobs(base, {name: variants[name] for name in names}, args.seeds, args.epochs)
    path = file_of(args, title)
    rows = work_through(path, jobs, partial(choose, jobs), cold=False, minutes=args.minutes)
    summaries = summarise(sorted(rows, key=lambda row: names.index(row["name"])), args.seeds[0])
    screen, compared = console(), differences(rows, summaries)
    screen.print(table(summaries, args.epochs))
    for name, by_metric in compared.items():
        shown = (
            f"{metric.replace('_', ' ')} {100 * value['mean']:+.1f} ± {100 * value['standard_error']:.1f}"
            for metric, value in by_metric.items()
        )
        screen.print(f"{name}, difference to {first} (mean ± standard error): {', '.join(shown)}")
    for s in summaries:
        screen.print(f"{s['method']}: {s['cpu_s']:.0f} s of processor time a run")
    if args.record:
        figures = {"epochs": args.epochs, "base": base, "variants": summaries, "differences": compared}
        print(record(title, typed(), figures, seeds=args.seeds))


if __name__ == "__main__":
    compare("optimization", __doc__, BASE, VARIANTS)
