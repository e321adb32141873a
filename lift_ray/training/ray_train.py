"""One run: on Ray Train workers, where it survives lost and hung workers, or in this process without Ray."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lift_ray.errors import BadInput, RunFailed, Stopped, last_line
from lift_ray.ray_runtime.autoscaler import autoscaler_config
from lift_ray.ray_runtime.capacity import Need
from lift_ray.storage.layout import SETTINGS
from lift_ray.storage.output import Output
from lift_ray.training.events import Event, RunAborted, RunStopped
from lift_ray.training.progress import Progress

STOP_WITHIN_S = 10.0
POLL_S = 0.3
NODE_START_S = (
    1800.0  # for a machine to be found, to boot and to install; where fewer workers may do, nobody waits so long
)
RESIZE_S = 20.0  # between two looks, of a run with fewer workers than it may have, at the cluster
MOST_CHARACTERS = 300  # of an error in one line


@dataclass(frozen=True)
class Job:
    """What the workers of a run get.

    Args:
        name: of the run.
        config: the settings, as a tree.
        dataset, out: URIs.
        num_cpus: cores of each worker.
        checkpoint_s, checkpoint_steps: a checkpoint after so many seconds and so many steps, besides each epoch's.
    """

    name: str
    config: dict[str, Any]
    dataset: str = field(repr=False)  # Ray's dashboard shows the rest, and a URL may hold credentials
    out: str = field(repr=False)
    num_cpus: int = 1
    checkpoint_s: float = 300.0
    checkpoint_steps: int | None = None


@dataclass(frozen=True)
class Patience:
    """What failures a run survives.

    Args:
        max_failures: how often workers may be lost.
        heartbeat_s: workers that are silent for longer are taken for hung, and ended.
    """

    max_failures: int = 3
    heartbeat_s: float = 1800.0


def train_alone(job: Job, progress: Progress) -> None:
    """Train in this process, on its GPU if it has one. Raises BadInput, and RunFailed, also when SIGTERM comes."""
    import torch

    from lift_ray.methods.world import Ranks
    from lift_ray.training.loop import StopAsked, stop_on_sigterm, told_to_stop

    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    try:
        ranks = Ranks.alone(use_gpu=torch.cuda.is_available(), num_cpus=job.num_cpus)
        _train(job, ranks, progress.take, lambda: "SIGTERM" if told_to_stop.is_set() else "")
    except StopAsked as asked:
        raise _stopped(progress, str(asked), asked.checkpoint) from None
    except RunFailed as error:
        raise RunFailed(f"{error}{_kept(progress)}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(job: Job, ranks: Any, tell: Callable[[Event], None], stop_asked: Callable[[], str]) -> None:
    from lift_ray.settings.run import RunConfig
    from lift_ray.training.checkpoint_manager import CheckpointManager
    from lift_ray.training.loop import train
    from lift_ray.training.run import Run
    from lift_ray.training.workspace import Workspace

    output = Output(job.out)
    if not output.holds(SETTINGS):
        raise BadInput(
            f"{output}: must be storage that every worker reaches, but one on {os.uname().nodename} finds no "
            f"{SETTINGS} there; give a shared folder or a URL as --out"
        )
    run = Run(RunConfig.model_validate(job.config), Workspace(job.dataset, ranks))
    train(run, CheckpointManager(output, job.checkpoint_s, job.checkpoint_steps), tell, stop_asked)


def train_worker(settings: dict[str, Any]) -> None:
    """What every rank runs under Ray Train."""
    import ray
    import ray.train
    import torch
    from ray.train.torch import get_device

    from lift_ray.methods.world import Ranks
    from lift_ray.training.loop import StopAsked, told_to_stop

    job, board = settings["job"], settings["board"]
    me = ray.get_runtime_context().current_actor
    ray.get(me.execute.remote(_stop_on_sigterm))  # signals are a matter of the main thread, and this is not it
    if not ray.get(board.join.remote(me)):
        return
    context = ray.train.get_context()
    torch.set_num_threads(job.num_cpus)
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device(), max(1, job.num_cpus - 1))
    link = ChannelClient(board)
    try:
        _train(job, ranks, link.tell if ranks.is_first else lambda message: None, link.stop_asked)
    except StopAsked as asked:
        if not told_to_stop.is_set():
            ray.get(board.tell.remote(RunStopped(str(asked), asked.checkpoint)))
            time.sleep(
                STOP_WITHIN_S
            )  # the driver ends now, and this with it; Ray Train must not start workers meanwhile
            return
        raise RunFailed(f"told to stop by {asked}, and wrote {asked.checkpoint}") from None
    except (BadInput, RunFailed) as error:
        ray.get(board.tell.remote(RunAborted(str(error), isinstance(error, BadInput))))
        if ranks.world_size > 1:
            raise  # other ranks may wait for this one; Ray Train ends them, and nobody finds work at the second try


def _stop_on_sigterm() -> None:
    from lift_ray.training.loop import stop_on_sigterm

    stop_on_sigterm()


class ChannelClient:
    """A worker's side of the board. Nothing waits for an answer: it is looked at when it is there."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self._answer: Any = None

    def tell(self, message: Event) -> None:
        """Send a message."""
        self._answer = self.board.tell.remote(message)

    def stop_asked(self) -> str:
        """Why to stop now; "" to go on."""
        import ray

        from lift_ray.training.loop import told_to_stop

        if told_to_stop.is_set():
            return "SIGTERM"
        if self._answer is None or not ray.wait([self._answer], timeout=0)[0]:
            return ""
        answer, self._answer = ray.get(self._answer), None
        return str(answer)


def train_on_workers(job: Job, need: Need, min_workers: int, patience: Patience, progress: Progress) -> None:
    """Train on `need.workers` Ray Train workers, on at least `min_workers` when the cluster shrinks.

    Raises:
        BadInput: settings that only a worker could find wrong.
        RunFailed: the loss diverged, workers kept failing, storage or disk did, or SIGTERM came.
    """
    import ray

    from lift_ray.training.loop import stop_on_sigterm, told_to_stop
    from lift_ray.training.run_channel import new_channel

    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        before = signal.getsignal(signal.SIGTERM)
        stop_on_sigterm()
    board = new_channel(job.name)
    fitting = Fitting(job, need, min_workers, patience.max_failures, board)
    fitting.start()
    try:
        stop_at: float | None = None
        while fitting.is_alive():
            fitting.join(POLL_S)
            messages, silent_s = ray.get(board.take.remote())
            for message in messages:
                progress.take(message)
            if silent_s > patience.heartbeat_s:
                ray.get(board.kill_workers.remote(f"the workers gave no sign of life for {patience.heartbeat_s:g} s"))
            if told_to_stop.is_set() and stop_at is None:
                is_running = ray.get(board.ask_stop.remote("SIGTERM"))
                stop_at = time.monotonic() + (STOP_WITHIN_S if is_running else 0.0)
            if stop_at is not None and (progress.halted or time.monotonic() >= stop_at):
                raise _stopped(progress, "SIGTERM", progress.halted.checkpoint if progress.halted else "")
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    for message in ray.get(board.take.remote())[0]:
        progress.take(message)
    if progress.problem and progress.problem.is_bad_input:
        raise BadInput(progress.problem.line)
    if progress.problem:
        raise RunFailed(progress.problem.line + _kept(progress))
    if fitting.error is not None:
        raise RunFailed(
            f"{progress.output}: the workers must finish, but failed more than {patience.max_failures} times; the last error: "
            f"{last_line(fitting.error)[:MOST_CHARACTERS]}; train again with --resume"
        )


class Fitting(threading.Thread):
    """Ray Train at work, in a thread, so that the main thread can show what happens and hear signals."""

    def __init__(self, job: Job, need: Need, min_workers: int, max_failures: int, board: Any) -> None:
        super().__init__(daemon=True)
        self.job, self.need, self.min_workers, self.max_failures, self.board = (
            job,
            need,
            min_workers,
            max_failures,
            board,
        )
        self.error: BaseException | None = None

    def run(self) -> None:
        """To the end, or to a failure too many, which is then in `error`."""
        import ray.train
        from ray.train.torch import TorchTrainer

        from lift_ray.ray_runtime.session import dashboard_url

        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        if dashboard_url():
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's /api/train/v2/runs/v1
        if self.min_workers >= self.need.workers and autoscaler_config():
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(NODE_START_S))
        board, need = self.board, self.need

        class Failures(ray.train.UserCallback):  # type: ignore[misc]
            """Tells the board that workers were lost."""

            def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
                """Ray Train calls this before it starts workers anew."""
                ray.get(board.failed.remote(_reason(worker_exceptions)))

        # Ray Train keeps its own notes here; the run's checkpoints are ours, so nothing of it is needed later.
        with tempfile.TemporaryDirectory(prefix="lift_ray-") as notes:
            trainer = TorchTrainer(
                train_worker,
                train_loop_config={"job": self.job, "board": board},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=need.workers if self.min_workers >= need.workers else (self.min_workers, need.workers),
                    use_gpu=bool(need.gpus),
                    resources_per_worker=need.bundle(),
                    elastic_resize_monitor_interval_s=RESIZE_S,
                ),
                run_config=ray.train.RunConfig(
                    name=re.sub(r"[^\w.-]", "-", self.job.name),
                    storage_path=notes,
                    callbacks=[Failures()],
                    failure_config=ray.train.FailureConfig(
                        max_failures=self.max_failures, controller_failure_limit=self.max_failures
                    ),
                ),
            )
            try:
                trainer.fit()
            except Exception as error:
                self.error = error


def _reason(errors: dict[int, Exception]) -> str:
    """The first worker that failed by itself, and not because another was gone."""
    lines = [(rank, last_line(error)[:MOST_CHARACTERS]) for rank, error in sorted(errors.items())]
    rank, line = min(lines, key=lambda pair: "gloo" in pair[1] or "NCCL" in pair[1])
    return f"worker {rank}: {line}"


def _stopped(progress: Progress, reason: str, checkpoint: str) -> Stopped:
    last = checkpoint or progress.checkpoint
    kept = f"the last checkpoint is {last}" if last else "there was no checkpoint yet"
    return Stopped(f"{progress.output}: stopped by {reason}; {kept}; go on with --resume")


def _kept(progress: Progress) -> str:
    return f"; checkpoints/{progress.checkpoint} is the last good one" if progress.checkpoint else ""
