"""Run of a search, whose last validation also measures other post-hoc taus."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lift_ray.data.dataset import Split
from lift_ray.data.order import rank_slice
from lift_ray.evaluation.accumulator import TauGrid, halves_of
from lift_ray.settings.search import TAUS
from lift_ray.training.run import Figures, Run


class Trial(Run):
    """Run whose last epoch also reports validation/posthoc_... metrics, from the same logits as its validation metrics."""

    grid: TauGrid | None = None

    def end_epoch(self) -> Figures:
        """End an epoch as in `Run`; after the last one, add the post-hoc metrics."""
        self._open_grid(self.epoch + 1 == self.num_epochs)
        return self._with_posthoc(super().end_epoch())

    def validate_untrained(self) -> Figures:
        """Validate a model that is not trained, and add the post-hoc metrics."""
        self._open_grid(True)
        return self._with_posthoc(super().validate_untrained())

    def _open_grid(self, wanted: bool) -> None:
        self.grid = TauGrid(TAUS, self.class_counts, self.ranks.device) if wanted else None

    def _with_posthoc(self, figures: Figures) -> Figures:
        if self.grid is None:
            return figures
        for tensor in self.grid.tensors():
            self.ranks.sum(tensor)
        figures |= {f"validation/{name}": value for name, value in self.grid.result().items()}
        self.grid = None
        return figures

    def _logits(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        mine = rank_slice(split.num_samples, self.ranks.rank, self.ranks.world_size)
        at, halves = mine.start, torch.from_numpy(halves_of(split.labels)).to(self.ranks.device)
        for logits, labels in super()._logits(split):
            if self.grid is not None:
                self.grid.add(logits, labels, halves[at : at + len(labels)])
            at += len(labels)
            yield logits, labels
