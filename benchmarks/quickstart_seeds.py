"""The quickstart for several search seeds: how often, and by how much, its result is better than each baseline on the test split.

python benchmarks/quickstart_seeds.py --seeds 10 --out runs/quickstart-seeds --record
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from lift_ray.epoch_metrics import ACCURACIES

SPACE = "search_spaces/quickstart.yaml"
MEASURES = ("mean_class_accuracy", "few")
BEST = "best found"
T_95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # by number of seeds


def search(seed: int, out: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Run the quickstart with a search seed, unless it is there already, and return its study.json."""
    if not (out / "study.json").exists():
        command = [sys.executable, "-m", "lift_ray.tune", SPACE, f"search.seed={seed}", *settings, "--out", str(out)]
        resume = ["--resume"] if (out / "optuna.journal").exists() else []
        subprocess.run([*command, *resume, "--no-live", "--no-dashboard"], check=True)
    study: dict[str, Any] = json.loads((out / "study.json").read_text())
    return study


def summary(studies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the difference of the result from each baseline, in points: mean and 95% interval over the seeds, number above zero."""
    tables = [{row["label"]: row for row in study["compared"]} for study in studies]
    baselines = [label for label in tables[0] if not label.startswith(BEST) and all(label in table for table in tables)]
    out = []
    for label in baselines:
        for measure in MEASURES:
            name = f"test/{measure}"
            gains = 100 * np.array([table[BEST][name] - table[label][name] for table in tables])
            error = float(gains.std(ddof=1) / math.sqrt(len(gains)))
            half = T_95[len(gains)] * error
            out.append(
                {
                    "baseline": label,
                    "measure": measure,
                    "mean": round(float(gains.mean()), 2),
                    "error": round(error, 2),
                    "low": round(float(gains.mean()) - half, 2),
                    "high": round(float(gains.mean()) + half, 2),
                    "above_zero": int((gains > 0).sum()),
                    "seeds": len(gains),
                }
            )
    return out


def table_rows(studies: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return median, minimum and maximum over the seeds of each test accuracy (%) of each line that all tables have."""
    tables = [{row["label"]: row for row in study["compared"]} for study in studies]
    out: dict[str, dict[str, list[float]]] = {}
    for label in [label for label in tables[0] if all(label in table for table in tables)]:
        out[label] = {}
        for name in ACCURACIES:
            values = np.array([100 * table[label][f"test/{name}"] for table in tables])
            out[label][name] = [round(float(value), 1) for value in (np.median(values), values.min(), values.max())]
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, choices=sorted(T_95))
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-seeds"))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("settings", nargs="*", help="changes of the space file, key=value")
    options = parser.parse_args(arguments)
    seeds = list(range(options.seeds))
    studies = [search(seed, options.out / f"seed-{seed}", options.settings) for seed in seeds]
    rows = summary(studies)
    print(f"{'best found, compared with':28s}{'points':>8s}{'95% interval':>18s}{'above zero':>12s}")
    for row in rows:
        name, interval = (
            f"{row['baseline']}, {row['measure'].split('_')[0]}",
            f"{row['low']:+.1f} to {row['high']:+.1f}",
        )
        print(f"{name:28s}{row['mean']:+8.1f}{interval:>18s}{row['above_zero']:6d} of {row['seeds']}")
    medians = table_rows(studies)
    print("\nTest accuracy (%), median (minimum to maximum)")
    print(f"{'':28s}" + "".join(f"{name.replace('_accuracy', '').replace('_', ' '):>22s}" for name in ACCURACIES))
    for label, row in medians.items():
        print(
            f"{label:28s}"
            + "".join(f"{f'{mid:.1f} ({low:.1f} to {high:.1f})':>22s}" for mid, low, high in row.values())
        )
    if options.record:
        figures = {
            "table": medians,
            "differences": rows,
            "seconds": [study["time_s"]["total"] for study in studies],
            "choices": [
                {"seed": seed, **{name: study["choice"][name] for name in ("trial", "tau", "baseline", "value")}}
                for seed, study in zip(seeds, studies, strict=True)
            ],
            "compared": [study["compared"] for study in studies],
        }
        command = " ".join(["python benchmarks/quickstart_seeds.py --seeds", str(options.seeds), *options.settings])
        print(record("quickstart_seeds", command, figures, seeds=seeds, digest=studies[0]["best"]["digest"]))


if __name__ == "__main__":
    main()
