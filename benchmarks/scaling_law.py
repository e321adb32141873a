"""How well a power law fitted to the smaller trials of a search predicts its larger ones (lift_ray.results.scaling_law).

The search is `search_spaces/scaling.yaml`: shares of the training pictures, epochs and widths of the tuner, each with each.

    python -m lift_ray.tune search_spaces/scaling.yaml --out DIR
    python benchmarks/scaling_law.py DIR --record
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from record import record

from lift_ray.results.scaling_law import fit_law
from lift_ray.results.search_figures import unit_of
from lift_ray.results.studies import read_study


def measure(folder: Path) -> dict[str, Any]:
    """What the law says of a study, and how far it misses the trials that were held out."""
    study = read_study(folder, folder.name)
    law = fit_law(study, *unit_of(study))
    held = [p for p in law.points if p.held_out]
    mean = statistics.fmean(p.found for p in law.points if not p.held_out)
    return {
        "trials": len(study.finished), "fitted": len(law.points) - len(held), "held_out": len(held),
        "misses_by_points": round(100 * statistics.fmean(abs(p.found - p.predicted.value) for p in held), 3),
        "mean_misses_by_points": round(100 * statistics.fmean(abs(p.found - mean) for p in held), 3),
        "inside_95_interval": sum(p.predicted.low <= p.found <= p.predicted.high for p in held),
        "exponents": {name: [round(x, 4) for x in (b.value, b.low, b.high)] for name, b in law.exponents.items()},
        "answer": law.answer,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the search's folder")
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/scaling_law.jsonl")
    args = parser.parse_args()
    figures = measure(args.study)
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.record:
        command = "python -m lift_ray.tune search_spaces/scaling.yaml --out DIR && python benchmarks/scaling_law.py DIR"
        print(record("scaling_law", command, figures, seeds=[0]))


if __name__ == "__main__":
    main()
