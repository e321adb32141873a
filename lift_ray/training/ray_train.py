"""Training of one run: on Ray Train workers, where it survives lost and hung workers, or in this process without Ray."""

from __future__ import annotations

import os
import platform
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lift_ray.errors import BadInput, RunFailed, Stopped, last_line, one_line
from lift_ray.ray_runtime.autoscaler import autoscaler_config
from lift_ray.ray_runtime.capacity import Need
from lift_ray.storage.layout import SETTINGS
from lift_ray.storage.output import Output
from lift_ray.text import count
from lift_ray.training.events import Event, RunAborted, RunStopped
from lift_ray.training.progress import Progress

STOP_WITHIN_S = 10.0
POLL_S = 0.3
# A machine must be found, boot and install. A run that may start with fewer workers does not wait this long.
NODE_START_S = 1800.0
RESIZE_S = 20.0  # a run with fewer workers than allowed checks the cluster this often


@dataclass(frozen=True)
class Job:
    """Description of a run for its workers.

    Args:
        name: name of the run.
        config: settings, as a tree.
        dataset: URI of the dataset.
        out: URI of the result folder.
        num_cpus: cores of each worker.
        checkpoint_s: seconds between checkpoints, in addition to one after each epoch.
        checkpoint_steps: steps between checkpoints, in addition; None for none.
        train_on: images to train on, as in a run file.
    """

    name: str
    config: dict[str, Any]
    dataset: str = field(repr=False)  # Ray's dashboard shows the rest, and a URL may hold credentials
    out: str = field(repr=False)
    num_cpus: int = 1
    checkpoint_s: float = 300.0
    checkpoint_steps: int | None = None
    train_on: str = "train"


@dataclass(frozen=True)
class Patience:
    """Failures that a run survives.

    Args:
        max_failures: number of times that workers may be lost.
        heartbeat_s: seconds without an event after which workers count as hung and are killed.
    """

    max_failures: int = 3
    heartbeat_s: float = 1800.0


def train_alone(job: Job, progress: Progress) -> None:
    """Train in this process, on its GPU if it has one. Raises BadInput, and RunFailed, also after SIGTERM."""
    from lift_ray.methods.world import Ranks
    from lift_ray.model.device import best_device
    from lift_ray.training.loop import StopAsked, stop_on_sigterm, told_to_stop

    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    try:
        ranks = Ranks.on(best_device(), job.num_cpus)
        _train(job, ranks, progress.take, lambda: "SIGTERM" if told_to_stop.is_set() else "")
    except StopAsked as asked:
        raise _stopped(progress, str(asked), asked.checkpoint) from None
    except RunFailed as error:
        raise RunFailed(f"{error}{_kept(progress)}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(job: Job, ranks: Any, tell: Callable[[Event], None], stop_asked: Callable[[], str]) -> None:
    from lift_ray.data.folds import training_view
    from lift_ray.data.open import open_dataset
    from lift_ray.settings.run import RunConfig
    from lift_ray.training.checkpoint_manager import CheckpointManager, CheckpointPolicy
    from lift_ray.training.loop import train
    from lift_ray.training.run import Run
    from lift_ray.training.workspace import Workspace

    output = Output(job.out)
    if not output.holds(SETTINGS):
        raise BadInput(
            str(output),
            "must be storage that every worker can reach",
            but=f"a worker on {platform.node()} finds no {SETTINGS} there",
            remedy="use a shared folder or a URL as --out",
        )
    dataset = training_view(open_dataset(job.dataset), job.train_on)
    run = Run(RunConfig.model_validate(job.config), Workspace(dataset, ranks))
    policy = CheckpointPolicy(job.checkpoint_s, job.checkpoint_steps)
    train(run, CheckpointManager(output, policy), tell, stop_asked)


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one rank under Ray Train."""
    import ray
    import ray.train
    import torch
    from ray.train.torch import get_device

    from lift_ray.methods.world import Ranks
    from lift_ray.training.loop import StopAsked, told_to_stop
    from lift_ray.training.run import Diverged

    job, channel = settings["job"], settings["channel"]
    me = ray.get_runtime_context().current_actor
    # Only the main thread may set a signal handler, and Ray Train runs this function in another thread.
    ray.get(me.execute.remote(_stop_on_sigterm))
    if not ray.get(channel.join.remote(me)):
        return
    context = ray.train.get_context()
    torch.set_num_threads(job.num_cpus)
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device(), max(1, job.num_cpus - 1))
    client = ChannelClient(channel)
    try:
        _train(job, ranks, client.tell if ranks.is_first else lambda message: None, client.stop_asked)
    except StopAsked as asked:
        if not told_to_stop.is_set():
            ray.get(channel.tell.remote(RunStopped(str(asked), asked.checkpoint)))
            # The driver exits now, and this worker with it. Until then Ray Train must not start new workers.
            time.sleep(STOP_WITHIN_S)
            return
        raise RunFailed(f"stopped by {asked} after writing {asked.checkpoint}") from None
    except (BadInput, RunFailed) as error:
        diverged = isinstance(error, Diverged)
        ray.get(channel.tell.remote(RunAborted(str(error), isinstance(error, BadInput), diverged)))
        if ranks.world_size > 1:
            # Other ranks may wait for this one, so Ray Train must end them. The workers that it starts next find the run aborted
            # (RunChannel.join) and return at once.
            raise


def _stop_on_sigterm() -> None:
    from lift_ray.training.loop import stop_on_sigterm

    stop_on_sigterm()


class ChannelClient:
    """Client of a RunChannel in a worker. It never waits for a reply: it reads one when it has arrived."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self._reply: Any = None

    def tell(self, message: Event) -> None:
        """Send an event."""
        self._reply = self.channel.tell.remote(message)

    def stop_asked(self) -> str:
        """Return the reason to stop now; "" to continue."""
        import ray

        from lift_ray.training.loop import told_to_stop

        if told_to_stop.is_set():
            return "SIGTERM"
        if self._reply is None or not ray.wait([self._reply], timeout=0)[0]:
            return ""
        reply, self._reply = ray.get(self._reply), None
        return str(reply)


def train_on_workers(job: Job, need: Need, min_workers: int, patience: Patience, progress: Progress) -> None:
    """Train on `need.workers` Ray Train workers, or on at least `min_workers` if the cluster shrinks.

    Raises:
        BadInput: a mistake in the settings that only a worker can find.
        RunFailed: the loss diverged, workers failed too often, storage or disk failed, or SIGTERM came.
    """
    import ray

    from lift_ray.training.loop import stop_on_sigterm, told_to_stop
    from lift_ray.training.run_channel import new_channel

    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        before = signal.getsignal(signal.SIGTERM)
        stop_on_sigterm()
    channel = new_channel(job.name)
    fitting = Fitting(job, need, min_workers, patience.max_failures, channel)
    fitting.start()
    try:
        stop_at: float | None = None
        while fitting.is_alive():
            fitting.join(POLL_S)
            messages, silent_s = ray.get(channel.take.remote())
            for message in messages:
                progress.take(message)
            if silent_s > patience.heartbeat_s:
                ray.get(channel.kill_workers.remote(f"the workers were silent for {patience.heartbeat_s:g} s"))
            if told_to_stop.is_set() and stop_at is None:
                is_running = ray.get(channel.ask_stop.remote("SIGTERM"))
                stop_at = time.monotonic() + (STOP_WITHIN_S if is_running else 0.0)
            if stop_at is not None and (progress.halted or time.monotonic() >= stop_at):
                raise _stopped(progress, "SIGTERM", progress.halted.checkpoint if progress.halted else "")
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    for message in ray.get(channel.take.remote())[0]:
        progress.take(message)
    if progress.problem and progress.problem.is_bad_input:
        raise BadInput(progress.problem.line)
    if progress.problem:
        raise RunFailed(progress.problem.line + _kept(progress))
    if fitting.error is not None:
        raise RunFailed(
            f"{progress.output}: the workers failed more than {count(patience.max_failures, 'time')}, the last time with: "
            f"{one_line(last_line(fitting.error))}" + ("; continue with --resume" if progress.checkpoint else "")
        )


class Fitting(threading.Thread):
    """Thread that runs Ray Train, so that the main thread can show progress and handle signals."""

    def __init__(self, job: Job, need: Need, min_workers: int, max_failures: int, channel: Any) -> None:
        super().__init__(daemon=True)
        self.job, self.need, self.min_workers = job, need, min_workers
        self.max_failures, self.channel = max_failures, channel
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train to the end, or until workers have failed too often; the last error is then in `error`."""
        import ray.train
        from ray.train.torch import TorchTrainer

        from lift_ray.ray_runtime.session import dashboard_url

        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        if dashboard_url():
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's /api/train/v2/runs/v1
        if self.min_workers >= self.need.workers and autoscaler_config():
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(NODE_START_S))
        channel, need = self.channel, self.need

        class Failures(ray.train.UserCallback):  # type: ignore[misc]
            """Report lost workers to the channel."""

            def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
                """Ray Train calls this before it starts new workers."""
                ray.get(channel.failed.remote(_reason(worker_exceptions)))

        # Ray Train keeps its own state here. Checkpoints are written by lift_ray, so nothing of it is needed later.
        with tempfile.TemporaryDirectory(prefix="lift_ray-") as state:
            trainer = TorchTrainer(
                train_worker,
                train_loop_config={"job": self.job, "channel": channel},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=need.workers if self.min_workers >= need.workers else (self.min_workers, need.workers),
                    use_gpu=bool(need.gpus),
                    resources_per_worker=need.bundle(),
                    elastic_resize_monitor_interval_s=RESIZE_S,
                ),
                run_config=ray.train.RunConfig(
                    name=re.sub(r"[^\w.-]", "-", self.job.name),
                    storage_path=state,
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
    """Name the first worker that failed by itself, and not because another worker was gone."""
    lines = [(rank, one_line(last_line(error))) for rank, error in sorted(errors.items())]
    rank, line = min(lines, key=lambda pair: "gloo" in pair[1] or "NCCL" in pair[1])
    return f"worker {rank}: {line}"


def _stopped(progress: Progress, reason: str, checkpoint: str) -> Stopped:
    last = checkpoint or progress.checkpoint
    kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return Stopped(f"{progress.output}: stopped by {reason}; {kept}; continue with --resume")


def _kept(progress: Progress) -> str:
    return f"; the last good checkpoint is checkpoints/{progress.checkpoint}" if progress.checkpoint else ""
