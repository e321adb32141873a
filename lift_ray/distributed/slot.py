"""Warm slots: process groups that load the tower once and then serve one trial after another.

A slot is a placement group with an actor in each bundle. A trial is a message to them, an epoch another one; so a trial costs
no new process, and an early stop no clean-up. A slot that loses a process is replaced, and its trial goes on from its checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lift_ray.distributed.capacity import Need
from lift_ray.distributed.cluster import meeting_point
from lift_ray.distributed.metrics import SlotGauges
from lift_ray.errors import BadInput, RunFailed, last_line
from lift_ray.results.output import Output
from lift_ray.settings.run import RunConfig

if TYPE_CHECKING:
    from lift_ray.distributed.backdoor_trial import BackdoorTrial
    from lift_ray.distributed.ensemble import Ensemble
    from lift_ray.distributed.run import Run
    from lift_ray.distributed.trial import Trial

LOOK_S = 5.0  # between two looks at the cluster's size
MAX_START_FAILURES = 3
DIVERGED = "diverged"


@dataclass(frozen=True)
class Order:
    """A trial to take up.

    Args:
        number: of the trial; its checkpoints are OUT/checkpoints/NUMBER/epoch-N.
        config: the settings of its run.
        resume: go on from its last checkpoint, if there is one.
    """

    number: int
    config: dict[str, Any]
    resume: bool = False


@dataclass(frozen=True)
class Exam:
    """An evaluation: settings, the checkpoint's folder in OUT (None when nothing was trained), and splits."""

    config: dict[str, Any]
    checkpoint: str | None
    splits: list[str]


def folder_of(number: int, epoch: int) -> str:
    """Where, inside OUT, the checkpoint of a trial is."""
    return f"checkpoints/{number:04d}/epoch-{epoch:04d}"


class Worker:
    """One rank of a slot.

    torch is imported here and not with the module: the driver has no use for it.
    """

    def __init__(self, dataset: str, need: Need, rank: int, out: str, study: str, slot: int) -> None:
        self.dataset, self.need, self.rank, self.out = dataset, need, rank, out
        self.gauges = SlotGauges(study, slot)
        self.trial: Trial | BackdoorTrial | None = None

    def address(self) -> tuple[str, int]:
        """Where the slot's process group can meet."""
        return meeting_point()

    def open(self, address: tuple[str, int] | None) -> None:
        """Load what trials share, and form the slot's process group. Raises BadInput."""
        from lift_ray.distributed.ranks import Ranks, join_group
        from lift_ray.distributed.warm import Warm

        began = time.monotonic()
        ranks = Ranks.alone(use_gpu=bool(self.need.gpus), num_cpus=self.need.cpus)
        if address is not None:
            join_group(self.rank, self.need.workers, *address, ranks.device)
            ranks = Ranks(self.rank, self.need.workers, ranks.device, ranks.num_threads)
        self.output, self.warm = Output(self.out), Warm(self.dataset, ranks)
        self.began_s, self.loaded_s = time.monotonic() - began, 0.0

    def begin(self, order: Order) -> dict[str, Any]:
        """Take up a trial; returns num_epochs, trained_parameters, and the figures of the epochs its checkpoint has.

        Raises BadInput.
        """
        from lift_ray.distributed.backdoor_trial import trial_of
        from lift_ray.distributed.loop import Pulse

        began = time.monotonic() - self.began_s
        self.order = order
        self.trial = trial_of(RunConfig.model_validate(order.config), self.warm, self.output)
        if order.resume:
            self._restore(order)
        self.trial.pulse = Pulse(self.trial, self.gauges.take, lambda: "")
        self.epochs = self.trial.epochs()
        self.times = {"time/begin_s": time.monotonic() - began, "time/load_s": self.warm.load_s - self.loaded_s}
        self.began_s, self.loaded_s = 0.0, self.warm.load_s
        return {
            "num_epochs": self.trial.num_epochs,
            "trained_parameters": self.trial.num_trained,
            "history": self.trial.history,
        }

    def _restore(self, order: Order) -> None:
        from lift_ray.distributed.checkpoint import RECORD

        assert self.trial is not None
        folder = f"checkpoints/{order.number:04d}"
        names = [
            name for name in self.output.names(folder) if name[-4:].isdigit()
        ]  # others are of a process that was killed
        whole = [name for name in names if self.output.holds(f"{folder}/{name}/{RECORD}")]
        if whole:
            with self.output.fetched(f"{folder}/{max(whole)}") as path:
                self.trial.load(path)

    def epoch(self) -> dict[str, Any]:
        """Train, evaluate and save one epoch; returns its figures, or {DIVERGED: how}. Raises RunFailed when it cannot be saved."""
        from lift_ray.distributed.checkpoint import RECORD

        assert self.trial is not None
        try:
            figures = next(self.epochs)
        except RunFailed as error:
            return {DIVERGED: str(error)}
        figures |= {**self.times, "num_epochs": self.trial.num_epochs}
        self.times = dict.fromkeys(self.times, 0.0)
        if self.rank == 0:
            self.gauges.epoch_done(figures)
            began, epoch = time.monotonic(), int(figures["epoch"])
            with self.output.staged(folder_of(self.order.number, epoch), RECORD) as folder:
                self.trial.save(folder)
            if epoch > 1:
                self.output.remove(folder_of(self.order.number, epoch - 1))
            figures["time/save_s"] = time.monotonic() - began
        return dict(figures)

    def examine(self, exam: Exam, keep: str) -> dict[str, float]:
        """Metrics of a model on some splits; what it makes of each test image goes to the folder `keep` in OUT."""
        from lift_ray.distributed.predictions import evaluate_each, write_predictions

        run = self._trained(exam)
        figures: dict[str, float] = {"trained_parameters": run.num_trained}
        for split in exam.splits:
            found, table = evaluate_each(run, split)
            figures |= found
            if split == "test" and self.rank == 0:
                write_predictions(table, self.output, keep)
        return figures

    def cross_examine(self, exam: Exam) -> dict[str, Any]:
        """Test metrics of the models of `method: backdoor` together, and the report of `Ensemble.report`."""
        run = cast("Ensemble", self._trained(exam))
        return {**run.evaluate("test"), "report": run.report("test")}

    def tau_curve(self, exam: Exam) -> list[dict[str, float]]:
        """Validation metrics of a model for each tau after training."""
        from lift_ray.distributed.trial import TAUS

        return [
            {"tau": tau, **figures}
            for tau, figures in zip(TAUS, self._trained(exam).evaluate_taus("validation", TAUS), strict=True)
        ]

    def _trained(self, exam: Exam) -> Run:
        from lift_ray.distributed import checkpoint
        from lift_ray.distributed.ensemble import run_of

        run = run_of(RunConfig.model_validate(exam.config), [self.warm])
        if exam.checkpoint is not None:
            with self.output.fetched(exam.checkpoint) as folder:
                checkpoint.load_weights(folder, run.model)
        return run


class Slot:
    """The driver's side of a slot: its actors, and the answers it waits for."""

    def __init__(self, dataset: str, need: Need, out: str, study: str, number: int) -> None:
        self.number = number
        self.group = placement_group([need.bundle()] * need.workers)
        remote = ray.remote(num_cpus=need.cpus, num_gpus=need.gpus)(Worker)
        self.workers = [
            remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, rank))
            .remote(dataset, need, rank, out, study, number)
            for rank in range(need.workers)
        ]  # fmt: skip
        self.asked = "open"
        self.job: Any = None  # what the caller wants to know with the answer
        self.waiting = self._ask("open", self.workers[0].address.remote() if need.workers > 1 else None)

    def ask(self, method: str, job: Any, *args: Any) -> None:
        """Send a message to every worker."""
        self.asked, self.job = method, job
        self.waiting = self._ask(method, *args)

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return [getattr(worker, method).remote(*args) for worker in self.workers]

    @property
    def is_idle(self) -> bool:
        """Open, and waiting for nothing."""
        return not self.waiting

    def close(self) -> None:
        """End the processes and give back what they held."""
        for worker in self.workers:
            ray.kill(worker)
        remove_placement_group(self.group)


@dataclass(frozen=True)
class Answer:
    """What a slot did: `asked`, of `job`, gave `value`, or failed with `error`; the slot is then gone."""

    slot: Slot
    asked: str
    job: Any
    value: Any = None
    error: Exception | None = None


class Pool:
    """As many slots as the cluster holds, and no more than wanted; looked at anew as the cluster grows and shrinks.

    Args:
        dataset: URI.
        out: the search's Output, as a URL.
        size: how many slots there should be now.
        shrinks: close those that are too many and have nothing to do, so that their nodes can go.
        study: its name, the metrics' tag.

    Attributes:
        lost: how many slots ended that should not have.
    """

    def __init__(
        self, dataset: str, need: Need, out: str, size: Callable[[], int], shrinks: bool = False, study: str = ""
    ) -> None:
        self.dataset, self.need, self.out, self.size, self.shrinks = dataset, need, out, size, shrinks
        self.study, self.lost = study, 0
        self.slots: list[Slot] = []
        self._looked_at, self._failed_starts = -LOOK_S, 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self.slots:
            slot.close()
        self.slots = []

    def idle(self) -> list[Slot]:
        """Slots that can be asked."""
        if time.monotonic() - self._looked_at >= LOOK_S or not self.slots:
            self._looked_at = time.monotonic()
            more = self.size() - len(self.slots)
            for _ in range(more):
                number = min(set(range(len(self.slots) + 1)) - {slot.number for slot in self.slots})
                self.slots.append(Slot(self.dataset, self.need, self.out, self.study, number))
            if self.shrinks:
                self._close(-more)
        return [slot for slot in self.slots if slot.is_idle]

    def _close(self, number: int) -> None:
        """End so many slots, or as many as have nothing to do; first those that are not open yet."""
        free = sorted(
            (slot for slot in self.slots if slot.is_idle or slot.asked == "open"), key=lambda slot: slot.is_idle
        )
        for slot in free[: max(0, number)]:
            self.slots.remove(slot)
            slot.close()

    @property
    def is_busy(self) -> bool:
        """Does a slot work on a job?"""
        return any(slot.waiting and slot.asked != "open" for slot in self.slots)

    def wait(self, timeout_s: float = 1.0) -> list[Answer]:
        """The answers that are there, after at most so long.

        Raises BadInput that a worker found, and RunFailed when results cannot be written or slots do not start.
        """
        refs = [ref for slot in self.slots for ref in slot.waiting]
        if not refs:
            time.sleep(min(timeout_s, 0.05))
            return []
        ready = set(ray.wait(refs, num_returns=1, timeout=timeout_s)[0])
        ready |= set(ray.wait(refs, num_returns=len(refs), timeout=0)[0])
        return [
            answer for slot in list(self.slots) if slot.waiting and (answer := self._answer(slot, ready)) is not None
        ]

    def _answer(self, slot: Slot, ready: set[Any]) -> Answer | None:
        """A slot's answer when all its workers have given theirs, or one of them failed."""
        here = [ref for ref in slot.waiting if ref in ready]
        try:
            values = ray.get(here)
        except BadInput as error:
            raise BadInput(_first_line(error)) from None
        except RunFailed as error:
            raise RunFailed(_first_line(error)) from None
        except Exception as error:  # a process that was killed, a node that was lost, or a bug in a worker
            return self._broken(slot, error)
        if len(here) < len(slot.waiting):
            return None
        slot.waiting = []
        if slot.asked == "open":
            self._failed_starts = 0
            return None
        return Answer(slot, slot.asked, slot.job, values[0])

    def _broken(self, slot: Slot, error: Exception) -> Answer | None:
        self.slots.remove(slot)
        slot.close()
        self.lost += 1
        self._looked_at = -LOOK_S
        if slot.asked != "open":
            return Answer(slot, slot.asked, slot.job, error=error)
        self._failed_starts += 1
        if self._failed_starts >= MAX_START_FAILURES:
            raise RunFailed(
                f"slots must start, but {self._failed_starts} in a row did not; the last error: {last_line(error)}"
            )
        return None


def _first_line(error: Exception) -> str:
    """What a worker raised, without Ray's report of where."""
    cause = getattr(error, "cause", None)
    return str(cause if cause is not None else error)


def in_one_line(error: Exception) -> str:
    """What ended a slot: the last line of what a worker raised, or that it was lost."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return last_line(error)
    return "its processes were lost"
