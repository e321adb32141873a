"""The driver of a search: trials from the study, to slots, figures back, and what becomes of each.

Each step writes to the study first. A driver that is killed between any two steps loses none, and does none twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from lift_ray.distributed.autoscaler import autoscaler_config
from lift_ray.distributed.capacity import Need
from lift_ray.distributed.checkpoint import RECORD, read_record
from lift_ray.distributed.conclusion import (
    Found,
    answer_together,
    best_of,
    compare,
    front_of,
    posthoc_curve,
    where_time_went,
)
from lift_ray.distributed.metrics import StudyMetrics
from lift_ray.distributed.monitor import Monitor
from lift_ray.distributed.schedulers import decide, takeovers
from lift_ray.distributed.seeds import Repeat, repeats, train_again, with_their_own
from lift_ray.distributed.slot import DIVERGED, Answer, Order, Pool, Slot, folder_of, in_one_line
from lift_ray.distributed.study import Study
from lift_ray.results.output import Output
from lift_ray.results.rows import TrialRow
from lift_ray.settings.run import apply_overrides
from lift_ray.settings.space import SpaceFile

MAX_FAILURES = 2


class Slots(Protocol):
    """What the driver asks of a pool of slots."""

    @property
    def is_busy(self) -> bool: ...

    def idle(self) -> list[Slot]: ...

    def wait(self, timeout_s: float = 1.0) -> list[Answer]: ...


class Watcher(Protocol):
    """Who is told what happens."""

    def started(self, row: TrialRow) -> None: ...

    def reported(self, row: TrialRow) -> None: ...

    def ended(self, row: TrialRow) -> None: ...


class Watchers:
    """Several that are told the same."""

    def __init__(self, each: Sequence[Watcher]) -> None:
        self.each = each

    def started(self, row: TrialRow) -> None:
        """A trial was handed to a slot."""
        for watcher in self.each:
            watcher.started(row)

    def reported(self, row: TrialRow) -> None:
        """An epoch is done."""
        for watcher in self.each:
            watcher.reported(row)

    def ended(self, row: TrialRow) -> None:
        """A trial ran to its end, was stopped early, or failed."""
        for watcher in self.each:
            watcher.ended(row)


class Search:
    """A study, the slots that train its trials, and whoever watches.

    Args:
        out: holds the trials' checkpoints.
    """

    def __init__(self, study: Study, slots: Slots, watcher: Watcher, out: Output) -> None:
        self.study, self.space, self.slots, self.watcher, self.out = study, study.space, slots, watcher, out
        self.failures: dict[int, int] = {}
        self.started: set[int] = set()  # by this driver

    def run(self) -> None:
        """Until every trial has ended. Raises BadInput when a slot finds one that no trial could use, and RunFailed."""
        for row in self.study.rows.values():
            if not row.has_ended and row.history:
                self._after_epoch(row, None)
        while True:
            if self.study.beat():
                self.out.publish()
            for slot in self.slots.idle():
                if (new := self._next()) is not None:
                    self._hand_out(slot, new)
            for answer in self.slots.wait():
                self._take(answer)
            if all(row.has_ended for row in self.study.rows.values()) and len(self.study.rows) >= self.space.num_trials:
                return
            if (
                not self.slots.is_busy
                and not self._to_come()
                and any(r.state == "paused" for r in self.study.rows.values())
            ):
                self._release()

    def _to_come(self) -> bool:
        waiting = any(row.state == "waiting" for row in self.study.rows.values())
        return waiting or len(self.study.rows) < self.space.num_trials

    def _next(self) -> TrialRow | None:
        """A trial that was interrupted or released, else a new one."""
        return next((row for row in self.study.rows.values() if row.state == "waiting"), None) or self.study.next()

    def _hand_out(self, slot: Slot, row: TrialRow) -> None:
        row.state = "running"
        order = Order(row.number, self.space.config(row.values).to_dict(), resume=True)
        slot.ask("begin", row, order)
        if row.number not in self.started:
            self.started.add(row.number)
            self.watcher.started(row)

    def _take(self, answer: Answer) -> None:
        row: TrialRow = answer.job
        if answer.error is not None:
            self._failed(row, answer.error)
        elif answer.asked == "begin":
            self._begun(answer.slot, row, answer.value)
        elif DIVERGED in answer.value:
            self._end(row, "failed", answer.value[DIVERGED], diverged=True)
        else:
            self._reported(row, answer.value)
            self._after_epoch(row, answer.slot)

    def _begun(self, slot: Slot, row: TrialRow, about: dict[str, Any]) -> None:
        row.num_epochs = about["num_epochs"]
        known = {"trained_parameters": about["trained_parameters"]}
        broken = {n: v for n, v in known.items() if (limit := self.space.constraints.get(n)) and limit.excess(v) > 0}
        if broken:
            error = ", ".join(f"{name} is {value:,.0f}" for name, value in broken.items())
            self._end(row, "infeasible", error, known=known)
            return
        for figures in about["history"][len(row.history) :]:  # saved, but the driver was gone before it heard
            self._reported(row, figures)
        self._after_epoch(row, slot)

    def _reported(self, row: TrialRow, figures: dict[str, float]) -> None:
        self.study.report(row, {name: value for name, value in figures.items() if isinstance(value, int | float)})
        self.watcher.reported(row)

    def _after_epoch(self, row: TrialRow, slot: Slot | None) -> None:
        """Go on in this slot, or wait for one where there is none; end, or pause."""
        if row.is_done:
            self._end(row, "finished")
            return
        decision = decide(self.space, row, list(self.study.rows.values()))
        if decision == "stop":
            self._end(row, "pruned")
        elif decision == "pause":
            row.state = "paused"
        elif slot is not None:
            slot.ask("epoch", row)

    def _failed(self, row: TrialRow, error: Exception) -> None:
        self.failures[row.number] = self.failures.get(row.number, 0) + 1
        if self.failures[row.number] > MAX_FAILURES:
            self._end(row, "failed", in_one_line(error))
        else:
            row.state = "waiting"

    def _end(
        self,
        row: TrialRow,
        state: str,
        error: str = "",
        *,
        diverged: bool = False,
        known: Mapping[str, float] | None = None,
    ) -> None:
        self.study.end(row, state, error, diverged=diverged, known=known)
        if row.state != "finished" and row.history:
            self.out.remove(f"checkpoints/{row.number:04d}")
        self.watcher.ended(row)

    def _release(self) -> None:
        """Population based training: the worst take over from the best, then all go on."""
        changes = takeovers(self.space, list(self.study.rows.values()))
        for number, change in changes.items():
            if change.source is not None:
                epoch = len(self.study.rows[number].history)
                take_over(self.out, folder_of(number, epoch), folder_of(change.source, epoch), change.values)
        self.study.release(changes)


def take_over(out: Output, target: str, source: str, values: Mapping[str, Any]) -> None:
    """Write the checkpoint of another trial as one of the run with these values: weights and optimiser stay as they are."""
    with out.fetched(source) as theirs, out.staged(target, RECORD) as mine:
        record = read_record(theirs)
        record.config = apply_overrides(record.config, dict(values))
        files = {file.name: file.read_bytes() for file in theirs.iterdir()}
        files[RECORD] = json.dumps(asdict(record), indent=1).encode()
        mine.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            temporary = mine / f"{name}.tmp"
            temporary.write_bytes(data)
            temporary.replace(mine / name)


def run_search(
    space: SpaceFile,
    dataset: str,
    need: Need,
    size: Callable[[], int],
    study: Study,
    out: Output,
    watchers: Sequence[Watcher] = (),
) -> Found:
    """Search, then compare the best with zero-shot and the start points on the test split.

    Args:
        dataset: URI, absolute.
        size: how many slots the cluster holds now.
        out: for checkpoints and the trials table.
        watchers: told what happens, beside the table on the terminal and Ray's metrics.

    Raises:
        BadInput: settings that only a worker could find wrong (a backbone that cannot be loaded, for example).
        RunFailed: no trial finished, or slots do not start.
    """
    began = time.monotonic()
    monitor = Monitor(space, study.rows, out)
    again: list[Repeat] = []

    def slots_now() -> int:
        to_come = sum(not row.has_ended for row in study.rows.values()) + space.num_trials - len(study.rows)
        return min(size(), max(1, to_come, len(again)))

    num_slots = slots_now()
    with Pool(dataset, need, out.url, slots_now, shrinks=bool(autoscaler_config()), study=space.name) as pool:
        with monitor:
            Search(study, pool, Watchers([monitor, StudyMetrics(space, study.rows, pool), *watchers]), out).run()
        rows = [study.rows[number] for number in sorted(study.rows)]
        best, searched_s = best_of(rows, space, out), time.monotonic() - began
        again += repeats(space, rows, best)
        others = train_again(again, pool)
        compared, posthoc = compare(space, pool, rows, best), posthoc_curve(space, pool, best)
        together = answer_together(space, pool, rows)
    times = where_time_went(rows, monitor, num_slots, searched_s, time.monotonic() - began)
    seeds = with_their_own(again, others, compared)
    return Found(rows, best, compared, front_of(rows, space), times, posthoc, seeds, together)
