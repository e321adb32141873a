"""Trial of `method: backdoor`: each of its epochs adds one model, trained now or by an earlier trial."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from lift_ray.ensembles.ensemble import Ensemble
from lift_ray.search.trial import Trial
from lift_ray.settings.methods import BackdoorConfig
from lift_ray.settings.run import RunConfig
from lift_ray.storage.layout import RECORD
from lift_ray.storage.output import Output
from lift_ray.training import checkpoint
from lift_ray.training.run import Figures, Run
from lift_ray.training.workspace import Workspace


def trial_of(config: RunConfig, warm: Workspace, output: Output) -> Trial | BackdoorTrial:
    """Return the trial for a run's method.

    Args:
        output: the search's.
    """
    if not isinstance(config.method, BackdoorConfig):
        return Trial(config, warm)
    trial = BackdoorTrial.of(config, [warm])
    trial.output = output
    return trial


class BackdoorTrial(Ensemble):
    """Ensemble of several models in a search; created with `of`.

    A trained model is kept as OUT/members/DIGEST and shared by all trials with the same settings for it. If two slots need the
    same model at the same time, both train it, with the same result.

    Attributes:
        output: the search's.
    """

    output: Output

    @property
    def num_epochs(self) -> int:
        """The number of models."""
        return len(self.runs)

    def epochs(self) -> Iterator[Figures]:
        """Add the missing models one by one, and yield the validation figures of the ensemble after each.

        Raises:
            RunFailed: the loss of a model is not finite.
        """
        for run in list(self.runs.values())[self.epoch :]:
            began = time.monotonic()
            seconds = self._join(run)
            self.epoch += 1
            self.in_use = self.epoch
            self.metrics = self.evaluate("validation")
            self.history.append(
                {
                    "epoch": self.epoch,
                    "trained_parameters": self.num_trained,
                    "time/member_s": time.monotonic() - began,
                    "cost/train_s": sum(figures["time/train_s"] for figures in run.history),
                    **seconds,
                    **self.metrics,
                }
            )
            yield self.history[-1]

    def _join(self, run: Run) -> Figures:
        """Load a model that is already trained, or train it. Returns the seconds that training spent on each of its parts."""
        place = f"members/{run.config.digest()}"
        # The first rank decides for all: another slot may finish the model while the ranks look.
        if run.ranks.from_first("there" if self.output.holds(f"{place}/{RECORD}") else ""):
            with self.output.fetched(place) as folder:
                run.load(folder)
            return {}
        epochs = [run.train_epoch() for _ in range(run.num_epochs)]
        run.history = [{"epoch": number, **figures} for number, figures in enumerate(epochs, 1)]
        if run.ranks.is_first:
            with self.output.staged(place, RECORD) as folder:
                run.save(folder)
        return {name: sum(figures[name] for figures in epochs) for name in run.seconds if epochs}

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of the same settings. Raises BadInput that names the first setting that differs."""
        record = checkpoint.read_record(folder)
        checkpoint.check_same(folder, record, self.config.to_dict(), self.warm.dataset.class_names)
        checkpoint.load_weights(folder, self.model)
        self.epoch, self.metrics, self.history = record.epoch, record.metrics, record.history
