"""What unlabelled images are worth: FixMatch, LoFT and ULFine (our reading) against LIFT on the labelled ones alone.

497 labelled images of 40 classes, 40 to 2 of each (embedded:caltech101-half), and a pool without labels that holds them and
587 more: with as many of each class in proportion (consistent), with the order of the classes turned round (reversed), or 1,880
more, as many of every class (uniform). All methods take the same number of steps with the same number of labelled images, with
loss and augmentation of LIFT+, lift-small at 56 px, AdaptFormer in its last two blocks, and a classifier that starts from the class
means; five learning rates are compared on the first seed by validation mean class accuracy, and the best is trained with the
other seeds too. Every finished run is kept in --out: `--resume` goes on there.

A step has two unlabelled images for each labelled one, not the seven of the literature, so that the whole fits two cores.
`--methods ulfine_adjusted` is ULFine with the training prior in the cross-entropy of its similarity logits too.

    python benchmarks/half_labelled.py --out /tmp/half --record
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import rich.box
from jobs import Job, Row, file_of, mean_std, parser, plus_minus, work_through
from methods import Summary, choose, summarise
from record import record, typed
from rich.table import Table

from lift_ray.epoch_metrics import ACCURACIES, MAIN
from lift_ray.evaluation.metrics import PUBLISHED
from lift_ray.terminal.tables import console

RATES = [0.003, 0.01, 0.03, 0.1, 0.3]
METHODS = {
    "fixmatch": "FixMatch + LA",
    "loft": "LoFT",
    "ulfine": "ULFine (our reading)",
    "ulfine_adjusted": "ULFine (our reading), CE(S) adjusted",
}
FURTHER_SETTINGS = {"ulfine_adjusted": {"method.kind": "ulfine", "method.similarity_tau": 1.0}}
LABELLED = "LIFT, labelled only"
ARRANGEMENTS = {"consistent": "", "reversed": "-reversed", "uniform": "-uniform"}
DATA = "embedded:caltech101-half"
FURTHER = ("linear", "similarity")


def possible_jobs(args: argparse.Namespace) -> list[Job]:
    """Every run that the options allow; the labelled images are the same in all arrangements, so LIFT has one set of runs."""
    base = {
        "backbone.resolution_px": args.px,
        "tuner.blocks": {"last": 2},
        "head.init": "class_mean",
        "optim.global_batch_size": args.batch,
        "evaluation.group_bounds": list(PUBLISHED),
    }
    runs = [(LABELLED, base, DATA)]
    for arrangement in args.arrangements:
        for kind in args.methods:
            own = {"method.kind": kind, "method.unlabelled_ratio": args.ratio, "method.threshold": args.threshold}
            own |= FURTHER_SETTINGS.get(kind, {})
            runs.append((f"{METHODS[kind]}, {arrangement}", {**base, **own}, DATA + ARRANGEMENTS[arrangement]))
    return [
        Job(name, seed, args.epochs, rate, overrides, dataset)
        for name, overrides, dataset in runs
        for seed in args.seeds
        for rate in args.rates
    ]


def with_pseudo_labels(summaries: Sequence[Summary], rows: Sequence[Row]) -> list[Summary]:
    """The summaries, and of the chosen runs: mean pseudo-label figures of each epoch, and the test accuracies of other logits."""
    out = []
    for summary in summaries:
        mine = [row for row in rows if row["name"] == summary["method"] and row.get("digest") in summary["digests"]]
        epochs = zip(*(row["pseudo_labels"] for row in mine), strict=True)
        over_time = [
            {name: mean_std(f[name] for f in found if name in f)["mean"] for name in sorted(set().union(*found))}
            for found in epochs
        ]
        further = {
            logits: {
                name: mean_std(row["metrics"][key] for row in mine)
                for name in ACCURACIES
                if (key := f"test/{name}_{logits}") in mine[0]["metrics"]
            }
            for logits in FURTHER
        }
        out.append({**summary, "pseudo_labels": over_time, "further": {k: v for k, v in further.items() if v}})
    return out


def table(summaries: Sequence[Summary], title: str) -> Table:
    """Test accuracy in percent, and how good the pseudo-labels of the last epoch were."""
    out = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    out.add_column("method")
    for heading in ("mean class", "medium", "few", "precision", "recall", "few recall", "rate", "cpu s", "seeds"):
        out.add_column(heading, justify="right", no_wrap=True)
    for s in summaries:
        last = s["pseudo_labels"][-1] if s["pseudo_labels"] else {}
        shown = [last.get(f"unlabelled/{name}") for name in ("precision", "recall", "recall_few")]
        quality = ["-" if value is None else f"{100 * value:.0f}" for value in shown]
        rate = f"{s['rate']:g}{'*' if s['at_end_of_rates'] else ''}"
        out.add_row(s["method"], *_accuracies(s["test"]), *quality, rate, f"{s['cpu_s']:.0f}", str(len(s["seeds"])))
        for logits, test in s["further"].items():
            out.add_row(f"  its {logits} logits", *_accuracies(test))
    return out


def _accuracies(test: dict[str, Any]) -> list[str]:
    return [plus_minus(test.get(name)) for name in (MAIN, "medium", "few")]


def gains(summaries: Sequence[Summary]) -> list[str]:
    """A sentence for each method: whether it is above LIFT by more than the root of their summed variances over the seeds."""
    base = next(s["test"][MAIN] for s in summaries if s["method"] == LABELLED)
    out = []
    for s in summaries:
        if s["method"] != LABELLED:
            own = s["test"][MAIN]
            gain, noise = own["mean"] - base["mean"], (own["std"] ** 2 + base["std"] ** 2) ** 0.5
            if len(s["seeds"]) < 2:
                out.append(
                    f"{s['method']}: {100 * gain:+.1f} points of mean class accuracy on one seed, which says little."
                )
                continue
            verdict = "helps" if gain > noise else "hurts" if gain < -noise else "makes no difference beyond the seeds"
            out.append(
                f"{s['method']} {verdict}: {100 * gain:+.1f} points of mean class accuracy, noise {100 * noise:.1f}."
            )
    return out


def main() -> None:
    options = parser(__doc__, epochs=2, minutes=60)
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS)[:3], metavar="METHOD")
    options.add_argument(
        "--arrangements", nargs="+", choices=list(ARRANGEMENTS), default=["consistent", "reversed"], metavar="NAME"
    )
    options.add_argument("--rates", type=float, nargs="+", default=RATES)
    options.add_argument("--batch", type=int, default=16, help="labelled images a step")
    options.add_argument("--ratio", type=int, default=2, help="unlabelled images for each labelled one")
    options.add_argument("--px", type=int, default=56, help="side of the images, a multiple of 14")
    options.add_argument("--threshold", type=float, default=0.6)
    args = options.parse_args()
    path, jobs = file_of(args, "half_labelled"), possible_jobs(args)
    rows = work_through(path, jobs, partial(choose, jobs), cold=False, minutes=args.minutes)
    order = {name: number for number, name in enumerate(dict.fromkeys(job.name for job in jobs))}
    found = summarise(sorted(rows, key=lambda row: order[row["name"]]), args.seeds[0])
    summaries, screen = with_pseudo_labels(found, rows), console()
    steps = args.epochs * (497 // args.batch)
    screen.print(
        table(
            summaries,
            f"Test accuracy in percent, mean ± standard deviation over seeds, {steps} steps; pseudo-labels of "
            f"the last epoch, threshold {args.threshold:g}",
        )
    )
    for sentence in gains(summaries):
        screen.print(sentence)
    if args.record:
        figures = {
            "epochs": args.epochs,
            "steps": steps,
            "batch": args.batch,
            "resolution_px": args.px,
            "unlabelled_ratio": args.ratio,
            "threshold": args.threshold,
            "sentences": gains(summaries),
            "methods": summaries,
        }
        print(record("half_labelled", typed(), figures, seeds=args.seeds))


if __name__ == "__main__":
    main()
