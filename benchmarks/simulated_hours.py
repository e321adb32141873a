"""The model that predicts the hours of a search (lift_ray/clusters/cost.py) beside searches on this machine, for simulation.py.

Played searches have slots that sleep for each epoch: what they check is the number of epochs that early stopping leaves, and how
well slots are kept busy. The real ones train lift-tiny; their speed is measured in the same search.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from simulated_search import DRIVEN

Figures = dict[str, Any]
EPOCHS, EPOCH_S = 9, 1.0
SPACE = """\
name: hours
dataset: embedded:caltech101-lt
base:
  backbone: {model: "MODEL"}
  tuner: {kind: adaptformer}
  optim: {epochs: 3}
space:
  loss.tau: {float: [0.0, 2.0]}
  optim.lr: {float: [1.0e-2, 3.0e-1], log: true}
search: {trials: 9, sampler: random, scheduler: {kind: asha}, tte_best: 0}
"""


def played(out: str, slots: int, trials: int) -> Figures:
    """A search whose slots sleep a second for each epoch, beside what the model says of it."""
    import ray
    from played import run_on_ray, space

    from lift_ray.clusters.cost import Work
    from lift_ray.searching.study import Study, open_storage

    options = {"slots": slots, "trials": trials, "epochs": EPOCHS, "epoch_s": EPOCH_S}
    options["search"] = {"scheduler": {"kind": "asha"}}
    ray.init(num_cpus=slots, **DRIVEN)
    did = run_on_ray(Path(out), options)
    ray.shutdown()
    wanted = space(EPOCHS, trials=trials, tte_best=0, scheduler={"kind": "asha"})
    rows = Study(wanted, "d", open_storage(None, Path(out)), resume=True).rows.values()
    epochs = wanted.expected_epochs()
    hours = Work(epochs, EPOCHS, 1, 1 / EPOCH_S).hours(slots, 1)
    return {
        "slots": slots,
        "trials": trials,
        "epochs_predicted": round(epochs, 1),
        "epochs_trained": sum(len(row.history) for row in rows),
        "trials_s_predicted": round(3600 * (hours or 0.0), 1),
        "trials_s": round(did["trials_s"], 1),
    }


def real(slots: int) -> Figures:
    """A search that trains, beside what the model says of it with the speed that the search itself has shown."""
    from embedded import LIFT_TINY

    from lift_ray.clusters.cost import work
    from lift_ray.settings.checks import read_space

    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "space.yaml", Path(folder) / "out"
        file.write_text(SPACE.replace("MODEL", LIFT_TINY))
        words = [f"scale.max_concurrent={slots}", "--no-dashboard", "--no-live", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "lift_ray.tune", str(file), *words], check=True)
        times = json.loads((out / "study.json").read_text())["time_s"]
        rows = pq.read_table(out / "trials.parquet").to_pylist()
        journal = (out / "optuna.journal").stat().st_size
        wanted = read_space(file)
    todo = work(wanted)
    assert todo.images is not None
    trained, train_s = sum(row["epochs"] for row in rows), sum(row["train_s"] for row in rows)
    evaluate_s = sum(row["evaluate_s"] for row in rows)
    speeds = {
        "train": trained * todo.images / train_s,
        "with_evaluation": trained * todo.images / (train_s + evaluate_s),
    }

    def predicted_s(speed: float) -> float:
        return max(todo.epochs / slots, todo.longest) * todo.images / speed

    trials_s = max(row["ended_at"] for row in rows) - min(row["began_at"] for row in rows)
    return {
        "slots": slots,
        "trials": len(rows),
        "epochs_predicted": round(todo.epochs, 1),
        "epochs_trained": trained,
        "images_per_s": {name: round(speed, 1) for name, speed in speeds.items()},
        "trials_s_predicted": {name: round(predicted_s(speed), 1) for name, speed in speeds.items()},
        "trials_s": round(trials_s, 1),
        "start_s": times["start"],
        "final_comparison_s": times["final comparison"],
        "total_s": times["total"],
        "journal_bytes_per_epoch": round(journal / trained),
    }
