"""LT-Soups (arXiv 2511.10683) on the embedded long-tailed Caltech-101, against one model and against an average over seeds.

A soup averages the trained parameters of models that start from the same weights. LT-Soups trains one model on each of several subsets
that keep at most n, 2 n, 4 n ... images of a class, n those of the rarest; then it trains the classifier alone again, on all images.
The control is a soup of as many models, each trained on all images in another order. All are on cached features, with SGD and logit
adjustment, for the same number of epochs (on subsets with half the batch). Each way has its best of three learning rates by validation
mean class accuracy on the first seed.

    python benchmarks/soups.py --record
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jobs import DATASET, PROCESSES, end_with_parent, mean_std, parser, plus_minus
from record import record, typed
from rich.table import Table
from torch import Tensor

from lift_ray.data.dataset import Dataset, joined
from lift_ray.data.longtail import keep_first
from lift_ray.epoch_metrics import ACCURACIES, MAIN
from lift_ray.methods.world import Ranks
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.terminal.tables import HEADINGS, console
from lift_ray.training.run import Diverged, Run
from lift_ray.training.shared_features import SharedFeatures
from lift_ray.training.step import TrainStep
from lift_ray.training.workspace import Workspace

COMMON = {"augment.kind": "none", "head.init": "class_mean"}
TUNED: dict[str, tuple[dict[str, Any], list[float]]] = {
    "adaptformer": (
        {"tuner.kind": "adaptformer", "tuner.blocks.last": 2, "tuner.bottleneck": 16},
        [0.01, 0.03, 0.1],
    ),
    "last_block": ({"tuner.kind": "partial"}, [0.003, 0.01, 0.03]),
}
WAYS = ("one model", "one model, classifier again", "soup of seeds", "LT-Soups without the second stage", "LT-Soups")
Weights = dict[str, Tensor]
Found = dict[str, dict[str, float]]  # metrics of validation and test
Measured = dict[tuple[str, float, int], dict[str, Found]]  # by what is tuned, rate and seed; then by way

_workspaces: list[Workspace] = []


def subsets(dataset: Dataset) -> Iterator[Dataset]:
    """Yield the dataset with at most n, 2 n, 4 n ... training images a class, n those of the rarest class, up to all."""
    train, counts = dataset.split("train"), dataset.split("train").class_counts(dataset.num_classes)
    limit = int(counts.min())
    while limit < 2 * counts.max():
        kept = keep_first(train.labels, counts.clip(max=limit))
        yield replace(dataset, splits={**dataset.splits, "train": joined("train", [(train, kept)])})
        limit *= 2


def trained(config: RunConfig, workspace: Workspace, start: Weights | None = None, head_only: bool = False) -> Run:
    """Train a run to its end, from given weights, or only its classifier."""
    run = Run(config, workspace)
    if start is not None:
        run.predictor.load_stored(start)
    if head_only:
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
        run.stepper = TrainStep(run.config, workspace, run.model, run.class_counts)
    while run.epoch < run.num_epochs:
        run.train_epoch()
    return run


def weights(run: Run) -> Weights:
    """Return copies of what a checkpoint would hold."""
    return {name: tensor.detach().clone() for name, tensor in run.predictor.stored().items()}


def average(models: Sequence[Weights]) -> Weights:
    """Return the mean of the weights of several models."""
    return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}


def metrics(run: Run) -> Found:
    """Return the metrics of validation and test."""
    return {split: run.evaluate(split).metrics for split in ("validation", "test")}


def measure(tuned: str, rate: float, seed: int, epochs: int) -> dict[str, Found]:
    """Return the metrics of each way to train; empty if a loss diverged."""
    if not _workspaces:
        _workspaces.append(Workspace(DATASET, Ranks.alone(num_cpus=1), SharedFeatures()))
    whole = _workspaces[0]
    own = {"seed": seed, "optim.epochs": epochs, "optim.lr": rate}
    config = RunConfig.model_validate(apply_overrides({}, {**COMMON, **TUNED[tuned][0], **own}, RunConfig))
    try:
        start = weights(Run(config, whole))
        single = trained(config, whole, start)
        found, one = {WAYS[0]: metrics(single)}, weights(single)
        parts = [whole.on(part) for part in subsets(whole.dataset)]
        orders = [config.model_copy(update={"seed": 1000 * (seed + 1) + number}) for number in range(len(parts))]
        seeds = average([weights(trained(order, whole, start)) for order in orders])
        small = config.optim.model_copy(update={"global_batch_size": 64})
        soup = average([weights(trained(config.model_copy(update={"optim": small}), part, start)) for part in parts])
        for way, model in zip((WAYS[1], WAYS[2], WAYS[4]), (one, seeds, soup), strict=True):
            found[way] = metrics(trained(config, whole, model, head_only=True))
        plain = Run(config, whole)
        plain.predictor.load_stored(soup)
        return found | {WAYS[3]: metrics(plain)}
    except Diverged:
        return {}


def best_rates(by_job: Measured, tuned: str, seed: int) -> dict[str, float]:
    """Return the rate of each way with the best validation mean class accuracy."""
    rates = [rate for rate in TUNED[tuned][1] if by_job[tuned, rate, seed]]
    return {way: max(rates, key=lambda rate: by_job[tuned, rate, seed][way]["validation"][MAIN]) for way in WAYS}


def summary(by_job: Measured, tuned: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each way at its best rate: test accuracies, and differences to one model with the same seed."""
    rows, best = [], best_rates(by_job, tuned, seeds[0])
    base = [by_job[tuned, best[WAYS[0]], seed][WAYS[0]]["test"] for seed in seeds]
    for way, rate in best.items():
        tests = [by_job[tuned, rate, seed][way]["test"] for seed in seeds]
        gains = {name: mean_std(a[name] - b[name] for a, b in zip(tests, base, strict=True)) for name in (MAIN, "few")}
        test = {name: mean_std(one[name] for one in tests) for name in ACCURACIES if name in tests[0]}
        rows.append({"tuned": tuned, "way": way, "rate": rate, "test": test, "difference": gains})
    return rows


def main() -> None:
    options = parser(__doc__, epochs=3, minutes=60)
    options.add_argument("--tuned", nargs="+", choices=list(TUNED), default=list(TUNED), metavar="WHAT")
    args = options.parse_args()
    first, others = args.seeds[0], args.seeds[1:]
    by_job: Measured = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, end_with_parent) as pool:
        jobs = [(tuned, rate, first) for tuned in args.tuned for rate in TUNED[tuned][1]]
        by_job.update(zip(jobs, pool.map(partial(_measured, args.epochs), jobs), strict=True))
        best = {tuned: sorted({*best_rates(by_job, tuned, first).values()}) for tuned in args.tuned}
        jobs = [(tuned, rate, seed) for tuned in args.tuned for rate in best[tuned] for seed in others]
        by_job.update(zip(jobs, pool.map(partial(_measured, args.epochs), jobs), strict=True))
    rows = [row for tuned in args.tuned for row in summary(by_job, tuned, args.seeds)]
    out = Table(box=None, pad_edge=False)
    for heading in ("tuned", "way", *HEADINGS, "rate"):
        out.add_column(heading)
    for row in rows:
        out.add_row(row["tuned"], row["way"], *(plus_minus(row["test"].get(n)) for n in ACCURACIES), f"{row['rate']:g}")
    console().print(out)
    for row in rows:
        gains = ", ".join(f"{name} {plus_minus(value)}" for name, value in row["difference"].items())
        console().print(f"{row['tuned']}, {row['way']}: difference to one model: {gains}")
    if args.record:
        print(record("soups", typed(), {"epochs": args.epochs, "rows": rows}, seeds=args.seeds))


def _measured(epochs: int, job: tuple[str, float, int]) -> dict[str, Found]:
    found = measure(*job, epochs)
    told = ", ".join(f"{way} {100 * metric['validation'][MAIN]:.1f}" for way, metric in found.items())
    print(*job, told or "diverged", flush=True)
    return found


if __name__ == "__main__":
    main()
