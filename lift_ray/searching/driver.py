"""Driver of a search: connects the study, the slots and the watchers."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from lift_ray.errors import RunFailed, Stopped, last_line
from lift_ray.ray_runtime.autoscaler import autoscaler_config
from lift_ray.ray_runtime.capacity import Need
from lift_ray.ray_runtime.feature_exchange import start_exchange
from lift_ray.reporting.trial_rows import best_of
from lift_ray.searching.engine import Engine
from lift_ray.searching.final_comparison import SearchResult, none_finished
from lift_ray.searching.frozen_cuts import tunings
from lift_ray.searching.interrupts import Interrupts
from lift_ray.searching.jobs import SlotSettings
from lift_ray.searching.progress_table import Monitor, time_breakdown
from lift_ray.searching.refit import refit_all
from lift_ray.searching.result_files import write_best_so_far
from lift_ray.searching.search_data import SearchData
from lift_ray.searching.slot import Slot
from lift_ray.searching.state import Search, Watcher
from lift_ray.searching.study import Study
from lift_ray.searching.tune_run import run_jobs
from lift_ray.storage.output import Output
from lift_ray.terminal.tables import describe
from lift_ray.text import count, say
from lift_ray.tracking.prometheus import StudyMetrics

if TYPE_CHECKING:
    from ray.tune import Callback


def run_search(
    study: Study,
    dataset: str,
    need: Need,
    size: Callable[[], int],
    out: Output,
    interrupts: Interrupts,
    *,
    data: SearchData,
    show: Callable[[str], None] = lambda text: None,
    watchers: Sequence[Watcher] = (),
    callbacks: Sequence[Callback] = (),
    slot_class: type[Slot] = Slot,
) -> SearchResult:
    """Run all trials, confirm the best ones, and compare the winner with zero-shot and the baselines on the test split.

    Args:
        dataset: absolute URI.
        need: resources of a slot.
        size: returns the number of slots that fit the cluster, nodes that its autoscaler may add included.
        out: receives checkpoints and the table of trials.
        data: facts about the dataset.
        show: called once a second with a line of progress.
        watchers: notified about trials, like the table on the terminal.
        callbacks: callbacks of Ray Tune, for users of the Python API. They are notified about every job of a slot:
            `trial.config["job"]` is a `jobs.TrainJob` for a trial, whose results have figures at the end of each epoch, or a
            `jobs.Pack` of several trials, whose results have only `reply`.
        slot_class: Trainable that runs the jobs; tests pass one that trains nothing.

    Raises:
        BadInput: settings that only a worker can find invalid, for example a backbone that cannot be loaded.
        RunFailed: no trial finished, slots do not start, or results cannot be written.
        Stopped: a signal arrived. The best trial so far, if one has finished, is in OUT/best and OUT/best.yaml.
    """
    began = time.monotonic()
    search = Search(study, out, data)
    monitor = Monitor(search, show)

    @lru_cache(maxsize=1)
    def best_so_far(num_ended: int) -> str:
        return _write_best_so_far(search, dataset, out)

    def should_stop() -> bool:
        if interrupts.came:
            best_so_far(search.num_ended)  # before the slots stop, because SIGKILL may follow soon
        return interrupts.came

    def on_step() -> None:
        if study.beat():
            out.publish()
        monitor.tick(engine.num_slots)
        metrics.tick()

    exchange, _actor = start_exchange()  # it lives as long as this reference
    slot = SlotSettings(
        dataset,
        need,
        out.url,
        study.space.name,
        folds=search.data.folds,
        tunings=tunings(study.space),
        is_only=need.workers == 1 and study.space.scale.use_gpu == "auto" and size() == 1,
        exchange=exchange,
    )
    keeps_slots = not autoscaler_config()
    engine = Engine(search, slot, size, should_stop=should_stop, on_step=on_step, keeps_slots=keeps_slots)
    metrics = StudyMetrics(study.space, study.rows, engine)
    search.watchers += [monitor, *watchers]

    while True:
        interrupts.ask(lambda: say("stopping at the next step; interrupt again to stop at once"))
        with monitor:
            run_jobs(engine, callbacks, slot_class)
        if not (search.is_over and search.refits):
            break
        engine.put_all_back()  # the slots have ended, and their resources are free for Ray Train
        try:
            refit_all(search, dataset, need, interrupts, on_step)
        except Stopped:
            raise Stopped(best_so_far(search.num_ended), 128 + (interrupts.signum or signal.SIGTERM)) from None
    if not search.is_over:  # a signal arrived, or something else ended Tune
        raise Stopped(best_so_far(search.num_ended), 128 + interrupts.signum if interrupts.came else 1)
    times = time_breakdown(search.rows(), monitor, max(1, engine.num_slots), time.monotonic() - began)
    if (found := search.result(times)) is None:
        raise none_finished(search.rows(), out)
    return found


def _write_best_so_far(search: Search, dataset: str, out: Output) -> str:
    """Write OUT/best and OUT/best.yaml, and return the line that summarizes the stopped search."""
    best = choice.row if (choice := search.choice()) else best_of(search.rows(), search.space.objectives)
    found = "no trial has finished yet"
    if best is not None:
        found = f"the best so far is trial {best.number} ({describe(best.values)}), in {out}/best and {out}/best.yaml"
        try:
            write_best_so_far(search.space, dataset, best, out)
        except (RunFailed, OSError) as error:  # a full disk must not prevent the search from stopping
            found = f"the best so far, trial {best.number}, could not be written ({last_line(error)})"
    has_a_number = search.space.search.per_kind is None and search.space.search.sampler != "grid"
    fewer = has_a_number and 0 < search.num_ended < search.space.num_trials
    return (
        f"stopped with {search.num_ended} of {count(search.space.num_trials, 'trial')} done; {found}; "
        "add --resume to the command to continue"
        + (f", or --resume search.trials={search.num_ended} to compare the best of these" if fewer else "")
    )
