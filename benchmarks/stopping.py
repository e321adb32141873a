"""Which rule stops the arms of a search best: ASHA, the median rule, or a power law fitted to the arms that are finished.

The arms are trials with random settings on the embedded long-tailed Caltech-101, each trained to its end once, its validation figure
kept after every epoch. Then searches over them are replayed: the arms come in a random order, some at a time, and a rule
(`lift_ray.searching.stopping`, or the law below) looks at each after every epoch. Of each replay: the epochs it trained, and
its regret, how far the best arm that was trained to its end is behind the best of all.

The law: over the arms that are finished, log of the final error = a + b * log of the error after as many epochs. An arm is stopped
when the most that this promises it, `z` standard errors of a single prediction above its middle, is below the best finished arm.

Blocks below the last two stay frozen and images are not augmented, so that activations are kept and an epoch takes a second.

    python benchmarks/stopping.py --out /tmp/stopping --record
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from lift_ray.epoch_metrics import MAIN, MAIN_METRIC, EpochMetrics
from lift_ray.errors import RunFailed
from lift_ray.methods.world import Ranks
from lift_ray.reporting.trial_rows import TrialRow
from lift_ray.searching.stopping import Stopping
from lift_ray.settings.run import RunConfig
from lift_ray.settings.space import SpaceFile, seeded_draws
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

FEWEST_FINISHED = 4  # before the law says anything
SPACE = {
    "name": "stopping",
    "dataset": "embedded:caltech101-lt",
    "objectives": {MAIN_METRIC: "max"},
    "base": {"augment": {"kind": "none"}, "tuner": {"kind": "adaptformer"}},
    "space": {
        "tuner.kind": {"choices": ["adaptformer", "lora", "ssf", "linear_probe"]},
        "tuner.bottleneck": {"int": [2, 32], "log": True, "when": {"tuner.kind": ["adaptformer", "lora"]}},
        "loss.tau": {"float": [0.0, 2.0]},
        "optim.lr": {"float": [0.003, 1.0], "log": True},
        "optim.global_batch_size": {"choices": [32, 128]},
    },
}

Rule = Callable[[TrialRow, Sequence[TrialRow]], bool]


def space(scheduler: dict[str, Any], epochs: int) -> SpaceFile:
    """The space with a scheduler."""
    base = {**SPACE["base"], "optim": {"epochs": epochs}}  # type: ignore[dict-item]
    return SpaceFile.model_validate({**SPACE, "base": base, "search": {"scheduler": scheduler}})


def train_arms(out: Path, arms: int, epochs: int, data_frac: float) -> list[list[float]]:
    """The figure after every epoch of every arm that did not diverge; what is in OUT already is not trained again."""
    out.mkdir(parents=True, exist_ok=True)
    plan, workspace = space({"kind": "none"}, epochs), Workspace(str(SPACE["dataset"]), Ranks.alone())
    curves = []
    for number, draw in enumerate(seeded_draws(plan.space, arms)):
        path = out / f"arm-{number:03d}.json"
        if not path.exists():
            tree = plan.config(draw).to_dict()
            tree["optim"]["data_frac"] = data_frac
            if tree["tuner"]["kind"] in ("adaptformer", "lora", "ssf"):
                tree["tuner"]["blocks"] = [4, 5]
            try:
                figures = [f[MAIN_METRIC] for f in Run(RunConfig.model_validate(tree), workspace).epochs()]
            except RunFailed:
                figures = []
            path.with_suffix(".part").write_text(json.dumps({"values": draw, "curve": figures}))
            path.with_suffix(".part").rename(path)
            print(f"arm {number}: {[round(100 * f, 1) for f in figures]}", flush=True)
        if curve := json.loads(path.read_text())["curve"]:
            curves.append(curve)
    return curves


def by_scheduler(scheduler: dict[str, Any], epochs: int) -> Rule:
    """One of the search's own rules: true to stop."""
    plan = space(scheduler, epochs)
    return lambda row, rows: Stopping(plan, rows).decide(row) == "stop"


def by_law(z: float, grace: int, epochs: int) -> Rule:
    """The law: true to stop."""

    def stop(row: TrialRow, rows: Sequence[TrialRow]) -> bool:
        epoch = len(row.history)
        finished = [
            np.log(1 - np.array([m.validation[MAIN] for m in r.history])) for r in rows if len(r.history) == epochs
        ]
        if epoch < grace or epoch >= epochs or len(finished) < FEWEST_FINISHED:
            return False
        x, y = np.array([[1.0, f[epoch - 1]] for f in finished]), np.array([f[-1] for f in finished])
        at = np.array([1.0, np.log(1 - row.last.validation[MAIN])])
        inverse = np.linalg.pinv(x.T @ x)
        coefficients = inverse @ x.T @ y
        spread = np.sqrt(((y - x @ coefficients) ** 2).sum() / (len(y) - 2) * (1 + at @ inverse @ at))
        return bool(at @ coefficients - z * spread > y.min())

    return stop


def replay(curves: Sequence[Sequence[float]], order: Sequence[int], rule: Rule, slots: int) -> tuple[int, float]:
    """(epochs trained, regret) of one search in which `slots` arms train side by side, an epoch at a time."""
    rows: list[TrialRow] = []
    waiting, running = list(order), []
    while waiting or running:
        while waiting and len(running) < slots:
            arm = waiting.pop(0)
            rows.append(TrialRow(len(rows), {}, len(curves[arm])))
            running.append((arm, rows[-1]))
        for arm, row in list(running):
            epoch = len(row.history) + 1
            row.history.append(EpochMetrics(epoch, validation={MAIN: curves[arm][epoch - 1]}))
            if row.is_done or rule(row, rows):
                running.remove((arm, row))
    found = max((row.last.validation[MAIN] for row in rows if row.is_done), default=0.0)
    return sum(len(row.history) for row in rows), max(curve[-1] for curve in curves) - found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the arms' figures")
    parser.add_argument("--arms", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--data-frac", type=float, default=0.5)
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/stopping.jsonl")
    args = parser.parse_args()
    curves = train_arms(args.out, args.arms, args.epochs, args.data_frac)
    finals = sorted((curve[-1] for curve in curves), reverse=True)
    rules: dict[str, Rule] = {"none": by_scheduler({"kind": "none"}, args.epochs)}
    for factor in (2, 3, 4):
        rules[f"asha, factor {factor}"] = by_scheduler({"kind": "asha", "reduction_factor": factor}, args.epochs)
    rules["median, grace 1"] = by_scheduler({"kind": "median"}, args.epochs)
    for grace in (1, 2):
        for z in (0.5, 1.0, 2.0, 3.0):
            rules[f"law, z {z:g}, grace {grace}"] = by_law(z, grace, args.epochs)
    random = np.random.default_rng(0)
    orders = [random.permutation(len(curves)).tolist() for _ in range(args.orders)]
    figures: dict[str, Any] = {
        "arms": len(curves),
        "epochs": args.epochs,
        "slots": args.slots,
        "orders": args.orders,
        "data_frac": args.data_frac,
        "best_finals": finals[:5],
    }
    for name, rule in rules.items():
        found = [replay(curves, order, rule, args.slots) for order in orders]
        share = [epochs / (len(curves) * args.epochs) for epochs, _ in found]
        regret = [100 * r for _, r in found]
        figures[name] = {
            "share_of_epochs": round(statistics.fmean(share), 4),
            "regret_points": round(statistics.fmean(regret), 4),
            "regret_90th_points": round(float(np.percentile(regret, 90)), 4),
        }
        print(f"{name:>22}: {figures[name]}", flush=True)
    if args.record:
        options = " ".join(
            f"--{name.replace('_', '-')} {getattr(args, name):g}"
            for name in ("arms", "epochs", "data_frac", "orders", "slots")
        )
        command = f"python benchmarks/stopping.py --out DIR {options}"
        print(record("stopping", command, figures, seeds=[0]))


if __name__ == "__main__":
    main()
