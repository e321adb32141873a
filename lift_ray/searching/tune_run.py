"""Run the jobs of a search on Ray Tune: one `Tuner.fit()` for all of them, from the first trial to the last evaluation.

Three of Tune's public extension points are used:

* a `Searcher` hands out jobs one by one, and none while all slots are busy;
* a `TrialScheduler`, which is also the `Stopper`, stores each reply and decides whether the slot continues (engine.py);
* a reused `Trainable` is the slot (slot.py).

A trial of Tune is a job of ours. Tune's own persistence is not used: results and snapshots go to a temporary folder that is never
read. A driver that is killed loses nothing, because Optuna's storage has every report, and the next driver starts a new Tuner.
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
from lift_ray.searching.engine import MAX_FAILURES, Engine
from lift_ray.searching.slot import Slot

MAX_TUNERS = 3
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they cost 0.03 to 0.06 s per trial, and their files are never read
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # snapshots are never read, and cost 0.14 to 0.34 s each
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # JobSearcher.suggest limits them
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # interrupts.py installs ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class JobSearcher(Searcher):  # type: ignore[misc]
    """Searcher that hands out the jobs of an engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Accept any settings: Tune's own metric and space are not used."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next job; None if there is nothing to do now."""
        with self.engine.errors_kept():
            return self.engine.next_config(trial_id)
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the engine if Tune has given up a job."""
        if error:
            with self.engine.errors_kept():
                self.engine.gave_up(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: Optuna's storage has everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: no Tuner is ever restored."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: snapshots are never read."""

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles the searcher into snapshots that are never read."""
        return {}


def run_jobs(engine: Engine, callbacks: Sequence[tune.Callback] = (), slot_class: type[Slot] = Slot) -> None:
    """Run a search's jobs until it is over or is asked to stop.

    Args:
        callbacks: the user's callbacks of Ray Tune, notified about every job: `trial.config["job"]` is a TrainJob for a trial,
            or a Pack of several.
        slot_class: Trainable that runs the jobs.

    Raises:
        BadInput, RunFailed: the error that ended the search.
        ray.tune.TuneError: a callback raised an error.
    """
    for tuners in range(1, MAX_TUNERS + 1):
        try:
            _fit(engine, callbacks, slot_class)
        except RuntimeError as error:
            # Tune handles lost actors, but if Ray's memory monitor kills one, Tune's loop ends with this error.
            if engine.error is None and tuners == MAX_TUNERS:
                raise RunFailed(f"Ray Tune failed: {last_line(error)}; add --resume to continue") from None
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
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # otherwise Tune pickles every job
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        tuner.fit()


@contextmanager
def _environment() -> Iterator[None]:
    """Set Tune's environment variables during a fit, and keep AWS keys out of what the dashboard shows."""
    logger = logging.getLogger("ray.tune")  # it would print tracebacks of errors that the search reports in one line
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
