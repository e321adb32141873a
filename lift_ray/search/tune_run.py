"""Ray Tune runs the jobs of a search: one `Tuner.fit()` for all of them, from the first trial to the last evaluation.

It uses three of Tune's extension points, and nothing private:

* a `Searcher` hands out jobs as they come, and has nothing to give while all slots are busy;
* a `TrialScheduler` stores each reply and answers whether the slot continues; it is also the `Stopper` (engine.py);
* a `Trainable` that is reused is the slot (slot.py).

Tune's trial is a job of ours. Its own memory is not used: results and snapshots go to a temporary folder that is never read. A
driver that is killed loses nothing, because Optuna's storage has every report, and the next driver builds a new Tuner over it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from lift_ray.errors import RunFailed, last_line
from lift_ray.ray_runtime.patches import aws_keys_stay_here
from lift_ray.search.engine import MAX_FAILURES, Engine
from lift_ray.search.slot import Slot

MAX_TUNERS = 3
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they cost 0.03 to 0.06 s a trial; nobody reads what they write
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # snapshots are never read, and cost 0.14 to 0.34 s each
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # the limit is in JobSearcher.suggest
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # interrupts.py has ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class JobSearcher(Searcher):  # type: ignore[misc]
    """Hands out the jobs of an engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Tune's own metric and space are not used."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next job; None when there is nothing to do now."""
        with self.engine.kept():
            return self.engine.next_config(trial_id)
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune gives a job up."""
        if error:
            with self.engine.kept():
                self.engine.gave_up(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Optuna's storage has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as no Tuner is ever restored."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing."""

    def __getstate__(self) -> dict[str, Any]:
        """As of the engine."""
        return {}


def run_jobs(engine: Engine, callbacks: Sequence[tune.Callback] = (), slot_class: type[Slot] = Slot) -> None:
    """Run a search's jobs until it is over, or is to stop.

    Args:
        slot_class: what does them.
        callbacks: of the user. They hear of every job: `trial.config["job"]` is a TrainJob for a trial.

    Raises what ended the search early: BadInput, RunFailed, or ray.tune.TuneError for what a callback raised.
    """
    for tuners in range(1, MAX_TUNERS + 1):
        try:
            _fit(engine, callbacks, slot_class)
        except RuntimeError as error:
            # Tune knows lost actors, but not one that Ray's memory monitor killed: its loop ends with this error.
            if engine.error is None and tuners == MAX_TUNERS:
                raise RunFailed(
                    f"Ray Tune must run the search, but: {last_line(error)}; add --resume to continue"
                ) from None
            engine.put_all_back()
        else:
            break
        if engine.error is not None:
            break
    if engine.error is not None:
        raise engine.error


def _fit(engine: Engine, callbacks: Sequence[tune.Callback], slot_class: type[Slot]) -> None:
    with _environment(), tempfile.TemporaryDirectory(prefix="lift_ray-tune-") as folder:
        tuner = tune.Tuner(
            slot_class,
            tune_config=tune.TuneConfig(
                search_alg=JobSearcher(engine),
                scheduler=engine,
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["job"].key,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                stop=engine,
                callbacks=list(callbacks),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # else a pickle for every job
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        tuner.fit()


@contextmanager
def _environment() -> Iterator[None]:
    """Tune's settings for the time of a fit, without AWS keys in what the dashboard shows."""
    logger = logging.getLogger("ray.tune")  # it would report, with tracebacks, what the search has a line for
    before, level = {name: os.environ.get(name) for name in ENVIRONMENT}, logger.level
    logger.setLevel(logging.CRITICAL)
    os.environ.update(ENVIRONMENT)
    try:
        with aws_keys_stay_here():
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
