"""Training of the members of `method: backdoor`: each is an ordinary run in OUT/members/NAME; one checkpoint combines them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import FINAL_CHECKPOINT, RECORD, WEIGHTS
from lift_ray.storage.output import Output
from lift_ray.text import say
from lift_ray.training import checkpoint
from lift_ray.training.progress import Progress


class MemberProgress(Progress):
    """Progress of one of several concurrent runs: its lines start with its name, and it has no progress bar.

    Args:
        output: destination of its figures.
        name: name of the member.
    """

    def __init__(self, output: Output, name: str) -> None:
        super().__init__(output)
        self.name, self._bar.disable = name, True

    def _say(self, text: str) -> None:
        super()._say(f"{self.name}: {text}")


def place_of(output: Output, name: str) -> Output:
    """Return the result folder of a member: OUT/members/NAME."""
    return output.inside(f"members/{name}")


def train_members(
    names: Mapping[str, Output],
    train: Callable[[str, Output], object],
    at_once: int,
) -> None:
    """Train the members that are not finished.

    Args:
        names: result folder of each member, by name.
        train: starts or resumes the training of one member, and returns at its end.
        at_once: number of members that are trained at once.

    Raises the error of the first member that failed, in their order, after all have ended.
    """
    waiting = {}
    for name, output in names.items():
        if output.holds(f"{FINAL_CHECKPOINT}/{RECORD}"):
            say(f"{name}: already finished")
        else:
            waiting[name] = output
    if at_once == 1:
        for name, output in waiting.items():
            train(name, output)
        return
    from lift_ray.training.loop import stop_on_sigterm, told_to_stop

    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    try:
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(train, name, output) for name, output in waiting.items()]
            try:
                wait(futures)
            except BaseException:
                # Each training writes a checkpoint and ends; leaving the pool waits for that.
                told_to_stop.set()
                raise
        for future in futures:
            future.result()
    finally:
        signal.signal(signal.SIGTERM, before)


def bind(config: RunConfig, names: Mapping[str, Output], output: Output) -> None:
    """Write OUT/checkpoint with the weights of the finished members, under their names. Raises BadInput and RunFailed.

    Args:
        config: settings of the ensemble.
        names: result folder of each member, by name.
        output: OUT.
    """
    tensors: dict[str, Any] = {}
    history: list[dict[str, float]] = []
    for name, place in names.items():
        with place.fetched(FINAL_CHECKPOINT) as folder:
            record = checkpoint.read_record(folder)
            tensors |= {f"{name}/{key}": tensor for key, tensor in checkpoint.read_tensors(folder / WEIGHTS).items()}
        train_s = sum(epoch.get("time/train_s", 0.0) for epoch in record.history)
        history.append({"epoch": len(history) + 1, "time/train_s": train_s})
    record = replace(
        record,
        config=config.to_dict(),
        digest=config.digest(),
        epoch=len(names),
        step=0,
        metrics={},
        history=history,
        seconds={},
        scaler={},
    )
    with output.staged(FINAL_CHECKPOINT, RECORD) as folder:
        checkpoint.save(folder, tensors, record)
