"""How well a power law fitted to the smaller trials of a search predicts its larger ones (lift_ray.reporting.scaling_law).

The search is `search_spaces/scaling.yaml`: shares of the training images, epochs and widths of the tuner, each with each.

    python -m lift_ray.tune search_spaces/scaling.yaml --out DIR
    python benchmarks/scaling_law.py DIR --record

With --longer, also how well the law of all trials predicts a run beyond them, such as its best settings with more epochs:

    python -m lift_ray.train DIR/best.yaml optim.epochs=16 --no-ray --out RUN
    python benchmarks/scaling_law.py DIR --longer RUN --record
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from lift_ray.epoch_metrics import MAIN_METRIC
from lift_ray.reporting.figures.search import unit_of
from lift_ray.reporting.scaling_law import Law, PowerLaw, fit_law
from lift_ray.reporting.study_files import read_study
from lift_ray.training.checkpoint import read_record


def measure(folder: Path, longer: Path | None) -> dict[str, Any]:
    """What the law says of a study, and how far it misses the trials that were held out, and a longer run."""
    study = read_study(folder, folder.name)
    law = fit_law(study, *unit_of(study))
    held = [p for p in law.points if p.held_out]
    mean = statistics.fmean(p.found for p in law.points if not p.held_out)
    return {
        "trials": len(study.finished),
        "fitted": len(law.points) - len(held),
        "held_out": len(held),
        "misses_by_points": round(100 * statistics.fmean(abs(p.found - p.predicted.value) for p in held), 3),
        "mean_misses_by_points": round(100 * statistics.fmean(abs(p.found - mean) for p in held), 3),
        "inside_95_interval": sum(p.predicted.low <= p.found <= p.predicted.high for p in held),
        "exponents": {name: [round(x, 4) for x in (b.value, b.low, b.high)] for name, b in law.exponents.items()},
        "answer": law.answer,
    } | ({"longer": beyond(law, longer)} if longer else {})


def beyond(law: Law, folder: Path) -> dict[str, Any]:
    """Validation mean class accuracy of a run in %, and what the law of all trials predicts for it with its 95% interval."""
    run = read_record(folder / "checkpoint")
    known = {f"optim.{name}": run.config["optim"][name] for name in ("data_frac", "epochs")} | run.history[-1]
    fitted = PowerLaw(np.array([list(p.scales.values()) for p in law.points]), np.array([p.found for p in law.points]))
    at = {name: known[name] for name in law.exponents}
    predicted = fitted.predict(np.array([list(at.values())], float))[0]
    percent = [round(100 * x, 1) for x in (run.metrics[MAIN_METRIC], *vars(predicted).values())]
    return at | dict(zip(("found", "predicted", "low", "high"), percent, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the search's folder")
    parser.add_argument("--longer", type=Path, help="folder of a run beyond the search's scales")
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/scaling_law.jsonl")
    args = parser.parse_args()
    figures = measure(args.study, args.longer)
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.record:
        command = "python -m lift_ray.tune search_spaces/scaling.yaml --out DIR && python benchmarks/scaling_law.py DIR"
        if args.longer:
            changed = f"optim.epochs={figures['longer']['optim.epochs']}"
            command += f" --longer RUN, of python -m lift_ray.train DIR/best.yaml {changed} --no-ray --out RUN"
        print(record("scaling_law", command, figures, seeds=[0]))


if __name__ == "__main__":
    main()
