"""Trials that train in one pass against the same trials one after another, with augmented images.

J trials cost J (p + s) one after another, and p + J s in one pass, if p is what they share (decoding, and the blocks that all leave
frozen) and s what each has alone. So the most that can be gained is J (p + s) / (p + J s). Here p is the time of the shared part
alone, and p + s that of a trial, both measured between the packs, in turns, on the first images of the embedded long-tailed
Caltech-101 with lift-small. Trials differ in learning rate, tau and bottleneck. Their losses and their accuracy on the validation
images are compared with those of the trials alone. For features that are cached, nothing is trained in one pass: given is only
how much there would be to gain.

`--search` runs a search twice, one trial at a time and in packs: seconds, trials an hour, and whether all trials found the same.

    python benchmarks/fused.py --record
    python benchmarks/fused.py --search base.augment.kind=mda base.optim.epochs=1 search.trials=16 search.sampler=random --record
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from data_contenders import peak_bytes
from record import record, typed

from lift_ray.methods.world import Ranks
from lift_ray.settings.overrides import apply_overrides
from lift_ray.settings.run import RunConfig
from lift_ray.terminal.tables import console
from lift_ray.training.batches import cached_batches
from lift_ray.training.run import Run
from lift_ray.training.together import shared_batches, train_together
from lift_ray.training.workspace import Workspace

SIZES = (1, 2, 4, 8)
DATASET, SPACE = "embedded:caltech101-lt", "search_spaces/quickstart.yaml"
CASES: dict[str, dict[str, Any]] = {
    "linear probe": {"tuner.kind": "linear_probe"},
    "last block": {"tuner.blocks.last": 1},
    "last three blocks": {"tuner.blocks.last": 3},
    "all blocks": {},
}
EPOCHS, BATCH = 5, 16  # of a trial, and of the measurement
GIB = 2**30
FOUND = ["number", "state", "epochs", "train/loss", "validation/loss", "validation/mean_class_accuracy"]


def settings(own: dict[str, Any], number: int, frac: float, augment: str = "mda") -> RunConfig:
    """Return the settings of one of several trials."""
    differing = {"optim.lr": 0.01 * (1 + number), "loss.tau": 0.5 + 0.25 * number}
    if own.get("tuner.kind") != "linear_probe":
        differing |= {"tuner.kind": "adaptformer", "tuner.bottleneck": 4 + 4 * number}
    common = {
        "augment.kind": augment,
        "optim.epochs": EPOCHS,
        "optim.global_batch_size": BATCH,
        "optim.data_frac": frac,
    }
    head = {"head.init": "class_mean"}
    return RunConfig.parse(apply_overrides({}, common | head | differing | own, RunConfig))


class Case:
    """One kind of trial, measured in packs of every size.

    Args:
        workspace: shared by all.
        own: settings of its trials.
        frac: fraction of the training images of an epoch.
    """

    def __init__(self, workspace: Workspace, own: dict[str, Any], frac: float) -> None:
        self.workspace, self.own, self.frac = workspace, own, frac
        self.seconds: dict[int | str, list[float]] = {"shared": [], "cached": [], "from cached": []}
        self.peak_gib: dict[int, float] = {}
        self.losses: dict[int, list[list[float]]] = {}
        self.found: dict[int, list[Any]] = {}

    def runs(self, number: int, augment: str = "mda") -> list[Run]:
        """Return that many new trials."""
        return [Run(settings(self.own, i, self.frac, augment), self.workspace) for i in range(number)]

    def one_pass(self, number: int) -> None:
        """Train an epoch of that many trials in one pass; of one as it trains without packs."""
        runs, began = self.runs(number), time.monotonic()
        if number > 1:
            train_together(runs)
        else:
            for batch in runs[0].batches():
                runs[0].train_step(batch)
        self.seconds.setdefault(number, []).append(time.monotonic() - began)
        self.peak_gib.setdefault(number, peak_bytes() / GIB)
        if number not in self.losses:
            self.losses[number] = [run.losses[:20, 0].tolist() for run in runs]
            self.found[number] = [run.evaluate("validation").metrics for run in runs]

    def shared_part(self) -> None:
        """Do only what trials share."""
        run, began = self.runs(1)[0], time.monotonic()
        for _ in shared_batches([run]):
            pass
        self.seconds["shared"].append(time.monotonic() - began)

    def from_cached(self) -> None:
        """Train an epoch from cached features, and do only what trials would share there."""
        run = self.runs(1, "none")[0]
        images = self.workspace.images(run.config, run.train)
        if (cached := self.workspace.cached_features(run.config, run.model, images)) is None:
            return
        began = time.monotonic()
        for _ in cached_batches(run.config, self.workspace, run.train, cached, 0, 0):
            pass
        self.seconds["cached"].append(time.monotonic() - began)
        began = time.monotonic()
        for batch in run.batches():
            run.train_step(batch)
        self.seconds["from cached"].append(time.monotonic() - began)

    def alone(self) -> tuple[list[list[float]], list[Any]]:
        """Return the losses of all trials one after another, and what they find."""
        losses, found = [], []
        for run in self.runs(max(SIZES)):
            for batch in run.batches():
                run.train_step(batch)
            losses.append(run.losses[:20, 0].tolist())
            found.append(run.evaluate("validation").metrics)
        return losses, found

    def figures(self) -> dict[str, Any]:
        """Return the table's figures of this case."""
        median = {name: statistics.median(values) for name, values in self.seconds.items() if values}
        whole = median[1]
        p = min(
            median["shared"], whole
        )  # measured apart, so what is nearly all of a trial can seem to take longer than it
        s = whole - p
        losses, found = self.alone()
        images = self.workspace.dataset.split("train").num_samples * EPOCHS
        per_image = 1 / (BATCH * len(self.runs(1)[0].losses))
        out: dict[str, Any] = {
            "p_ms_an_image": round(1e3 * p * per_image, 3),
            "s_ms_an_image": round(1e3 * s * per_image, 3),
        }
        for number in SIZES:
            gain, bound = number * whole / median[number], number * whole / (p + number * s)
            out[str(number)] = {
                "gain": round(gain, 2),
                "bound": round(bound, 2),
                "of_bound": round(gain / bound, 2),
                "trials_an_hour": round(3600 * number / (median[number] * per_image * images), 1),
                "peak_gib": round(self.peak_gib[number], 2),
                "same_losses": self.losses[number] == losses[:number],
                "same_validation": self.found[number] == found[:number],
            }
        if "cached" in median:
            p, whole, most = median["cached"], median["from cached"], max(SIZES)
            out["cached_bound"] = round(most * whole / (p + most * (whole - p)), 2)
        return out


def compare(cases: Sequence[str], frac: float, rounds: int) -> dict[str, Any]:
    """Measure the packs of each case in turns, and print its figures."""
    workspace, out = Workspace(DATASET, Ranks.alone()), {}
    for name in cases:
        case = Case(workspace, CASES[name], frac)
        for _ in range(rounds):
            for number in SIZES:
                case.one_pass(number)
            case.shared_part()
            case.from_cached()
        out[name] = case.figures()
        console().print(f"{name}: {json.dumps(out[name])}", soft_wrap=True)
    return out


def search(changed: list[str], rounds: int) -> dict[str, Any]:
    """Run a search one trial at a time and in packs, and compare."""
    seconds: dict[str, list[float]] = {"off": [], "auto": []}
    rows: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for fused, taken in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                words = [SPACE, *changed, f"scale.fused={fused}", "--out", f"{folder}/out"]
                env = os.environ | {"LIFT_CACHE": folder}
                subprocess.run([sys.executable, "-m", "lift_ray.tune", *words], check=True, env=env)
                table = pq.read_table(Path(folder) / "out" / "trials.parquet")
                ends = table["ended_at"].to_pylist()
                taken.append(max(ends) - min(table["began_at"].to_pylist()))
                rows[fused] = table.select(FOUND).to_pylist()
    whole = {fused: statistics.median(taken) for fused, taken in seconds.items()}
    return {
        "trials": len(rows["off"]),
        "seconds": {fused: round(taken, 1) for fused, taken in whole.items()},
        "trials_an_hour": {fused: round(3600 * len(rows[fused]) / taken) for fused, taken in whole.items()},
        "gain": round(whole["off"] / whole["auto"], 2),
        "same_trials": sum(one == other for one, other in zip(rows["off"], rows["auto"], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--frac", type=float, default=0.1, help="fraction of the training images of an epoch (default %(default)g)"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--search", nargs="*", metavar="KEY=VALUE", help="compare searches of the quickstart with these changes"
    )
    parser.add_argument("--record", action="store_true", help="append the result to benchmarks/results")
    options = parser.parse_args()
    searches = options.search is not None
    figures = (
        search(options.search, options.rounds) if searches else compare(options.cases, options.frac, options.rounds)
    )
    print(json.dumps(figures))
    if options.record:
        print(record("fused", typed(), figures, seeds=[0]))


if __name__ == "__main__":
    main()
