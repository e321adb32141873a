"""Cached features: a probe from them against the same probe through the tower, and two slots that share them against two that do not.

Some epochs on the embedded long-tailed Caltech-101 with lift-small, the evaluation crop in both. Seconds are those of training;
the pass that computes the features is given beside them. In a search that pass is paid once on a node, not for a trial.

Then two processes, one torch thread each, need the features of the training and validation images for a linear probe, for the last
block and for the last two. Given are the seconds until both have read all of them, the size of the features, and the peak of the
proportional memory (PSS) of both processes together, in which pages that both map count once.

    python benchmarks/kept_features.py --epochs 1
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from typing import Any

import numpy as np
import psutil
from record import record

from lift_ray.epoch_metrics import MAIN_METRIC, named
from lift_ray.methods.world import Ranks
from lift_ray.settings.run import RunConfig
from lift_ray.training.run import Run
from lift_ray.training.shared_features import SharedFeatures
from lift_ray.training.workspace import Workspace

Figures = dict[str, float]
SLOTS = 2
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
    workspace.cached_features(run.config, run.model, workspace.images(run.config, run.train))
    before = time.monotonic() - began
    trained = sum(run.train_epoch()["time/train_s"] for _ in range(epochs))
    found = {name: run.evaluate(name).metrics for name in ("validation", "test")}
    figures = named("validation", found["validation"]) | named("test", found["test"])
    return before, trained, figures, run.config.digest()


def tunings(num_blocks: int) -> list[RunConfig]:
    """Return a linear probe, and runs that tune the last block and the last two."""
    blocks = [{"blocks": list(range(num_blocks - last, num_blocks))} for last in (1, 2)]
    tuners = [{"kind": "linear_probe"}, *({"kind": "adaptformer", **one} for one in blocks)]
    shared = {"backbone": {"cache_gib": 64.0}, "augment": {"kind": "none"}}
    return [RunConfig.model_validate({**shared, "tuner": tuner}) for tuner in tuners]


def slot(share: bool, barrier: Any, results: Any) -> None:
    """Get all features as a slot of a search does; put seconds and bytes into the queue, and wait until memory was measured."""
    shared = SharedFeatures() if share else None
    workspace = Workspace(DATASET, Ranks.alone(), shared)
    num_blocks = workspace.backbone(RunConfig()).tower.num_blocks
    workspace.tunings = tunings(num_blocks) if share else ()
    runs = [Run(config, workspace) for config in tunings(num_blocks)]
    barrier.wait(600)
    began = time.monotonic()
    for run in runs:
        for name in ("train", "validation"):
            split = workspace.dataset.split(name)
            features = workspace.cached_features(run.config, run.model, workspace.images(run.config, split))
            assert features is not None
            for start in range(0, split.num_samples, 64):
                features[np.arange(start, min(start + 64, split.num_samples))].sum()
    results.put((time.monotonic() - began, sum(workspace.cache[key].nbytes for key in workspace.cache)))
    barrier.wait(3600)
    if shared is not None:
        shared.close()


def slots(share: bool) -> Figures:
    """Measure slots that share their features, or that compute them each for itself: seconds, bytes, peak memory."""
    with tempfile.TemporaryDirectory() as folder:  # features of earlier searches are not found there
        os.environ["LIFT_CACHE"] = folder
        return _slots(share)


def _slots(share: bool) -> Figures:
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(SLOTS + 1), spawn.Queue()
    processes = [spawn.Process(target=slot, args=(share, barrier, results), daemon=True) for _ in range(SLOTS)]
    for process in processes:
        process.start()
    watched = [psutil.Process(process.pid) for process in processes]
    barrier.wait(600)
    peak = 0
    while results.qsize() < SLOTS:
        if not all(process.is_alive() for process in processes):
            raise SystemExit("a slot has died")
        peak = max(peak, sum(process.memory_full_info().pss for process in watched))
        time.sleep(0.2)
    found = [results.get() for _ in processes]
    barrier.wait(600)
    for process in processes:
        process.join(60)
    num_bytes = [size for _, size in found]
    total = num_bytes[0] if share else sum(num_bytes)
    seconds = max(seconds for seconds, _ in found)
    return {"seconds": round(seconds, 1), "gib": round(total / 2**30, 2), "peak_gib": round(peak / 2**30, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIFT_CACHE"] = folder
        together, apart = slots(share=True), slots(share=False)
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
        "two_slots_shared": together,
        "two_slots_each_for_itself": apart,
    }
    for name, one in (("sharing", together), ("each for itself", apart)):
        print(
            f"two slots, {name}: {one['seconds']} s, {one['gib']} GiB of features, {one['peak_gib']} GiB of memory at most"
        )
    print(
        f"{args.epochs} epochs through the tower {tower_s:.1f} s, from kept features {kept_s:.2f} s: {tower_s / kept_s:.0f} times"
        f" ({tower_s / (kept_s + pass_s):.1f} times with the {pass_s:.1f} s of computing them); metrics differ by {difference:.1e}"
    )
    print(
        record(
            "kept_features",
            f"python benchmarks/kept_features.py --epochs {args.epochs}",
            figures,
            seeds=[0],
            digest=digest,
        )
    )


if __name__ == "__main__":
    main()
