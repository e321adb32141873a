"""The overhead of a trial: warm slots of the search's engine, and beside them a TorchTrainer inside a Tune function.

python benchmarks/search.py [--trials 24 200 1000] [--naive-trials 4] [--record]

Both run the same draws of the same space: linear probes of the embedded images, one epoch. The naive way takes half a minute a
trial, so fewer of its trials are run; its overhead is a mean over them. Overhead per trial is the slots' wall time without
training and evaluation; the start of the slots, which a search pays once, is given beside it. Eight slots on a machine with fewer
cores train nothing (tests/played.py): for these the wall time of a slot for a trial, and the driver's processor time, are given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from quickstart import memory
from record import record

PLAYED = Path(__file__).parents[1] / "tests" / "played.py"
SPACE = """\
name: overhead
dataset: embedded:caltech101-lt
base: {augment: {kind: none}, tuner: {kind: linear_probe}, optim: {epochs: 1}}
space:
  loss.tau: {float: [0.0, 2.0]}
  optim.lr: {float: [1.0e-2, 3.0e-1], log: true}
search: {trials: 16, sampler: random, scheduler: {kind: none}, tte_best: 0}
"""


def watched(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak GiB of a command's processes, shared pages counted once. Ends this program when it fails."""
    began, peak = time.monotonic(), 0
    running = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    while running.poll() is None:
        peak = max(peak, memory(psutil.Process(running.pid)))
        time.sleep(2)
    if running.returncode:
        sys.exit(running.returncode)
    return time.monotonic() - began, peak / 2**30


def warm(space: Path, folder: Path, trials: int, slots: int) -> dict[str, Any]:
    """A search with so many warm slots."""
    out = folder / f"warm-{slots}-{trials}"
    words = [
        f"search.trials={trials}",
        f"scale.max_concurrent={slots}",
        "--no-dashboard",
        "--no-live",
        "--out",
        str(out),
    ]
    wall_s, peak_gib = watched(["-m", "lift_ray.tune", str(space), *words])
    times = json.loads((out / "study.json").read_text())["time_s"]
    between_s = times["between trials and idle"] + times["saving"]
    trained_s = times["training steps"] + times["waiting for data"] + times["evaluation"]
    return {
        "slots": slots,
        "trials": trials,
        "wall_s": round(wall_s, 1),
        "peak_gib": round(peak_gib, 2),
        "start_s": times["start"],
        "overhead_s": round(between_s * slots / trials, 3),
        "trials_per_h": round(3600 * trials / (between_s + trained_s)),
    }


def trivial(folder: Path, trials: int, slots: int) -> dict[str, Any]:
    """A search whose slots train nothing, in a process of its own."""
    options = {"slots": slots, "trials": trials, "epochs": 1}
    command = [sys.executable, str(PLAYED), str(folder / f"trivial-{trials}"), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    did = json.loads(done.stdout.splitlines()[-1])
    assert did["states"] == {"finished": trials}, did
    return {
        "slots": slots,
        "trials": trials,
        "processes": did["processes"],
        "slot_s_per_trial": round(did["trials_s"] * slots / trials, 3),
        "driver_cpu_s_per_trial": round(did["driver_cpu_s"] / trials, 4),
    }


def naive(space: Path, folder: Path, trials: int, slots: int) -> dict[str, Any]:
    """The same draws, a TorchTrainer for each."""
    result = folder / "naive.json"
    wall_s, peak_gib = watched([__file__, "--run-naive", str(space), str(result), str(trials), str(slots)])
    found = json.loads(result.read_text())
    overhead_s = (found["search_s"] * slots - found["trained_s"]) / trials
    return {
        "slots": slots,
        "trials": trials,
        "wall_s": round(wall_s, 1),
        "peak_gib": round(peak_gib, 2),
        "overhead_s": round(overhead_s, 2),
        "trials_per_h": round(3600 * trials / found["search_s"]),
    }


def run_naive(space_file: str, result: str, trials: int, slots: int) -> None:
    """In a process of its own: Tune around Ray Train."""
    import ray
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from lift_ray.settings.checks import read_space
    from lift_ray.settings.space import seeded_draws

    space = read_space(space_file)
    configs = [space.config(values).to_dict() for values in seeded_draws(space.space, trials)]
    storage = tempfile.mkdtemp()

    def trial(config: dict[str, Any]) -> None:
        name = f"trial-{ray.tune.get_context().get_trial_id()}"
        TorchTrainer(
            train_alone,
            train_loop_config=config["run"],
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.9}),
            run_config=RunConfig(name=name, storage_path=storage, callbacks=[TuneReportCallback()]),
        ).fit()

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.3"
    ray.init(address="local", num_cpus=slots, log_to_driver=False)
    began = time.monotonic()
    grid = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.05}),
        param_space={"run": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(max_concurrent_trials=slots),
        run_config=tune.RunConfig(storage_path=storage, verbose=0),
    ).fit()
    search_s = time.monotonic() - began
    done = [r.metrics for r in grid if r.metrics and "time/train_s" in r.metrics]
    if len(done) < trials:
        sys.exit(
            f"naive: {trials} trials must finish, but {len(done)} did: {[str(r.error)[:200] for r in grid if r.error]}"
        )
    trained_s = sum(m["time/train_s"] + m["time/evaluate_s"] for m in done)
    Path(result).write_text(json.dumps({"search_s": search_s, "trained_s": trained_s}))
    ray.shutdown()


def train_alone(config: dict[str, Any]) -> None:
    """What the naive worker does: load everything, train, report."""
    import ray.train

    from lift_ray.methods.world import Ranks
    from lift_ray.settings.run import RunConfig
    from lift_ray.training.run import Run
    from lift_ray.training.workspace import Workspace

    run = Run(
        RunConfig.model_validate(config), Workspace("embedded:caltech101-lt", Ranks.alone(use_gpu=False, num_cpus=1))
    )
    for figures in run.epochs():
        ray.train.report(figures.flat())


def main() -> None:
    if sys.argv[1:2] == ["--run-naive"]:
        run_naive(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[24, 200, 1000])
    parser.add_argument("--naive-trials", type=int, default=4)
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/search.jsonl")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    space = folder / "space.yaml"
    space.write_text(SPACE)
    most = os.cpu_count() or 1
    slowly = naive(space, folder, options.naive_trials, most)
    rows = []
    for trials in options.trials:
        for slots in sorted({1, 2, most}):
            rows.append(warm(space, folder, trials, slots))
            print("warm", rows[-1], flush=True)
    idle = [trivial(folder, trials, 8) for trials in options.trials]
    print(f"{'slots':>6} {'trials':>7} {'start s':>8} {'overhead s a trial':>19} {'trials/h':>9} {'GiB':>5}")
    for row in rows:
        print(
            f"{row['slots']:6d} {row['trials']:7d} {row['start_s']:8.1f} {row['overhead_s']:19.3f} {row['trials_per_h']:9d} "
            f"{row['peak_gib']:5.1f}"
        )
    for row in idle:
        print(
            f"8 slots that train nothing, {row['trials']} trials: {row['slot_s_per_trial']:.3f} s of a slot a trial, "
            f"driver {1000 * row['driver_cpu_s_per_trial']:.1f} ms of processor time, {row['processes']} processes"
        )
    print(
        f"naive, {most} at a time: overhead {slowly['overhead_s']:.1f} s a trial over {slowly['trials']}, {slowly['peak_gib']:.1f} "
        f"GiB, {slowly['trials_per_h']} trials/h"
    )
    print(f"naive / warm: {slowly['overhead_s'] / max(row['overhead_s'] for row in rows):.0f} x or more")
    if options.record:
        figures = {"warm": rows, "trivial": idle, "naive": slowly}
        print(record("search", "python benchmarks/search.py", figures, seeds=[0], digest=""))


if __name__ == "__main__":
    main()
