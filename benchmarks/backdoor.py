"""Does it help to average independently tuned models (arXiv 2501.15955), and more than averaging seeds of one of them?

Three ways to see the embedded long-tailed Caltech-101 are tuned by LIFT, with logit adjustment and with cross-entropy:
    small   lift-small at 84 px;
    small56 lift-small at 56 px: the same weights, so no second foundation model;
    tiny    lift-tiny of the tests at 48 px, another and much weaker foundation model.
AdaptFormer is in the last two blocks of each, on images that are not augmented, so that the blocks below them are computed once. The
classifier starts from the class means. Each is trained with several rates on the first seed; the rate with the best validation mean
class accuracy is used for the other seeds. Logits are stored, and every combination is computed from them. A row of the table is the
mean over three groups of seeds that share none: group g has the seeds 3g, 3g + 1 and 3g + 2. A combination of several backbones takes
seed 3g of each, and the control takes the three seeds of one backbone. So "small + small56 + tiny" and "small x 3" cost about the same.

The gain of each is told by data group D and parameter group P: thirds of the classes by the label prior inside lift-small at 84 px.

    python benchmarks/backdoor.py --out /tmp/backdoor --record

`--rates "tiny LA=0.3" "small LA=0.03,0.1"` compares other rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import torch
from jobs import (
    DATASET,
    PROCESSES,
    Job,
    Row,
    file_of,
    final,
    mean_std,
    parser,
    plus_minus,
    work_through,
)
from numpy.typing import NDArray
from record import record, typed
from rich.table import Table
from safetensors.torch import load_file, save_file

from lift_ray.data.open import open_dataset
from lift_ray.ensembles.combine import COMBINE
from lift_ray.ensembles.group_table import GroupGainTable
from lift_ray.epoch_metrics import ACCURACIES, MAIN, MAIN_METRIC
from lift_ray.evaluation.accumulator import MetricAccumulator
from lift_ray.evaluation.evaluator import LogitBatch
from lift_ray.evaluation.metrics import groups_of
from lift_ray.methods.prior import thirds
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.terminal.tables import HEADINGS, console
from lift_ray.training.label_prior import label_prior
from lift_ray.training.workspace import Workspace

RATES = [0.03, 0.1, 0.3]
LOSSES = {"LA": "logit_adjusted", "CE": "cross_entropy"}
PER_GROUP = 3  # seeds of one backbone in a control
SPLITS = ("validation", "test")
LIFT_TINY = f"local-dir:{Path(__file__).parents[1] / 'tests' / 'lift-tiny'}"
BACKBONES: dict[str, dict[str, Any]] = {
    "small": {},
    "small56": {"backbone.resolution_px": 56},
    "tiny": {"backbone.model": LIFT_TINY, "backbone.resolution_px": 48},
}
COMMON = {"head.init": "class_mean", "tuner.blocks": {"last": 2}, "augment.kind": "none"}

GAINS = ("gain", "gain_over_best")

Logits = dict[str, torch.Tensor]  # of each split, (N, K)
Cells = dict[str, dict[str, dict[str, float]]]  # by data group and parameter group, as GroupGainTable.result
Models = dict[tuple[str, str, int], Logits]  # by backbone, loss and seed


def possible_jobs(args: argparse.Namespace) -> list[Job]:
    """Every run that the options allow, first group first."""
    jobs = []
    for group in range(args.groups):
        for name, own in BACKBONES.items():
            for loss, kind in LOSSES.items():
                for seed in range(PER_GROUP * group, PER_GROUP * (group + 1)):
                    jobs += [
                        Job(f"{name} {loss}", seed, args.epochs, rate, {**COMMON, **own, "loss.kind": kind})
                        for rate in args.rates.get(f"{name} {loss}", RATES)
                    ]
    return jobs


def choose(jobs: Sequence[Job], rows: Sequence[Row]) -> list[Job]:
    """All rates of the first seed of each backbone and loss and, when these are there, the best of them for the other seeds."""
    out = []
    for name in dict.fromkeys(job.name for job in jobs):
        mine = [job for job in jobs if job.name == name]
        search = [job for job in mine if job.seed == 0]
        found = [row for row in rows if row["name"] == name and row["seed"] == 0]
        out += search
        if len(found) == len(search) and (rate := best_rate(found)):
            out += [job for job in mine if job.seed and job.rate == rate]
    return out


def best_rate(rows: Sequence[Row]) -> float | None:
    """The rate with the best validation mean class accuracy, the smallest of equal ones; None when all failed."""
    best = max(rows, key=lambda row: (final(row), -row["rate"]))
    return None if "failed" in best else float(best["rate"])


def keep_logits(folder: Path, job: Job, run: Any) -> None:
    """Store the logits of both splits, renamed into place."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        logits = {
            s: torch.cat([batch.logits for batch in run.predictor.logits(run.workspace.dataset.split(s))]).cpu()
            for s in SPLITS
        }
    temporary = folder / f"{job.key}.tmp"
    save_file({name: tensor.clone() for name, tensor in logits.items()}, temporary)
    temporary.replace(folder / f"{job.key}.safetensors")


def combinations(models: Models, group: int) -> dict[str, list[Logits]]:
    """The models of every row of the table that are there, for a group of seeds."""
    first = PER_GROUP * group
    names = list(dict.fromkeys(name for name, _, _ in models))
    out: dict[str, list[tuple[str, str, int]]] = {}
    for loss in LOSSES:
        out |= {f"{name}, {loss}": [(name, loss, first)] for name in names}
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        out |= {f"{a} + {b}, {loss}": [(a, loss, first), (b, loss, first)] for a, b in pairs}
        if len(names) > 2:
            out[f"{' + '.join(names)}, {loss}"] = [(name, loss, first) for name in names]
        out |= {f"{name} x {PER_GROUP}, {loss}": [(name, loss, first + i) for i in range(PER_GROUP)] for name in names}
    return {label: [models[key] for key in keys] for label, keys in out.items() if all(key in models for key in keys)}


def figures_of(members: Sequence[Logits], combine: str, data: Mapping[str, Any]) -> tuple[dict[str, float], Cells]:
    """Test accuracies and calibration error of a combination, its gain over the mean of its members and over the best of them,
    and their disagreement; the accuracies before and after by data group and parameter group."""
    logits, labels = [member["test"] for member in members], data["labels"]
    tally = MetricAccumulator(data["num_classes"], torch.device("cpu"))
    tally.add(COMBINE[combine](logits, [1.0] * len(logits)), labels)
    found, together = tally.result(data["d_groups"])
    out = {name: found[name] for name in (*ACCURACIES, "calibration_error") if name in found}
    crossed = GroupGainTable([str(m) for m in range(len(members))], torch.zeros(data["num_classes"]))
    crossed.add(LogitBatch(logits[0], labels, members=logits))
    report = crossed.result("test", together, data["d_groups"], data["p_groups"])
    gains = {f"{gain}_{d}": row["all"][gain] for gain in GAINS for d, row in report["groups"].items()}
    differ = [share for _, _, share in report["disagreement"]]
    return out | gains | ({"disagreement": float(np.mean(differ))} if differ else {}), report["groups"]


def mean_cells(found: Sequence[Cells]) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells D x P of several groups of seeds: classes, and mean and deviation of all else."""
    first = found[0]
    return {
        d: {
            p: {
                name: int(value) if name == "classes" else mean_std(cells[d][p][name] for cells in found)
                for name, value in cell.items()
                if name != "best"
            }
            for p, cell in row.items()
        }
        for d, row in first.items()
    }


def summarise(models: Models, groups: int, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the table shows of each combination: mean and deviation over the groups of seeds, for both ways to combine."""
    made = [combinations(models, group) for group in range(groups)]
    out = []
    for label in made[0]:
        there = [here[label] for here in made if label in here]
        both = {how: [figures_of(members, how, data) for members in there] for how in COMBINE}
        out.append(
            {
                "models": label,
                "number": len(there[0]),
                "groups": len(there),
                **{
                    how: {name: mean_std(found[name] for found, _ in all_found) for name in all_found[0][0]}
                    for how, all_found in both.items()
                },
            }
        )
        if len(there[0]) > 1:
            out[-1]["crossed"] = mean_cells([cells for _, cells in both["logits"]])
    return out


def table(rows: Sequence[dict[str, Any]], epochs: int) -> Table:
    """Test accuracy in percent by combination."""
    out = Table(
        title=f"Test accuracy in percent, mean of the logits, mean ± standard deviation over groups of seeds, {epochs} epochs",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    out.add_column("models")
    for heading in (*HEADINGS, "gain", "over best", "differ", "probabilities"):
        out.add_column(heading, justify="right")
    for row in rows:
        found = row["logits"]
        gain = [f"{100 * found[f'{name}_all']['mean']:+.1f}" if row["number"] > 1 else "" for name in GAINS]
        differ = f"{100 * found['disagreement']['mean']:.0f}" if row["number"] > 1 else ""
        other = plus_minus(row["probabilities"][MAIN]) if row["number"] > 1 else ""
        out.add_row(row["models"], *(plus_minus(found.get(name)) for name in ACCURACIES), *gain, differ, other)
    return out


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Whether several backbones beat the seeds of one and the best single model, by more than the root of their summed variances."""
    value = {row["models"]: row["logits"][MAIN] for row in rows if row["models"].endswith(", LA")}
    mixes, seeds, single = ([name for name in value if mark in name] for mark in (" + ", " x ", ""))
    single = [name for name in single if name not in mixes + seeds]
    if not (mixes and seeds):
        return "Whether several backbones beat the seeds of one needs both."
    mixed, control, alone = (max(names, key=lambda name: value[name]["mean"]) for names in (mixes, seeds, single))

    def against(other: str) -> str:
        gain = value[mixed]["mean"] - value[other]["mean"]
        noise = (value[mixed]["std"] ** 2 + value[other]["std"] ** 2) ** 0.5
        return "beat" if gain > noise else "fall behind" if gain < -noise else "cannot be told from"

    return (
        f"Several backbones {against(control)} seeds of one and {against(alone)} the best single model: {mixed} has "
        f"{plus_minus(value[mixed])}% mean class accuracy, the best control, {control}, {plus_minus(value[control])}%, the best "
        f"model alone, {alone}, {plus_minus(value[alone])}%. Each is the best of its kind on the test split itself."
    )


def parameter_groups() -> NDArray[np.str_]:
    """many, medium or few of each class by the label prior inside lift-small, (K,)."""
    return thirds(label_prior(Workspace(DATASET, Ranks.alone(num_cpus=PROCESSES)), RunConfig()).log_q)


def named_rates(word: str) -> tuple[str, list[float]]:
    """`tiny LA=0.1,0.3` -> its name and rates."""
    name, rates = word.split("=")
    return name, [float(rate) for rate in rates.split(",")]


def main() -> None:
    options = parser(__doc__, epochs=3, minutes=60)
    options.add_argument(
        "--groups", type=int, default=3, help="of three seeds (default %(default)s); --seeds is not used"
    )
    options.add_argument(
        "--rates",
        nargs="+",
        type=named_rates,
        default=[],
        metavar="NAME=RATE,...",
        help="other rates to compare for a backbone and loss",
    )
    args = options.parse_args()
    args.rates = dict(args.rates)
    path, jobs, logits = file_of(args, "backdoor"), possible_jobs(args), args.out / "logits"
    keep = partial(keep_logits, logits)
    rows = work_through(path, jobs, partial(choose, jobs), cold=False, minutes=args.minutes, keep=keep)
    names = dict.fromkeys(job.name for job in jobs)
    rates = {
        name: best_rate(found) for name in names if (found := [r for r in rows if r["name"] == name and r["seed"] == 0])
    }
    used = [row for row in rows if "failed" not in row and row["rate"] == rates.get(row["name"])]
    models: Models = {
        (*row["name"].split(), row["seed"]): load_file(logits / f"{row['key']}.safetensors") for row in used
    }
    dataset = open_dataset(DATASET)
    data = {
        "num_classes": dataset.num_classes,
        "d_groups": groups_of(dataset, "auto").names,
        "labels": torch.from_numpy(dataset.split("test").labels),
        "p_groups": parameter_groups(),
    }
    found, screen = summarise(models, args.groups, data), console()
    screen.print(table(found, args.epochs))
    screen.print(sentence := verdict(found))
    tried = {name: sorted({row["rate"] for row in rows if row["name"] == name and row["seed"] == 0}) for name in rates}
    if marked := [
        name for name, rate in rates.items() if len(tried[name]) > 1 and rate in (tried[name][0], tried[name][-1])
    ]:
        screen.print(f"the best rate is an end of those tried: {', '.join(marked)}")
    if args.record:
        cost = {name: float(np.mean([row["cpu_s"] for row in used if row["name"] == name])) for name in rates}
        figures = {
            "sentence": sentence,
            "epochs": args.epochs,
            "rates": rates,
            "chosen_by": MAIN_METRIC,
            "cpu_s": cost,
            "by_rate": {
                name: {row["rate"]: final(row) for row in rows if row["name"] == name and row["seed"] == 0}
                for name in rates
            },
            "digests": {name: [row["digest"] for row in used if row["name"] == name] for name in rates},
            "trained_parameters": {row["name"]: row["trained_parameters"] for row in used},
            "models": found,
        }
        print(record("backdoor", typed(), figures, seeds=list(range(PER_GROUP * args.groups))))


if __name__ == "__main__":
    main()
