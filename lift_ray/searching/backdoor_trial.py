"""Trial of `method: backdoor`: each of its epochs adds one model, trained now or by an earlier trial."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from lift_ray.data.folds import SEARCHED
from lift_ray.ensembles.ensemble import ensemble_of
from lift_ray.epoch_metrics import EpochMetrics
from lift_ray.evaluation.evaluator import Evaluation, evaluate
from lift_ray.evaluation.metrics import PerClass
from lift_ray.settings.methods import BackdoorConfig
from lift_ray.settings.run import RunConfig
from lift_ray.settings.search import TAUS
from lift_ray.storage.layout import RECORD
from lift_ray.storage.output import Output
from lift_ray.training import checkpoint
from lift_ray.training.run import Callback, Run
from lift_ray.training.workspace import Workspace


def trial_of(config: RunConfig, workspace: Workspace, output: Output, fold: int = SEARCHED) -> Run | BackdoorTrial:
    """Return the trial for a run's method.

    Args:
        output: the search's.
        fold: the fold that the workspace holds out.
    """
    if isinstance(config.method, BackdoorConfig):
        return BackdoorTrial(config, config.method, workspace, output, fold)
    return Run(config, workspace, TAUS)


class BackdoorTrial:
    """Training of an ensemble, model by model.

    A trained model is kept as OUT/members/DIGEST and shared by all trials with the same settings for it. If two slots need the
    same model at the same time, both train it, with the same result.

    Args:
        config: settings of the trial.
        method: its method.
        workspace: the loaded backbones and data.
        output: the search's.
        fold: the fold that the workspace holds out.

    Attributes:
        epoch: number of models that are there.
        history: metrics of the ensemble after each model.
    """

    step = steps_per_epoch = 0

    def __init__(
        self, config: RunConfig, method: BackdoorConfig, workspace: Workspace, output: Output, fold: int = SEARCHED
    ) -> None:
        self.place = "members" if fold == SEARCHED else f"members/fold-{fold}"
        self.config, self.workspace, self.output, self.ranks = config, workspace, output, workspace.ranks
        self.runs = {name: Run(member, workspace) for name, member in config.members().items()}
        self.predictor = ensemble_of(method, {name: run.predictor for name, run in self.runs.items()})
        self.epoch = 0
        self.history: list[EpochMetrics] = []
        self.per_class: PerClass | None = None
        self.callback: Callback = lambda at, evaluated=0.0: None

    @property
    def num_epochs(self) -> int:
        """The number of models."""
        return len(self.runs)

    @property
    def num_trained(self) -> int:
        """Number of trained parameters of all models."""
        return self.predictor.num_trained

    def epochs(self) -> Iterator[EpochMetrics]:
        """Add the missing models one by one, and yield the metrics of the ensemble after each.

        Raises Diverged if the loss of a model is not finite.
        """
        for run in list(self.runs.values())[self.epoch :]:
            began = time.monotonic()
            seconds = self._join(run)
            self.epoch += 1
            self.predictor.in_use = self.epoch
            validation = self.evaluate("validation")
            self.history.append(
                EpochMetrics(
                    self.epoch,
                    seconds={"member_s": time.monotonic() - began, **seconds, "evaluate_s": validation.seconds},
                    validation=validation.metrics,
                    cost={"train_s": sum(metrics.seconds["train_s"] for metrics in run.history)},
                    trained_parameters=self.num_trained,
                )
            )
            yield self.history[-1]

    def _join(self, run: Run) -> dict[str, float]:
        """Load a model that is already trained, or train it. Returns the seconds that training spent on each of its parts."""
        place = f"{self.place}/{run.config.digest()}"
        # The first rank decides for all: another slot may finish the model while the ranks look.
        if run.ranks.from_first("there" if self.output.holds(f"{place}/{RECORD}") else ""):
            with self.output.fetched(place) as folder:
                run.load(folder)
            return {}
        run.callback = self.callback
        run.history = [run.train_epoch() for _ in range(run.num_epochs)]
        if run.ranks.is_first:
            with self.output.staged(place, RECORD) as folder:
                run.save(folder)
        return {name: sum(metrics.seconds[name] for metrics in run.history) for name in run.seconds if run.history}

    def evaluate(self, split_name: str) -> Evaluation:
        """Evaluate the models that are there with the post-hoc adjustment of the settings, over all ranks."""
        found = evaluate(
            self.predictor,
            self.workspace.dataset.split(split_name),
            [self.config.evaluation.posthoc_tau],
            callback=lambda fraction: self.callback(self, fraction),
        )
        self.per_class = found.at_tau[0].per_class
        return found

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the models that are there, which are the same on every rank. Raises OSError."""
        counts = self.predictor.class_counts
        record = checkpoint.record_of(self.config, self.workspace.dataset, counts, self.history, self.epoch)
        # Without parameter groups, for which all ranks would have to be here.
        first = next(iter(self.runs.values())).predictor
        rows = first.per_class_rows(self.per_class) if self.per_class else []
        checkpoint.save(folder, self.predictor.stored(), record, per_class=rows)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of the same settings. Raises BadInput that names the first setting that differs."""
        record = checkpoint.read_record(folder)
        checkpoint.check_same(folder, record, self.config.to_dict(), self.workspace.dataset.class_names)
        checkpoint.load_weights(folder, self.predictor)
        self.epoch, self.history = record.epoch, [EpochMetrics.of(flat) for flat in record.history]
