"""Searches whose slots train nothing: accuracy is a function of settings and epoch, a checkpoint is a line of JSON.

python tests/played.py OUT '{"slots": 8, "trials": 24}'    one driver, on a Ray of its own; prints what it did as JSON
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from optuna.storages import BaseStorage
from processes import wait_for

from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.evaluation.metrics import ClassGroups
from lift_ray.ray_runtime.capacity import Need
from lift_ray.searching.interrupts import Interrupts
from lift_ray.searching.jobs import EvaluationJob, IdleJob, Job, Pack, SlotSettings, TrainJob, trial_checkpoints
from lift_ray.searching.predictions import out_of_fold_folder, part_name, write_predictions
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.state import Search
from lift_ray.searching.study import Study, open_storage
from lift_ray.settings.search import TAUS
from lift_ray.settings.space import SpaceFile
from lift_ray.storage.output import Output
from lift_ray.training.events import EpochEnded, JobDone, Replies, Reply, RunAborted, RunDiverged, RunStarted

METRIC = "validation/mean_class_accuracy"
EPOCHS = 9
IMAGES = {"train": 100, "validation": 10, "test": 10}
DATA = SearchData(groups=ClassGroups.of([200, 50, 5]), num_images=IMAGES, final_images=100)
HELD_OUT = 60  # images of a fold


def space(epochs: int = EPOCHS, blocks: Any = None, **search: Any) -> SpaceFile:
    """Return a space with ten trials by default, the first of which is a baseline.

    Args:
        blocks: of the tuner; trials that do not tune the first one train in packs.
    """
    return SpaceFile.model_validate(
        {
            "name": "played",
            "dataset": "d",
            "base": {"optim": {"epochs": epochs}, "tuner": {"blocks": blocks}},
            "space": {"optim.lr": {"float": [0.01, 1.0], "log": True}, "loss.tau": {"float": [0.0, 2.0]}},
            "baselines": [{"optim.lr": 0.02, "loss.tau": 1.0}],
            "search": {"trials": 10, "sampler": "random", **search},
        }
    )


def write_out_of_fold(out: Output, number: int, fold: int, accuracy: float, taus: Sequence[float]) -> dict[str, int]:
    """Write predictions of three classes, so many of them correct whatever the tau, and return the result of the job."""
    label = np.arange(HELD_OUT) % 3
    predicted = np.where(np.arange(HELD_OUT) < round(HELD_OUT * accuracy), label, (label + 1) % 3)
    lists = {"predicted": predicted, "confidence": np.full(HELD_OUT, 0.5), "loss": np.ones(HELD_OUT)}
    columns = {"label": label.astype(np.int32)}
    columns |= {name: list(np.repeat(values[:, None], len(taus), 1)) for name, values in lists.items()}
    write_predictions(pa.table(columns), out, out_of_fold_folder(number, fold), part_name(0, 1))
    return {"parts": 1, "images": HELD_OUT}


def accuracy_of(config: dict[str, Any]) -> float:
    """Return the accuracy of a trial in the end."""
    return float(1 / (1 + abs(config["loss"]["tau"] - 1) + abs(config["optim"]["lr"] - 0.3)))


def metrics_of(config: dict[str, Any], epoch: int) -> EpochMetrics:
    """Return the metrics of a trial after an epoch."""
    accuracy = accuracy_of(config) * (1 - 0.5**epoch)
    return EpochMetrics(
        epoch,
        seconds={"train_s": 0.0, "evaluate_s": 0.0},
        validation={"mean_class_accuracy": accuracy},
        trained_parameters=8,
        num_epochs=config["optim"]["epochs"],
    )


@dataclass
class Played:
    """Worker of a slot with the interface of worker.Worker, which trains nothing.

    Args:
        disk: the history of each saved training, by the key of its job.
        out: where predictions are written.
        epoch_s: seconds of an epoch.
        load_s: seconds that the first job of a process takes longer.
        alone_epochs: epochs after which a process waits for a second one to load, however long a busy machine takes; 0: never.
        faults: trial number -> what its first epoch does: raise, die, diverge or bad; `die once` limits it to one process.
    """

    disk: dict[str, list[EpochMetrics]] = field(default_factory=dict)
    folder: Path | None = None
    out: Output | None = None
    epoch_s: float = 0.0
    load_s: float = 0.0
    alone_epochs: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    began: list[str] = field(default_factory=list)
    replies: Iterator[Reply] = field(default_factory=lambda: iter(()))
    is_loaded: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)

    def begin(self, job: Job) -> None:
        self.began.append(job.key)
        self.job, self.replies = job, self._run(job)

    def next(self, timeout_s: float = 1.0) -> Reply:
        if not self.is_loaded:
            self.is_loaded = True
            self._log("loaded")
            time.sleep(self.load_s)
        return next(self.replies)

    def stop(self) -> None:
        self.stopped.set()

    def _run(self, job: Job) -> Iterator[Reply]:
        if isinstance(job, EvaluationJob):
            time.sleep(self.epoch_s)
            self._log(f"done {job.key}")
            yield JobDone(
                {
                    "figures": [
                        {
                            f"{job.split}/mean_class_accuracy": 0.5 - tau / 10,
                            "time/evaluate_s": 0.0,
                            "trained_parameters": 8,
                        }
                        for tau in job.taus
                    ],
                    **self._held_out(job.out_of_fold, 1, job.config, job.taus),
                }
            )
        elif isinstance(job, IdleJob):
            yield JobDone({})
            while not self.stopped.wait(0.05):
                yield JobDone({})
        elif isinstance(job, Pack):
            trainings = {each.number: self._train(each) for each in job.jobs}
            while True:
                yield Replies({number: next(training) for number, training in trainings.items()})  # type: ignore[misc]
        else:
            yield from self._train(job)

    def _held_out(self, number: int | None, fold: int, config: dict[str, Any], taus: Sequence[float]) -> dict[str, int]:
        if number is None:
            return {}
        assert self.out is not None
        return write_out_of_fold(self.out, number, fold, accuracy_of(config), taus)

    def _train(self, job: TrainJob) -> Iterator[Reply]:
        history = self.disk.setdefault(job.key, self._saved(job))
        epochs = job.config["optim"]["epochs"]
        yield RunStarted(1, epochs, 1, len(history), 0, list(history), 8)
        while len(history) < epochs:
            yield from self._fault(job)
            time.sleep(self.epoch_s)
            self._wait_for_another()
            history.append(metrics_of(job.config, len(history) + 1))
            self._save(job, history)
            self._log(f"epoch {job.number} {len(history)}")
            yield EpochEnded(history[-1], "")
        if job.then == "hold out":
            yield JobDone(self._held_out(job.number, job.fold, job.config, TAUS))
        elif job.then:
            yield JobDone({**history[-1].flat(), "test/mean_class_accuracy": 0.5})

    def _wait_for_another(self) -> None:
        own = sum(line.startswith(f"{os.getpid()} epoch ") for line in log_of(self.folder)) if self.alone_epochs else 0
        if own >= self.alone_epochs > 0:
            wait_for("a second process", lambda: sum(line.endswith(" loaded") for line in log_of(self.folder)) > 1)
            self.alone_epochs = 0

    def _fault(self, job: TrainJob) -> Iterator[Reply]:
        fault = self.faults.get(str(job.number), "")
        if fault.endswith(" once") and self._count(f"fault {job.number}"):
            return
        if fault:
            self._log(f"fault {job.number}")
        if fault.startswith("raise"):
            raise ValueError("a bug in the worker")
        if fault.startswith("die"):
            os._exit(1)
        if fault == "diverge":
            yield RunDiverged("the loss must be finite")
        if fault == "bad":
            yield RunAborted("backbone.model: unknown model 'x'", True)

    def _saved(self, job: TrainJob) -> list[EpochMetrics]:
        path = self.folder and self.folder / f"{trial_checkpoints(job.number, job.fold)}.json"
        return [EpochMetrics.of(flat) for flat in json.loads(path.read_text())] if path and path.exists() else []

    def _save(self, job: TrainJob, history: list[EpochMetrics]) -> None:
        if self.folder:
            path = self.folder / f"{trial_checkpoints(job.number, job.fold)}.json"
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps([metrics.flat() for metrics in history]))
            path.with_suffix(".tmp").replace(path)

    def _log(self, text: str) -> None:
        if self.folder:
            with (self.folder / "log").open("a") as log:
                log.write(f"{os.getpid()} {text}\n")

    def _count(self, text: str) -> int:
        return sum(line.split(" ", 1)[1] == text for line in log_of(self.folder)) if self.folder else 0


def log_of(folder: Path | None) -> list[str]:
    """Return the log's lines: `pid loaded`, `pid epoch TRIAL NUMBER` and `pid done KEY`, in order."""
    path = folder and folder / "log"
    return path.read_text().splitlines() if path and path.exists() else []


def play(search: Search, worker: Played | None = None, slots: int = 2) -> Played:
    """Run all jobs of a search in this process, in place of an engine and its slots."""
    worker = worker or Played()
    worker.out = search.out
    busy: list[tuple[Job, Iterator[Reply]]] = []
    while not search.is_over:
        while len(busy) < slots and (job := search.next_job()) is not None:
            worker.begin(job)
            busy.append((job, worker.replies))
        assert busy, "the search is not over, and has no job"
        for job, replies in list(busy):
            try:
                continues = search.take(job, next(replies))
            except ValueError as error:  # raised by the slot; an engine would first try again
                search.failed(job, str(error))
                continues = False
            if not continues:
                busy.remove((job, replies))
    return worker


def searched(
    wanted: SpaceFile,
    storage: BaseStorage,
    out: Path,
    worker: Played | None = None,
    resume: bool = False,
    data: SearchData = DATA,
) -> tuple[Study, Played]:
    """Run a whole search in this process."""
    study = Study(wanted, "d", storage, resume=resume)
    return study, play(Search(study, Output(str(out)), data), worker)


def run_on_ray(out: Path, options: dict[str, Any], callbacks: Any = ()) -> dict[str, Any]:
    """Run a search on the connected Ray with the real engine, and return what happened.

    Args:
        options: trials, slots, blocks, search, and those of Played.
    """
    from lift_ray.searching.driver import run_search

    out.mkdir(parents=True, exist_ok=True)
    own = {name: options[name] for name in ("epoch_s", "load_s", "alone_epochs", "faults", "broken") if name in options}
    wanted = space(
        options.get("epochs", 3),
        options.get("blocks"),
        **{
            "trials": options.get("trials", 12),
            "tte_best": 0,
            "scheduler": {"kind": "none"},
            **options.get("search", {}),
        },
    )
    resume = (out / "optuna.journal").exists()
    study = Study(wanted, "d", open_storage(None, out), resume=resume)
    dataset, began, cpu_s = json.dumps(own), time.monotonic(), time.process_time()
    with Interrupts() as interrupts:
        found = run_search(
            study,
            dataset,
            Need(options.get("workers", 1), 1, 0),
            lambda: options.get("slots", 2),
            Output(str(out)),
            interrupts,
            data=DATA,
            callbacks=callbacks,
            slot_class=slot_class(),
        )
    lines, ends = log_of(out), [row.ended_at or 0.0 for row in study.rows.values()]
    return {
        "states": dict(Counter(row.state for row in study.rows.values())),
        "trials": len(study.rows),
        "processes": len({line.split()[0] for line in lines}),
        "loads": sum(line.endswith(" loaded") for line in lines),
        "compared": [label for label, _ in found.compared],
        "seconds": time.monotonic() - began,
        "trials_s": max(ends) - min(ends),
        "driver_cpu_s": time.process_time() - cpu_s,
    }


def slot_class() -> Any:
    """Return a slot for Tune whose worker is Played. Imported late, because it requires Ray."""
    from played_slot import PlayedSlot

    return PlayedSlot


def worker_of(slot: SlotSettings) -> Played:
    """Return the worker of a slot. Its options are passed as the dataset."""
    if "broken" in slot.dataset:
        raise ValueError("no such option")
    return Played(folder=Path(slot.out), out=Output(slot.out), **json.loads(slot.dataset))


def main() -> None:
    import ray

    options = json.loads(sys.argv[2])
    ray.init(
        address="local",
        num_cpus=options.get("slots", 2),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    print(json.dumps(run_on_ray(Path(sys.argv[1]), options)), flush=True)


if __name__ == "__main__":
    main()
