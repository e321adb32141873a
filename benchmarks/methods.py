"""Which way of fine-tuning serves the rare classes: seven methods on the embedded long-tailed Caltech-101.

Each method is trained with three learning rates on the first seed; the rate with the best validation mean class accuracy is
then trained with the other seeds, and the test split is reported as mean and standard deviation over the seeds. Tower, loss,
augmentation and number of epochs are the same for all. All classifiers that are trained start from the mean feature of each
class: lift-small recognizes too few class names to start from them. The optimizer is AdamW: with SGD, the rate that the early
blocks of this tower stand is too small for the last ones and for the classifier (--optimizer sgd, with --rates). Training leaves out
half of the patches, which halves its cost. Every finished run is kept in --out: `--resume` goes on there.

    python benchmarks/methods.py --out /tmp/methods --record
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import rich.box
from jobs import Job, Row, file_of, final, mean_std, parser, plus_minus, work_through
from record import record, typed
from rich.table import Table
from rich.text import Text

from lift_ray.epoch_metrics import ACCURACIES
from lift_ray.terminal.tables import HEADINGS, console

# A classifier alone takes large rates, tuners smaller ones, the tower's own weights the smallest; a best rate at an end is marked.
RATES: dict[str, list[float | None]] = {
    "zero_shot": [None],
    "linear_probe": [0.003, 0.01, 0.03],
    "adaptformer": [0.001, 0.002, 0.005],
    "lora": [0.002, 0.005, 0.01],
    "vpt_deep": [0.001, 0.003, 0.01],
    "partial": [0.0002, 0.0005, 0.001],
    "full": [0.00002, 0.00004, 0.00008],
}
UNTRAINED = "zero_shot"

Summary = dict[str, Any]


def possible_jobs(args: argparse.Namespace) -> list[Job]:
    """Every run that the options allow, by method, then seed, then rate."""
    jobs = []
    for method in args.methods:
        overrides: dict[str, Any] = {"tuner.kind": method}
        rates, seeds = args.rates or RATES[method], args.seeds
        if method == UNTRAINED:
            rates, seeds = [None], seeds[:1]
        else:
            overrides |= {"head.init": "class_mean", "augment.patch_dropout": args.patch_dropout}
            overrides["optim.optimizer"] = args.optimizer
        jobs += [Job(method, seed, args.epochs, rate, overrides) for seed in seeds for rate in rates]
    return jobs


def choose(jobs: Sequence[Job], rows: Sequence[Row]) -> list[Job]:
    """All rates of a method on its first seed and, when these are there, the best of them on the other seeds."""
    out, done = [], {row["key"] for row in rows}
    for method in dict.fromkeys(job.name for job in jobs):
        mine = [job for job in jobs if job.name == method]
        search = [job for job in mine if job.seed == mine[0].seed]
        out += search
        if all(job.key in done for job in search):
            best = best_row(rows, method, mine[0].seed)
            out += [job for job in mine if job not in search and best is not None and job.rate == best["rate"]]
    return out


def best_row(rows: Sequence[Row], method: str, seed: int) -> Row | None:
    """The run of a method and seed with the best validation mean class accuracy, the smallest rate of equal ones."""
    found = [row for row in rows if row["name"] == method and row["seed"] == seed and "failed" not in row]
    return min(found, key=lambda row: (-final(row), row["rate"] or 0), default=None)


def summarise(rows: Sequence[Row], seed: int) -> list[Summary]:
    """What the table shows of each method that has a run, in the order of the rows.

    Args:
        seed: on which the rates were compared.
    """
    out = []
    for method in dict.fromkeys(row["name"] for row in rows):
        best = best_row(rows, method, seed)
        if best is None:
            continue
        mine = [row for row in rows if row["name"] == method and "failed" not in row]
        chosen = sorted((row for row in mine if row["rate"] == best["rate"]), key=lambda row: int(row["seed"]))
        tried = sorted({row["rate"] for row in rows if row["name"] == method and row["rate"] is not None})
        names = [name for name in ACCURACIES if f"test/{name}" in best["metrics"]]
        out.append(
            {
                "method": method,
                "rate": best["rate"],
                "rates": tried,
                "seeds": [row["seed"] for row in chosen],
                "at_end_of_rates": len(tried) > 1 and best["rate"] in (tried[0], tried[-1]),
                "trained_parameters": best["trained_parameters"],
                "cpu_s": statistics.fmean(r["cpu_s"] for r in chosen),
                "validation": mean_std(final(row) for row in chosen),
                "digests": [row["digest"] for row in chosen],
                "test": {name: mean_std(row["metrics"][f"test/{name}"] for row in chosen) for name in names},
                "by_rate": {str(r["rate"]): final(r) for r in mine if r["seed"] == seed and r["rate"] is not None},
            }
        )
    return out


def table(summaries: Sequence[Summary], epochs: int) -> Table:
    """Test accuracy in percent by method; the best mean of each column stands out."""
    out = Table(
        title=f"Test accuracy in percent, mean ± standard deviation over seeds, {epochs} epochs",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    out.add_column("method", no_wrap=True)
    for heading in (*HEADINGS, "trained", "rate"):
        out.add_column(heading, justify="right", no_wrap=True)
    top = {
        name: max((s["test"][name]["mean"] for s in summaries if name in s["test"]), default=0) for name in ACCURACIES
    }
    for s in summaries:
        values = [(s["test"].get(name), top[name]) for name in ACCURACIES]
        shown = [Text(plus_minus(v), "bold" if v and v["mean"] == best else "") for v, best in values]
        rate = "-" if s["rate"] is None else f"{s['rate']:g}{'*' if s['at_end_of_rates'] else ''}"
        out.add_row(s["method"], *shown, f"{s['trained_parameters']:,}", rate)
    return out


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho, equal values sharing their ranks; 0 when all of one side are equal."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(b < a for b in values) + sum(b == a for b in values) / 2 for a in values]

    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return statistics.correlation(ranks(x), ranks(y))


def few_hurt(summaries: Sequence[Summary]) -> tuple[bool, str]:
    """Whether tuning the most parameters costs few-class accuracy, and the sentence that says so.

    It does when the method that trains the most is under the best of the others by more than the root of their summed
    variances over the seeds. The rank correlation over all methods tells whether the fall is a steady one.
    """
    trained = sorted((s for s in summaries if s["trained_parameters"]), key=lambda s: int(s["trained_parameters"]))
    trained = [s for s in trained if "few" in s["test"]]
    if len(trained) < 2:
        return False, "Whether heavy fine-tuning hurts the few classes needs two trained methods."
    few = [s["test"]["few"] for s in trained]
    rho = rank_correlation([s["trained_parameters"] for s in trained], [value["mean"] for value in few])
    most, best = trained[-1], max(trained[:-1], key=lambda s: float(s["test"]["few"]["mean"]))
    noise = (few[-1]["std"] ** 2 + best["test"]["few"]["std"] ** 2) ** 0.5
    hurts = best["test"]["few"]["mean"] - few[-1]["mean"] > noise
    return hurts, (
        f"Heavy fine-tuning {'hurts' if hurts else 'does not hurt'} the few classes: "
        f"{most['method']} ({most['trained_parameters']:,} trained) has {plus_minus(few[-1])}%, the best of the others, "
        f"{best['method']} ({best['trained_parameters']:,}), {plus_minus(best['test']['few'])}%; rank correlation of "
        f"trained parameters and few-class accuracy over {len(trained)} methods {rho:+.2f}."
    )


def main() -> None:
    options = parser(__doc__, epochs=3, minutes=120)
    options.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES), metavar="METHOD")
    options.add_argument("--rates", type=float, nargs="+", help="for every method, instead of its own three")
    options.add_argument("--optimizer", choices=["sgd", "adamw"], default="adamw")
    options.add_argument("--patch-dropout", type=float, default=0.5, help="share of patches left out in training")
    args = options.parse_args()
    path, jobs = file_of(args, "methods"), possible_jobs(args)
    rows = work_through(path, jobs, partial(choose, jobs), cold=False, minutes=args.minutes)
    order = {method: number for number, method in enumerate(args.methods)}
    summaries = summarise(sorted(rows, key=lambda row: order[row["name"]]), args.seeds[0])
    (hurts, sentence), screen = few_hurt(summaries), console()
    screen.print(table(summaries, args.epochs))
    screen.print(sentence)
    if marked := [s["method"] for s in summaries if s["at_end_of_rates"]]:
        screen.print(
            f"* the best rate is an end of those tried: {', '.join(marked)}; others with --rates may be better."
        )
    if args.record:
        figures = {
            "few_hurt": hurts,
            "sentence": sentence,
            "epochs": args.epochs,
            "methods": summaries,
            "patch_dropout": args.patch_dropout,
            "optimizer": args.optimizer,
        }
        print(record("methods", typed(), figures, seeds=args.seeds))


if __name__ == "__main__":
    main()
