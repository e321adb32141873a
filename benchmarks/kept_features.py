"""A linear probe from features that are computed once, against the same probe through the tower in every epoch.

Ten epochs on the embedded long-tailed Caltech-101 with lift-tiny, the evaluation crop in both. Seconds are those of training;
the pass that computes the features is given beside them. In a search that pass is paid once for a slot, not for a trial.

    python benchmarks/kept_features.py
"""

from __future__ import annotations

import argparse
import time

from record import record

from lift_ray.epoch_metrics import MAIN_METRIC, named
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

DATASET = "embedded:caltech101-lt"


def measure(cache_gib: float, epochs: int, threads: int) -> tuple[float, float, dict[str, float], str]:
    """Seconds of the pass before training, seconds of training, last metrics, digest."""
    config = RunConfig.model_validate(
        {
            "backbone": {"cache_gib": cache_gib},
            "augment": {"kind": "none"},
            "tuner": {"kind": "linear_probe"},
            "optim": {"epochs": epochs, "lr": 0.3},
        }
    )
    workspace = Workspace(DATASET, Ranks.alone(num_cpus=threads))
    run = Run(config, workspace)
    began = time.monotonic()
    workspace.cached_features(run.config, run.model, run.train)
    before = time.monotonic() - began
    trained = sum(run.train_epoch()["time/train_s"] for _ in range(epochs))
    found = {name: run.evaluate(name).metrics for name in ("validation", "test")}
    figures = named("validation", found["validation"]) | named("test", found["test"])
    return before, trained, figures, run.config.digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    pass_s, kept_s, kept, digest = measure(2.0, args.epochs, args.threads)
    _, tower_s, tower, _ = measure(0.0, args.epochs, args.threads)
    names = [name for name in kept if not name.startswith("time/")]
    difference = max(abs(kept[name] - tower[name]) for name in names)
    figures = {
        "epochs": args.epochs,
        "threads": args.threads,
        "features_s": round(pass_s, 2),
        "kept_s": round(kept_s, 3),
        "tower_s": round(tower_s, 2),
        "ratio": round(tower_s / kept_s, 1),
        "ratio_with_features": round(tower_s / (kept_s + pass_s), 2),
        "largest_difference": difference,
        "validation_mean_class_accuracy": kept[MAIN_METRIC],
    }
    print(
        f"{args.epochs} epochs through the tower {tower_s:.1f} s, from kept features {kept_s:.2f} s: {tower_s / kept_s:.0f} times"
        f" ({tower_s / (kept_s + pass_s):.1f} times with the {pass_s:.1f} s of computing them); metrics differ by {difference:.1e}"
    )
    print(record("kept_features", "python benchmarks/kept_features.py", figures, seeds=[0], digest=digest))


if __name__ == "__main__":
    main()
