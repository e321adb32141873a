"""Searches without training, for simulation.py: what the driver of a search costs by number of trials and slots."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from process_memory import memory

Figures = dict[str, Any]
EPOCHS = 3
DRIVEN = {  # of ray.init: a small Ray of its own
    "address": "local",
    "include_dashboard": False,
    "log_to_driver": False,
    "object_store_memory": 100 * 2**20,
}


class Marks:
    """Wall time, processor time and memory of this process, noted each time `every` more trials have ended.

    Args:
        every: number of trials between two notes.
    """

    def __init__(self, every: int) -> None:
        self.every, self.found = every, list[tuple[int, float, float, int]]()

    def ended(self, number: int) -> None:
        """Note the number of trials that have ended, if it is time for a note."""
        if number % self.every == 0:
            self.note(number)

    def note(self, number: int) -> None:
        """Note time and memory; nothing if no trial has ended since the last note."""
        if not self.found or number > self.found[-1][0]:
            self.found.append((number, time.monotonic(), time.process_time(), memory("VmRSS")))

    def windows(self) -> list[Figures]:
        """Return milliseconds a trial between two notes, and memory at the second."""
        return [
            {
                "trials": n1,
                "wall_ms": round(1000 * (w1 - w0) / (n1 - n0), 2),
                "cpu_ms": round(1000 * (c1 - c0) / (n1 - n0), 2),
                "mib": round(rss / 2**20),
            }
            for (n0, w0, c0, _), (n1, w1, c1, rss) in zip(self.found, self.found[1:], strict=False)
        ]


def drive(out: str, slots: int, trials: int, sampler: str, every: int, minutes: float) -> Figures:
    """Run a search with real slot processes that train nothing, on a Ray of its own; SIGTERM ends it after `minutes`."""
    import ray
    from played import run_on_ray
    from ray import tune

    from lift_ray.errors import Stopped

    marks = Marks(every)

    class Watch(tune.Callback):  # type: ignore[misc]
        ended = 0

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            job = trial.config["job"]
            if hasattr(job, "then") and not job.then:  # a trial, and neither an idle job nor an evaluation
                self.ended += 1
                marks.ended(self.ended)

    options = {"slots": slots, "trials": trials, "epochs": EPOCHS}
    options["search"] = {"sampler": sampler, "scheduler": {"kind": "asha"}}
    ray.init(num_cpus=slots, **DRIVEN)
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    watch = Watch()
    marks.note(0)
    with suppress(Stopped):
        run_on_ray(Path(out), options, callbacks=[watch])
    timer.cancel()
    marks.note(watch.ended)
    ray.shutdown()
    return {
        "slots": slots,
        "sampler": sampler,
        "asked": trials,
        "trials": watch.ended,
        "windows": marks.windows(),
        "peak_mib": memory("VmHWM") >> 20,
        "journal_bytes": (Path(out) / "optuna.journal").stat().st_size,
    }


def resume(out: str, trials: int, sampler: str) -> Figures:
    """Read the journal of a search and build its state, as a driver that resumes does before it starts slots."""
    from played import space

    wanted = space(EPOCHS, trials=trials, tte_best=0, sampler=sampler, scheduler={"kind": "asha"})
    return resumed(wanted, out)


def resumed(wanted: Any, out: str) -> Figures:
    """Seconds and memory of reading a journal and building the state of its search."""
    from played import DATA

    from lift_ray.searching.state import Search
    from lift_ray.searching.study import Study, open_storage
    from lift_ray.storage.output import Output

    before, began, worked = memory("VmRSS"), time.monotonic(), time.process_time()
    search = Search(Study(wanted, "d", open_storage(None, Path(out)), resume=True), Output(out), DATA)
    return {
        "resume_s": round(time.monotonic() - began, 2),
        "resume_cpu_s": round(time.process_time() - worked, 2),
        "resume_mib": (memory("VmRSS") - before) >> 20,
        "resumed": search.num_ended,
    }


def call_methods(out: str, slots: int, trials: int, sampler: str, every: int, minutes: float) -> Figures:
    """Call the searcher's and the scheduler's own methods from this process, as Tune would, for slots that are only played.

    One reply is taken at a time, as in a step of Tune, and after each the methods are called that Tune calls in a step. Tune's event
    loop, actors and messages are not in the figures. It stops after the last trial, or after `minutes`.
    """
    from played import DATA

    from lift_ray.ray_runtime.capacity import Need
    from lift_ray.searching.engine import Engine
    from lift_ray.searching.jobs import IdleJob, SlotSettings
    from lift_ray.searching.progress_table import Monitor
    from lift_ray.searching.state import Search
    from lift_ray.searching.study import Study, open_storage
    from lift_ray.searching.tune_run import JobSearcher
    from lift_ray.settings.checks import read_space
    from lift_ray.storage.output import Output

    wanted = read_space("search_spaces/quickstart.yaml", {"search.trials": trials, "search.sampler": sampler})
    Path(out).mkdir(parents=True, exist_ok=True)
    study = Study(wanted, "d", open_storage(None, Path(out)))
    search = Search(study, Output(out), DATA)
    monitor = Monitor(search)
    search.watchers.append(monitor)
    settings = SlotSettings("d", Need(1, 1, 0), out, "simulation")
    engine = Engine(
        search,
        settings,
        lambda: slots,
        should_stop=lambda: False,
        on_step=lambda: monitor.tick(slots),
        keeps_slots=True,
    )
    searcher, marks = JobSearcher(engine), Marks(every)
    busy: deque[tuple[Any, Iterator[Any], int]] = deque()
    free, number, ends = deque(range(slots)), 0, time.monotonic() + 60 * minutes
    marks.note(0)
    with monitor:
        while not engine.stop_all() and not search.trials_are_over and time.monotonic() < ends:
            while isinstance(config := searcher.suggest(f"{number:08x}"), dict):
                trial = SimpleNamespace(trial_id=f"{number:08x}", status="PENDING", config=config)
                number += 1
                engine.on_trial_add(None, trial)
                chosen = engine.choose_trial_to_run(None)
                chosen.status = "RUNNING"
                busy.append((chosen, replies(chosen.config["job"]), free.popleft()))
            engine.choose_trial_to_run(None)
            trial, coming, slot = busy.popleft()
            if engine.on_trial_result(None, trial, {"reply": next(coming), "slot": slot}) == engine.CONTINUE:
                busy.append((trial, coming, slot))
                continue
            trial.status = "TERMINATED"
            engine.on_trial_complete(None, trial, {})
            free.append(slot)
            if not isinstance(trial.config["job"], IdleJob):
                marks.ended(search.num_ended)
    if engine.error is not None:
        raise engine.error
    marks.note(search.num_ended)
    return {
        "slots": slots,
        "sampler": sampler,
        "asked": trials,
        "trials": search.num_ended,
        "epochs": sum(len(row.history) for row in study.rows.values()),
        "windows": marks.windows(),
        "peak_mib": memory("VmHWM") >> 20,
        "journal_bytes": (Path(out) / "optuna.journal").stat().st_size,
        **resumed(wanted, out),
    }


def replies(job: Any) -> Iterator[Any]:
    """Yield what a slot replies to a job: for a trial as many metrics as a real epoch has, and accuracy by the settings."""
    from played import accuracy_of

    from lift_ray.epoch_metrics import METRICS, POSTHOC, EpochMetrics
    from lift_ray.searching.jobs import TrainJob
    from lift_ray.training.events import EpochEnded, JobDone, RunStarted

    if not isinstance(job, TrainJob):
        figures = [{f"{job.split}/mean_class_accuracy": 0.5} for _ in job.taus] if hasattr(job, "taus") else []
        while True:
            yield JobDone({"figures": figures, "parts": 1, "images": 1})
    random, epochs, best = np.random.default_rng(job.number), job.config["optim"]["epochs"], accuracy_of(job.config)

    def drawn(*names: str) -> dict[str, float]:
        return dict(zip(names, random.random(len(names)).tolist(), strict=True))

    yield RunStarted(1, epochs, 1, 0, 0, [], 8)
    for epoch in range(1, epochs + 1):
        value = best * (1 - 0.5**epoch)
        yield EpochEnded(
            EpochMetrics(
                epoch,
                train=drawn("loss", "accuracy", "images_per_s"),
                seconds=drawn("begin_s", "load_s", "features_s", "train_s", "data_wait_s", "evaluate_s", "save_s"),
                validation={**drawn(*METRICS, *POSTHOC), "mean_class_accuracy": value},
                trained_parameters=8,
                num_epochs=epochs,
            ),
            "",
        )
