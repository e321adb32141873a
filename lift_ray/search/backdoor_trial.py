"""A trial of `method: backdoor`: in each of its epochs one more model joins, trained now or by an earlier trial."""

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
    """The trial of any method.

    Args:
        output: of the search.
    """
    if not isinstance(config.method, BackdoorConfig):
        return Trial(config, warm)
    trial = BackdoorTrial.of(config, [warm])
    trial.output = output
    return trial


class BackdoorTrial(Ensemble):
    """Several models inside a search; made by `of`.

    A trained model is kept as OUT/members/DIGEST and belongs to all trials whose settings ask for it. Two slots that need the
    same one at the same moment both train it, with the same result.

    Attributes:
        output: of the search.
    """

    output: Output

    @property
    def num_epochs(self) -> int:
        """The number of models."""
        return len(self.runs)

    def epochs(self) -> Iterator[Figures]:
        """Let the models join that are not there yet; yields validation of those that are, together, after each.

        Raises RunFailed when the loss of one was not finite.
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
        """Fetch a model that is trained already, or train it; returns where the time went."""
        place = f"members/{run.config.digest()}"
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
        """Go on from a checkpoint of the same settings. Raises BadInput, naming the first setting that differs."""
        record = checkpoint.read_record(folder)
        checkpoint.check_same(folder, record, self.config.to_dict(), self.warm.dataset.class_names)
        checkpoint.load_weights(folder, self.model)
        self.epoch, self.metrics, self.history = record.epoch, record.metrics, record.history
