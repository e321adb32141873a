"""One run on Ray Train workers: survives a lost worker, and resumes."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from lift_ray.distributed.capacity import Need
from lift_ray.distributed.checkpoint import FOLDER, keep
from lift_ray.errors import BadInput, RunFailed

MAX_FAILURES = 3
METRICS = "metrics.jsonl"


def train_worker(settings: dict[str, Any]) -> None:
    """What every rank runs: load, go on from the last checkpoint, train, report each epoch, test at the end."""
    import torch
    from ray.train.torch import get_device

    from lift_ray.distributed.ranks import Ranks
    from lift_ray.distributed.run import Run
    from lift_ray.distributed.warm import Warm
    from lift_ray.settings.run import RunConfig

    context, num_cpus = ray.train.get_context(), settings["num_cpus"]
    torch.set_num_threads(num_cpus)
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device(), max(1, num_cpus - 1))
    try:
        run = Run(RunConfig.model_validate(settings["config"]), Warm(settings["dataset"], ranks))
        if checkpoint := ray.train.get_checkpoint():
            with checkpoint.as_directory() as folder:
                run.load(Path(folder) / FOLDER)
        for figures in run.epochs():
            _report(run, figures)
        if "test" in run.warm.dataset.splits:
            ray.train.report({"epoch": run.epoch, **run.evaluate("test")})
    except (BadInput, RunFailed) as error:
        # Raised, it would be tried again MAX_FAILURES times; it is nothing that a retry can mend.
        ray.train.report({"problem": str(error), "bad_input": isinstance(error, BadInput)})


def _report(run: Any, figures: dict[str, float]) -> None:
    """Figures and a checkpoint from the first rank; Ray Train takes the folder over."""
    if not run.ranks.is_first:
        ray.train.report(figures)
        return
    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder) / FOLDER)
        ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(folder))


class Journal(ray.train.UserCallback):  # type: ignore[misc]
    """Writes the first rank's figures to metrics.jsonl, a line for each report.

    An epoch that is trained again after a failure replaces its line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Ray Train calls this when all ranks have reported."""
        new = metrics[0]
        is_test = any(name.startswith("test/") for name in new)
        lines = [
            old for old in read_metrics(self.path) if is_test or "problem" in new or old.get("epoch", 0) < new["epoch"]
        ]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*lines, new]))
        temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none when there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_training(
    config: dict[str, Any], dataset: str, need: Need, out: Path, show: Callable[[dict[str, Any]], None]
) -> tuple[Path, dict[str, Any]]:
    """Train on `need.workers` workers, going on from what OUT holds.

    Args:
        show: called with the figures of each epoch as they come.

    Returns:
        OUT/checkpoint, and the figures of the last report (the test split's, where the data set has one).

    Raises:
        BadInput: settings that only a worker could find wrong.
        RunFailed: the loss diverged, or workers kept failing.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    metrics = out / METRICS
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "dataset": dataset, "num_cpus": need.cpus},
        scaling_config=ray.train.ScalingConfig(
            num_workers=need.workers, use_gpu=bool(need.gpus), resources_per_worker=need.bundle()
        ),
        run_config=ray.train.RunConfig(
            name="train", storage_path=str(out), callbacks=[Journal(metrics)],
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )  # fmt: skip
    with Follower(metrics, show):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise RunFailed(
                f"{out}: the workers must finish, but failed more than {MAX_FAILURES} times; the last error: "
                f"{_last_line(error)}; train again with --resume"
            ) from None
    last, target = read_metrics(metrics)[-1], out / "checkpoint"
    if result.checkpoint:
        keep(result.checkpoint, target)
    if "problem" in last:
        metrics.write_text("".join(json.dumps(line) + "\n" for line in read_metrics(metrics)[:-1]))
        kept = f"; {target} is the last good checkpoint" if result.checkpoint else ""
        raise (BadInput if last["bad_input"] else RunFailed)(last["problem"] + kept)
    return target, last


class Follower:
    """Shows new lines of metrics.jsonl while the main thread waits for the workers."""

    def __init__(self, path: Path, show: Callable[[dict[str, Any]], None]) -> None:
        self.path, self.show = path, show
        self.shown = [line.get("epoch") for line in read_metrics(path)]
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self._new_lines()

    def _follow(self) -> None:
        while not self.stop.wait(0.5):
            self._new_lines()

    def _new_lines(self) -> None:
        for line in read_metrics(self.path):
            if "train/loss" in line and line["epoch"] not in self.shown:
                self.shown.append(line["epoch"])
                self.show(line)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
